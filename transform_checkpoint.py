"""Trained checkpoints to one file, or to the shards of another plan, verified before they take their name.

Shards and strategy of a parallel run become one file, one file becomes shards (--dst_strategy), shards
become those of another plan (both). Ranks of a data-parallel run, which are equal, become one without a
strategy.
"""
from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from mindrlhf import cli
from mindrlhf.checkpoints import containers, layouts, reshard, shards, strict, tensors
from mindrlhf.checkpoints.containers import SUFFIXES
from mindrlhf.checkpoints.runs import choose, weights_of
from mindrlhf.cli import UserError
from mindrlhf.files import check_room, workshop
from mindrlhf.models.glm4 import lora, sidecar

EXAMPLE = """  python transform_checkpoint.py --src_checkpoint=output/checkpoint_network \\
    --src_strategy=output/strategy --dst_checkpoint=merged
  python transform_checkpoint.py --src_checkpoint=glm4_9b.ckpt \\
    --dst_strategy=output/strategy --dst_checkpoint=shards"""


def parser():
    parse = cli.Parser(__doc__, EXAMPLE)
    parse.add_argument("--src_checkpoint", required=True,
                       help="folder with rank_0, rank_1, ...: output/checkpoint_network, or "
                            "output/checkpoint, whose training states hold them too; or one whole file")
    parse.add_argument("--src_strategy", help="folder with the strategy files of the run: output/strategy; "
                                              "empty or absent after data-parallel training")
    parse.add_argument("--dst_strategy", help="the same of a run with the plan to share the weights out by "
                                              "(default: one file)")
    parse.add_argument("--base_checkpoint", help="after LoRA training: the base weights, to which the adapters are "
                                                 "added (default: one file of the adapters alone)")
    parse.add_argument("--dst_checkpoint", required=True,
                       help="folder for merged.ckpt, or a name that ends in .ckpt or .safetensors; with "
                            "--dst_strategy the new folder for rank_0, rank_1, ...")
    parse.add_argument("--step", type=cli.positive,
                       help="number of training steps, where checkpoints of several are there (default: the "
                            "last that all ranks have whole)")
    parse.add_argument("--format", choices=[suffix[1:] for suffix in SUFFIXES],
                       help="of files that --dst_checkpoint does not name (default: ckpt)")
    return parse


@dataclass(frozen=True)
class Source:
    """What is transformed.

    Attributes:
        place: the file or folder.
        ranks: of each rank name -> StoredTensor; only one where all are equal, or for one whole file.
        strategy: path of the strategy file that the ranks are sharded by, or None.
        tensors: name -> tensor, whole.
        files: of the ranks that were read.
    """
    place: Path
    ranks: list
    strategy: Path | None
    tensors: dict
    files: list


def open_source(place, strategy=None, step=None):
    """Find a checkpoint, and make sure that its parts belong together.

    Args:
        place: a whole file, or a folder of rank_0, rank_1, ...
        strategy: folder or file of strategies, or None.
        step: number of training steps, or None: the last that all ranks have whole.
    """
    place, strategy = Path(place), layouts.find(strategy)
    if not place.is_dir():
        if strategy or step:
            raise UserError(f"{place}: is no folder of rank_0, rank_1, ...; leave --src_strategy and "
                            "--step out for one file")
        tensors = weights_of(place)
        shards.check_model({name: tensor.shape for name, tensor in tensors.items()}, place)
        return Source(place, [tensors], None, tensors, [place])
    files, step = choose(place, step, skipped=print)
    ranks = [weights_of(path) for path in files]
    if step is not None:
        print(f"{place}: step {step}")
    if strategy:
        tensors = shards.join(ranks, strategy, place)
        shards.check_replicas(tensors)
    else:
        tensors, ranks = merge_replicas(files, ranks), ranks[:1]
    described = sidecar.find(place)
    shards.check_model({name: tensor.shape for name, tensor in tensors.items()}, files[0],
                       sidecar.read_sidecar(described)[0] if described else None)
    return Source(place, ranks, strategy, tensors, files)


def merge_replicas(files, ranks):
    """Weights of a data-parallel run: every rank holds all of them, and the same.

    Raises:
        UserError: two ranks differ, so they are no replicas.
    """
    identity = strict.fingerprint(ranks[0])
    for path, tensors in zip(files[1:], ranks[1:]):
        if strict.fingerprint(tensors) != identity:
            raise UserError(f"{path}: differs from {files[0]}; weights of a model-parallel run need "
                            "--src_strategy, replicas of a data-parallel run are equal: is this one run?")
    return ranks[0]


def with_remarks(source: Source, tensors: dict) -> dict:
    """Whole LoRA adapters, and rank and alpha beside them."""
    remarks = {name: tensor for name, tensor in containers.read(source.files[0]).items() if name in lora.REMARKS}
    return {**tensors, **remarks}


def add_adapters(adapters: dict, base_path: str, place: Path) -> list:
    """Base weights and whole LoRA adapters to full weights, in the base's dtype: items for write()."""
    base = weights_of(base_path)
    changed = lora.merged(base, adapters, place)

    def make(tensor):
        return lambda: tensors.narrow(changed[tensor.name](), tensor.dtype)

    return [(t.name, t.dtype, t.shape, make(t) if t.name in changed else t.chunks) for t in base.values()]


def check_adapters(adapted: bool, place: Path, base_path: str | None, strategy: Path | None) -> None:
    """Raise UserError for what makes no sense with, or without, LoRA adapters."""
    if base_path and not adapted:
        raise UserError(f"{place}: holds full weights, no adapters; leave --base_checkpoint out")
    if base_path and strategy:
        raise UserError("--base_checkpoint and --dst_strategy: merge the adapters first, then share the "
                        "merged file out")
    if adapted and strategy:
        raise UserError(f"{place}: holds LoRA adapters, which every command takes as one file; leave --dst_strategy out")


def name_files(arguments, cards):
    """(path that is to appear, names of the files in it, one a card)."""
    target, suffix = Path(arguments.dst_checkpoint), f".{arguments.format or 'ckpt'}"
    if arguments.dst_strategy:
        if target.suffix in SUFFIXES:
            raise UserError(f"{target}: with --dst_strategy, --dst_checkpoint is a folder; --format says "
                            "what its files are")
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise UserError(f"{target}: exists; remove it, or give the name of a new folder")
        return target, [f"rank_{rank}/sharded{suffix}" for rank in range(cards)]
    if target.suffix not in SUFFIXES:
        target = target / f"merged{suffix}"
    elif arguments.format and target.suffix != suffix:
        raise UserError(f"{target}: is not --format {arguments.format}; leave one of them out")
    if target.is_dir():
        raise UserError(f"{target}: is a folder; give the name of a file")
    return target, [target.name]


def main(argv=None):
    arguments = parser().parse_args(argv)
    strategy = layouts.find(arguments.dst_strategy)
    if arguments.dst_strategy and not strategy:
        raise UserError(f"{arguments.dst_strategy}: holds no strategy file; a parallel run writes them to "
                        "output/strategy")
    source = open_source(arguments.src_checkpoint, arguments.src_strategy, arguments.step)
    adapted = any(map(lora.is_adapter, source.tensors))
    check_adapters(adapted, source.place, arguments.base_checkpoint, strategy)
    wanted = reshard.targets(source.tensors, strategy)
    target, names = name_files(arguments, len(wanted))
    with workshop(target) as folder:
        made = [folder / "out" / name for name in names]
        identity, wanted = make(source, strategy, wanted, made, adapted, arguments.base_checkpoint)
        if strategy:
            (folder / "out" / "strategy").mkdir()
            shutil.copy(strategy, folder / "out" / "strategy" / "ckpt_strategy_rank_0.ckpt")
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(folder / "out" if strategy else made[0], target)
    described = sidecar.carry(source.place, target, dtype=wanted[0][0][1], fingerprint=identity)
    size = reshard.size_on_disk(wanted) / 1e9
    unknown = "" if described else f"; without the numbers of the model, as the run left no {sidecar.MODEL}"
    if adapted and not arguments.base_checkpoint:
        print("these are LoRA adapters alone; --base_checkpoint adds them to the weights that they belong to")
    print(f"{target}: {len(wanted[0])} parameters, {size:.2f} GB, from {len(source.files)} rank(s)"
          f"{f' to {len(names)}' if strategy else ''}; read back and verified, fingerprint "
          f"{identity[:12]}{unknown}")


def make(source: Source, strategy: Path | None, wanted: list, made: list, adapted: bool, base: str | None) -> tuple:
    """Write and verify the files of all cards. Returns (fingerprint of the whole weights, wanted)."""
    folder, by_mindspore = made[0].parents[1 if strategy is None else 2], source.strategy or strategy
    size = reshard.size_on_disk(wanted)
    check_room(made[0], size + (reshard.room(source.tensors, source.ranks) if by_mindspore else 0))
    tensors = source.tensors
    if by_mindspore:
        files = [folder / "adapters.ckpt"] if adapted else made
        with cli.progress(size, "transform", "B", unit_scale=True) as bar:
            reshard.transform(source.ranks, (source.strategy, strategy), wanted, files, folder, bar.update)
        identity = strict.fingerprint(tensors)
        reshard.verify(identity, files, strategy)
        tensors = containers.read(files[0])
    if adapted or not by_mindspore:
        tensors = with_remarks(source, tensors)
        items = add_adapters(tensors, base, source.files[0]) if base else \
            [(t.name, t.dtype, t.shape, t.chunks) for t in tensors.values()]
        wanted = [[item[:3] for item in items]]
        size = reshard.size_on_disk(wanted)
        check_room(made[0], size)
        with cli.progress(size, "write", "B", unit_scale=True) as bar:
            identity = containers.write(made[0], items, bar.update)
        reshard.verify(identity, made, None)
    return identity, wanted


if __name__ == "__main__":
    cli.run(main)
