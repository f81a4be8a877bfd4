"""The checkpoints of several cards as one: rank_0, rank_1, ... with the strategy of their run."""
import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from mindrlhf.checkpoints import layouts
from mindrlhf.checkpoints.containers import read
from mindrlhf.checkpoints.runs import WEIGHTS, choose, weights_of
from mindrlhf.checkpoints.tensors import DTYPES, StoredTensor, pieces, size_of
from mindrlhf.cli import UserError
from mindrlhf.models.glm4 import lora, weight_names


@dataclass(frozen=True)
class ShardedTensor(StoredTensor):
    """A tensor whose blocks lie in the files of several cards. It reads as a StoredTensor does.

    Attributes:
        layout: Layout.
        parts: the StoredTensor of each card, rank 0 first.
    """
    layout: layouts.Layout = None
    parts: tuple = ()

    @property
    def nbytes(self):
        """Size of the whole in bytes."""
        return size_of(self.dtype, self.shape)

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
        rows = slice(first // inner, -(-(first + count) // inner))
        block = self.block((rows, *(slice(0, size) for size in self.shape[1:])))
        return block.reshape(-1)[first - rows.start * inner:][:count]

    def array(self):
        """As StoredTensor.array."""
        return self.block(tuple(slice(0, size) for size in self.shape))


def _moved(slices, origins):
    return tuple(slice(a.start - b.start, a.stop - b.start) for a, b in zip(slices, origins))


def join(ranks, strategy, place):
    """The tensors of all cards as whole ones.

    Args:
        ranks: for each card a dict, name -> StoredTensor.
        strategy: path of the strategy file of their run.
        place: what to name in errors: the folder of the shards.

    Returns:
        dict, name -> ShardedTensor.

    Raises:
        UserError: cards and strategy are not of one run.
    """
    plan = layouts.read(strategy)
    cards = next(iter(plan.values())).cards
    if cards != len(ranks):
        cure = f", or copy rank_{len(ranks)} too" if cards > len(ranks) else ""
        raise UserError(f"{strategy}: is of a run on {cards} card(s), {place} holds {len(ranks)} rank "
                        f"folder(s); give the strategy of the same run{cure}")
    for tensors in ranks[1:]:
        _alike(ranks[0], tensors)
    expected = {name for name in plan if name.startswith(WEIGHTS)}
    if any(map(lora.is_adapter, ranks[0])):  # the frozen weights are not saved then
        expected = set(filter(lora.is_adapter, expected))
    _same_names(expected, ranks[0], strategy)
    return {name: _joined(name, [tensors[name] for tensors in ranks], plan[name], strategy)
            for name in ranks[0]}


def _alike(first, other):
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


def check_replicas(tensors):
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


def check_model(found, place, numbers=None):
    """Raise UserError unless the shapes are those of a whole GLM-4: shards without their strategy are not.

    Args:
        found: dict, name -> shape.
        place: what to name in the error.
        numbers: Numbers of the model; None: whatever the tensors tell.
    """
    if any(map(lora.is_adapter, found)):
        return  # adapters are checked against their base
    told = weight_names.measure(found)
    if told and numbers is None:
        qkv = found["transformer.encoder.layers.0.self_attention.query_key_value.weight"][0]
        heads, hidden = told["num_attention_heads * kv_channels"], told["hidden_size"]
        numbers = weight_names.Numbers(told["num_layers"], told["padded_vocab_size"], hidden,
                                  told["ffn_hidden_size"], heads, (qkv - heads) // 2, 1, 1e-5, 1, (), 0)
    expected = weight_names.shapes(numbers) if numbers else {}
    wrong = [name for name in {**expected, **found} if expected.get(name) != tuple(found.get(name, ()))]
    if wrong:
        name = wrong[0]
        raise UserError(f"{place}: is no whole GLM-4: {name} is {list(found.get(name, ()))}, not "
                        f"{list(expected.get(name, ()))}. Shards need --src_strategy, the output/strategy "
                        "of their own run")


def open_weights(path, strategy=None):
    """Find the weights that a run starts from; their values stay in the files.

    Args:
        path: a whole file, or a folder of rank_0, rank_1, ...
        strategy: folder or file of strategies of the run that saved the shards; None: the ranks are equal.

    Returns:
        dict, name -> StoredTensor, whole ones.

    Raises:
        UserError: the shards and the strategy do not belong together, or the newest step is not whole.
    """
    if not path:
        raise UserError("no weights given; --load_checkpoint names the checkpoint that convert_weight.py "
                        "made")
    if not Path(path).is_dir():
        if strategy:
            raise UserError(f"{path}: is one file; --src_strategy belongs to a folder of rank_0, rank_1, ...")
        return read(path)
    files, _ = choose(path)
    ranks, strategy = [weights_of(file) for file in files], layouts.find(strategy)
    if strategy:
        return join(ranks, strategy, path)
    for tensors in ranks[1:]:
        _alike(ranks[0], tensors)
    check_model({name: tensor.shape for name, tensor in ranks[0].items()}, files[0])
    return ranks[0]
