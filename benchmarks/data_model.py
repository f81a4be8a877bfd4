"""Preference data like CValues-Comparison, made up: what the other scripts in this folder measure on.

CValues-Comparison has 116,000 training pairs: a short question in Chinese, an answer that helps and one that does
not, each of one to a few sentences. The model: question, chosen and rejected answer have log-normal token counts
with medians of 28, 115 and 90 tokens and spreads (sigma of the logarithm) of 0.5, 0.55 and 0.75, and a pair adds the
template's 7 tokens to each side. The longer side of a pair then has 210 tokens in the mean, 95 % are below 402, and
nothing is longer than 1,000.
"""

import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
PAIRS = 116_000
LONGEST = 1000


def parts(pairs, seed=0):
    """Token counts of prompt, chosen and rejected answer with their tags: int (N, 3)."""
    random = np.random.default_rng(seed)
    counts = [
        random.lognormal(np.log(median), sigma, pairs) + tags
        for median, sigma, tags in ((28, 0.5, 5), (115, 0.55, 2), (90, 0.75, 2))
    ]
    prompt = np.minimum(counts[0], LONGEST // 2)
    return np.stack(
        [prompt, *(np.minimum(answer, LONGEST - prompt) for answer in counts[1:])], 1
    ).astype(int)


def lengths(pairs, seed=0):
    """Token counts of the two sides of each pair: int (N, 2)."""
    counts = parts(pairs, seed)
    return counts[:, :1] + counts[:, 1:]


def table(title, head, rows):
    """Print one table; every cell is text."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    print(title)
    for row in [head, ["-" * width for width in widths], *rows]:
        print("  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths)))
