"""The sidecar of a checkpoint: `glm4_9b.ckpt.json` next to `glm4_9b.ckpt`.

It holds what the tensors do not: the sizes and constants of config.json. A wrong rope_ratio or
epsilon ruins a run without any error, so each command compares them with its YAML. Training writes
them to output/model.json, from where they pass to the merged checkpoint.
"""
from __future__ import annotations

import contextlib
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mindrlhf import cli
from mindrlhf.checkpoints.containers import SUFFIXES, open_tensors, require_intact
from mindrlhf.checkpoints.fingerprints import Fingerprint, digest
from mindrlhf.checkpoints.fingerprints import fingerprint as fingerprint_of
from mindrlhf.checkpoints.tensors import DTYPES, StoredTensor, TensorItem, pieces
from mindrlhf.cli import UserError
from mindrlhf.json_files import read_json, write_json
from mindrlhf.models.glm4 import model_config, weight_names
from mindrlhf.models.glm4.model_config import ModelConfig
from mindrlhf.outputs import Output

MODEL = "model.json"  # in the output folder of a training run
IN_YAML = ("num_layers", "padded_vocab_size", "hidden_size", "ffn_hidden_size",
           "num_attention_heads", "multi_query_group_num", "kv_channels", "layernorm_epsilon",
           "rope_ratio")
UNCHECKED = "rope_ratio, layernorm_epsilon, the head size and the stop tokens are not checked"


class Sidecar(NamedTuple):
    """The content of a sidecar.

    Attributes:
        path: the file.
        config: sizes and constants of the model.
        about: the other keys: dtype, source, fingerprint and so on.
    """
    path: Path
    config: ModelConfig
    about: dict[str, Any]


def path_beside(checkpoint: str | Path) -> Path:
    """Path of the sidecar of a checkpoint file."""
    return Path(f"{checkpoint}.json")


def find_sidecar(checkpoint: str | Path) -> Path | None:
    """Path of the sidecar of a checkpoint, or None.

    Shards, given as a folder or as one card's file, share the sidecar of their run.
    """
    path = Path(checkpoint).absolute()
    if path.is_dir() or not path.suffix:
        places = [path / MODEL, path.parent / MODEL]
    elif _is_in_rank_folder(path):
        places = [path_beside(checkpoint), path.parents[1] / MODEL, path.parents[2] / MODEL]
    else:
        places = [path_beside(checkpoint)]
    return next((place for place in places if place.is_file()), None)


def _is_in_rank_folder(checkpoint: str | Path) -> bool:
    """Whether a file may be one card's shard: shards are in folders rank_*."""
    return re.fullmatch(r"rank_\d+", Path(checkpoint).absolute().parent.name) is not None


def _name_for(checkpoint: str | Path) -> str:
    """File name of the sidecar that a checkpoint should have."""
    return MODEL if Path(checkpoint).is_dir() else path_beside(checkpoint).name


def write_sidecar(checkpoint: str | Path, config: ModelConfig, *, dtype: str, fingerprint: str,
                  source: str | Path, **about: Any) -> None:
    """Write the sidecar of an existing checkpoint.

    Args:
        checkpoint: path of the file.
        config: sizes and constants of the model.
        dtype: of the tensors, a key of tensors.DTYPES.
        fingerprint: of the file, 64 hex digits.
        source: what the checkpoint was made from.
        about: more keys.
    """
    write_json(path_beside(checkpoint), {
        "numbers": asdict(config), "dtype": dtype, "source": str(source), **about,
        "command": cli.command_line(), "fingerprint": fingerprint,
        "sample_fingerprint": sample_fingerprint(checkpoint)}, sealed=True)


def remove_sidecar(checkpoint: str | Path) -> None:
    """Remove the sidecar of a checkpoint that is about to be replaced.

    Raises:
        UserError: it cannot be removed.
    """
    path = path_beside(checkpoint)
    try:
        with contextlib.suppress(NotADirectoryError):  # then there is no checkpoint either
            path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be removed ({error.strerror}); give another "
                        "path") from None


def sample_fingerprint(checkpoint: str | Path) -> str:
    """Fingerprint of a sample of the values: fast, and enough to tell checkpoints apart."""
    return fingerprint_of(open_tensors(checkpoint), sample=True)


def sample_of_items(items: Sequence[TensorItem]) -> str:
    """The sample_fingerprint() of a checkpoint that is still to be written."""
    identity = Fingerprint()
    for item in items:
        digests = []
        for _, count in pieces(math.prod(item.shape))[:1]:
            made = item.make()
            whole = isinstance(made, (np.ndarray, np.generic))
            first = np.asarray(made if whole else next(iter(made))).reshape(-1)[:count]
            digests.append(digest(np.ascontiguousarray(first, DTYPES[item.dtype][1])
                                  .view(np.uint8).data))
        identity.add(item.spec, digests)
    return identity.hexdigest()


def checkpoint_outputs(checkpoint: str | Path) -> list[Output]:
    """The files of a checkpoint that is to be written: weights and sidecar."""
    def can_read(path: Path, read: Callable[[Path], object]) -> bool:
        try:
            read(path)
        except UserError:
            return False
        return True

    return [Output(Path(checkpoint), "an intact checkpoint", partial(can_read, read=open_tensors)),
            Output(path_beside(checkpoint), "the sidecar of a checkpoint",
                   partial(can_read, read=read_sidecar))]


def holds_already(checkpoint: str | Path, items: Sequence[TensorItem],
                  config: ModelConfig | None) -> bool:
    """Whether a checkpoint file holds these weights and this config; a sample is compared.

    Args:
        checkpoint: an existing file.
        items: the tensors that would be written.
        config: the config that would be written to its sidecar, or None if it is unknown.
    """
    beside = path_beside(checkpoint)
    if beside.is_file() and read_sidecar(beside).config != config:
        return False
    return sample_fingerprint(checkpoint) == sample_of_items(items)


def require_recorded_weights(checkpoint: str | Path, tensors: Mapping[str, StoredTensor],
                             known: str | None = None) -> None:
    """Compare a checkpoint with what was recorded of it when it was written.

    That is the fingerprint in its own sidecar and, in a .ckpt of a run, the checksum at its end.

    Args:
        checkpoint: a file, or a folder of shards.
        tensors: name -> tensor: all that are in the file, or the joined shards.
        known: their fingerprint; None: not computed yet.

    Raises:
        UserError: they differ.
    """
    path = Path(checkpoint)
    if path.is_file():
        require_intact(path)
    beside = path / MODEL if path.is_dir() else path_beside(path)
    recorded = read_sidecar(beside).about.get("fingerprint") if beside.is_file() else None
    if recorded and recorded != (known or fingerprint_of(tensors)):
        raise UserError(f"{path}: was changed or damaged after it was written: its weights do not "
                        f"have the fingerprint in {beside}; copy both again")


def read_sidecar(path: str | Path) -> Sidecar:
    """Read a sidecar.

    Raises:
        UserError: the file is not a sidecar.
    """
    content = read_json(path)
    values = content.pop("numbers", None)
    names = [field.name for field in fields(ModelConfig)]
    if not isinstance(values, dict) or sorted(values) != sorted(names):
        raise UserError(f"{path}: no sidecar of a checkpoint; remove it, or convert the weights "
                        "again")
    values = {name: tuple(value) if isinstance(value, list) else value
              for name, value in values.items()}
    invalid = [f"{name} is {value!r}" for name, value in values.items()
               if not model_config.is_valid(name, value)]
    if invalid:
        raise UserError(f"{path}: {', '.join(invalid)}; remove it, or convert the weights again")
    return Sidecar(Path(path), ModelConfig(**values), content)


def read_config_of(checkpoint: str | Path) -> Sidecar | None:
    """Read the sidecar of a checkpoint; None if it has none.

    Raises:
        UserError: the sidecar belongs to another checkpoint.
    """
    path = find_sidecar(checkpoint)
    if path is None:
        return None
    found = read_sidecar(path)
    sample = found.about.get("sample_fingerprint")
    if sample and sample != sample_fingerprint(checkpoint):
        raise UserError(f"{path}: describes another checkpoint than the one next to it; download "
                        "or convert both again, or remove it if the YAML has the right sizes")
    return found


def compare_fields(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, tuple]:
    """Differences in second's names: name -> (value in first, value in second)."""
    return {name: (first.get(name), second[name]) for name in second
            if first.get(name) != second[name]}


def require_same_model(checkpoint: str | Path | None, settings: dict[str, Any]) -> None:
    """Compare the sizes and constants of a checkpoint with the YAML; warn of what is unknown.

    Args:
        checkpoint: load_checkpoint: a file, or a folder of shards. None: nothing to compare.
        settings: as config.load_settings returns them.

    Raises:
        UserError: a value differs. The message names all that do.
    """
    if not checkpoint:
        return
    _require_full_weights(Path(checkpoint))
    model = settings["model"]["model_config"]
    found = read_config_of(checkpoint)
    yaml = {name: model.get(name, "not set") for name in IN_YAML}
    if found:
        place: str | Path = found.path
        stored = {name: getattr(found.config, name) for name in IN_YAML}
    else:
        place, stored = checkpoint, _measured_sizes(checkpoint)
        yaml |= {f"{name} * kv_channels": model.get(name, 0) * model.get("kv_channels", 0)
                 for name in ("num_attention_heads", "multi_query_group_num")}
        if cli.rank() == 0:
            # the stdout of predict is the answer
            stream = sys.stderr if settings["run_mode"] == "predict" else sys.stdout
            print(f"warning: {checkpoint}: has no {_name_for(checkpoint)} next to it, so "
                  f"{UNCHECKED}; convert_weight.py writes one", file=stream, flush=True)
    wrong = compare_fields(yaml, stored)
    if wrong:
        raise UserError(f"{place}: the YAML is not for this checkpoint: " + "; ".join(
            f"{name} is {ours} in the YAML, {theirs} in the checkpoint"
            for name, (ours, theirs) in wrong.items()))


def _require_full_weights(checkpoint: Path) -> None:
    """Raise UserError if a checkpoint holds LoRA adapters, or weights with Hugging Face's names."""
    inside = sorted(file for rank in checkpoint.glob("rank_0") for file in rank.iterdir()
                    if file.suffix in SUFFIXES)
    file = checkpoint if not checkpoint.is_dir() else inside[0] if inside else None
    if file is None:
        return  # reported where the weights are read
    names = list(open_tensors(file))
    if "step_num" in names:  # a training state
        return
    if any(map(weight_names.is_adapter, names)):
        raise UserError(f"{checkpoint}: holds LoRA adapters, not weights: predict with them as "
                        "--adapter_checkpoint and their base weights as --load_checkpoint, or "
                        "merge both with transform_checkpoint.py --base_checkpoint")
    if not any(map(weight_names.is_weight, names)) or weight_names.CHATGLM_EMBEDDING in names:
        raise UserError(f"{checkpoint}: holds no GLM-4 with MindFormers' names, but "
                        f"{cli.shown(names[:2])}; convert the Hugging Face folder of the model "
                        "with convert_weight.py")


def _measured_sizes(checkpoint: str | Path) -> dict[str, int]:
    """Sizes that the shapes in a checkpoint file imply; none for shards, which are partial."""
    if _is_in_rank_folder(checkpoint) or Path(checkpoint).is_dir():
        return {}
    shapes = {name: tensor.shape for name, tensor in open_tensors(checkpoint).items()}
    return weight_names.measure_shapes(shapes)


def copy_to_run(checkpoint: str | Path, output_dir: str | Path) -> None:
    """Write a run's model.json from the sidecar of the checkpoint it starts from, on rank 0."""
    if cli.rank():
        return
    target, path = Path(output_dir) / MODEL, find_sidecar(checkpoint)
    if path is None:
        target.unlink(missing_ok=True)  # an earlier run's
    elif path.resolve() != target.resolve():
        found = read_sidecar(path)
        write_json(target, {"numbers": asdict(found.config), "source": str(checkpoint),
                            "source_fingerprint": found.about.get("fingerprint")}, sealed=True)


def copy_to_result(source: str | Path, target: str | Path, *, dtype: str,
                   fingerprint: str) -> bool:
    """Write the sidecar of a checkpoint that was merged or resharded.

    Args:
        source: what it was made from: a file, or a run's checkpoint or checkpoint_network folder.
        target: path of the new file, or of the folder of the new shards.
        dtype: of the new tensors, a key of tensors.DTYPES.
        fingerprint: of the new weights, joined over all shards.

    Returns:
        whether the source has a sidecar.
    """
    path = find_sidecar(source)
    if path is None:
        if not Path(target).is_dir():
            remove_sidecar(target)
        return False
    config = read_sidecar(path).config
    if Path(target).is_dir():
        write_json(Path(target) / MODEL, {"numbers": asdict(config), "source": str(source),
                                          "dtype": dtype, "fingerprint": fingerprint},
                   sealed=True)
    else:
        write_sidecar(target, config, dtype=dtype, fingerprint=fingerprint, source=source)
    return True
