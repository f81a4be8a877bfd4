"""Time of training and preprocessing, by arithmetic: operations over what the cards can do."""
from __future__ import annotations

from typing import Any, NamedTuple

from mindrlhf.arithmetic import ceil_div
from mindrlhf.models.glm4.model_config import ModelConfig
from mindrlhf.parallel import Plan
from mindrlhf.plan import traffic
from mindrlhf.plan.memory import shares_of, widths
from mindrlhf.recompute import recomputed_layers

# operations a second of an Ascend 910B in bfloat16, as commonly stated for its larger variant; the
# smaller one has 313e12
PEAK = 376e12
EFFICIENCY = 0.45  # assumption: share of the peak, recomputed operations counted
# assumption: bytes a second that a card receives over HCCS, about half of its 196e9
BANDWIDTH = 100e9


class Operations(NamedTuple):
    """Floating-point operations of a position in the forward pass."""
    layers: int
    output: int


class StepTime(NamedTuple):
    """Seconds of a step, or of a part of it if gradients are accumulated."""
    computing: float
    communicating: float


class Span(NamedTuple):
    """Hours of a run, with communication hidden behind computing (least) or after it (most)."""
    least: float
    most: float


def forward_operations(settings: dict[str, Any]) -> Operations:
    """Operations of a position in the forward pass.

    A matrix product takes two for each weight. Attention covers all positions of the row: flash
    attention computes masked positions too.
    """
    sizes, (hidden, query, key, ffn) = ModelConfig.of(settings), widths(settings)
    matrices = hidden * (query + 2 * key) + query * hidden + 3 * hidden * ffn
    attention = 4 * settings["model"]["model_config"]["seq_length"] * query
    return Operations(sizes.num_layers * (2 * matrices + attention),
                      2 * hidden * sizes.padded_vocab_size)


def step_operations(settings: dict[str, Any], recomputed: float | None = None) -> float:
    """Operations of a position in a training step: forward, twice that backward, recomputation.

    Args:
        settings: as config.load_settings returns them.
        recomputed: share of the layers that are recomputed; None: as in the YAML.
    """
    operations = forward_operations(settings)
    if recomputed is None:
        recomputed = recomputed_layers(settings) / ModelConfig.of(settings).num_layers
    backward = 1 if "lora" in settings else 2  # frozen matrices need no gradient
    again = 1 if settings["dpo"]["logps_chunk_size"] else 0
    return (operations.layers * (1 + backward + recomputed)
            + operations.output * (1 + backward + again))


def tokens_per_second(operations: float, *, peak: float = PEAK,
                      efficiency: float = EFFICIENCY) -> float:
    """Positions a second of one card.

    Args:
        operations: of one position.
        peak: operations a second of a card at its peak.
        efficiency: share of the peak that is reached.
    """
    return peak * efficiency / operations


def seconds_per_step(settings: dict[str, Any], devices: int, peak: float = PEAK) -> StepTime:
    """Time of a step. The parts of an accumulated batch count as steps of their own.

    Args:
        settings: as config.load_settings returns them.
        devices: number of cards.
        peak: operations a second of a card at its peak.
    """
    plan, shares = Plan.of(settings, devices), shares_of(settings, devices)
    positions = shares.group / plan.model  # model parallelism splits their matrix products
    if settings["run_mode"] == "preprocess":
        operations = float(sum(forward_operations(settings)))
        return StepTime(positions / tokens_per_second(operations, peak=peak), 0.0)
    received = sum(traffic.traffic_volumes(settings, devices).values())
    rate = tokens_per_second(step_operations(settings), peak=peak)
    return StepTime(positions / rate, received / BANDWIDTH)


def card_rate(settings: dict[str, Any], devices: int, seconds: float) -> float:
    """Positions a second of one card, padding included.

    Args:
        settings: as config.load_settings returns them.
        devices: number of cards.
        seconds: of a step.
    """
    plan = Plan.of(settings, devices)
    return shares_of(settings, devices).group / plan.model / seconds


def steps_per_epoch(settings: dict[str, Any], devices: int, rows: int) -> int:
    """Steps of an epoch; the parts of an accumulated batch count as steps of their own.

    Args:
        settings: as config.load_settings returns them.
        devices: number of cards.
        rows: of the data. Each has a chosen and a rejected side.
    """
    return ceil_div(rows, settings["runner_config"]["batch_size"] * Plan.of(settings, devices).data)


def run_hours(settings: dict[str, Any], devices: int, rows: int, peak: float = PEAK) -> Span:
    """Hours of a run.

    Args:
        settings: as config.load_settings returns them.
        devices: number of cards.
        rows: of the data. Each has a chosen and a rejected side.
        peak: operations a second of a card at its peak.
    """
    step = seconds_per_step(settings, devices, peak)
    epochs = settings["runner_config"].get("epochs", 1)
    count = steps_per_epoch(settings, devices, rows) * epochs / 3600
    return Span(count * max(step), count * sum(step))
