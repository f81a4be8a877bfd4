"""Strategy files: which block of each tensor a card of a parallel plan holds.

MindSpore describes a plan by a device matrix, in which cards are numbered row by row, and for each
dimension of a tensor the axes of that matrix that split it; axis 0 is the last one of the matrix.
Cards that would hold the same block may split it further along its first dimension (optimizer
sharding).
"""
from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from mindrlhf.cli import UserError

MOST_CARDS = 1 << 20  # of a plan

@dataclass(frozen=True)
class TensorLayout:
    """The layout of one tensor.

    Attributes:
        devices: the device matrix; the product of its sizes is the number of cards.
        axes: for each dimension of the tensor, the places in `devices` that split it.
        shards: into how many parts optimizer sharding splits a block; 1 without it.
    """
    devices: tuple[int, ...]
    axes: tuple[tuple[int, ...], ...]
    shards: int = 1

    @property
    def cards(self) -> int:
        """Number of cards."""
        return math.prod(self.devices)

    @property
    def splits(self) -> tuple[int, ...]:
        """Number of parts of each dimension."""
        parts = [math.prod(self.devices[place] for place in places) for places in self.axes]
        return (parts[0] * self.shards, *parts[1:]) if parts else ()

    def index(self, rank: int) -> tuple[int, ...]:
        """Which part of each dimension a card holds."""
        where = np.unravel_index(rank, self.devices)
        parts = [_mixed_radix(where, self.devices, places) for places in self.axes]
        if self.shards > 1:
            used = {place for places in self.axes for place in places}
            free = [place for place in range(len(self.devices)) if place not in used]
            shard = _mixed_radix(where, self.devices, free) % self.shards
            parts[0] = parts[0] * self.shards + shard
        return tuple(parts)

    def whole(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of the unsharded tensor, given the shape of a card's block."""
        return tuple(size * parts for size, parts in zip(shape, self.splits))

    def block(self, index: Sequence[int], shape: Sequence[int]) -> tuple[slice, ...]:
        """Position of a block in the tensor.

        Args:
            index: as index() returns it.
            shape: of the unsharded tensor.
        """
        sizes = [size // parts for size, parts in zip(shape, self.splits)]
        return tuple(slice(part * size, part * size + size) for part, size in zip(index, sizes))


def _mixed_radix(where: Sequence[Any], sizes: Sequence[int], places: Iterable[int]) -> int:
    """The number whose digits are the coordinates at some places, most significant first."""
    number = 0
    for place in places:
        number = number * sizes[place] + int(where[place])
    return number


def find_strategy(folder: str | Path | None) -> Path | None:
    """Find the strategy file of a run.

    Args:
        folder: output/strategy, or one of its files, or None.

    Returns:
        the first file; None without a folder, or if it is empty, as after data-parallel training.

    Raises:
        UserError: there is no such folder, or its files are of different runs.
    """
    if folder is None:
        return None
    folder = Path(folder)
    if folder.is_file():
        return folder
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give output/strategy of the run that saved the "
                        "checkpoint")
    files = sorted(folder.glob("*.ckpt"))
    if not files:
        return None
    first = read_strategy(files[0])
    for path in files[1:]:
        if read_strategy(path) != first:
            raise UserError(f"{path}: differs from {files[0].name}; a folder must hold the "
                            "strategies of one run without pipeline stages: remove the others")
    return files[0]


def read_strategy(path: str | Path) -> dict[str, TensorLayout]:
    """The layouts in a strategy file: name -> layout, of weights and optimizer states.

    Raises:
        UserError: it is no strategy file, or it splits a tensor into unequal parts.
    """
    import mindspore as ms
    path = Path(path)
    if not path.is_file() or not path.stat().st_size:
        raise UserError(f"{path}: is missing or empty; a parallel run writes "
                        "output/strategy/ckpt_strategy_rank_N.ckpt")
    try:
        found = ms.build_searched_strategy(str(path))
        layouts = {name: _parse_layout(entry) for name, entry in found.items()}
    except (TypeError, ValueError, KeyError, IndexError, AttributeError):
        layouts = {}
    if not layouts or len({layout.cards for layout in layouts.values()}) > 1:
        raise UserError(f"{path}: not a strategy file; a parallel run writes "
                        "output/strategy/ckpt_strategy_rank_N.ckpt")
    return layouts


def write_partial_strategy(path: Path, names: Collection[str], target: Path) -> Path:
    """Write a strategy file of a few tensors, because MindSpore parses the file many times.

    Args:
        path: the strategy file of all tensors.
        names: the tensors to keep.
        target: file to write.

    Returns:
        target.

    Raises:
        UserError: the file is damaged.
    """
    from mindspore.train.node_strategy_pb2 import ParallelStrategyMap
    content, few = ParallelStrategyMap(), ParallelStrategyMap()
    content.ParseFromString(path.read_bytes())
    few.current_stage = content.current_stage
    few.parallel_strategy_item.extend(content.parallel_strategy_item[:1])
    few.parallel_layout_item.extend(item for item in content.parallel_layout_item
                                    if item.param_name in names)
    if not few.IsInitialized():
        raise UserError(f"{path}: is damaged; copy output/strategy again")
    target.write_bytes(few.SerializeToString())
    return target


def _parse_layout(entry: Any) -> TensorLayout:
    """Convert MindSpore's ParallelLayouts."""
    if entry.field or (entry.param_split_shape and entry.param_split_shape[0].dim):
        raise ValueError("splits a tensor into unequal parts")
    devices = tuple(entry.dev_matrix[0].dim)
    maps = [list(each.dim) for each in entry.tensor_map]
    # several axes may split a dimension: one map for each dimension, else one map for all
    each = [each for each in maps if each] if len(maps) > 1 else [[axis] for axis in maps[0]]
    axes = tuple(tuple(len(devices) - 1 - axis for axis in dimension if axis >= 0)
                 for dimension in each)
    layout = TensorLayout(devices, axes)
    used = [place for places in axes for place in places]
    if not set(used) <= set(range(len(devices))) or min([-1, *chain(*maps)]) < -1:  # -1: no split
        raise ValueError("has an axis that is not in its device matrix")
    if min(devices, default=0) < 1 or math.prod(devices) > MOST_CARDS or len(set(used)) < len(used):
        raise ValueError("has an impossible device matrix, or an axis that splits twice")
    if entry.opt_weight_shard_step and entry.opt_weight_shard_size:
        spare = layout.cards // math.prod(layout.splits)
        size = entry.opt_weight_shard_size
        layout = TensorLayout(devices, axes, spare if size == -1 else size)
        if layout.shards < 1 or spare % layout.shards:
            raise ValueError("shards the optimizer over cards that it does not have")
    return layout
