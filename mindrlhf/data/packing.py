"""Which pairs share a row."""
import numpy as np

MIN_TOKENS_PER_PAIR = 32  # a row of S positions takes at most S / 32 pairs


def max_pairs(seq_len):
    """The most pairs that a row of seq_len positions may hold."""
    return max(1, seq_len // MIN_TOKENS_PER_PAIR)


def pack(lengths, seq_len):
    """Pack pairs into rows by first-fit decreasing: longest pair first, each into the first row with room.

    A pair takes room on both sides of its row. The result depends on the lengths alone.

    Args:
        lengths: int array (N, 2), tokens of the chosen and the rejected side; none above seq_len.
        seq_len: positions of a row on each side.

    Returns:
        list of lists of pair numbers; each pair is in exactly one row.
    """
    lengths = np.asarray(lengths, np.int64).reshape(-1, 2)
    limit = max_pairs(seq_len)
    order = np.lexsort((np.arange(len(lengths)), -lengths.sum(1), -lengths.max(1)))
    free = np.empty((len(lengths), 2), np.int64)
    rows = []
    for pair in order.tolist():
        chosen, rejected = lengths[pair]
        fits = (free[:len(rows), 0] >= chosen) & (free[:len(rows), 1] >= rejected)
        row = int(fits.argmax()) if fits.any() else len(rows)
        if row == len(rows):
            rows.append([])
            free[row] = seq_len
        rows[row].append(pair)
        free[row] -= lengths[pair]
        if len(rows[row]) == limit:
            free[row] = -1
    return rows
