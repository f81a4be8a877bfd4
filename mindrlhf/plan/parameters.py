"""What a card holds of the weights, the gradients and the optimizer's state, to the byte.

The rules are those of MindFormers' ChatGLM2 (how each weight is split) and of MindSpore's optimizer
sharding. They were found by compiling plans and reading the shapes on every rank;
tests/test_plan.py has the record.
"""
from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from mindrlhf.models.glm4 import lora, weight_names
from mindrlhf.models.glm4.model_config import ModelConfig
from mindrlhf.parallel import Plan

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
# bytes: MindSpore's parallel_optimizer_threshold; the optimizer does not shard smaller weights
OPTIMIZER_THRESHOLD = 64 * 1024


@dataclass(frozen=True)
class Held:
    """One parameter on one card.

    Attributes:
        shape: of the full parameter.
        gathered: shape of the part that the card computes with. If the optimizer shards that part,
            it is gathered first.
        slice: shape of the part that the card holds between steps.
        dtype: of its elements.
        trained: whether it has a gradient and moments.
    """
    shape: tuple[int, ...]
    gathered: tuple[int, ...]
    slice: tuple[int, ...]
    dtype: str
    trained: bool

    @property
    def bytes(self) -> int:
        """Bytes of the part that the card holds."""
        return math.prod(self.slice) * BYTES[self.dtype]

    @property
    def shared_by(self) -> int:
        """Over how many cards the optimizer shards the part (1: not at all)."""
        return math.prod(self.gathered) // math.prod(self.slice)


def all_shapes(settings: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every parameter of the network, adapters included: name -> shape."""
    table = weight_names.parameter_shapes(ModelConfig.of(settings))
    if "lora" not in settings:
        return table
    rank, names = settings["lora"]["rank"], settings["lora"]["target_modules"]
    targets = {cell for name in names for cell in lora.TARGETS[name].split("|")}
    for name, shape in list(table.items()):
        cell = name.removesuffix(".weight")
        if "encoder.layers" in name and cell != name and cell.rsplit(".", 1)[1] in targets:
            table[cell + weight_names.LORA_A] = (rank, shape[1])
            table[cell + weight_names.LORA_B] = (shape[0], rank)
    return table


def split_of(name: str, shape: tuple[int, ...], plan: Plan) -> tuple[int, ...]:
    """How model parallelism splits a parameter; the optimizer's sharding is not included.

    Args:
        name: of the parameter.
        shape: of the full parameter.
        plan: how the model is sharded.

    Returns:
        for each dimension, the number of parts.
    """
    model, cell = plan.model, name.rsplit(".", 1)[0]
    if "layernorm" in name:
        return (1,)
    if name == weight_names.EMBEDDING or cell.endswith("output_layer"):
        if plan.keeps_vocabulary or shape[0] % model:
            return 1, 1
        return (model if name == weight_names.EMBEDDING else plan.cards), 1
    splits_columns = cell.endswith("dense_4h_to_h")
    if name.endswith(weight_names.LORA_A):
        return 1, model if splits_columns else 1
    if name.endswith(weight_names.LORA_B):
        return 1 if splits_columns else model, 1
    if splits_columns:
        return 1, model
    return (model,) if len(shape) == 1 else (model, 1)


def held(settings: dict[str, Any], devices: int) -> dict[str, Held]:
    """Every parameter as one card holds it.

    Args:
        settings: as config.load_settings returns them.
        devices: number of cards.

    Returns:
        name -> what the card holds.
    """
    plan, model = Plan.of(settings, devices), settings["model"]["model_config"]
    table = {}
    for name, shape in all_shapes(settings).items():
        # norms are float32: layernorm_compute_type
        dtype = "float32" if "layernorm" in name else model["param_init_type"]
        parts = split_of(name, shape, plan)
        part = tuple(size // count for size, count in zip(shape, parts))
        trained = "lora" not in settings or weight_names.is_adapter(name)
        own = part if name.endswith("bias") else _shard(part, parts, plan, dtype)
        table[name] = Held(shape, part, own, dtype, trained)
    return table


def _shard(part: tuple[int, ...], parts: tuple[int, ...], plan: Plan,
           dtype: str) -> tuple[int, ...]:
    """Shape of a card's slice of a part, after the optimizer shards it over the part's cards."""
    copies = plan.cards // math.prod(parts)
    if (not plan.shards_optimizer or copies == 1 or part[0] % copies
            or math.prod(part) * BYTES[dtype] < OPTIMIZER_THRESHOLD):
        return part
    return (part[0] // copies, *part[1:])


def parameter_bytes(settings: dict[str, Any], devices: int) -> dict[str, int]:
    """What one card holds of weights and of Adam's moments (adam_m.*, adam_v.*, float32).

    Args:
        settings: as config.load_settings returns them.
        devices: number of cards.

    Returns:
        name -> bytes.
    """
    table = held(settings, devices)
    found = {name: part.bytes for name, part in table.items()}
    if "optimizer" in settings:
        found |= {f"adam_{kind}.{name}": math.prod(part.slice) * 4
                  for kind in "mv" for name, part in table.items() if part.trained}
    return found
