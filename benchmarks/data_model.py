"""Synthetic token counts that imitate CValues-Comparison, for the other benchmarks.

CValues-Comparison has 116,000 training pairs: a short question in Chinese, a helpful answer and an
unhelpful one, each of one to a few sentences. In this model, the token counts of question, chosen
and rejected answer are log-normal, with medians of 28, 115 and 90 tokens and spreads (sigma of the
logarithm) of 0.5, 0.55 and 0.75. The template adds 5 tokens to a prompt and 2 to an answer. Prompt
and longer answer then have 210 tokens on average, 95 % have fewer than 402, and none more than
1,000; a pair takes 291 positions of a row.
"""

from __future__ import annotations

import numpy as np

PAIRS = 116_000
LONGEST = 1000


def parts(pairs: int, seed: int = 0) -> np.ndarray:
    """Token counts of prompt, chosen and rejected answer, tags included: int (N, 3)."""
    random = np.random.default_rng(seed)
    counts = [
        random.lognormal(np.log(median), sigma, pairs) + tags
        for median, sigma, tags in ((28, 0.5, 5), (115, 0.55, 2), (90, 0.75, 2))
    ]
    prompt = np.minimum(counts[0], LONGEST // 2)
    return np.stack(
        [prompt, *(np.minimum(answer, LONGEST - prompt) for answer in counts[1:])], 1
    ).astype(int)
