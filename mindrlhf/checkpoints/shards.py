"""The checkpoints of several cards as one: rank_0, rank_1, ... with the strategy of their run."""
from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from mindrlhf.arithmetic import ceil_div
from mindrlhf.checkpoints import layouts
from mindrlhf.checkpoints.tensors import DTYPES, StoredTensor, count_bytes, pieces
from mindrlhf.cli import UserError


@dataclass(frozen=True)
class ShardedTensor(StoredTensor):
    """A tensor whose blocks lie in the files of several cards. It reads as a StoredTensor does.

    Attributes:
        layout: Layout.
        parts: the StoredTensor of each card, rank 0 first.
    """
    layout: layouts.TensorLayout = None
    parts: tuple = ()

    @property
    def nbytes(self):
        """Size of the whole in bytes."""
        return count_bytes(self.dtype, self.shape)

    @cached_property
    def holders(self):
        """Each block of the tensor with the cards that hold it: dict, index -> list of StoredTensor."""
        found = {index: [] for index in np.ndindex(self.layout.splits)}
        for rank, part in enumerate(self.parts):
            found[self.layout.index(rank)].append(part)
        return found

    def block(self, slices):
        """As StoredTensor.block; each element comes from one block, of the first card that holds it."""
        out = np.empty([each.stop - each.start for each in slices], DTYPES[self.dtype][1])
        for index, (holder, *_) in self.holders.items():
            place = self.layout.block(index, self.shape)
            common = [slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(place, slices)]
            if all(each.start < each.stop for each in common):
                out[_moved(common, slices)] = holder.block(_moved(common, place))
        return out

    def read(self, first, count):
        """As StoredTensor.read."""
        if not self.shape:
            return self.parts[0].read(first, count)
        inner = math.prod(self.shape[1:])
        rows = slice(first // inner, ceil_div(first + count, inner))
        block = self.block((rows, *(slice(0, size) for size in self.shape[1:])))
        return block.reshape(-1)[first - rows.start * inner:][:count]

    def array(self):
        """As StoredTensor.array."""
        return self.block(tuple(slice(0, size) for size in self.shape))


def _moved(slices, origins):
    return tuple(slice(a.start - b.start, a.stop - b.start) for a, b in zip(slices, origins))


def join_shards(ranks: Sequence[Mapping[str, StoredTensor]], strategy: Path, place: Path, *,
                is_expected: Callable[[str], bool]) -> dict[str, ShardedTensor]:
    """The tensors of all cards as whole ones.

    Args:
        ranks: for each card name -> tensor, rank 0 first.
        strategy: the strategy file of their run.
        place: the folder of the shards, for messages.
        is_expected: whether a name of the strategy should be among the tensors.

    Returns:
        name -> whole tensor.

    Raises:
        UserError: cards and strategy are not of one run.
    """
    plan = layouts.read_strategy(strategy)
    cards = next(iter(plan.values())).cards
    if cards != len(ranks):
        cure = f", or copy rank_{len(ranks)} too" if cards > len(ranks) else ""
        raise UserError(f"{strategy}: is of a run on {cards} card(s), {place} holds {len(ranks)} rank "
                        f"folder(s); give the strategy of the same run{cure}")
    for tensors in ranks[1:]:
        require_alike(ranks[0], tensors)
    _same_names(set(filter(is_expected, plan)), ranks[0], strategy)
    return {name: _joined(name, [tensors[name] for tensors in ranks], plan[name], strategy)
            for name in ranks[0]}


def require_alike(first: Mapping[str, StoredTensor], other: Mapping[str, StoredTensor]) -> None:
    """Raise UserError unless two cards hold blocks of one size of the same tensors."""
    for name in {**first, **other}:
        one, two = first.get(name), other.get(name)
        if not one or not two or (one.shape, one.dtype) != (two.shape, two.dtype):
            files = [next(iter(tensors.values())).file.name for tensors in (first, other)]
            raise UserError(f"{files[1]}: {name} is there otherwise than in {files[0]}; it is cut short, "
                            "or of another run")


def _same_names(expected, found, strategy):
    wrong = sorted(expected ^ set(found))
    if wrong:
        where = "it" if wrong[0] in expected else "the checkpoint"
        raise UserError(f"{strategy}: is of another model: {wrong[0]} and {len(wrong) - 1} more stand only "
                        f"in {where}; give the strategy of the same run")


def _joined(name, parts, layout, strategy):
    if len(parts[0].shape) != len(layout.splits):
        raise UserError(f"{strategy}: {name} has {len(layout.splits)} dimension(s) in it, "
                        f"{len(parts[0].shape)} in the checkpoint; give the strategy of the same run")
    tensor = ShardedTensor(name, parts[0].dtype, layout.whole(parts[0].shape), None, (), layout, tuple(parts))
    if not all(tensor.holders.values()):
        raise UserError(f"{strategy}: leaves a part of {name} to no card; it is damaged, copy it again")
    return tensor


def require_equal_replicas(tensors):
    """Raise UserError unless cards that hold the same block hold the same values in it."""
    def differ(one, other):
        return any(one.read(*piece).tobytes() != other.read(*piece).tobytes()
                   for piece in pieces(one.elements))

    for tensor in tensors.values():
        for first, *others in tensor.holders.values():
            for other in others:
                if differ(first, other):
                    raise UserError(f"{other.file.name}: {tensor.name} differs from its copy in "
                                    f"{first.file.name}; the files are of different runs or steps, "
                                    "or the strategy is of another run")
