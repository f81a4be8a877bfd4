"""The shards of several cards, rank_0, rank_1, ..., read as unsharded tensors."""
from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from mindrlhf.arithmetic import ceil_div
from mindrlhf.checkpoints import layouts
from mindrlhf.checkpoints.tensors import DTYPES, StoredTensor, pieces
from mindrlhf.cli import UserError


@dataclass(frozen=True)
class ShardedTensor(StoredTensor):
    """A tensor whose blocks are in the files of several cards. It reads like a StoredTensor.

    Attributes:
        file: that of rank 0.
        spans: empty.
        layout: the layout of the blocks.
        parts: the block of each card, rank 0 first.
    """
    layout: layouts.TensorLayout
    parts: tuple[StoredTensor, ...]

    @property
    def nbytes(self) -> int:
        """Size of the unsharded tensor in bytes."""
        return self.spec.nbytes

    @cached_property
    def holders(self) -> dict[tuple[int, ...], list[StoredTensor]]:
        """Index of each block -> the blocks of the cards that hold it, all equal."""
        found: dict[tuple[int, ...], list[StoredTensor]]
        found = {index: [] for index in np.ndindex(self.layout.splits)}
        for rank, part in enumerate(self.parts):
            found[self.layout.index(rank)].append(part)
        return found

    def block(self, slices: tuple[slice, ...]) -> np.ndarray:
        """As StoredTensor.block; each element comes from the first card that holds it."""
        out = np.empty([each.stop - each.start for each in slices], DTYPES[self.dtype][1])
        for index, (holder, *_) in self.holders.items():
            place = self.layout.block(index, self.shape)
            common = tuple(slice(max(a.start, b.start), min(a.stop, b.stop))
                           for a, b in zip(place, slices))
            if all(each.start < each.stop for each in common):
                out[_relative(common, slices)] = holder.block(_relative(common, place))
        return out

    def read(self, first: int, count: int) -> np.ndarray:
        """As StoredTensor.read."""
        if not self.shape:
            return self.parts[0].read(first, count)
        inner = math.prod(self.shape[1:])
        rows = slice(first // inner, ceil_div(first + count, inner))
        block = self.block((rows, *(slice(0, size) for size in self.shape[1:])))
        return block.reshape(-1)[first - rows.start * inner:][:count]

    def array(self) -> np.ndarray:
        """As StoredTensor.array."""
        return self.block(tuple(slice(0, size) for size in self.shape))


def _relative(slices: tuple[slice, ...], origins: tuple[slice, ...]) -> tuple[slice, ...]:
    """Slices relative to the starts of a surrounding block."""
    return tuple(slice(a.start - b.start, a.stop - b.start) for a, b in zip(slices, origins))


def join_shards(ranks: Sequence[Mapping[str, StoredTensor]], strategy: Path, place: Path, *,
                is_expected: Callable[[str], bool]) -> dict[str, ShardedTensor]:
    """Join the tensors of all cards.

    Args:
        ranks: for each card name -> tensor, rank 0 first.
        strategy: the strategy file of their run.
        place: the folder of the shards, for messages.
        is_expected: whether a name in the strategy must be among the tensors.

    Returns:
        name -> unsharded tensor.

    Raises:
        UserError: cards and strategy are of different runs.
    """
    plan = layouts.read_strategy(strategy)
    cards = next(iter(plan.values())).cards
    if cards != len(ranks):
        hint = f", or copy rank_{len(ranks)} too" if cards > len(ranks) else ""
        raise UserError(f"{strategy}: is of a run on {cards} card(s), but {place} contains "
                        f"{len(ranks)} rank folder(s); give the strategy of the same run{hint}")
    for tensors in ranks[1:]:
        require_alike(ranks[0], tensors)
    _require_same_names(set(filter(is_expected, plan)), ranks[0], strategy)
    return {name: _join_parts(name, [tensors[name] for tensors in ranks], plan[name], strategy)
            for name in ranks[0]}


def require_alike(first: Mapping[str, StoredTensor], other: Mapping[str, StoredTensor]) -> None:
    """Raise UserError unless two cards hold tensors of the same names, dtypes and shapes."""
    for name in {**first, **other}:
        one, two = first.get(name), other.get(name)
        if not one or not two or one.spec != two.spec:
            files = [next(iter(tensors.values())).file.name for tensors in (first, other)]
            raise UserError(f"{files[1]}: {name} does not match {files[0]}; the file is truncated "
                            "or of another run")


def _require_same_names(expected: Collection[str], found: Collection[str], strategy: Path) -> None:
    wrong = sorted(set(expected) ^ set(found))
    if wrong:
        where = "the strategy" if wrong[0] in expected else "the checkpoint"
        raise UserError(f"{strategy}: is of another model: {wrong[0]} and {len(wrong) - 1} more "
                        f"are only in {where}; give the strategy of the same run")


def _join_parts(name: str, parts: Sequence[StoredTensor], layout: layouts.TensorLayout,
                strategy: Path) -> ShardedTensor:
    first = parts[0]
    if len(first.shape) != len(layout.splits):
        raise UserError(f"{strategy}: {name} has {len(layout.splits)} dimension(s), but "
                        f"{len(first.shape)} in the checkpoint; give the strategy of the same run")
    tensor = ShardedTensor(name, first.dtype, layout.whole(first.shape), first.file, (), layout,
                           tuple(parts))
    if not all(tensor.holders.values()):
        raise UserError(f"{strategy}: no card holds a part of {name}; the file is damaged, copy it "
                        "again")
    return tensor


def require_equal_replicas(tensors: Mapping[str, StoredTensor]) -> None:
    """Raise UserError unless all cards that hold the same block have the same values in it.

    Tensors that are not sharded have no replicas.
    """
    def differ(one: StoredTensor, other: StoredTensor) -> bool:
        return any(one.read(*piece).tobytes() != other.read(*piece).tobytes()
                   for piece in pieces(one.elements))

    for tensor in (each for each in tensors.values() if isinstance(each, ShardedTensor)):
        for first, *others in tensor.holders.values():
            for other in others:
                if differ(first, other):
                    raise UserError(f"{other.file.name}: {tensor.name} differs from its copy in "
                                    f"{first.file.name}; the files are of different runs or steps, "
                                    "or the strategy is of another run")
