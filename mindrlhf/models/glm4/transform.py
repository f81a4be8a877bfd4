"""Trained checkpoints to one file, or to the shards of another parallel plan.

The result is verified before it takes its final name.
"""
from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mindrlhf import cli
from mindrlhf.checkpoints import fingerprints, layouts, reshard, shards
from mindrlhf.checkpoints.containers import SUFFIXES, open_tensors, write_tensors
from mindrlhf.checkpoints.tensors import StoredTensor, TensorItem, TensorSpec, Values, round_to
from mindrlhf.cli import UserError
from mindrlhf.files import require_space, staging_folder
from mindrlhf.models.glm4 import load, lora, sidecar
from mindrlhf.models.glm4.load import OpenedCheckpoint
from mindrlhf.models.glm4.weight_names import is_adapter, is_weight
from mindrlhf.outputs import require_no_loss, require_overwrite


@dataclass(frozen=True)
class SourceCheckpoint:
    """The checkpoint to transform.

    Attributes:
        opened: the files; ranks has one entry if all ranks are equal.
        tensors: name -> unsharded tensor.
    """
    opened: OpenedCheckpoint
    tensors: dict[str, StoredTensor]

    @property
    def is_adapted(self) -> bool:
        """Whether these are LoRA adapters and not the weights of a model."""
        return any(map(is_adapter, self.tensors))


@dataclass(frozen=True)
class TargetCheckpoint:
    """The checkpoint to write.

    Attributes:
        path: the file or folder.
        names: relative paths of the files in it, one for each card.
        strategy: the strategy file to shard by, or None for unsharded tensors.
        base: checkpoint to add LoRA adapters to, or None.
    """
    path: Path
    names: list[str]
    strategy: Path | None
    base: str | None


@dataclass(frozen=True)
class Written:
    """What was written: the fingerprint of the unsharded weights, and the tensors of each card."""
    fingerprint: str
    cards: list[list[TensorSpec]]


def open_source(place: str | Path, strategy: str | None = None,
                step: int | None = None) -> SourceCheckpoint:
    """Open a checkpoint, and check that its parts belong together.

    Args:
        place: a single file, or a folder of rank_0, rank_1, ...
        strategy: folder or file of strategies, or None.
        step: number of training steps; None: the newest step that is intact on all ranks.

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
    load.require_whole_model({name: tensor.shape for name, tensor in tensors.items()},
                             opened.files[0],
                             sidecar.read_sidecar(described).config if described else None)
    return SourceCheckpoint(opened, tensors)


def _require_equal_ranks(opened: OpenedCheckpoint) -> dict[str, StoredTensor]:
    """The weights of a data-parallel run, in which every rank holds all weights.

    Raises:
        UserError: the values of two ranks differ.
    """
    identity = fingerprints.fingerprint(opened.ranks[0])
    for path, tensors in zip(opened.files[1:], opened.ranks[1:]):
        if fingerprints.fingerprint(tensors) != identity:
            raise UserError(f"{path}: differs from {opened.files[0]}. Shards of a parallel plan "
                            "need --src_strategy; the ranks of a data-parallel run are equal: are "
                            "these files of one run?")
    return opened.ranks[0]


def file_to_write(path: str | Path, suffix: str | None = None) -> Path:
    """The file for unsharded weights, given its path or that of its folder.

    Args:
        path: file or folder.
        suffix: ".ckpt" or ".safetensors"; None: that of the path, or .ckpt.
    """
    path = Path(path)
    return path if path.suffix in SUFFIXES else path / f"merged{suffix or '.ckpt'}"


def plan_target(source: SourceCheckpoint, path: str | Path, *, strategy: str | None = None,
                suffix: str | None = None, base: str | None = None,
                overwrite: bool = False) -> TargetCheckpoint:
    """Decide what to write.

    Args:
        source: the checkpoint to transform.
        path: file or folder to write.
        strategy: folder or file of strategies of the plan to shard for; None: one file.
        suffix: ".ckpt" or ".safetensors"; None: that of the path, or .ckpt.
        base: base weights to add LoRA adapters to, or None.
        overwrite: replace a file that holds other weights.

    Raises:
        UserError: the options contradict each other or the source, or the path must not be
            replaced.
    """
    path, found = Path(path), layouts.find_strategy(strategy)
    if strategy and not found:
        raise UserError(f"{strategy}: holds no strategy file; a parallel run writes them to "
                        "output/strategy")
    _check_adapters(source, base, found)
    if found:
        if overwrite:
            raise UserError("--overwrite replaces a checkpoint file; with --dst_strategy, "
                            "--dst_checkpoint is a new folder: leave --overwrite out")
        if path.suffix in SUFFIXES:
            raise UserError(f"{path}: with --dst_strategy, --dst_checkpoint is a folder; --format "
                            "sets the type of its files")
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UserError(f"{path}: exists; remove it, or give the name of a new folder")
        cards = len(reshard.plan_cards(source.tensors, found, is_expected=is_weight))
        names = [f"rank_{rank}/sharded{suffix or '.ckpt'}" for rank in range(cards)]
        return TargetCheckpoint(path, names, found, base)
    path = file_to_write(path, suffix)
    if suffix and path.suffix != suffix:
        raise UserError(f"{path}: is not --format {suffix[1:]}; leave one of them out")
    place = source.opened.place
    read = ([file.parent for file in source.opened.files] if place.is_dir()  # rank_0, rank_1, ...
            else [place])
    require_no_loss(sidecar.checkpoint_outputs(path), [*read, source.opened.strategy, base])
    described = sidecar.find_sidecar(place)
    config = sidecar.read_sidecar(described).config if described else None
    require_overwrite(path, overwrite, lambda: sidecar.holds_already(
        path, _unsharded_items(source, base, source.tensors), config))
    return TargetCheckpoint(path, [path.name], None, base)


def _check_adapters(source: SourceCheckpoint, base: str | None, strategy: Path | None) -> None:
    """Raise UserError if the options do not fit LoRA adapters, or full weights."""
    place = source.opened.place
    if base and not source.is_adapted:
        raise UserError(f"{place}: holds full weights, no adapters; leave --base_checkpoint out")
    if base and strategy:
        raise UserError("--base_checkpoint and --dst_strategy exclude each other: merge the "
                        "adapters first, then shard the merged file")
    if source.is_adapted and strategy:
        raise UserError(f"{place}: holds LoRA adapters, which every command takes as one file; "
                        "leave --dst_strategy out")


def write_target(source: SourceCheckpoint, target: TargetCheckpoint) -> list[str]:
    """Write and verify the target. It takes its name when it is complete.

    Returns:
        lines about the result.

    Raises:
        UserError: the source is not what its sidecar says, the disk is too small, the strategies
            do not fit the source, or the target differs when it is read back.
    """
    place = source.opened.place
    sidecar.require_recorded_weights(
        place, source.tensors if place.is_dir() else open_tensors(place))
    if target.base:
        sidecar.require_recorded_weights(target.base, open_tensors(target.base))
    with staging_folder(target.path) as folder:
        files = [folder / "out" / name for name in target.names]
        written = _write_files(source, target, files, folder)
        if target.strategy:
            (folder / "out" / "strategy").mkdir()
            shutil.copy(target.strategy, folder / "out" / "strategy" / "ckpt_strategy_rank_0.ckpt")
        target.path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(folder / "out" if target.strategy else files[0], target.path)
    described = sidecar.copy_to_result(
        place, target.path, dtype=written.cards[0][0].dtype,
        fingerprint=written.fingerprint)
    lines = []
    if source.is_adapted and not target.base:
        lines.append("these are LoRA adapters alone; --base_checkpoint adds them to their base "
                     "weights")
    size = cli.size_text(reshard.size_on_disk(written.cards))
    ranks = f"{len(source.opened.files)} rank(s)"
    if target.strategy:
        ranks += f" to {len(files)}"
    unknown = "" if described else f"; without the model's config: the run has no {sidecar.MODEL}"
    lines.append(f"{target.path}: {len(written.cards[0])} parameters, {size}, from {ranks}; "
                 f"read back and verified, fingerprint {written.fingerprint[:12]}{unknown}")
    return lines


def _write_files(source: SourceCheckpoint, target: TargetCheckpoint, files: Sequence[Path],
                 folder: Path) -> Written:
    """Write and verify the file of every card.

    Args:
        source: the checkpoint to transform.
        target: the checkpoint to write.
        files: path of the file of each card, in the staging folder.
        folder: the staging folder.

    Raises:
        UserError: see write_target().
    """
    strategies = source.opened.strategy, target.strategy
    cards = reshard.plan_cards(source.tensors, target.strategy, is_expected=is_weight)
    if not any(strategies):
        return _write_unsharded(source, target, files[0], source.tensors)
    size = reshard.size_on_disk(cards)
    require_space(files[0], size + reshard.scratch_bytes(source.tensors, source.opened.ranks))
    resharded = [folder / "adapters.ckpt"] if source.is_adapted else files
    with cli.progress_bar(size, "transform", "B", unit_scale=True) as bar:
        reshard.reshard_tensors(source.opened.ranks, strategies, cards, resharded, folder,
                                bar.update)
    identity = fingerprints.fingerprint(source.tensors)
    reshard.verify_files(identity, resharded, target.strategy, is_expected=is_weight)
    if source.is_adapted:
        return _write_unsharded(source, target, files[0], open_tensors(resharded[0]))
    return Written(identity, cards)


def _write_unsharded(source: SourceCheckpoint, target: TargetCheckpoint, file: Path,
                     tensors: Mapping[str, StoredTensor]) -> Written:
    """Write and verify one file of unsharded tensors, with LoRA adapters merged if a base is given.

    Args:
        source: the checkpoint to transform.
        target: the checkpoint to write.
        file: path of the file, in the staging folder.
        tensors: name -> tensor, of the weights or adapters.

    Raises:
        UserError: see write_target().
    """
    items = _unsharded_items(source, target.base, tensors)
    cards = [[item.spec for item in items]]
    size = reshard.size_on_disk(cards)
    require_space(file, size)
    with cli.progress_bar(size, "write", "B", unit_scale=True) as bar:
        identity = write_tensors(file, items, bar.update)
    reshard.verify_files(identity, [file], None, is_expected=is_weight)
    return Written(identity, cards)


def _unsharded_items(source: SourceCheckpoint, base: str | None,
                     tensors: Mapping[str, StoredTensor]) -> list[TensorItem]:
    """The tensors of an unsharded target.

    Args:
        source: the checkpoint to transform.
        base: checkpoint to add LoRA adapters to, or None.
        tensors: name -> unsharded tensor, of the weights or adapters.
    """
    tensors = {**tensors, **source.opened.adapter_metadata()}
    if base:
        return items_with_adapters(tensors, base, source.opened.files[0])
    return [TensorItem(*tensor.spec, tensor.chunks) for tensor in tensors.values()]


def items_with_adapters(adapters: Mapping[str, StoredTensor], base_path: str,
                        place: Path) -> list[TensorItem]:
    """Full weights in the base's dtype: base weights plus LoRA adapters.

    Args:
        adapters: name -> tensor, of an adapter file.
        base_path: checkpoint with the base weights.
        place: the adapter file, for messages.
    """
    base = load.read_weights(base_path)
    changed = lora.merge_adapters(base, adapters, place)

    def values_of(tensor: StoredTensor) -> Callable[[], Values]:
        if tensor.name not in changed:
            return tensor.chunks
        return lambda: round_to(changed[tensor.name](), tensor.dtype)

    return [TensorItem(*tensor.spec, values_of(tensor)) for tensor in base.values()]
