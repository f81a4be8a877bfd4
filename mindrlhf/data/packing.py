"""Packing: which pairs share a row."""
from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence

import numpy as np

MIN_TOKENS_PER_PAIR = 32  # a row of S positions takes at most S / 32 pairs
TRIES = 64  # pairs tried for a gap before it stays empty
SPREAD = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: its multiples mod 2^64 spread evenly


def max_pairs(seq_len: int) -> int:
    """The most pairs that a row of seq_len positions may hold."""
    return max(1, seq_len // MIN_TOKENS_PER_PAIR)


class _Pool:
    """Unpacked pairs with the same longer side, either chosen or rejected.

    They are taken in mixed order, or as the longest pair that fits. Union-find skips packed pairs,
    so all queries together cost O(N log N).
    """

    def __init__(self, numbers: np.ndarray, longer: np.ndarray, is_packed: bytearray):
        self.mixed, self.next, self.is_packed = numbers.tolist(), 0, is_packed
        order = numbers[np.argsort(longer[numbers], kind="stable")]
        self.sorted, self.sizes = order.tolist(), longer[order].tolist()
        self.below = list(range(len(order) + 1))  # below[i]: upper bound of last(i)

    def next_mixed(self) -> int | None:
        """The next unpacked pair of the mixed order, if any."""
        while self.next < len(self.mixed) and self.is_packed[self.mixed[self.next]]:
            self.next += 1
        return self.mixed[self.next] if self.next < len(self.mixed) else None

    def last(self, end: int) -> int:
        """1 + position of the last unpacked pair among the first `end` by size; 0 if none."""
        root = end
        while root and (self.below[root] < root or self.is_packed[self.sorted[root - 1]]):
            root = min(self.below[root], root - 1)
        while end > root:  # path compression
            self.below[end], end = root, min(self.below[end], end - 1)
        return root

    def longest(self, fits: Callable[[int], bool], size: int) -> tuple[int, int | None]:
        """(longer side, pair) of the longest pair up to `size` tokens that fits, or (0, None)."""
        end = self.last(bisect_right(self.sizes, size))
        for _ in range(TRIES):
            if not end:
                break
            if fits(self.sorted[end - 1]):
                return self.sizes[end - 1], self.sorted[end - 1]
            end = self.last(end - 1)
        return 0, None


def pack_pairs(lengths: np.ndarray | Sequence[Sequence[int]], seq_len: int) -> list[list[int]]:
    """Pack pairs into rows that are full on both sides and hold about the same number of pairs.

    A row starts with the longest unpacked pair, continues with pairs in mixed order (the side with
    more room gets a pair that is longer there), and is filled up with the longest pairs that still
    fit. Plain first-fit decreasing would put ten long pairs into one row and a hundred short ones
    into another. Because the loss is a mean over the pairs of a batch, a short pair would then
    weigh a tenth of a long one. The result depends on the lengths alone.

    Args:
        lengths: int (N, 2), tokens of the chosen and the rejected side; at most seq_len each.
        seq_len: positions of a row on each side.

    Returns:
        Pair numbers of each row; each pair is in exactly one row.
    """
    lengths = np.asarray(lengths, np.int64).reshape(-1, 2)
    chosen, rejected = lengths.T.tolist()
    longer, is_packed = lengths.max(1, initial=0), bytearray(len(lengths))
    mixed = np.argsort(np.arange(len(lengths), dtype=np.uint64) * SPREAD, kind="stable")
    is_chosen_longer = lengths[mixed, 0] >= lengths[mixed, 1]
    pools = (_Pool(mixed[is_chosen_longer], longer, is_packed),
             _Pool(mixed[~is_chosen_longer], longer, is_packed))
    rows: list[list[int]] = []
    left = len(lengths)
    while left:
        row: list[int] = []
        room = [seq_len, seq_len]
        for pair in _choose_row(pools, chosen, rejected, room):
            is_packed[pair] = 1
            row.append(pair)
            room[0] -= chosen[pair]
            room[1] -= rejected[pair]
            if len(row) == max_pairs(seq_len):
                break
        rows.append(row)
        left -= len(row)
    return rows


def _choose_row(pools: tuple[_Pool, _Pool], chosen: Sequence[int], rejected: Sequence[int],
                room: Sequence[int]) -> Iterator[int]:
    """Yield the pairs of one row; between them, the caller packs the pair and updates `room`.

    Args:
        pools: the pairs with a longer chosen and with a longer rejected side.
        chosen, rejected: tokens of each pair's sides.
        room: free positions on the chosen and on the rejected side.
    """
    def fits(pair: int) -> bool:
        return chosen[pair] <= room[0] and rejected[pair] <= room[1]

    first = max(pool.longest(fits, room[0]) for pool in pools if pool.last(len(pool.sorted)))[1]
    assert first is not None  # every pair fits into an empty row
    yield first
    while True:
        order = pools if room[0] >= room[1] else pools[::-1]
        mixed = (pool.next_mixed() for pool in order)
        pair = next((pair for pair in mixed if pair is not None), None)
        if pair is None or not fits(pair):
            break
        yield pair
    while True:
        found = [pool.longest(fits, size) for pool, size in zip(pools, room)]
        pair = max(found, key=lambda size_and_pair: size_and_pair[0])[1]
        if pair is None:
            return
        yield pair
