"""What a YAML costs, before NPUs are rented: python -m mindrlhf.plan CONFIG. Needs no MindSpore."""
from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mindrlhf import cli, config
from mindrlhf.models.glm4.model_config import ModelConfig
from mindrlhf.parallel import Plan
from mindrlhf.plan import hours, memory, traffic
from mindrlhf.plan.parameters import parameter_bytes

EXAMPLE = ("  python -m mindrlhf.plan finetune_glm4_9b.yaml --devices 8 --memory 64 "
           "--data dpo.mindrecord")
UNITS = {"GB": 1e9, "MB": 1e6}


class Remedy(NamedTuple):
    """A change of the YAML that saves memory.

    Attributes:
        sentence: for the user.
        changes: dotted key -> value.
    """
    sentence: str
    changes: dict[str, Any]


def parser() -> cli.Parser:
    """The command line."""
    arguments = cli.Parser(
        "Estimate the memory of a card, the traffic of a step and the hours of a run for a "
        "finetune or process YAML, and say what to change first if it does not fit.", EXAMPLE)
    arguments.add_argument("config", metavar="CONFIG", help="YAML of a preprocessing or a training")
    arguments.add_argument("--devices", type=cli.positive,
                           help="number of cards (default: that of parallel_config, or 8)")
    arguments.add_argument("--memory", type=cli.positive, default=64,
                           help="memory of a card in GB, 1e9 bytes (default: 64)")
    source = arguments.add_mutually_exclusive_group()
    source.add_argument("--data", metavar="FILE",
                        help=".mindrecord of the preprocessing, to estimate the hours")
    source.add_argument("--rows", type=cli.positive,
                        help="rows of the data, if there is no file yet")
    return arguments


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


def remedies(settings: dict[str, Any], devices: int) -> list[Remedy]:
    """Changes that save memory, the cheapest first."""
    plan, model = Plan.of(settings, devices), settings["model"]["model_config"]
    batch, length = settings["runner_config"]["batch_size"], model["seq_length"]
    found = []
    positions = memory.shares_of(settings, devices).everywhere
    chunk_sizes = [size for size in (512, 1024, 2048, 4096, 8192, 16384) if size <= positions]
    if chunk_sizes:
        totals = {size: total_with(settings, devices, {"dpo.logps_chunk_size": size})
                  for size in chunk_sizes}
        size = min(chunk_sizes, key=lambda size: (totals[size], -size))
        found.append(Remedy(f"dpo.logps_chunk_size {size}", {"dpo.logps_chunk_size": size}))
    if settings["run_mode"] == "finetune":
        keys = ["recompute_config.recompute"]
        if plan.is_sharded and plan.data > 1:
            keys.append("parallel.enable_parallel_optimizer")
        found += [Remedy(f"{key} True", {key: True}) for key in keys]
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
    for sentence, changes in remedies(settings, devices):
        alone = total_with(settings, devices, changes)
        both = total_with(settings, devices, together | changes)
        if alone <= limit:
            return f"does not fit; change first: {sentence} ({alone / 1e9:.1f} GB)"
        if both < least:
            sentences, together, least = [*sentences, sentence], together | changes, both
        if least <= limit:
            return f"does not fit; change first: {'; '.join(sentences)} ({least / 1e9:.1f} GB)"
    return "does not fit with any of these changes: use more cards, or train adapters (LoRA)"


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


def report(settings: dict[str, Any], devices: int, *, limit: float, rows: int | None) -> list[str]:
    """Lines of the report.

    Args:
        settings: as config.load_settings returns them.
        devices: number of cards.
        limit: bytes of a card that may be used.
        rows: of the data; None leaves the hours out.
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
    return [*lines, *time_lines(settings, devices, rows)]


def time_lines(settings: dict[str, Any], devices: int, rows: int | None) -> list[str]:
    """Lines of the report on time.

    Args:
        settings: as config.load_settings returns them.
        devices: number of cards.
        rows: of the data; None leaves the hours out.
    """
    step = hours.seconds_per_step(settings, devices)
    rate = f"{hours.BANDWIDTH / 1e9:.0f} GB/s"
    communication = (f", {step.communicating:.1f} s communication at {rate}"
                     if step.communicating > 0 else "")
    lines = [f"a step: {step.computing:.1f} s computing at {hours.EFFICIENCY:.0%} of "
             f"{hours.PEAK / 1e12:.0f} TFLOPS{communication} (assumed rates)"]
    if rows:
        least, most = hours.run_hours(settings, devices, rows)
        span = f"{least:.1f}" if most - least < 0.05 else f"{least:.1f} to {most:.1f}"
        count = hours.steps_per_epoch(settings, devices, rows)
        lines.append(f"{rows} rows: {count} batches a card an epoch, {span} hours in total")
    return lines


def rows_of(path: str, settings: dict[str, Any]) -> int:
    """Number of rows of a .mindrecord.

    Args:
        path: the .mindrecord, with its sidecar beside it.
        settings: of the YAML.

    Raises:
        UserError: there is no such file, or its rows are not of the YAML's seq_length.
    """
    from mindrlhf.data.mindrecord import read_data_sidecar
    sidecar, length = read_data_sidecar(path), settings["model"]["model_config"]["seq_length"]
    if sidecar["seq_len"] != length:
        raise cli.UserError(f"{path}: has rows of {sidecar['seq_len']}, the YAML has seq_length "
                            f"{length}; give the YAML that trains on it")
    return sidecar["rows"]


def main(argv: Sequence[str] | None = None) -> None:
    """Print the report of a YAML."""
    arguments = parser().parse_args(argv)
    settings = config.load_settings(arguments.config, run_mode=("finetune", "preprocess"))
    plan = Plan.of(settings)
    devices = arguments.devices or (plan.cards if plan.is_sharded else 8)
    config.require_workers(settings, devices)
    rows = rows_of(arguments.data, settings) if arguments.data else arguments.rows
    limit = room(settings, arguments.memory)
    cli.say(*report(settings, devices, limit=limit, rows=rows))


if __name__ == "__main__":
    cli.run_command(main)
