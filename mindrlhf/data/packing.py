"""Which pairs share a row."""
from bisect import bisect_right

import numpy as np

MIN_TOKENS_PER_PAIR = 32  # a row of S positions takes at most S / 32 pairs
TRIES = 64  # pairs looked at to fill a gap before it stays open
SPREAD = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: multiples of it, modulo 2^64, lie evenly


def max_pairs(seq_len):
    """The most pairs that a row of seq_len positions may hold."""
    return max(1, seq_len // MIN_TOKENS_PER_PAIR)


class _Kind:
    """The pairs that are left of one kind: those with the longer chosen, or the longer rejected answer.

    They can be taken in a mixed order, or as the longest that fits. What is gone is skipped by union-find, so
    all takes together cost O(N log N).
    """

    def __init__(self, numbers, longer, gone):
        self.mixed, self.next, self.gone = numbers.tolist(), 0, gone
        order = numbers[np.argsort(longer[numbers], kind="stable")]
        self.sorted, self.sizes = order.tolist(), longer[order].tolist()
        self.below = list(range(len(order) + 1))  # below[i]: as many of the first i are worth looking at

    def any(self):
        """The next pair of the mixed order, or None."""
        while self.next < len(self.mixed) and self.gone[self.mixed[self.next]]:
            self.next += 1
        return self.mixed[self.next] if self.next < len(self.mixed) else None

    def last(self, end):
        """1 + the place of the last pair left among the first `end` by size; 0 if there is none."""
        root = end
        while root and (self.below[root] < root or self.gone[self.sorted[root - 1]]):
            root = min(self.below[root], root - 1)
        while end > root:  # next time in one step
            self.below[end], end = root, min(self.below[end], end - 1)
        return root

    def longest(self, fits, size):
        """(longer side, pair) of the longest pair of at most `size` tokens that fits, or (0, None)."""
        end = self.last(bisect_right(self.sizes, size))
        for _ in range(TRIES):
            if not end:
                break
            if fits(self.sorted[end - 1]):
                return self.sizes[end - 1], self.sorted[end - 1]
            end = self.last(end - 1)
        return 0, None


def pack_pairs(lengths, seq_len):
    """Pack pairs into rows, full on both sides and about equally many to a row.

    A row starts with the longest pair left, goes on with pairs in a mixed order (the side with more room gets
    the pair that is longer there), and is topped up with the longest pairs that still fit. Plain first-fit
    decreasing puts ten long pairs into one row and a hundred short ones into another: as the loss is a mean
    over the pairs of a batch, a short pair would weigh a tenth of a long one. The result depends on the
    lengths alone.

    Args:
        lengths: int array (N, 2), tokens of the chosen and the rejected side; none above seq_len.
        seq_len: positions of a row on each side.

    Returns:
        list of lists of pair numbers; each pair is in exactly one row.
    """
    lengths = np.asarray(lengths, np.int64).reshape(-1, 2)
    chosen, rejected = lengths.T.tolist()
    longer, gone = lengths.max(1, initial=0), bytearray(len(lengths))
    mixed = np.argsort(np.arange(len(lengths), dtype=np.uint64) * SPREAD, kind="stable")
    first = lengths[mixed, 0] >= lengths[mixed, 1]
    kinds = _Kind(mixed[first], longer, gone), _Kind(mixed[~first], longer, gone)
    rows, left = [], len(lengths)
    while left:
        row, room = [], [seq_len, seq_len]
        for pair in _row(kinds, chosen, rejected, room):
            gone[pair] = 1
            row.append(pair)
            room[0] -= chosen[pair]
            room[1] -= rejected[pair]
            if len(row) == max_pairs(seq_len):
                break
        rows.append(row)
        left -= len(row)
    return rows


def _row(kinds, chosen, rejected, room):
    """The pairs of one row, one after another; the caller keeps `room` up to date."""
    def fits(pair):
        return chosen[pair] <= room[0] and rejected[pair] <= room[1]

    yield max(kind.longest(fits, room[0]) for kind in kinds if kind.last(len(kind.sorted)))[1]
    while True:
        order = kinds if room[0] >= room[1] else kinds[::-1]
        pair = next((pair for pair in (kind.any() for kind in order) if pair is not None), None)
        if pair is None or not fits(pair):
            break
        yield pair
    while True:
        found = [kind.longest(fits, size) for kind, size in zip(kinds, room)]
        pair = max(found, key=lambda size_and_pair: size_and_pair[0])[1]
        if pair is None:
            return
        yield pair
