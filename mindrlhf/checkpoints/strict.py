"""Checkpoints: their identity, and loading that is strict.

MindSpore's own readers hold a whole file in memory and load what fits, by name, without a word about the
rest. Here nothing loads unless every name and every shape agrees. Reading and writing the files is in formats.py.
"""
from __future__ import annotations

from pathlib import Path

from mindrlhf.checkpoints.containers import Fingerprint, digest, read, write
from mindrlhf.checkpoints.runs import choose
from mindrlhf.checkpoints.shards import open_weights
from mindrlhf.checkpoints.tensors import DTYPES, StoredTensor, in_order, narrow, pieces
from mindrlhf.cli import UserError
from mindrlhf.files import atomic_file, write_json
from mindrlhf.models.glm4.lora import REMARKS
from mindrlhf.models.glm4.weight_names import is_cache

__all__ = ["DTYPES", "StoredTensor", "atomic_file", "difference", "fingerprint", "load_strictly", "narrow",
           "open_adapters", "open_weights", "read", "steps_done", "write", "write_json"]


def fingerprint(tensors, *, sample=False, inspect=None):
    """Identity of a set of weights, as formats.Fingerprint defines it: of names, dtypes, shapes and values.

    Args:
        tensors: dict, name -> StoredTensor, of one file or of several.
        sample: only the first piece of each tensor: tells whether two checkpoints can be the same, at once.
        inspect: called with each tensor and the stored values of each of its pieces, from several threads.

    Returns:
        64 hex digits. Pieces are hashed side by side, as fast as they are read.
    """
    def some(tensor):
        return pieces(tensor.elements)[:1 if sample else None]

    def look(tensor, *piece):
        values = tensor.read(*piece)
        if inspect:
            inspect(tensor, values)
        return digest(values)

    identity = Fingerprint()
    digests = in_order(look, ((tensor, *piece) for tensor in tensors.values() for piece in some(tensor)))
    for tensor in tensors.values():
        identity.add(tensor.name, tensor.dtype, tensor.shape, [next(digests) for _ in some(tensor)])
    return identity.hexdigest()


def difference(expected, found, *, limit=3):
    """What a file's shapes lack, have too many, or have otherwise than expected, in words; empty where they agree."""
    def named(names):
        return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")

    missing = [name for name in expected if name not in found]
    unknown = [name for name in found if name not in expected]
    shapes = [f"{name} ({list(found[name])} in the file, {list(expected[name])} in the model)" for name in expected
              if name in found and tuple(found[name]) != tuple(expected[name])]
    parts = [("missing", missing), ("not in the model", unknown), ("of another shape", shapes)]
    return "; ".join(f"{title}: {named(names)}" for title, names in parts if names)


def load_strictly(network, path, *, training_state=False, names=None, strategy=None):
    """Load every parameter of a network from a file, and every tensor of the file into the network.

    A network that is spread over cards reads its part of each tensor when it is compiled, so files must stay until then.

    Args:
        network: a Cell; its parameters' names and shapes decide. Key-value caches are no part of a file.
        path: a .ckpt or .safetensors file with the whole (unsharded) weights, or a folder of shards.
        training_state: allow the optimizer's and the trainer's own tensors in the file (a resumed run).
        names: function from a name to whether this file is responsible for it; None: for all.
        strategy: of the shards, as shards.open_weights takes it.

    Returns:
        dict, name -> StoredTensor, what was loaded.

    Raises:
        UserError: naming each kind of difference; nothing was loaded then.
    """
    from mindrlhf.checkpoints.slices import FileTensor
    stored = open_weights(path, strategy)
    parameters = {parameter.name: parameter for parameter in network.get_parameters()
                  if not is_cache(parameter.name) and (names is None or names(parameter.name))}
    if training_state:
        stored = {name: tensor for name, tensor in stored.items() if name in parameters}
    problem = difference({name: parameter.shape for name, parameter in parameters.items()},
                         {name: tensor.shape for name, tensor in stored.items()})
    if problem:
        raise UserError(f"{path}: does not fit the model of this YAML. {problem}")
    for name, parameter in parameters.items():
        parameter.set_data(FileTensor(stored[name], parameter.dtype))
    return stored


def open_adapters(path: str | Path, strategy: str | None = None) -> dict[str, StoredTensor]:
    """Find the LoRA adapters of a run; their values stay in the files.

    Args:
        path: an adapter file, or a folder of rank_0, rank_1, ...: output/checkpoint_network of a run.
        strategy: of the shards, as shards.open_weights takes it.

    Returns:
        name -> tensor, whole ones, lora.REMARKS included.
    """
    stored = open_weights(path, strategy)
    if Path(path).is_dir():
        first = read(choose(path)[0][0])
        stored = {**stored, **{name: first[name] for name in REMARKS if name in first}}
    return stored


def steps_done(path):
    """Number of training steps behind a checkpoint that MindFormers' CheckpointMonitor wrote.

    Raises:
        UserError: the file says nothing of steps; it is no training state.
    """
    tensors = read(path)
    if "step_num" not in tensors:
        raise UserError(f"{path}: is no training state; resume_training needs a file of output/checkpoint/rank_*")
    return int(tensors["step_num"].array())
