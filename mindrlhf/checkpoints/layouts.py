"""How a parallel plan lays weights out over cards: strategy files, and which block of a tensor a card holds.

MindSpore describes it by a matrix of devices, in which cards are numbered row by row, and for each
dimension of a tensor the axes of that matrix which split it; axis 0 is the matrix's last. Cards that would
hold the same block may split it further along its first dimension (optimizer sharding).
"""
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mindrlhf.cli import UserError


@dataclass(frozen=True)
class TensorLayout:
    """The layout of one tensor.

    Attributes:
        devices: the device matrix, tuple of int; its product is the number of cards.
        axes: for each dimension of the tensor a tuple of the places in `devices` that split it.
        shards: into how many parts optimizer sharding splits a block; 1: not.
    """
    devices: tuple
    axes: tuple
    shards: int = 1

    @property
    def cards(self):
        """Number of cards."""
        return math.prod(self.devices)

    @property
    def splits(self):
        """Into how many parts each dimension is split."""
        parts = [math.prod(self.devices[place] for place in places) for places in self.axes]
        return (parts[0] * self.shards, *parts[1:]) if parts else ()

    def index(self, rank):
        """Which part of each dimension a card holds."""
        where = np.unravel_index(rank, self.devices)
        parts = [_mixed(where, self.devices, places) for places in self.axes]
        if self.shards > 1:
            used = {place for places in self.axes for place in places}
            free = [place for place in range(len(self.devices)) if place not in used]
            parts[0] = parts[0] * self.shards + _mixed(where, self.devices, free) % self.shards
        return tuple(parts)

    def whole(self, shape):
        """Shape of the tensor of which each card holds a block of this shape."""
        return tuple(size * parts for size, parts in zip(shape, self.splits))

    def block(self, index, shape):
        """The block of a tensor: tuple of slices.

        Args:
            index: as index() gives it.
            shape: of the whole tensor.
        """
        sizes = [size // parts for size, parts in zip(shape, self.splits)]
        return tuple(slice(part * size, part * size + size) for part, size in zip(index, sizes))


def _mixed(where, sizes, places):
    """The number that coordinates at some places make, the first of them being the most significant."""
    number = 0
    for place in places:
        number = number * sizes[place] + int(where[place])
    return number


def find_strategy(folder):
    """The strategy file of a run; None where its folder is empty, as data-parallel training leaves it.

    Args:
        folder: output/strategy, or one of its files, or None.

    Raises:
        UserError: no such folder, or its files are not of one run.
    """
    if folder is None:
        return None
    folder = Path(folder)
    if folder.is_file():
        return folder
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; take output/strategy of the run whose checkpoint it is")
    files = sorted(folder.glob("*.ckpt"))
    if not files:
        return None
    first = read_strategy(files[0])
    for path in files[1:]:
        if read_strategy(path) != first:
            raise UserError(f"{path}: differs from {files[0].name}; one folder holds the strategies of one "
                            "run, without pipeline stages: remove those of other runs")
    return files[0]


def read_strategy(path):
    """The layouts in a strategy file: dict, name -> Layout, of weights and optimizer states.

    Raises:
        UserError: it is no strategy file, or splits unevenly.
    """
    import mindspore as ms
    path = Path(path)
    if not path.is_file() or not path.stat().st_size:
        raise UserError(f"{path}: is missing or empty; a parallel run writes "
                        "output/strategy/ckpt_strategy_rank_N.ckpt")
    try:
        found = ms.build_searched_strategy(str(path))
        layouts = {name: _layout(entry) for name, entry in found.items()}
    except (TypeError, ValueError, KeyError, IndexError, AttributeError):
        layouts = {}
    if not layouts or len({layout.cards for layout in layouts.values()}) > 1:
        raise UserError(f"{path}: no strategy file; a parallel run writes "
                        "output/strategy/ckpt_strategy_rank_N.ckpt")
    return layouts


def write_partial_strategy(path, names, target):
    """Write a strategy file of a few tensors: MindSpore parses it many times. Returns its path."""
    from mindspore.train.node_strategy_pb2 import ParallelStrategyMap
    content, few = ParallelStrategyMap(), ParallelStrategyMap()
    content.ParseFromString(Path(path).read_bytes())
    few.current_stage = content.current_stage
    few.parallel_strategy_item.extend(content.parallel_strategy_item[:1])
    few.parallel_layout_item.extend(item for item in content.parallel_layout_item
                                    if item.param_name in names)
    target.write_bytes(few.SerializeToString())
    return target


def _layout(entry):
    """MindSpore's ParallelLayouts -> Layout."""
    if entry.field or (entry.param_split_shape and entry.param_split_shape[0].dim):
        raise ValueError("splits unevenly")
    devices = tuple(entry.dev_matrix[0].dim)
    maps = [list(each.dim) for each in entry.tensor_map]
    each = [each for each in maps if each] if len(maps) > 1 else [[axis] for axis in maps[0]]
    axes = tuple(tuple(len(devices) - 1 - axis for axis in dimension if axis >= 0) for dimension in each)
    layout = TensorLayout(devices, axes)
    if not all(0 <= place < len(devices) for places in axes for place in places):
        raise ValueError("has an axis that its device matrix lacks")
    if entry.opt_weight_shard_step and entry.opt_weight_shard_size:
        spare = layout.cards // math.prod(layout.splits)
        size = entry.opt_weight_shard_size
        layout = TensorLayout(devices, axes, spare if size == -1 else size)
    return layout
