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

from mindrlhf.data.groups import row_limits
from mindrlhf.data.packing import pack_groups

FIRST_FIT_PAIRS = 20_000  # it takes time in proportion to pairs x rows


def groups_of(pairs: int) -> np.ndarray:
    """Positions, answers and pairs of groups of one pair each: int (N, 3)."""
    positions = data_model.parts(pairs).sum(1) - 1
    return np.stack([positions, np.full(pairs, 2), np.ones(pairs, int)], 1)


def pack(groups: np.ndarray, seq_len: int) -> list[list[int]]:
    """Our packer."""
    return pack_groups(groups, row_limits(seq_len))


def first_fit_decreasing(groups: np.ndarray, seq_len: int) -> list[list[int]]:
    """Longest group first, each into the first row with room."""
    free, rows = np.empty(groups.shape, int), []
    for group in np.argsort(-groups[:, 0], kind="stable").tolist():
        fits = (free[: len(rows)] >= groups[group]).all(1)
        row = int(fits.argmax()) if fits.any() else len(rows)
        if row == len(rows):
            rows.append([])
            free[row] = row_limits(seq_len)
        rows[row].append(group)
        free[row] -= groups[group]
    return rows


def measure(
    name: str,
    packer: Callable[[np.ndarray, int], Sequence[Sequence[int]]],
    groups: np.ndarray,
    seq_len: int,
) -> list[str]:
    """One line of the table."""
    begin = time.perf_counter()
    rows = packer(groups, seq_len)
    seconds = time.perf_counter() - begin
    counts = np.array([len(row) for row in rows])
    return [
        name,
        f"{seq_len}",
        f"{len(groups):,}",
        f"{len(rows):,}",
        f"{groups[:, 0].sum() / (len(rows) * seq_len):.1%}",
        f"{counts.mean():.1f} +- {counts.std():.1f}",
        f"{counts.max()}",
        f"{seconds:.2f}",
    ]


def peak(pairs: int) -> float:
    """Peak memory of packing, in bytes per pair."""
    groups = groups_of(pairs)
    tracemalloc.start()
    pack(groups, 8192)
    top = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return top / pairs


def main() -> None:
    """Print the table and the memory."""
    every, few = groups_of(data_model.PAIRS), groups_of(FIRST_FIT_PAIRS)
    lines = []
    for seq_len in (1024, 2048, 8192):
        lines.append(measure("pack", pack, every, seq_len))
        lines.append(measure("pack", pack, few, seq_len))
        lines.append(measure("first-fit decreasing", first_fit_decreasing, few, seq_len))
    table(
        "packing", ["packer", "S", "pairs", "rows", "full", "pairs a row", "most", "seconds"], lines
    )
    print(
        "memory: "
        + ", ".join(
            f"{peak(pairs):.0f} bytes a pair for {pairs:,} pairs" for pairs in (29_000, 116_000)
        )
    )


if __name__ == "__main__":
    main()
