"""Weights that are read from their file only as far as this card holds them.

In a parallel plan, MindSpore knows a card's part of a parameter when it has compiled the network, and asks
the parameter's initial value for it then. Here that value is a tensor in a file, or one spread over files.
"""
from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from mindspore import Tensor
from mindspore.common.initializer import Zero
from mindspore.communication import get_group_size, get_rank

from mindrlhf.checkpoints.tensors import convert_dtype


class FileTensor(Tensor):
    """A Tensor whose values lie in a file until MindSpore wants them.

    Args:
        stored: StoredTensor or Values, whole.
        dtype: the parameter's.
    """

    def __init__(self, stored, dtype):
        super().__init__(dtype=dtype, shape=stored.shape, init=Zero())  # an init marks it as not there yet
        self.stored = stored

    def init_data(self, slice_index=None, shape=None, opt_shard_group=None):
        """The part that this card holds, as Tensor.init_data describes it; all of it without arguments."""
        whole = self.stored.shape
        block = tuple(slice(0, size) for size in whole)
        if slice_index is not None and whole:
            group = opt_shard_group and (get_group_size(opt_shard_group), get_rank(opt_shard_group))
            block = find_block(whole, tuple(shape), slice_index, cards=get_group_size(),
                               group=group or (1, 0))
        values = np.ascontiguousarray(self.stored.block(block))
        return Tensor(convert_dtype(values, self.stored.dtype, "F32"), self.dtype)


@dataclass(frozen=True)
class ArrayTensor:
    """An array in the place of a StoredTensor, for FileTensor: what a parameter starts with in every plan.

    Attributes:
        values: float32 array.
    """
    values: np.ndarray
    dtype: str = "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def block(self, block: tuple[slice, ...]) -> np.ndarray:
        """A part of it."""
        return self.values[block]


class OwnPart(Tensor):
    """What a parameter of a parallel plan starts with where this card's part of it is known already.

    MindSpore asks a parameter's initial value for that part when it has compiled the network.

    Args:
        part: array, what this card holds.
        shape: of the whole parameter.
        dtype: of the parameter.
    """

    def __init__(self, part, shape, dtype):
        super().__init__(dtype=dtype, shape=shape, init=Zero())  # an init marks it as not there yet
        self.part = part

    def init_data(self, slice_index=None, shape=None, opt_shard_group=None):  # noqa: ARG002  MindSpore's
        """The part, whichever MindSpore asks for."""
        return Tensor(self.part, self.dtype)


def find_block(whole, shape, index, *, cards, group=(1, 0)):
    """Which block of a tensor a card holds.

    Args:
        whole: shape of the tensor.
        shape: of the card's part; before or after optimizer sharding, which differs between versions of
            MindSpore.
        index: number of the part, counted row by row over the parts that model parallelism makes. With
            optimizer sharding, the number of cards and the place in the group are added to it.
        cards: number of cards.
        group: (cards that hold the same part and share it out again along the first dimension, this card's
            place in them).

    Returns:
        tuple of slices.
    """
    size, place = group
    if size > 1:
        index -= cards + place
        if math.prod(whole) == math.prod(shape) * cards:  # shared out already: all cards hold different parts
            shape = (shape[0] * size, *shape[1:])
    splits = [all_ // part for all_, part in zip(whole, shape)]
    starts = [number * part for number, part in zip(np.unravel_index(index, splits), shape)]
    block = [slice(int(start), int(start) + part) for start, part in zip(starts, shape)]
    rows = shape[0] // size
    block[0] = slice(block[0].start + place * rows, block[0].start + (place + 1) * rows)
    return tuple(block)
