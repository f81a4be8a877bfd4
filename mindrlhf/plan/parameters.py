"""What a card holds of the weights, the gradients and the optimizer's state, to the byte.

The rules are those of MindFormers' ChatGLM2 (how each weight is split) and of MindSpore's optimizer
sharding. They were found by compiling plans for real and reading the shapes off every rank;
tests/test_plan.py has the record.
"""
import math
from dataclasses import dataclass

from mindrlhf.models.glm4 import lora, weight_names
from mindrlhf.models.glm4.model_config import ModelConfig
from mindrlhf.parallel import Plan

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
OPTIMIZER_THRESHOLD = 64 * 1024  # bytes: MindSpore's parallel_optimizer_threshold; smaller weights stay whole


@dataclass(frozen=True)
class Held:
    """One parameter on one card.

    Attributes:
        shape: of the whole parameter.
        gathered: shape of the part that the card computes with; where the optimizer shares it out,
        gathered for that.
        slice: shape of the part that it holds between steps.
        dtype: of its numbers.
        trained: whether it has a gradient and moments.
    """
    shape: tuple
    gathered: tuple
    slice: tuple
    dtype: str
    trained: bool

    @property
    def bytes(self):
        """Bytes of the part that the card holds."""
        return math.prod(self.slice) * BYTES[self.dtype]

    @property
    def shared_by(self):
        """Over how many cards the optimizer shares the part out (1: not at all)."""
        return math.prod(self.gathered) // math.prod(self.slice)


def all_shapes(settings):
    """Name -> shape of every parameter of the network, adapters included."""
    table = weight_names.parameter_shapes(ModelConfig.of(settings))
    if "lora" in settings:
        rank = settings["lora"]["rank"]
        targets = "|".join(lora.TARGETS[target] for target in settings["lora"]["target_modules"]).split("|")
        for name, shape in list(table.items()):
            cell = name.removesuffix(".weight")
            if "encoder.layers" in name and cell != name and cell.rsplit(".", 1)[1] in targets:
                table |= {cell + weight_names.LORA_A: (rank, shape[1]), cell + weight_names.LORA_B: (shape[0], rank)}
    return table


def split_of(name, shape, plan):
    """Into how many parts each dimension of a parameter is split, without the optimizer's sharding."""
    model, cell = plan.model, name.rsplit(".", 1)[0]
    if "layernorm" in name:
        return (1,)
    if name == weight_names.EMBEDDING or cell.endswith("output_layer"):
        if plan.keeps_vocabulary or shape[0] % model:
            return 1, 1
        return (model if name == weight_names.EMBEDDING else plan.cards), 1
    if name.endswith(weight_names.LORA_A):
        return 1, model if cell.endswith("dense_4h_to_h") else 1
    if name.endswith(weight_names.LORA_B):
        return 1 if cell.endswith("dense_4h_to_h") else model, 1
    if cell.endswith("dense_4h_to_h"):
        return 1, model
    return (model,) if len(shape) == 1 else (model, 1)


def held(settings, devices):
    """Every parameter as one card holds it.

    Args:
        settings: as config.load() returns them.
        devices: number of cards.

    Returns:
        dict, name -> Held.
    """
    plan, model = Plan.of(settings, devices), settings["model"]["model_config"]
    table = {}
    for name, shape in all_shapes(settings).items():
        dtype = "float32" if "layernorm" in name else model["param_init_type"]  # layernorm_compute_type
        parts = split_of(name, shape, plan)
        part = tuple(size // count for size, count in zip(shape, parts))
        trained = "lora" not in settings or weight_names.is_adapter(name)
        shared = _shared(part, parts, plan, dtype) if not name.endswith("bias") else part
        table[name] = Held(shape, part, shared, dtype, trained)
    return table


def _shared(part, parts, plan, dtype):
    """Slice of a part that several cards hold alike, after the optimizer shared it out over them."""
    copies = plan.cards // math.prod(parts)
    if (not plan.shards_optimizer or copies == 1 or part[0] % copies
            or math.prod(part) * BYTES[dtype] < OPTIMIZER_THRESHOLD):
        return part
    return (part[0] // copies, *part[1:])


def parameter_bytes(settings, devices):
    """Name -> bytes of every weight and of Adam's moments (adam_m.*, adam_v.*, float32) on one card."""
    table = held(settings, devices)
    moments = {f"adam_{kind}.{name}": math.prod(part.slice) * 4
               for kind in "mv" for name, part in table.items() if part.trained}
    return {name: part.bytes for name, part in table.items()} | (moments if "optimizer" in settings else {})
