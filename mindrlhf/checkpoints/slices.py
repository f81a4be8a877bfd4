"""Parameters that each card reads from the file only as far as it holds them.

In a parallel plan, MindSpore knows which part of a parameter a card holds after it has compiled
the network. It then asks the parameter's initial value for that part. Here the initial value is a
tensor in a file, or one sharded over several files.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from mindspore import Tensor
from mindspore.common.initializer import Zero
from mindspore.communication import get_group_size, get_rank

from mindrlhf.checkpoints.tensors import StoredTensor, convert_dtype


@dataclass(frozen=True)
class ArrayTensor:
    """A float32 array that FileTensor takes like a StoredTensor: the same start in every plan."""
    values: np.ndarray
    dtype: str = "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the unsharded tensor."""
        return self.values.shape

    def block(self, block: tuple[slice, ...]) -> np.ndarray:
        """The values of a block."""
        return self.values[block]


@dataclass(frozen=True)
class ComputedTensor:
    """Float32 values that are computed when FileTensor needs them.

    Attributes:
        make: computes the unsharded tensor.
        shape: of it.
    """
    make: Callable[[], np.ndarray]
    shape: tuple[int, ...]
    dtype: str = "F32"

    def block(self, block: tuple[slice, ...]) -> np.ndarray:
        """The values of a block."""
        return self.make()[block]


class FileTensor(Tensor):
    """A Tensor whose values stay in a file until MindSpore asks for them.

    Args:
        stored: the unsharded tensor.
        dtype: MindSpore's dtype of the parameter.
    """

    def __init__(self, stored: StoredTensor | ArrayTensor | ComputedTensor, dtype: Any) -> None:
        # an init tells MindSpore that there are no values yet
        super().__init__(dtype=dtype, shape=stored.shape, init=Zero())
        self.stored = stored

    def init_data(self, slice_index: int | None = None, shape: Sequence[int] | None = None,
                  opt_shard_group: str | None = None) -> Tensor:
        """The part that this card holds; the entire tensor without arguments.

        Args:
            slice_index: as in Tensor.init_data, see find_block.
            shape: of the part.
            opt_shard_group: communication group of optimizer sharding; empty without it.
        """
        full = self.stored.shape
        block = tuple(slice(0, size) for size in full)
        if slice_index is not None and shape is not None and full:
            group = (1, 0)
            if opt_shard_group:
                group = (get_group_size(opt_shard_group), get_rank(opt_shard_group))
            block = find_block(full, tuple(shape), slice_index, cards=get_group_size(), group=group)
        values = np.ascontiguousarray(self.stored.block(block))
        return Tensor(convert_dtype(values, self.stored.dtype, "F32"), self.dtype)


class OwnPart(Tensor):
    """The initial value of a parameter of a parallel plan where this card's part is already known.

    MindSpore asks for that part after it has compiled the network.

    Args:
        part: what this card holds.
        shape: of the unsharded parameter.
        dtype: MindSpore's dtype of the parameter.
    """

    def __init__(self, part: np.ndarray, shape: Sequence[int], dtype: Any) -> None:
        # an init tells MindSpore that there are no values yet
        super().__init__(dtype=dtype, shape=shape, init=Zero())
        self.part = part

    def init_data(self, slice_index: int | None = None,  # noqa: ARG002  MindSpore's signature
                  shape: Sequence[int] | None = None,  # noqa: ARG002
                  opt_shard_group: str | None = None) -> Tensor:  # noqa: ARG002
        """The part, whichever one MindSpore asks for."""
        return Tensor(self.part, self.dtype)


def find_block(full: Sequence[int], shape: Sequence[int], index: int, *, cards: int,
               group: tuple[int, int] = (1, 0)) -> tuple[slice, ...]:
    """Find which block of a tensor a card holds.

    Args:
        full: shape of the unsharded tensor.
        shape: shape of the card's part, before or after optimizer sharding: versions of MindSpore
            differ.
        index: number of the part, counted row by row over the parts that model parallelism makes.
            With optimizer sharding, MindSpore adds the number of cards and the card's place in the
            group.
        cards: number of cards.
        group: number of cards that hold the same part and split it further along the first
            dimension, and the place of this card among them.

    Returns:
        one slice for each dimension.
    """
    members, place = group
    if members > 1:
        index -= cards + place
        if math.prod(full) == math.prod(shape) * cards:  # already split: all cards' parts differ
            shape = (shape[0] * members, *shape[1:])
    splits = [size // part for size, part in zip(full, shape)]
    starts = [number * part for number, part in zip(np.unravel_index(index, splits), shape)]
    block = [slice(int(start), int(start) + part) for start, part in zip(starts, shape)]
    rows = shape[0] // members
    block[0] = slice(block[0].start + place * rows, block[0].start + (place + 1) * rows)
    return tuple(block)
