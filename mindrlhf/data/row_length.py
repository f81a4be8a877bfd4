"""Which row length trains fastest on some data, by counting operations."""
from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from mindrlhf.data.features import group_size
from mindrlhf.data.groups import Sizes, group_sizes, make_groups, row_limits
from mindrlhf.data.packing import pack_groups

SHORTEST, LONGEST = 512, 32768  # positions of the rows that are tried, powers of two
FULL = 0.97  # share of tokens beyond which longer rows have no gaps to fill, and more attention


class RowLength(NamedTuple):
    """Rows of some length that hold all pairs.

    Attributes:
        seq_len: positions of a row.
        rows: how many.
        fill: share of the positions that hold tokens.
        operations: of an epoch.
    """
    seq_len: int
    rows: int
    fill: float
    operations: float


def longest_pair(sizes: Sizes) -> int:
    """Positions of the longest pair; 0 without pairs."""
    if not len(sizes.pairs):
        return 0
    prompts, tokens = sizes.answers[sizes.pairs[:, 0]].T
    distinct = sizes.pairs[:, 0] != sizes.pairs[:, 1]
    return int((group_size(sizes.prompts[prompts], tokens)
                + sizes.answers[sizes.pairs[:, 1], 1] * distinct).max())


def count_rows(sizes: Sizes, seq_len: int, operations: Callable[[int], float]) -> RowLength:
    """Pack all pairs into rows of a length.

    Args:
        sizes: of prompts, answers and pairs; each pair fits into a row.
        seq_len: positions of a row.
        operations: positions of a row -> operations of a position.
    """
    limits = row_limits(seq_len)
    needs = group_sizes(sizes, make_groups(sizes, range(len(sizes.pairs)), limits))
    rows = len(pack_groups(needs, limits))
    return RowLength(seq_len, rows, float(needs[:, 0].sum()) / (rows * seq_len),
                     rows * seq_len * operations(seq_len))


def fastest_length(sizes: Sizes, operations: Callable[[int], float]) -> RowLength | None:
    """The row length with the fewest operations among those that hold every pair, if there is one.

    Args:
        sizes: of prompts, answers and pairs.
        operations: positions of a row -> operations of a position.
    """
    longest, length, best = longest_pair(sizes), SHORTEST, None
    while length <= LONGEST and (best is None or best.fill < FULL):
        if length >= longest:
            found = count_rows(sizes, length, operations)
            best = min(filter(None, (best, found)), key=lambda each: each.operations)
        length *= 2
    return best
