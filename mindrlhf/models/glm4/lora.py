"""LoRA: adapters of low rank for frozen weights (arXiv:2106.09685), W x + alpha / rank * B (A x).

The cells are MindFormers'. An adapter file holds A and B of every adapted matrix, alpha and rank,
so it can be merged without the YAML. The network without adapters is the reference model, so the
same preprocessed data serve LoRA and full fine-tuning.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mindrlhf.checkpoints.tensors import StoredTensor
from mindrlhf.cli import UserError
from mindrlhf.models.glm4.weight_names import LORA_A, LORA_B, is_adapter

if TYPE_CHECKING:
    from mindspore import nn

TARGETS = {"qkv": "query_key_value", "dense": "dense", "mlp": "dense_h_to_4h|dense_4h_to_h"}
METADATA = ("lora_rank", "lora_alpha")  # names of an adapter file's two scalars


class Adapter(NamedTuple):
    """The two matrices of an adapter.

    Attributes:
        a: float32 (rank, in).
        b: float32 (out, rank).
    """
    a: np.ndarray
    b: np.ndarray


class AdapterSet(NamedTuple):
    """The adapters in a file.

    Attributes:
        adapters: name of the adapted weight -> adapter.
        scale: alpha / rank.
    """
    adapters: dict[str, Adapter]
    scale: float


def add_adapters(network: nn.Cell, lora: Mapping[str, Any], *, compute_dtype: str,
                 seed: int) -> None:
    """Add an adapter to each target matrix and freeze all other parameters.

    Args:
        network: a ChatGLM2 network, changed in place. B is zero, so its outputs do not change.
        lora: the section `lora` of the YAML: rank, alpha, dropout, target_modules.
        compute_dtype: model_config.compute_dtype, for the products of adapters and their base
            matrices. MindFormers 1.3.0 would compute both in float16.
        seed: of the initial A, which is the same in every parallel plan.
    """
    from mindformers.pet.pet_config import LoraConfig
    from mindformers.pet.tuners.lora_adapter import LoraAdapter

    from mindrlhf.checkpoints.slices import ArrayTensor, FileTensor
    pattern = "|".join(TARGETS[target] for target in lora["target_modules"])
    LoraAdapter.get_pet_model(network.transformer.encoder, LoraConfig(
        lora_rank=lora["rank"], lora_alpha=lora["alpha"], lora_dropout=lora["dropout"],
        target_modules=f"({pattern})$", param_init_type="float32", compute_dtype=compute_dtype))
    for name, parameter in network.parameters_and_names():
        parameter.requires_grad = is_adapter(name)
        if is_adapter(name):
            parameter.name = name  # MindFormers names it relative to its cell
            start = ArrayTensor(initial_values(name, parameter.shape, seed))
            # each card of a parallel plan reads its part
            parameter.set_data(FileTensor(start, parameter.dtype))


def initial_values(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Initial adapter matrix: B zero, A uniform within 1 / sqrt(in), as in MindPet and PEFT.

    The values depend on the name and the seed alone. MindSpore's initializers draw each card's
    slice separately, so a parallel plan would start from other adapters than one process.

    Args:
        name: of the parameter.
        shape: (rank, in) of A, (out, rank) of B.
        seed: 0 or above.

    Returns:
        float32 of that shape.
    """
    if name.endswith(LORA_B):
        return np.zeros(shape, np.float32)
    generator = np.random.default_rng([seed, *name.encode()])
    bound = shape[1] ** -0.5
    return generator.uniform(-bound, bound, shape).astype(np.float32)


def adapter_metadata(lora: Mapping[str, Any]) -> dict[str, float]:
    """METADATA of the section `lora` of the YAML, for ms.save_checkpoint's append_dict."""
    return dict(zip(METADATA, (int(lora["rank"]), float(lora["alpha"]))))


def adapter_pairs(stored: Mapping[str, StoredTensor], path: str | Path) -> AdapterSet:
    """Read the adapters in a file.

    Args:
        stored: name -> tensor, of the file.
        path: of the file, for messages.

    Raises:
        UserError: the file holds no adapters, or one of an adapter's two matrices is missing.
    """
    names = [name.removesuffix(LORA_A) for name in stored if name.endswith(LORA_A)]
    if not names or any(name not in stored for name in METADATA):
        raise UserError(f"{path}: holds no adapters; training with a `lora:` section writes them "
                        "to checkpoint_network")
    unpaired = [name for name in names if name + LORA_B not in stored]
    if unpaired or len(names) != sum(name.endswith(LORA_B) for name in stored):
        raise UserError(f"{path}: an adapter lacks its other matrix; copy the file again")
    rank, alpha = (float(stored[name].array()) for name in METADATA)
    adapters = {f"{name}.weight": Adapter(stored[name + LORA_A].float32(),
                                          stored[name + LORA_B].float32())
                for name in names}
    return AdapterSet(adapters, alpha / rank)


def merge_adapters(base: Mapping[str, StoredTensor], stored: Mapping[str, StoredTensor],
                   path: str | Path) -> dict[str, Callable[[], np.ndarray]]:
    """Full weights: base weights plus adapters.

    Args:
        base: name -> tensor, of the base weights.
        stored: name -> tensor, of an adapter file.
        path: of the adapter file, for messages.

    Returns:
        name -> function that returns the float32 values, of each adapted weight.

    Raises:
        UserError: an adapter does not fit its base weight, or the base does not have the weight.
    """
    adapters, scale = adapter_pairs(stored, path)

    def merged(name: str) -> np.ndarray:
        a, b = adapters[name]
        return base[name].float32() + np.float32(scale) * (b @ a)

    for name, (a, b) in adapters.items():
        if name not in base or tuple(base[name].shape) != (b.shape[0], a.shape[1]):
            raise UserError(f"{path}: its adapter of {name} does not fit the base weights; give "
                            "the base it was trained on, and --src_strategy with the shards of a "
                            "parallel plan")
    return {name: partial(merged, name) for name in adapters}
