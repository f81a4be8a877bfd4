"""Accuracies and means of pairs, with errors that know that pairs of a prompt are alike.

Three answers to a prompt make three pairs, which are right or wrong together. A formula for
independent pairs would make the errors too small, so the variance of a mean is that of sums over
prompts. An accuracy gets Wilson's interval for as many independent pairs as would have this
variance. Unlike a bootstrap's, it is no single point where all pairs are right.
"""
from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from mindrlhf.inference.score_record import Accuracy, Mean, Slice

QUANTILE = 1.959963984540054  # of the normal distribution, for 95 %
ROUNDING = 1e-12  # variance of a share below which its sums differ by rounding only
PARTS = 4  # of the pairs by length


def mean_of(values: np.ndarray, prompts: np.ndarray) -> Mean:
    """Mean and its standard error.

    Args:
        values: (N,), of each pair, N > 0.
        prompts: int (N,), number of each pair's prompt.
    """
    variance = _variance_of_mean(values, prompts)
    return Mean(float(np.mean(values, dtype=np.float64)),
                None if variance is None else math.sqrt(variance))


def accuracy_of(advantages: np.ndarray, prompts: np.ndarray) -> Accuracy:
    """Share of the pairs with a positive advantage; a tie counts one half.

    Args:
        advantages: (N,), by how much the chosen answer is better, N > 0.
        prompts: int (N,), number of each pair's prompt.
    """
    points = 0.5 + 0.5 * np.sign(advantages, dtype=np.float64)
    share, pairs = float(points.mean()), len(points)
    clusters = len(np.unique(prompts))
    variance = _variance_of_mean(points, prompts)
    # with all prompts alike, there is no variance to tell how alike their pairs are
    effective = (clusters if variance is None or variance < ROUNDING
                 else min(pairs, share * (1 - share) / variance))
    low, high = wilson_interval(share, effective)
    return Accuracy(share, low, high, pairs, clusters, int((advantages == 0).sum()))


def wilson_interval(share: float, count: float) -> tuple[float, float]:
    """95 % interval of a share of count independent trials (E. B. Wilson, 1927)."""
    square = QUANTILE ** 2 / count
    centre = (share + square / 2) / (1 + square)
    half = QUANTILE / (1 + square) * math.sqrt(share * (1 - share) / count + square / (4 * count))
    return min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half))


def _variance_of_mean(values: np.ndarray, prompts: np.ndarray) -> float | None:
    """Variance of the mean of clustered values; None for a single cluster."""
    _, cluster = np.unique(prompts, return_inverse=True)
    sums = np.bincount(cluster.reshape(-1), weights=values - np.mean(values, dtype=np.float64))
    count = len(sums)
    return None if count < 2 else float((sums ** 2).sum() / len(values) ** 2 * count / (count - 1))


def slice_pairs(labels: Mapping[str, np.ndarray], advantages: np.ndarray,
                prompts: np.ndarray) -> list[Slice]:
    """Accuracy and mean advantage of parts of the pairs.

    Args:
        labels: name of a part -> bool (N,), its pairs. Parts without pairs are left out.
        advantages, prompts: (N,), as in accuracy_of().
    """
    return [Slice(name, accuracy_of(advantages[own], prompts[own]),
                  mean_of(advantages[own], prompts[own]))
            for name, own in labels.items() if own.any()]


def label_names(names: Sequence[str], numbers: np.ndarray) -> dict[str, np.ndarray]:
    """Name -> which pairs have its number."""
    return {name: numbers == number for number, name in enumerate(names)}


def label_lengths(tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Four parts by the tokens of both answers, cut at the quartiles; equal cuts are one.

    Args:
        tokens: int (N, 2), of each pair's answers.
    """
    return dict(_parts_by(tokens.sum(1)))


def _parts_by(sizes: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """"from-to tokens" and which sizes it has."""
    places = (len(sizes) - 1) * np.arange(1, PARTS + 1) // PARTS
    ends, first = np.unique(np.sort(sizes)[places]), sizes.min()
    for end in ends.tolist():
        own = (sizes >= first) & (sizes <= end)
        yield f"{first}-{end} tokens" if first < end else f"{end} tokens", own
        later = sizes[sizes > end]
        first = later.min() if len(later) else end


def label_longer(tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Which answer has more tokens; tokens: int (N, 2), chosen and rejected."""
    chosen, rejected = tokens.T
    return {"chosen is longer": chosen > rejected, "rejected is longer": chosen < rejected,
            "equally long": chosen == rejected}
