"""The report of the plan tool: memory, traffic, disk, time."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mindrlhf import config
from mindrlhf.parallel import Plan
from mindrlhf.plan import hours, memory, traffic
from mindrlhf.plan.advice import advice
from mindrlhf.plan.parameters import held, parameter_bytes


def table(title: str, values: Mapping[str, float], scale: float, unit: str) -> list[str]:
    """Lines of a table of amounts, without those that would print as 0.

    Args:
        title: the first line.
        values: name -> amount.
        scale: the unit in units of the amounts, 1e9 for bytes in GB.
        unit: its name.
    """
    width = max(map(len, values))
    shown = {name: value for name, value in values.items() if value >= scale / 200}
    return [title, *(f"  {name:<{width}}  {value / scale:>8.2f} {unit}"
                     for name, value in shown.items())]


def report(settings: dict[str, Any], devices: int, *, limit: float, rows: int | None,
           peak_rate: float = hours.PEAK) -> list[str]:
    """Lines of the report.

    Args:
        settings: as config.load_settings returns them.
        devices: number of cards.
        limit: bytes of a card that may be used.
        rows: of the data; None leaves the hours out.
        peak_rate: operations a second of a card at its peak.
    """
    plan, peak = Plan.of(settings, devices), memory.peak_memory_of(settings, devices)
    optimizer = "sharded" if plan.shards_optimizer else "not sharded"
    exact = parameter_bytes(settings, devices)
    lines = [f"{devices} cards: data_parallel {plan.data} x model_parallel {plan.model}, optimizer "
             f"state {optimizer}; seq_length {settings['model']['model_config']['seq_length']}"]
    lines += table(
        f"memory of a card ({len(exact)} weights and moments to the byte; the rest estimated)",
        memory.memory_parts(settings, devices), 1e9, "GB")
    lines.append(f"  at most {peak.bytes / 1e9:.1f} GB at once, in the {peak.where}, "
                 f"of {limit / 1e9:.0f} GB: {advice(settings, devices, limit)}")
    if settings["run_mode"] == "finetune" and devices > 1:
        lines += table("traffic of a step: bytes that a card receives",
                       traffic.traffic_volumes(settings, devices), 1e9, "GB")
    return [*lines, *disk_lines(settings, devices),
            *time_lines(settings, devices, rows, peak_rate)]


def disk_lines(settings: dict[str, Any], devices: int) -> list[str]:
    """Line of the report on what a training writes. A state is complete before an older one goes.

    Args:
        settings: as config.load_settings returns them.
        devices: number of cards.
    """
    saver = config.callback_options(settings).get("DPOCheckpointMonitor")
    if saver is None:
        return []
    saved = [part for part in held(settings, devices).values()
             if part.trained or "lora" not in settings]  # adapters are saved alone
    weights = devices * sum(part.bytes for part in saved)
    moments = devices * memory.memory_parts(settings, devices)["Adam's moments"]
    state, count = weights + moments, saver["keep_checkpoint_max"] + 1
    return [f"disk: {(count * state + weights) / 1e9:.1f} GB over all cards: {count} states of "
            f"{state / 1e9:.1f} GB (keep_checkpoint_max, and the next one) and final weights of "
            f"{weights / 1e9:.1f} GB; with --eval_dataset {2 * weights / 1e9:.1f} GB more, for the "
            "best weights and the next best"]


def time_lines(settings: dict[str, Any], devices: int, rows: int | None,
               peak_rate: float = hours.PEAK) -> list[str]:
    """Lines of the report on time.

    Args:
        settings: as config.load_settings returns them.
        devices: number of cards.
        rows: of the data; None leaves the hours out.
        peak_rate: operations a second of a card at its peak.
    """
    part, parts = (hours.seconds_per_part(settings, devices, peak_rate),
                   hours.accumulated(settings))
    rate = f"{hours.BANDWIDTH / 1e9:.0f} GB/s"
    communication = (f", {parts * part.communicating:.1f} s communication at {rate}"
                     if part.communicating > 0 else "")
    lines = [f"a step: {parts * part.computing:.1f} s computing at {hours.EFFICIENCY:.0%} of "
             f"{peak_rate / 1e12:.0f} TFLOPS{communication} (assumed rates): "
             f"{hours.card_rate(settings, devices, part.computing):.0f} tokens/s/card"]
    if rows:
        least, most = hours.run_hours(settings, devices, rows, peak_rate)
        span = f"{least:.1f}" if most - least < 0.05 else f"{least:.1f} to {most:.1f}"
        count = hours.steps_per_epoch(settings, devices, rows)
        what = "steps" if settings["run_mode"] == "finetune" else "batches a card"
        lines.append(f"{rows} rows: {count} {what} an epoch, {span} hours in total")
    return lines
