"""Blocks of the paged key-value cache: which answer has which, and where its tokens are stored."""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mindrlhf.arithmetic import ceil_div


class BlockPool:
    """The blocks of the cache.

    Args:
        block_size: tokens in a block.
        num_blocks: blocks of the cache.
        longest: tokens of the longest sequence.

    Attributes:
        columns: blocks of the longest sequence, the width of a block table.
    """

    def __init__(self, block_size: int, num_blocks: int, longest: int) -> None:
        self.block_size, self.columns = block_size, longest // block_size
        self.free = list(range(num_blocks))

    def count(self, tokens: int) -> int:
        """Number of blocks that a sequence needs."""
        return ceil_div(tokens, self.block_size)

    def take(self, tokens: int) -> list[int] | None:
        """Blocks for a sequence, or None if too few are free."""
        count = self.count(tokens)
        if count > len(self.free):
            return None
        taken, self.free = self.free[:count], self.free[count:]
        return taken

    def give_back(self, blocks: Sequence[int]) -> None:
        """Free blocks that take() has returned."""
        self.free += blocks

    def tables(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """Block tables as PagedAttention takes them: int32 (rows, columns), -1 after the last."""
        tables = np.full((len(rows), self.columns), -1, np.int32)
        for table, blocks in zip(tables, rows):
            table[:len(blocks)] = blocks
        return tables

    def slots(self, blocks: Sequence[int], first: int, last: int, width: int) -> np.ndarray:
        """Where tokens are stored, as ReshapeAndCache takes it.

        Args:
            blocks: of the sequence.
            first, last: the tokens' positions, without the last one.
            width: tokens with padding.

        Returns:
            int32 (width,); -1 for padding.
        """
        slots = np.full(width, -1, np.int32)
        places = np.arange(first, last)
        slots[:last - first] = (np.asarray(blocks)[places // self.block_size] * self.block_size
                                + places % self.block_size)
        return slots
