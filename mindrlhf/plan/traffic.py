"""Bytes that a card receives in a training step, by kind.

Counted as in the graphs that MindSpore 2.7 compiles (tests/test_plan.py has the record). A gather
or scatter over n cards moves (n - 1) / n of the full tensor, an all-reduce twice that.
"""
from __future__ import annotations

import math
from typing import Any, NamedTuple

from mindrlhf.models.glm4.model_config import ModelConfig
from mindrlhf.parallel import Plan
from mindrlhf.plan.memory import RESIDUAL, compute_bytes, shares_of, widths
from mindrlhf.plan.parameters import BYTES, held
from mindrlhf.recompute import recomputed_layers


class LayerTraffic(NamedTuple):
    """Bytes that a card gathers for a layer.

    Attributes:
        forward: in the forward pass.
        once: of these, bytes that recomputation does not gather again.
    """
    forward: float
    once: float


def _remote(cards: int) -> float:
    """The share of a tensor over so many cards that comes from other cards."""
    return 1 - 1 / cards


def layer(settings: dict[str, Any], devices: int) -> LayerTraffic:
    """Traffic of a layer in the forward pass.

    MindFormers names strategies for matrix products and heads only. Between them, MindSpore splits
    the rows over all cards, so the input of every product is gathered and its output is split
    again: the price of model parallelism here. Without flash attention, the scores move too.

    Args:
        settings: as config.load_settings returns them, of run_mode finetune.
        devices: number of cards.
    """
    plan, shares, width = Plan.of(settings, devices), shares_of(settings, devices), widths(settings)
    if plan.model == 1:
        return LayerTraffic(0, 0)
    model, compute = settings["model"]["model_config"], compute_bytes(settings)
    # the share of rows and of columns that comes from other cards
    rows, columns = _remote(shares.group // shares.split), _remote(plan.model)
    flash = model.get("use_flash_attention", False)
    keys = 2 * width.key if flash else 2 * width.query
    joint = shares.group * (width.query + 2 * width.key) * columns * compute
    moved = (rows * (2 * width.hidden + width.query + keys)
             + columns * (width.query + width.hidden + 2 * width.ffn)) * (shares.group * compute)
    if not flash:  # scores to rows in compute_dtype, probabilities back to heads
        heads = ModelConfig.of(settings).num_attention_heads
        moved += shares.group * heads * model["seq_length"] * (columns + rows) * compute
    return LayerTraffic(joint + moved, joint)


def traffic_volumes(settings: dict[str, Any], devices: int) -> dict[str, float]:
    """Traffic of a training step.

    Args:
        settings: as config.load_settings returns them, of run_mode finetune.
        devices: number of cards.

    Returns:
        kind -> bytes that a card receives.
    """
    plan = Plan.of(settings, devices)
    if not plan.is_sharded:
        trained = sum(part.bytes for part in held(settings, devices).values() if part.trained)
        return {"gradient all-reduce": 2 * _remote(devices) * trained}
    shares, sizes = shares_of(settings, devices), ModelConfig.of(settings)
    compute, hidden, layers = compute_bytes(settings), sizes.hidden_size, sizes.num_layers
    forward, once = layer(settings, devices)
    again = recomputed_layers(settings) * (forward - once)
    products = 2 * _remote(plan.model) * shares.group * hidden
    fetched = (shares.everywhere - shares.split) * hidden * compute
    residuals = layers * compute + RESIDUAL * (plan.model > 1)
    return {**_parameter_traffic(settings, devices),
            "tensor-parallel gathers": layers * 2 * forward + again,
            "tensor-parallel all-reduces": 2 * products * residuals,
            "hidden states for the logits": 2 * fetched}


def _parameter_traffic(settings: dict[str, Any], devices: int) -> dict[str, float]:
    """Traffic of weights and gradients in a sharded plan: kind -> bytes."""
    table, compute = held(settings, devices), compute_bytes(settings)
    cards = Plan.of(settings, devices).cards
    trained = [part for part in table.values() if part.trained]
    gathered = sum(
        math.prod(part.gathered) * _remote(part.shared_by)
        * (compute if "encoder" in name else BYTES[part.dtype]) for name, part in table.items())
    scattered = sum(math.prod(part.gathered) * _remote(part.shared_by) * BYTES[part.dtype]
                    for part in trained)
    reduced = sum(
        2 * part.bytes * _remote(cards * math.prod(part.gathered) // math.prod(part.shape))
        for part in trained if part.shared_by == 1)
    return {"optimizer all-gather": gathered, "gradient reduce-scatter": scattered,
            "gradient all-reduce": reduced}
