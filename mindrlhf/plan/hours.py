"""Time of a run, by arithmetic: operations over what the cards can do."""
from __future__ import annotations

from typing import Any, NamedTuple

from mindrlhf.arithmetic import ceil_div
from mindrlhf.models.glm4.operations import forward_operations, step_operations
from mindrlhf.parallel import Plan
from mindrlhf.plan import traffic
from mindrlhf.plan.memory import shares_of

# operations a second of an Ascend 910B in bfloat16, as commonly stated for the variant of the Atlas
# 900 A2; a larger variant has 376e12
PEAK = 313e12
EFFICIENCY = 0.45  # assumption: share of the peak, recomputed operations counted
# assumption: bytes a second that a card receives over HCCS, about half of its 196e9
BANDWIDTH = 100e9


class StepTime(NamedTuple):
    """Seconds of a step, or of a part of it if gradients are accumulated."""
    computing: float
    communicating: float


class Span(NamedTuple):
    """Hours of a run, with communication hidden behind computing (least) or after it (most)."""
    least: float
    most: float


def tokens_per_second(operations: float, *, peak: float = PEAK,
                      efficiency: float = EFFICIENCY) -> float:
    """Positions a second of one card.

    Args:
        operations: of one position.
        peak: operations a second of a card at its peak.
        efficiency: share of the peak that is reached.
    """
    return peak * efficiency / operations


def seconds_per_part(settings: dict[str, Any], devices: int, peak: float = PEAK) -> StepTime:
    """Time of a step, or of each part of it where gradients are accumulated.

    Args:
        settings: as config.load_settings returns them.
        devices: number of cards.
        peak: operations a second of a card at its peak.
    """
    plan, shares = Plan.of(settings, devices), shares_of(settings, devices)
    positions = shares.group / plan.model  # model parallelism splits their matrix products
    if settings["run_mode"] in ("preprocess", "score"):
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
    """Steps of an epoch; the last one may be partly padding.

    Args:
        settings: as config.load_settings returns them.
        devices: number of cards.
        rows: of the data.
    """
    batch = settings["runner_config"]["batch_size"] * Plan.of(settings, devices).data
    return ceil_div(rows, batch * accumulated(settings))


def accumulated(settings: dict[str, Any]) -> int:
    """Parts of a step: batches whose gradients are accumulated."""
    return settings["runner_config"].get("gradient_accumulation_steps", 1)


def run_hours(settings: dict[str, Any], devices: int, rows: int, peak: float = PEAK) -> Span:
    """Hours of a run.

    Args:
        settings: as config.load_settings returns them.
        devices: number of cards.
        rows: of the data.
        peak: operations a second of a card at its peak.
    """
    step = seconds_per_part(settings, devices, peak)
    runner = settings["runner_config"]
    steps = steps_per_epoch(settings, devices, rows) * runner.get("epochs", 1)
    if runner.get("max_steps"):
        steps = min(steps, runner["max_steps"])
    count = steps * accumulated(settings) / 3600
    return Span(count * max(step), count * sum(step))
