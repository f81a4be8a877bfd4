"""How full are packed rows, how evenly are pairs spread over them, and how long does packing take?

    python benchmarks/packing.py

Prints a table with one line per packer and row length S, then the memory that packing needs.
First-fit decreasing is there for comparison: most packers use it. Pairs are synthetic, see
data_model.py.
"""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable, Sequence

import data_model
import numpy as np
from processes import table

from mindrlhf.data.packing import max_pairs, pack_pairs

FIRST_FIT_PAIRS = 20_000  # it takes time in proportion to pairs x rows


def first_fit_decreasing(lengths: np.ndarray, seq_len: int) -> list[list[int]]:
    """Longest pair first, each into the first row with room."""
    free, rows = np.empty((len(lengths), 2), int), []
    for pair in np.argsort(-lengths.max(1), kind="stable").tolist():
        fits = (free[: len(rows)] >= lengths[pair]).all(1)
        row = int(fits.argmax()) if fits.any() else len(rows)
        if row == len(rows):
            rows.append([])
            free[row] = seq_len
        rows[row].append(pair)
        free[row] = free[row] - lengths[pair] if len(rows[row]) < max_pairs(seq_len) else -1
    return rows


def measure(
    name: str,
    packer: Callable[[np.ndarray, int], Sequence[Sequence[int]]],
    lengths: np.ndarray,
    seq_len: int,
) -> list[str]:
    """One line of the table."""
    begin = time.perf_counter()
    rows = packer(lengths, seq_len)
    seconds = time.perf_counter() - begin
    counts = np.array([len(row) for row in rows])
    return [
        name,
        f"{seq_len}",
        f"{len(lengths):,}",
        f"{len(rows):,}",
        f"{lengths.sum(0).max() / (len(rows) * seq_len):.1%}",
        f"{counts.mean():.1f} +- {counts.std():.1f}",
        f"{counts.max()}",
        f"{seconds:.2f}",
    ]


def peak(pairs: int) -> float:
    """Peak memory of packing, in bytes per pair."""
    lengths = data_model.lengths(pairs)
    tracemalloc.start()
    pack_pairs(lengths, 8192)
    top = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return top / pairs


def main() -> None:
    """Print the table and the memory."""
    lengths, few = data_model.lengths(data_model.PAIRS), data_model.lengths(FIRST_FIT_PAIRS)
    lines = []
    for seq_len in (1024, 2048, 8192):
        lines.append(measure("pack", pack_pairs, lengths, seq_len))
        lines.append(measure("pack", pack_pairs, few, seq_len))
        lines.append(measure("first-fit decreasing", first_fit_decreasing, few, seq_len))
    table(
        "packing",
        ["packer", "S", "pairs", "rows", "longer side full", "pairs a row", "most", "seconds"],
        lines,
    )
    print(
        "memory: "
        + ", ".join(
            f"{peak(pairs):.0f} bytes a pair for {pairs:,} pairs" for pairs in (29_000, 116_000)
        )
    )


if __name__ == "__main__":
    main()
