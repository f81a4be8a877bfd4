"""What to change in a YAML whose plan does not fit, the cheapest change first."""
from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from mindrlhf import config
from mindrlhf.models.glm4.model_config import ModelConfig
from mindrlhf.parallel import Plan
from mindrlhf.plan import memory

UNITS = {"GB": 1e9, "MB": 1e6}
CHUNK_SIZES = (512, 1024, 2048, 4096, 8192, 16384)  # of dpo.logps_chunk_size
# as in finetune_glm4_9b_lora.yaml
ADAPTERS = {"rank": 8, "alpha": 16, "dropout": 0.0, "target_modules": ["qkv", "dense", "mlp"]}


class Remedy(NamedTuple):
    """A change of the YAML that saves memory.

    Attributes:
        sentence: for the user.
        changes: dotted key -> value.
    """
    sentence: str
    changes: dict[str, Any]


def room(settings: dict[str, Any], size: float) -> float:
    """Bytes of a card that may be used.

    Args:
        settings: of the YAML, whose max_device_memory may set a lower limit.
        size: memory of the card, GB.
    """
    text = config.get_setting(settings, "context.max_device_memory", "")
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(GB|MB)", text)
    return min(size * 1e9, float(match[1]) * UNITS[match[2]] if match else size * 1e9)


def total_with(settings: dict[str, Any], devices: int, changes: Mapping[str, Any]) -> float:
    """Bytes of a card after some changes of the settings.

    Args:
        settings: as config.load_settings returns them.
        devices: number of cards.
        changes: dotted key -> value.
    """
    return memory.peak_memory_of(config.with_changes(settings, changes), devices).bytes


def fewest_recomputed(settings: dict[str, Any], devices: int, limit: float) -> int | None:
    """The smallest number of recomputed layers with which a card's memory suffices, or None.

    Args:
        settings: as config.load_settings returns them, of run_mode finetune.
        devices: number of cards.
        limit: bytes of a card that may be used.
    """
    def fits(count: int) -> bool:
        return total_with(settings, devices, {"recompute_config.recompute": count}) <= limit

    low, high = 0, ModelConfig.of(settings).num_layers
    if not fits(high):
        return None
    while low < high:  # memory falls with the number of recomputed layers
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return low


def remedies(settings: dict[str, Any], devices: int, limit: float) -> list[Remedy]:
    """Changes that save memory, the cheapest first.

    Args:
        settings: as config.load_settings returns them.
        devices: number of cards.
        limit: bytes of a card that may be used.
    """
    plan, model = Plan.of(settings, devices), settings["model"]["model_config"]
    batch, length = settings["runner_config"]["batch_size"], model["seq_length"]
    found = []
    positions = memory.shares_of(settings, devices).everywhere
    chunk_sizes = [size for size in CHUNK_SIZES if size <= positions]
    if chunk_sizes:
        totals = {size: total_with(settings, devices, {"dpo.logps_chunk_size": size})
                  for size in chunk_sizes}
        size = min(chunk_sizes, key=lambda size: (totals[size], -size))
        found.append(Remedy(f"dpo.logps_chunk_size {size}", {"dpo.logps_chunk_size": size}))
    if settings["run_mode"] == "finetune":
        count = fewest_recomputed(settings, devices, limit)
        values = {"recompute_config.recompute": True if count is None else count}
        if plan.is_sharded and plan.data > 1:
            values["parallel.enable_parallel_optimizer"] = True
        found += [Remedy(f"{key} {value}", {key: value}) for key, value in values.items()]
    if batch > 1:
        found.append(Remedy(f"runner_config.batch_size {batch // 2}",
                            {"runner_config.batch_size": batch // 2}))
    sizes = ModelConfig.of(settings)
    flash = model.get("use_flash_attention")
    heads = sizes.multi_query_group_num if flash else sizes.num_attention_heads
    if plan.is_sharded and plan.data % 2 == 0 and heads % (2 * plan.model) == 0:
        data, width = plan.data // 2, 2 * plan.model
        found.append(Remedy(f"parallel_config.data_parallel {data}, model_parallel {width}",
                            {"parallel_config.data_parallel": data,
                             "parallel_config.model_parallel": width}))
    shorter = [length // part for part in (2, 4, 8) if length // part >= 512]
    return found + [Remedy(f"seq_length {size}, and preprocess with --seq_len {size}",
                           {"model.model_config.seq_length": size}) for size in shorter]


def advice(settings: dict[str, Any], devices: int, limit: float) -> str:
    """One line: "fits", or the first change that makes it fit, or several if one is not enough.

    Args:
        settings: as config.load_settings returns them.
        devices: number of cards.
        limit: bytes of a card that may be used.
    """
    least = memory.peak_memory_of(settings, devices).bytes
    if least <= limit:
        return "fits"
    sentences: list[str] = []
    together: dict[str, Any] = {}
    for sentence, changes in remedies(settings, devices, limit):
        alone = total_with(settings, devices, changes)
        both = total_with(settings, devices, together | changes)
        if alone <= limit:
            return f"does not fit; change first: {sentence} ({alone / 1e9:.1f} GB)"
        if both < least:
            sentences, together, least = [*sentences, sentence], together | changes, both
        if least <= limit:
            return f"does not fit; change first: {'; '.join(sentences)} ({least / 1e9:.1f} GB)"
    return f"does not fit with any of these changes: {adapter_advice(settings, devices, limit)}"


def adapter_advice(settings: dict[str, Any], devices: int, limit: float) -> str:
    """What to do if no plan for the training fits: LoRA with its memory, or more cards.

    Args:
        settings: as config.load_settings returns them.
        devices: number of cards.
        limit: bytes of a card that may be used.
    """
    more = ("use more cards" if Plan.of(settings, devices).is_sharded
            else "shard the model: parallel.parallel_mode 1, parallel_config.model_parallel 2")
    if settings["run_mode"] != "finetune" or "lora" in settings:
        return more
    adapters = total_with(settings, devices, {"lora": ADAPTERS, "recompute_config.recompute": True})
    if adapters <= limit:
        return ("train adapters (LoRA), as in finetune_glm4_9b_lora.yaml: "
                f"{adapters / 1e9:.1f} GB with all layers recomputed")
    return (f"{more}; adapters (LoRA) alone do not help, they take {adapters / 1e9:.1f} GB "
            "with all layers recomputed")
