"""Packing: which groups share a row."""
from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from mindrlhf.data.groups import Limits

TRIES = 64  # groups tried for a gap before it stays empty
SPREAD = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: its multiples mod 2^64 spread evenly


class _Pool:
    """Unpacked groups, taken in mixed order or as the longest group that fits.

    Union-find skips packed groups, so all queries together cost O(N log N).

    Args:
        positions: int (N,), of each group.
    """

    def __init__(self, positions: np.ndarray):
        count = len(positions)
        order = np.argsort(positions, kind="stable")
        self.sorted, self.sizes = order.tolist(), positions[order].tolist()
        self.below = list(range(count + 1))  # below[i]: upper bound of last(i)
        self.mixed = np.argsort(np.arange(count, dtype=np.uint64) * SPREAD, kind="stable").tolist()
        self.next, self.is_packed = 0, bytearray(count)

    def next_mixed(self) -> int | None:
        """The next unpacked group of the mixed order, if any."""
        while self.next < len(self.mixed) and self.is_packed[self.mixed[self.next]]:
            self.next += 1
        return self.mixed[self.next] if self.next < len(self.mixed) else None

    def last(self, end: int) -> int:
        """1 + position of the last unpacked group among the first `end` by size; 0 if none."""
        root = end
        while root and (self.below[root] < root or self.is_packed[self.sorted[root - 1]]):
            root = min(self.below[root], root - 1)
        while end > root:  # path compression
            self.below[end], end = root, min(self.below[end], end - 1)
        return root

    def longest(self, fits: Callable[[int], bool], size: int) -> int | None:
        """The longest group of up to `size` positions that fits, if any."""
        end = self.last(bisect_right(self.sizes, size))
        for _ in range(TRIES):
            if not end:
                break
            if fits(self.sorted[end - 1]):
                return self.sorted[end - 1]
            end = self.last(end - 1)
        return None


def pack_groups(sizes: np.ndarray | Sequence[Sequence[int]], limits: Limits, *,
                packed: bool = True) -> list[list[int]]:
    """Pack groups into rows that are full and hold about the same number of pairs.

    A row starts with the longest unpacked group, continues with groups in mixed order, and is
    filled up with the longest groups that still fit. Plain first-fit decreasing would put ten long
    pairs into one row and a hundred short ones into another. Because the loss is a mean over the
    pairs of a batch, a short pair would then weigh a tenth of a long one. The result depends on
    the sizes alone.

    Args:
        sizes: int (N, 3), positions, answers and pairs of each group, each within the limits.
        limits: of a row.
        packed: False puts each group into a row of its own.

    Returns:
        Group numbers of each row; each group is in exactly one row.
    """
    if not packed:
        return [[group] for group in range(len(sizes))]
    sizes = np.asarray(sizes, np.int64).reshape(-1, 3)
    pool, needs = _Pool(sizes[:, 0]), sizes.tolist()
    rows: list[list[int]] = []
    left = len(needs)
    while left:
        room, row = list(limits), []
        for group in _choose_row(pool, needs, room):
            pool.is_packed[group] = 1
            row.append(group)
            room[:] = [have - need for have, need in zip(room, needs[group])]
        rows.append(row)
        left -= len(row)
    return rows


def _choose_row(pool: _Pool, needs: Sequence[Sequence[int]], room: Sequence[int]) -> Iterator[int]:
    """Yield the groups of one row; between them, the caller packs the group and updates `room`.

    Args:
        pool: the unpacked groups.
        needs: positions, answers and pairs of each group.
        room: what is left of each in the row.
    """
    def fits(group: int) -> bool:
        return all(need <= have for need, have in zip(needs[group], room))

    def longest() -> int | None:
        return pool.longest(fits, room[0])

    group = longest()
    assert group is not None  # every group fits into an empty row
    yield group
    while (group := pool.next_mixed()) is not None and fits(group):
        yield group
    while (group := longest()) is not None:
        yield group
