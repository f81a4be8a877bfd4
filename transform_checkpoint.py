"""Trained checkpoints of several workers to one checkpoint, verified after it is written."""
import math
import re
import shutil
import tempfile
from pathlib import Path

import numpy as np

from mindrlhf import checkpoint, cli
from mindrlhf.cli import UserError
from mindrlhf.models.glm4 import lora, sidecar

EXAMPLE = """  python transform_checkpoint.py --src_checkpoint=output/checkpoint_network \\
    --src_strategy=output/strategy --dst_checkpoint=merged"""
WEIGHTS = "transformer."  # every weight's name starts so; the rest of a training state belongs to the optimizer


def parser():
    parse = cli.Parser(__doc__, EXAMPLE)
    parse.add_argument("--src_checkpoint", required=True, help="folder with rank_0, rank_1, ...: output/checkpoint_network")
    parse.add_argument("--src_strategy", help="folder with the strategy files of the run: output/strategy; "
                                              "empty or absent after data-parallel training")
    parse.add_argument("--base_checkpoint", help="after LoRA training: the base weights, to which the adapters are added")
    parse.add_argument("--dst_checkpoint", required=True,
                       help="folder for merged.ckpt, or a name that ends in .ckpt or .safetensors")
    return parse


def find_ranks(folder):
    """The newest checkpoint of each rank: list of paths, rank 0 first. `Newest` goes by the number of steps in it."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; --src_checkpoint takes output/checkpoint_network of a training run")
    ranks = {int(match[1]): path for path in folder.iterdir() if (match := re.fullmatch(r"rank_(\d+)", path.name))}
    if not ranks:
        raise UserError(f"{folder}: holds no rank_0, rank_1, ...; --src_checkpoint takes output/checkpoint_network")
    missing = sorted(set(range(max(ranks) + 1)) - set(ranks))
    if missing:
        raise UserError(f"{folder}: rank_{missing[0]} is missing; copy it from the machine that trained it")
    return [_newest(ranks[number]) for number in range(len(ranks))]


def _newest(folder):
    files = sorted([*folder.glob("*.ckpt"), *folder.glob("*.safetensors")])
    if not files:
        raise UserError(f"{folder}: holds no .ckpt or .safetensors; training saves one at its end")
    return files[0] if len(files) == 1 else max(files, key=checkpoint.steps_done)


def find_strategies(folder):
    """The strategy files of a run; none after data-parallel training."""
    if folder is None:
        return []
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; --src_strategy takes output/strategy of the same run")
    return sorted(folder.glob("*.ckpt"))


def weights_of(path):
    """The weights in a checkpoint: dict, name -> StoredTensor."""
    tensors = {name: tensor for name, tensor in checkpoint.read(path).items() if name.startswith(WEIGHTS)}
    if not tensors:
        raise UserError(f"{path}: holds no weights of a GLM-4")
    return tensors


def merge_replicas(files):
    """Weights of a data-parallel run: every rank holds all of them, and the same.

    Raises:
        UserError: two ranks differ, so they are no replicas.
    """
    first = weights_of(files[0])
    identity = checkpoint.fingerprint(first)
    for path in files[1:]:
        if checkpoint.fingerprint(weights_of(path)) != identity:
            raise UserError(f"{path}: differs from {files[0]}; weights of a model-parallel run need --src_strategy, "
                            "replicas of a data-parallel run are equal: are these of one run?")
    return first


def merge_shards(files, strategies, folder):
    """Weights of a model-parallel run, joined by MindSpore, rank files and strategies together.

    Args:
        files: one checkpoint of each rank.
        strategies: strategy files of the ranks.
        folder: for MindSpore's intermediate files.
    """
    import mindspore as ms
    for rank, path in enumerate(files):
        target = Path(folder) / "shards" / f"rank_{rank}"
        target.mkdir(parents=True)
        (target / path.name).symlink_to(path.resolve())
    merged = Path(folder) / "merged"
    try:
        ms.transform_checkpoints(str(Path(folder) / "shards"), str(merged), "merged", str(strategies[0]), None)
        (result,) = merged.glob("rank_0/*.ckpt")
    except (ValueError, RuntimeError, KeyError, OSError) as error:
        raise UserError(f"{strategies[0]}: MindSpore cannot join the shards by it "
                        f"({str(error).strip().splitlines()[0]}); take the strategy of the same run") from None
    return weights_of(result)


def add_adapters(base_path, stored, place):
    """Base weights and LoRA adapters to full weights, in the dtype of the base: items as checkpoint.write takes them."""
    base = weights_of(base_path)
    changed = lora.merged(base, stored, place)
    return [(t.name, t.dtype, t.shape, (lambda t=t: checkpoint.narrow(changed[t.name](), t.dtype)) if t.name in changed
             else t.array) for t in base.values()]


def collect(arguments, files, folder):
    """The weights to write: list of (name, dtype, shape, make).

    Raises:
        UserError: adapters without base weights, or base weights for what has no adapters.
    """
    strategies = find_strategies(arguments.src_strategy)
    tensors = merge_shards(files, strategies, folder) if strategies else merge_replicas(files)
    adapted = any(lora.is_adapter(name) for name in tensors)
    if adapted and not arguments.base_checkpoint:
        raise UserError(f"{files[0]}: holds LoRA adapters; --base_checkpoint names the weights that they belong to")
    if arguments.base_checkpoint and not adapted:
        raise UserError(f"{files[0]}: holds full weights, no adapters; leave --base_checkpoint out")
    if adapted:
        about = {name: tensor for name, tensor in checkpoint.read(files[0]).items() if name.startswith("lora_")}
        return add_adapters(arguments.base_checkpoint, {**tensors, **about}, files[0])
    return [(t.name, t.dtype, t.shape, t.array) for t in tensors.values()]


def verify(path, items):
    """Raise UserError unless a file holds what was to be written; it is deleted then."""
    stored = checkpoint.read(path)
    good = list(stored) == [name for name, *_ in items] and all(
        stored[name].dtype == dtype and np.array_equal(stored[name].array(), make(), equal_nan=dtype != "BF16")
        for name, dtype, _, make in items)
    if not good:
        path.unlink()
        raise UserError(f"{path}: what was read back is not what was written; check the disk, then try again")
    return checkpoint.fingerprint(stored)


def main(argv=None):
    arguments = parser().parse_args(argv)
    files = find_ranks(arguments.src_checkpoint)
    target = Path(arguments.dst_checkpoint)
    if target.suffix not in (".ckpt", ".safetensors"):
        target = target / "merged.ckpt"
    with tempfile.TemporaryDirectory(prefix=".merge-", dir=_existing_parent(target)) as folder:
        items = collect(arguments, files, folder)
        size = sum(math.prod(shape) * checkpoint.DTYPES[dtype][1].itemsize for _, dtype, shape, _ in items)
        if shutil.disk_usage(_existing_parent(target)).free < size:
            raise UserError(f"{target}: {size / 1e9:.1f} GB do not fit on this disk; give another --dst_checkpoint")
        with cli.progress(size, "write", "B", unit_scale=True) as bar:
            checkpoint.write(target, items, bar.update)
        identity = verify(target, items)
    described = sidecar.carry(arguments.src_checkpoint, target, dtype=items[0][1], fingerprint=identity)
    print(f"{target}: {len(items)} parameters, {size / 1e9:.2f} GB, from {len(files)} rank(s); "
          f"read back and verified, fingerprint {identity[:12]}"
          + ("" if described else f"; without {sidecar.path_of(target).name}, as the run left no {sidecar.MODEL}"))


def _existing_parent(path):
    return next(parent for parent in path.absolute().parents if parent.exists())


if __name__ == "__main__":
    cli.run(main)
