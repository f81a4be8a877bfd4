"""Conversion of GLM-4's weights between a Hugging Face folder and a MindSpore checkpoint.

Tensors are read, converted and written piece by piece, so no tensor is ever in memory as a whole.
"""
from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mindrlhf import cli, files
from mindrlhf.checkpoints import containers, tensors
from mindrlhf.checkpoints.strict import describe_difference
from mindrlhf.checkpoints.tensors import StoredTensor
from mindrlhf.cli import UserError
from mindrlhf.models.glm4 import hf, model_config, sidecar, weight_names
from mindrlhf.models.glm4.model_config import ModelConfig

DTYPES = {"bf16": "BF16", "fp16": "F16", "fp32": "F32"}  # option --dtype -> key of tensors.DTYPES


class Range(NamedTuple):
    """Some consecutive elements of a stored tensor: `count` of them from `first` on."""
    tensor: StoredTensor
    first: int
    count: int


@dataclass(frozen=True)
class Conversion:
    """How stored values become those of the output.

    Attributes:
        dtype: of the output, a key of tensors.DTYPES.
        allow_nonfinite: whether NaN and inf in the input are accepted.
    """
    dtype: str
    allow_nonfinite: bool

    def item(self, name: str, shape: tuple[int, ...], ranges: Sequence[Range]) -> tuple:
        """A tensor of the output, as containers.write takes it; its elements come from the ranges in order."""
        jobs = [(ranges, *piece) for piece in tensors.pieces(math.prod(shape))]
        return name, self.dtype, shape, lambda: tensors.map_in_order(self.piece, jobs)

    def piece(self, ranges: Sequence[Range], begin: int, count: int) -> np.ndarray:
        """`count` converted elements from `begin` on."""
        parts = []
        for stored, first, length in ranges:
            taken = min(max(length - begin, 0), count)
            if taken:
                parts.append(self.convert(stored, first + begin, taken))
            begin, count = max(begin - length, 0), count - taken
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def convert(self, stored: StoredTensor, first: int, count: int) -> np.ndarray:
        """Some elements of a stored tensor, converted.

        Raises:
            UserError: they hold NaN or inf, or a value beyond the range of dtype.
        """
        values = stored.read(first, count)
        converted = tensors.convert_dtype(values, stored.dtype, self.dtype)
        good = tensors.is_finite(converted, self.dtype)
        if good.all():
            return converted
        was_finite, place = tensors.is_finite(values, stored.dtype), f"{stored.file.name}: {stored.name}"
        if (was_finite & ~good).any():
            worst = np.abs(tensors.to_float32(values[was_finite], stored.dtype)).max()
            raise UserError(f"{place} holds {worst:g}, beyond the range of the output (largest: "
                            f"{tensors.LARGEST[self.dtype]:g}); convert with another --dtype")
        if not self.allow_nonfinite:
            raise UserError(f"{place} holds NaN or inf; download it again, or accept them with --allow_nonfinite")
        return converted


def to_mindspore(source: str, target: str, *, dtype: str, allow_nonfinite: bool = False) -> str:
    """Convert a Hugging Face folder to a checkpoint file and its sidecar.

    Args:
        source: folder with config.json and *.safetensors, of either spelling.
        target: .ckpt or .safetensors file to write.
        dtype: a key of DTYPES.
        allow_nonfinite: accept NaN and inf.

    Returns:
        one line about the result.

    Raises:
        UserError: the folder is no GLM-4 or is damaged, or the file cannot be written.
    """
    containers.require_suffix(target)
    conversion = Conversion(DTYPES[dtype], allow_nonfinite)
    with _progress(target) as progress:
        numbers, layout, stored = hf.read_hf_folder(source)
        shapes, items = weight_names.parameter_shapes(numbers), []
        for name, parts in weight_names.hf_parts(numbers, layout).items():
            ranges = [Range(stored[part.name], 0, stored[part.name].elements) for part in parts]
            items.append(conversion.item(name, shapes[name], ranges))
        _announce(items, target, progress)
        sidecar.remove_sidecar(target)  # it would describe other weights, if this were interrupted
        identity = containers.write_tensors(target, items, progress.update)
    sidecar.write_sidecar(target, numbers, dtype=conversion.dtype, fingerprint=identity, source=source, source_layout=layout)
    return _summary(target, progress.total, dtype, numbers)


def to_hugging_face(source: str, target: str, *, dtype: str, allow_nonfinite: bool = False, layout: str = "glm",
                    config: str | None = None) -> str:
    """Convert a checkpoint file to a Hugging Face folder.

    Args:
        source: .ckpt or .safetensors file with whole weights.
        target: new folder.
        dtype: a key of DTYPES.
        allow_nonfinite: accept NaN and inf.
        layout: "glm" or "chatglm".
        config: config.json or sidecar of the model, if no sidecar lies beside the checkpoint.

    Returns:
        one line about the result.

    Raises:
        UserError: the checkpoint is damaged or not described, or the folder cannot be written.
    """
    conversion = Conversion(DTYPES[dtype], allow_nonfinite)
    with _progress(target) as progress:
        stored = containers.open_tensors(source)
        numbers = find_config(source, config)
        problem = describe_difference(weight_names.parameter_shapes(numbers),
                                      {name: tensor.shape for name, tensor in stored.items()})
        if problem:
            raise UserError(f"{source}: the weights do not have the shapes that its numbers imply. {problem}")
        items = []
        for name, parts in weight_names.hf_parts(numbers, layout).items():
            first = 0
            for part in parts:
                count = math.prod(part.shape)
                items.append(conversion.item(part.name, part.shape, [Range(stored[name], first, count)]))
                first += count
        _announce(items, target, progress)
        hf.write_hf_folder(target, numbers, layout, conversion.dtype, items, progress.update)
    return _summary(target, progress.total, dtype, numbers) + f"; {layout} names; copy the model's tokenizer files there too"


def find_config(source: str, given: str | None) -> ModelConfig:
    """The numbers of a checkpoint: from its sidecar, or from --config; if both are there, they must agree."""
    numbers, path = sidecar.read_config_of(source)
    if given is None:
        if numbers is None:
            raise UserError(f"{source}: has no {sidecar.path_beside(source).name} beside it; copy it there, or "
                            "give --config with the config.json of the model that it comes from")
        return numbers
    content = files.read_json(cli.existing_file(given, "a config.json or a sidecar"))
    config = (sidecar.read_sidecar(given)[0] if "numbers" in content
              else model_config.parse_hf_config(content, given))
    wrong = numbers and sidecar.compare_fields(
        asdict(numbers), {name: getattr(config, name) for name in sidecar.IN_YAML})
    if wrong:
        raise UserError(f"{given}: does not describe this checkpoint: " + "; ".join(
            f"{name} is {theirs} there, {ours} in {path}" for name, (ours, theirs) in wrong.items()))
    return config


@contextlib.contextmanager
def _progress(target: str) -> Iterator[Any]:
    """A progress bar of bytes; Ctrl-C and SIGTERM end in one line."""
    # the C library keeps giving each piece's memory back and asking for it anew, unless a larger one was freed once
    np.empty(16 << 20, np.uint8)
    try:
        with cli.progress_bar(None, "convert", "B", unit_scale=True) as progress:
            yield progress
    except KeyboardInterrupt:
        raise UserError(f"{target}: stopped; nothing was left there") from None


def _announce(items: Sequence[tuple], target: str | Path, progress: Any) -> None:
    """Tell the bar how many bytes there will be, and the user if the disk has no room for them."""
    progress.total = sum(tensors.count_bytes(dtype, shape) for _, dtype, shape, _ in items)
    progress.refresh()
    files.require_space(target, progress.total)


def _summary(target: str, nbytes: int, dtype: str, numbers: ModelConfig) -> str:
    return (f"{target}: {nbytes / 1e9:.2f} GB, {dtype}; {numbers.num_layers} layers, rope_ratio {numbers.rope_ratio}, "
            f"layernorm_epsilon {numbers.layernorm_epsilon}")
