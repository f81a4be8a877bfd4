"""Trained checkpoints to one file, or to the shards of another plan, verified before they take their name."""
from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mindrlhf import cli
from mindrlhf.checkpoints import fingerprints, layouts, reshard, shards
from mindrlhf.checkpoints.containers import SUFFIXES, open_tensors, write_tensors
from mindrlhf.checkpoints.tensors import StoredTensor, round_to
from mindrlhf.cli import UserError
from mindrlhf.files import require_space, staging_folder
from mindrlhf.models.glm4 import load, lora, sidecar
from mindrlhf.models.glm4.load import OpenedCheckpoint
from mindrlhf.models.glm4.weight_names import is_adapter, is_weight


@dataclass(frozen=True)
class SourceCheckpoint:
    """What is transformed.

    Attributes:
        opened: the files; ranks has one entry if all ranks are equal.
        tensors: name -> whole tensor.
    """
    opened: OpenedCheckpoint
    tensors: dict[str, StoredTensor]

    @property
    def is_adapted(self) -> bool:
        """Whether these are LoRA adapters and not the weights of a model."""
        return any(map(is_adapter, self.tensors))


@dataclass(frozen=True)
class TargetCheckpoint:
    """What is made of it.

    Attributes:
        path: the file or folder that is to appear.
        names: the files in it, relative, one a card.
        strategy: the strategy file to shard by, or None for whole tensors.
        base: checkpoint to add LoRA adapters to, or None.
    """
    path: Path
    names: list[str]
    strategy: Path | None
    base: str | None


@dataclass(frozen=True)
class Written:
    """What was written: the fingerprint of the whole weights and, for each card, (name, dtype, shape) of its tensors."""
    fingerprint: str
    cards: list[list[tuple]]


def open_source(place: str | Path, strategy: str | None = None, step: int | None = None) -> SourceCheckpoint:
    """Open a checkpoint, and make sure that its parts belong together.

    Args:
        place: a whole file, or a folder of rank_0, rank_1, ...
        strategy: folder or file of strategies, or None.
        step: number of training steps; None: the newest that is intact on all ranks.

    Raises:
        UserError: parts are missing, damaged, or of different runs.
    """
    opened = load.open_checkpoint(place, strategy, step=step, report_skipped=print)
    if opened.step is not None:
        print(f"{place}: step {opened.step}")
    if not opened.place.is_dir():
        tensors = load.read_weights(place)
        opened = replace(opened, ranks=[tensors])
    elif opened.strategy:
        tensors = opened.whole_tensors()
        shards.require_equal_replicas(tensors)
    else:
        tensors = _require_equal_ranks(opened)
        opened = replace(opened, ranks=[tensors])
    described = sidecar.find_sidecar(opened.place) if opened.place.is_dir() else None
    load.require_whole_model({name: tensor.shape for name, tensor in tensors.items()}, opened.files[0],
                             sidecar.read_sidecar(described)[0] if described else None)
    return SourceCheckpoint(opened, tensors)


def _require_equal_ranks(opened: OpenedCheckpoint) -> dict[str, StoredTensor]:
    """The weights of a data-parallel run: every rank holds all of them, with equal values.

    Raises:
        UserError: two ranks differ.
    """
    identity = fingerprints.fingerprint(opened.ranks[0])
    for path, tensors in zip(opened.files[1:], opened.ranks[1:]):
        if fingerprints.fingerprint(tensors) != identity:
            raise UserError(f"{path}: differs from {opened.files[0]}. Shards of a parallel plan need --src_strategy; "
                            "the ranks of a data-parallel run are equal: are these files of one run?")
    return opened.ranks[0]


def plan_target(source: SourceCheckpoint, path: str | Path, *, strategy: str | None = None, suffix: str | None = None,
                base: str | None = None) -> TargetCheckpoint:
    """Decide what to write, and refuse options that contradict each other or the source.

    Args:
        source: the checkpoint.
        path: file or folder to write.
        strategy: folder or file of strategies of the plan to shard for; None: one file.
        suffix: ".ckpt" or ".safetensors"; None: as the path says, or .ckpt.
        base: base weights to add LoRA adapters to, or None.
    """
    path, found = Path(path), layouts.find_strategy(strategy)
    if strategy and not found:
        raise UserError(f"{strategy}: holds no strategy file; a parallel run writes them to output/strategy")
    _check_adapters(source, base, found)
    if found:
        if path.suffix in SUFFIXES:
            raise UserError(f"{path}: with --dst_strategy, --dst_checkpoint is a folder; --format says what its files are")
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UserError(f"{path}: exists; remove it, or give the name of a new folder")
        cards = len(reshard.plan_cards(source.tensors, found, is_expected=is_weight))
        return TargetCheckpoint(path, [f"rank_{rank}/sharded{suffix or '.ckpt'}" for rank in range(cards)], found, base)
    if path.suffix not in SUFFIXES:
        path = path / f"merged{suffix or '.ckpt'}"
    elif suffix and path.suffix != suffix:
        raise UserError(f"{path}: is not --format {suffix[1:]}; leave one of them out")
    if path.is_dir():
        raise UserError(f"{path}: is a folder; give the name of a file")
    return TargetCheckpoint(path, [path.name], None, base)


def _check_adapters(source: SourceCheckpoint, base: str | None, strategy: Path | None) -> None:
    """Raise UserError for what makes no sense with, or without, LoRA adapters."""
    place = source.opened.place
    if base and not source.is_adapted:
        raise UserError(f"{place}: holds full weights, no adapters; leave --base_checkpoint out")
    if base and strategy:
        raise UserError("--base_checkpoint and --dst_strategy exclude each other: merge the adapters first, then "
                        "shard the merged file")
    if source.is_adapted and strategy:
        raise UserError(f"{place}: holds LoRA adapters, which every command takes as one file; leave --dst_strategy out")


def write_target(source: SourceCheckpoint, target: TargetCheckpoint) -> list[str]:
    """Write and verify the target; it appears under its name when it is complete.

    Returns:
        lines about the result.

    Raises:
        UserError: the disk is too small, the strategies do not fit the source, or what was read back differs.
    """
    with staging_folder(target.path) as folder:
        files = [folder / "out" / name for name in target.names]
        written = _write_files(source, target, files, folder)
        if target.strategy:
            (folder / "out" / "strategy").mkdir()
            shutil.copy(target.strategy, folder / "out" / "strategy" / "ckpt_strategy_rank_0.ckpt")
        target.path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(folder / "out" if target.strategy else files[0], target.path)
    described = sidecar.copy_to_result(source.opened.place, target.path, dtype=written.cards[0][0][1],
                              fingerprint=written.fingerprint)
    lines = []
    if source.is_adapted and not target.base:
        lines.append("these are LoRA adapters alone; --base_checkpoint adds them to the weights that they belong to")
    unknown = "" if described else f"; without the model's numbers, as the run left no {sidecar.MODEL}"
    lines.append(f"{target.path}: {len(written.cards[0])} parameters, {reshard.size_on_disk(written.cards) / 1e9:.2f} GB, "
                 f"from {len(source.opened.files)} rank(s){f' to {len(files)}' if target.strategy else ''}; read back and "
                 f"verified, fingerprint {written.fingerprint[:12]}{unknown}")
    return lines


def _write_files(source: SourceCheckpoint, target: TargetCheckpoint, files: Sequence[Path], folder: Path) -> Written:
    """Write and verify the file of every card."""
    strategies = source.opened.strategy, target.strategy
    cards = reshard.plan_cards(source.tensors, target.strategy, is_expected=is_weight)
    if not any(strategies):
        return _write_whole(source, target, files[0], source.tensors)
    size = reshard.size_on_disk(cards)
    require_space(files[0], size + reshard.scratch_bytes(source.tensors, source.opened.ranks))
    resharded = [folder / "adapters.ckpt"] if source.is_adapted else files
    with cli.progress_bar(size, "transform", "B", unit_scale=True) as bar:
        reshard.reshard_tensors(source.opened.ranks, strategies, cards, resharded, folder, bar.update)
    identity = fingerprints.fingerprint(source.tensors)
    reshard.verify_files(identity, resharded, target.strategy, is_expected=is_weight)
    if source.is_adapted:
        return _write_whole(source, target, files[0], open_tensors(resharded[0]))
    return Written(identity, cards)


def _write_whole(source: SourceCheckpoint, target: TargetCheckpoint, file: Path, tensors: Mapping[str, StoredTensor]) -> Written:
    """Write and verify one file of whole tensors, LoRA adapters added to their base if there is one."""
    remarks = {name: tensor for name, tensor in open_tensors(source.opened.files[0]).items() if name in lora.METADATA}
    tensors = {**tensors, **remarks}
    items = _with_adapters(tensors, target.base, source.opened.files[0]) if target.base else \
        [(t.name, t.dtype, t.shape, t.chunks) for t in tensors.values()]
    cards = [[item[:3] for item in items]]
    size = reshard.size_on_disk(cards)
    require_space(file, size)
    with cli.progress_bar(size, "write", "B", unit_scale=True) as bar:
        identity = write_tensors(file, items, bar.update)
    reshard.verify_files(identity, [file], None, is_expected=is_weight)
    return Written(identity, cards)


def _with_adapters(adapters: Mapping[str, StoredTensor], base_path: str, place: Path) -> list[tuple]:
    """Full weights in the base's dtype, as containers.write takes them: base weights plus LoRA adapters."""
    base = load.read_weights(base_path)
    changed = lora.merge_adapters(base, adapters, place)

    def values_of(tensor: StoredTensor) -> Callable:
        if tensor.name not in changed:
            return tensor.chunks
        return lambda: round_to(changed[tensor.name](), tensor.dtype)

    return [(t.name, t.dtype, t.shape, values_of(t)) for t in base.values()]
