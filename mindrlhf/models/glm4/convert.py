"""Conversion of GLM-4's weights between a Hugging Face folder and a MindSpore checkpoint.

Tensors are read, converted and written in pieces, so no complete tensor is ever in memory.
"""
from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mindrlhf import cli, files, json_files, locks, outputs
from mindrlhf.checkpoints import containers, tensors
from mindrlhf.checkpoints.strict import describe_difference
from mindrlhf.checkpoints.tensors import StoredTensor, TensorItem
from mindrlhf.cli import UserError
from mindrlhf.models.glm4 import hf, model_config, sidecar, weight_names
from mindrlhf.models.glm4.model_config import ModelConfig

DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}  # option --dtype -> key of tensors.DTYPES


class Range(NamedTuple):
    """Consecutive elements of a stored tensor: `length` of them, from `first` on."""
    tensor: StoredTensor
    first: int
    length: int


@dataclass(frozen=True)
class Conversion:
    """How stored values are converted.

    Attributes:
        dtype: of the output, a key of tensors.DTYPES.
        allow_nonfinite: whether NaN and inf in the input are accepted.
    """
    dtype: str
    allow_nonfinite: bool

    def item(self, name: str, shape: tuple[int, ...], ranges: Sequence[Range]) -> TensorItem:
        """A tensor of the output. Its elements are those of the ranges, in order.

        Args:
            name: in the output.
            shape: in the output.
            ranges: where the elements are stored.
        """
        jobs = [(ranges, *piece) for piece in tensors.pieces(math.prod(shape))]
        return TensorItem(name, self.dtype, shape, lambda: tensors.map_in_order(self.piece, jobs))

    def piece(self, ranges: Sequence[Range], begin: int, count: int) -> np.ndarray:
        """Some converted elements of joined ranges.

        Args:
            ranges: of stored tensors.
            begin: first element, counted over all ranges.
            count: number of elements.

        Returns:
            stored values of dtype, (count,).
        """
        parts = []
        for stored, first, length in ranges:
            taken = min(max(length - begin, 0), count)
            if taken:
                parts.append(self.convert(stored, first + begin, taken))
            begin, count = max(begin - length, 0), count - taken
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def convert(self, stored: StoredTensor, first: int, count: int) -> np.ndarray:
        """Convert elements of a stored tensor.

        Args:
            stored: the tensor.
            first: first element.
            count: number of elements.

        Returns:
            stored values of dtype, (count,).

        Raises:
            UserError: a value is NaN or inf, or beyond the range of dtype.
        """
        values = stored.read(first, count)
        converted = tensors.convert_dtype(values, stored.dtype, self.dtype)
        good = tensors.is_finite(converted, self.dtype)
        if good.all():
            return converted
        was_finite = tensors.is_finite(values, stored.dtype)
        place = f"{stored.file.name}: {stored.name}"
        if (was_finite & ~good).any():
            worst = np.abs(tensors.to_float32(values[was_finite], stored.dtype)).max()
            raise UserError(f"{place} holds {worst:g}, beyond the range of the output (largest: "
                            f"{tensors.LARGEST[self.dtype]:g}); convert with another --dtype")
        if not self.allow_nonfinite:
            raise UserError(f"{place} holds NaN or inf; download it again, or accept them with "
                            "--allow_nonfinite")
        return converted


def to_mindspore(source: str, target: str, *, dtype: str, allow_nonfinite: bool = False,
                 overwrite: bool = False) -> str:
    """Convert a Hugging Face folder to a checkpoint file and its sidecar.

    Args:
        source: folder with config.json and *.safetensors, in either layout.
        target: .ckpt or .safetensors file to write.
        dtype: a key of DTYPES.
        allow_nonfinite: accept NaN and inf.
        overwrite: replace a checkpoint that holds other weights.

    Returns:
        one line about the result.

    Raises:
        UserError: the folder is not a GLM-4 or is damaged, or the file cannot be written or must
            not be replaced.
    """
    containers.require_suffix(target)
    read = [*Path(source).glob("*.safetensors"),
            *(Path(source, name) for name in (hf.INDEX, "config.json"))]
    outputs.require_no_loss(sidecar.checkpoint_outputs(target), read)
    conversion = Conversion(DTYPES[dtype], allow_nonfinite)
    with locks.hold(target), _progress(target) as progress:
        found = hf.read_hf_folder(source)
        shapes, items = weight_names.parameter_shapes(found.config), []
        for name, parts in weight_names.hf_parts(found.config, found.layout).items():
            ranges = [Range(found.tensors[part.name], 0, found.tensors[part.name].elements)
                      for part in parts]
            items.append(conversion.item(name, shapes[name], ranges))
        outputs.require_overwrite(target, overwrite,
                                partial(sidecar.holds_already, target, items, found.config))
        _prepare(items, target, progress)
        sidecar.remove_sidecar(target)  # after an interruption it would describe other weights
        identity = containers.write_tensors(target, items, progress.update)
        sidecar.write_sidecar(target, found.config, dtype=conversion.dtype, fingerprint=identity,
                              source=source, source_layout=found.layout)
    return _summary(target, progress.total, dtype, found.config)


def to_hugging_face(source: str, target: str, *, dtype: str, allow_nonfinite: bool = False,
                    layout: str = "glm", config: str | None = None,
                    tokenizer: str | None = None,
                    documents: Mapping[str, bytes] | None = None) -> str:
    """Convert a checkpoint file to a Hugging Face folder.

    Args:
        source: .ckpt or .safetensors file with unsharded weights.
        target: new folder.
        dtype: a key of DTYPES.
        allow_nonfinite: accept NaN and inf.
        layout: "glm" or "chatglm".
        config: config.json or sidecar of the model, if the checkpoint has no sidecar.
        tokenizer: tokenizer.model, or a folder with the tokenizer's files; None: those beside the
            source, if any.
        documents: name -> content of more files to write: the model card.

    Returns:
        one line about the result.

    Raises:
        UserError: the checkpoint is damaged or its sizes are unknown, or the folder cannot be
            written.
    """
    conversion = Conversion(DTYPES[dtype], allow_nonfinite)
    extra = hf.find_tokenizer(tokenizer or Path(source).parent, required=tokenizer is not None)
    with locks.hold(target), _progress(target) as progress:
        stored = containers.open_tensors(source)
        model = find_config(source, config)
        problem = describe_difference(weight_names.parameter_shapes(model),
                                      {name: tensor.shape for name, tensor in stored.items()})
        if problem:
            raise UserError(f"{source}: the weights do not have the shapes that its config "
                            f"implies. {problem}")
        sidecar.require_recorded_weights(source, stored)
        items = []
        for name, parts in weight_names.hf_parts(model, layout).items():
            first = 0
            for part in parts:
                rows = Range(stored[name], first, math.prod(part.shape))
                items.append(conversion.item(part.name, part.shape, [rows]))
                first += rows.length
        _prepare(items, target, progress)
        hf.write_hf_folder(target, model, layout, conversion.dtype, items, progress.update, extra,
                           documents=documents)
    summary = _summary(target, progress.total, dtype, model)
    copied = (f"with {', '.join(file.name for file in extra)} of {extra[0].parent}" if extra else
              "copy the model's tokenizer files there too, or name them with --tokenizer")
    return f"{summary}; {layout} names; {copied}"


def find_config(source: str, given: str | None) -> ModelConfig:
    """Sizes and constants of a checkpoint, from its sidecar or from --config.

    Args:
        source: the checkpoint.
        given: --config: a config.json or a sidecar, or None.

    Raises:
        UserError: there is neither, or both exist and differ.
    """
    found = sidecar.read_config_of(source)
    if given is None:
        if found is None:
            raise UserError(f"{source}: has no {sidecar.path_beside(source).name} next to it; copy "
                            "it there, or give --config with the config.json of its model")
        return found.config
    content = json_files.read_json(cli.existing_file(given, "a config.json or a sidecar"))
    config = (sidecar.read_sidecar(given).config if "numbers" in content
              else model_config.parse_hf_config(content, given))
    if found:
        wrong = sidecar.compare_fields(
            asdict(found.config), {name: getattr(config, name) for name in sidecar.IN_YAML})
        if wrong:
            raise UserError(f"{given}: does not describe this checkpoint: " + "; ".join(
                f"{name} is {theirs} there, {ours} in {found.path}"
                for name, (ours, theirs) in wrong.items()))
    return config


@contextlib.contextmanager
def _progress(target: str) -> Iterator[Any]:
    """A progress bar of bytes; Ctrl-C and SIGTERM end in one line."""
    # Until a larger block has been freed once, glibc returns each piece's memory to the system and
    # requests it again.
    np.empty(16 << 20, np.uint8)
    try:
        with cli.progress_bar(None, "convert", "B", unit_scale=True) as progress:
            yield progress
    except KeyboardInterrupt:
        raise UserError(f"{target}: stopped; nothing was written there") from None


def _prepare(items: Sequence[TensorItem], target: str | Path, progress: Any) -> None:
    """Set the total of the progress bar, and raise UserError if the disk is too small."""
    progress.total = sum(item.spec.nbytes for item in items)
    progress.refresh()
    files.require_space(target, progress.total)


def _summary(target: str, nbytes: int, dtype: str, config: ModelConfig) -> str:
    """One line about what was written."""
    return (f"{target}: {cli.size_text(nbytes)}, {dtype}; {config.num_layers} layers, "
            f"rope_ratio {config.rope_ratio}, layernorm_epsilon {config.layernorm_epsilon}")
