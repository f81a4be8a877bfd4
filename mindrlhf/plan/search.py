"""Tries plans, row lengths, batches and recomputation, and keeps the fastest that fit."""
from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from mindrlhf import config
from mindrlhf.cli import UserError
from mindrlhf.contradictions import find_contradictions
from mindrlhf.files import atomic_file
from mindrlhf.parallel import Plan
from mindrlhf.plan import hours, memory
from mindrlhf.plan.advice import CHUNK_SIZES, adapter_advice, fewest_recomputed
from mindrlhf.plan.workload import Workload
from mindrlhf.recompute import recomputed_layers

SHOWN = 10
SHORTEST = 512  # tokens of a row
# what is tried; in the order of the columns that are printed
KEYS = ("parallel_config.data_parallel", "parallel_config.model_parallel",
        "model.model_config.seq_length", "runner_config.batch_size",
        "runner_config.gradient_accumulation_steps", "recompute_config.recompute",
        "dpo.logps_chunk_size")


class FittingPlan(NamedTuple):
    """A plan that fits, and its speed if communication is not hidden behind computing.

    Attributes:
        changes: dotted key -> value, for all KEYS.
        bytes: memory of a card.
        tokens: a second and card, padding included.
        pairs: a second, on all cards; None if the data are unknown.
    """
    changes: dict[str, Any]
    bytes: float
    tokens: float
    pairs: float | None


def shapes(settings: dict[str, Any], devices: int,
           workload: Workload | None) -> Iterator[dict[str, Any]]:
    """Legal plans, row lengths and batches: dotted key -> value.

    An update always learns from as many tokens as in the YAML, so accumulation follows from the
    plan, the row length and the batch size.

    Args:
        settings: as config.load_settings returns them.
        devices: number of cards.
        workload: the data, if they are known.
    """
    runner, longest = settings["runner_config"], settings["model"]["model_config"]["seq_length"]
    update = (runner["batch_size"] * Plan.of(settings).data * longest
              * runner.get("gradient_accumulation_steps", 1))
    lengths = [longest // 2**power for power in range(longest.bit_length())
               if longest % 2**power == 0 and (power == 0 or longest // 2**power >= SHORTEST)]
    for data in (count for count in range(1, devices + 1) if devices % count == 0):
        for length in lengths:
            if workload and length != longest and not workload.fits(length):
                continue
            rest = update // (data * length)  # rows of an update on each group
            for batch in (count for count in range(1, rest + 1) if rest % count == 0):
                values = (data, devices // data, length, batch, rest // batch)
                changes = dict(zip(KEYS, values))
                if (rest * data * length == update
                        and not find_contradictions(config.with_changes(settings, changes))):
                    yield changes


def current_values(settings: dict[str, Any]) -> dict[str, Any]:
    """The values of KEYS in a YAML, recomputation as a number of layers."""
    values = {key: config.get_setting(settings, key, 1) for key in KEYS}
    return {**values, "recompute_config.recompute": recomputed_layers(settings)}


def measure_plan(settings: dict[str, Any], devices: int, workload: Workload | None = None,
                 peak: float = hours.PEAK) -> FittingPlan:
    """Memory and speed of settings.

    Args:
        settings: as config.load_settings returns them.
        devices: number of cards.
        workload: the data, if they are known.
        peak: operations a second of a card at its peak.
    """
    length = settings["model"]["model_config"]["seq_length"]
    tokens = hours.card_rate(settings, devices,
                             sum(hours.seconds_per_part(settings, devices, peak)))
    in_row = workload.pairs_per_row(length) if workload else None
    pairs = None if in_row is None else tokens * devices / length * in_row
    return FittingPlan(current_values(settings), memory.peak_memory_of(settings, devices).bytes,
                       tokens, pairs)


def find_plans(settings: dict[str, Any], devices: int, limit: float,
               workload: Workload | None = None, peak: float = hours.PEAK) -> list[FittingPlan]:
    """Plans that are legal and fit, the fastest first; of each shape, the best way to fit.

    Args:
        settings: as config.load_settings returns them.
        devices: number of cards.
        limit: bytes of a card that may be used.
        workload: the data, if they are known.
        peak: operations a second of a card at its peak.

    Raises:
        UserError: the YAML is not that of a sharded training.
    """
    if settings["run_mode"] != "finetune" or not Plan.of(settings).is_sharded:
        raise UserError("--search: needs a YAML of run_mode finetune with parallel.parallel_mode 1")
    found = []
    for shape in shapes(settings, devices, workload):
        options = []
        for chunk in (0, *CHUNK_SIZES):
            tried = config.with_changes(settings, {**shape, "dpo.logps_chunk_size": chunk})
            if chunk > memory.shares_of(tried, devices).everywhere:
                continue
            layers = fewest_recomputed(tried, devices, limit)
            if layers is not None:
                tried = config.with_changes(tried, {"recompute_config.recompute": layers})
                options.append(measure_plan(tried, devices, workload, peak))
        if options:
            found.append(max(options, key=_merit))
    return sorted(found, key=_merit, reverse=True)


def _merit(candidate: FittingPlan) -> tuple[float, float]:
    """Order of candidates: speed, in pairs where they are known, then less memory."""
    return (candidate.tokens if candidate.pairs is None else candidate.pairs), -candidate.bytes


def search_lines(found: Sequence[FittingPlan], now: FittingPlan) -> list[str]:
    """A table of the fastest plans.

    Args:
        found: as find_plans returns them.
        now: the YAML as it is.
    """
    lines = ["fastest plans that fit; tokens an update as in the YAML, communication not hidden",
             f"{'data x model':>14}{'seq_length':>12}{'batch':>7}{'accumulate':>12}"
             f"{'recompute':>11}{'chunk':>7}{'GB':>7}{'tokens/s/card':>15}{'pairs/s':>9}"]
    for name, each in [*((str(at), each) for at, each in enumerate(found[:SHOWN], 1)),
                       ("now", now)]:
        data, model, length, batch, parts, layers, chunk = each.changes.values()
        pairs = "" if each.pairs is None else f"{each.pairs:.1f}"
        lines.append(f"{name:<4}{f'{data} x {model}':>10}{length:>12}{batch:>7}{parts:>12}"
                     f"{layers:>11}{chunk:>7}{each.bytes / 1e9:>7.1f}{each.tokens:>15.0f}"
                     f"{pairs:>9}")
    return lines


def write_overlay(path: str, base: str, settings: dict[str, Any], best: FittingPlan) -> None:
    """Write a YAML that inherits from another one and has the keys that differ.

    Args:
        path: the new YAML.
        base: the YAML that was searched.
        settings: of that YAML.
        best: the plan.
    """
    current = current_values(settings)
    changes = {key: value for key, value in best.changes.items() if value != current[key]}
    folder = Path(path).resolve().parent
    content = config.with_changes(
        {"base_config": os.path.relpath(Path(base).resolve(), folder)}, changes)
    length = best.changes["model.model_config.seq_length"]
    header = (f"# Found by python -m mindrlhf.plan --search: {best.bytes / 1e9:.1f} GB a card, "
              f"{best.tokens:.0f} tokens/s/card.\n"
              f"# Preprocess the data with --seq_len {length}.\n")
    with atomic_file(path) as file:
        file.write((header + yaml.safe_dump(content, sort_keys=False)).encode())


def search_plans(path: str, settings: dict[str, Any], devices: int, limit: float, *,
                 workload: Workload | None, peak: float, target: str | None) -> list[str]:
    """Search, write the best plan, and describe what was found; no line if nothing fits.

    Args:
        path: the YAML.
        settings: of that YAML.
        devices: number of cards.
        limit: bytes of a card that may be used.
        workload: the data, if they are known.
        peak: operations a second of a card at its peak.
        target: YAML to write, or None.

    Raises:
        UserError: the target is the YAML itself.
    """
    if target and Path(target).resolve() == Path(path).resolve():
        raise UserError(f"--write {target}: is the YAML that is searched; name a new file")
    found = find_plans(settings, devices, limit, workload, peak)
    if not found:
        return []
    lines = search_lines(found, measure_plan(settings, devices, workload, peak))
    if target:
        write_overlay(target, path, settings, found[0])
        lines.append(f"{target}: the first of these plans; preprocess with --seq_len "
                     f"{found[0].changes['model.model_config.seq_length']}")
    return lines


def nothing_fits(settings: dict[str, Any], devices: int, limit: float) -> str:
    """One line: no plan of the search fits, and what to do.

    Args:
        settings: of the YAML.
        devices: number of cards.
        limit: bytes of a card that may be used.
    """
    return (f"no plan fits {limit / 1e9:.0f} GB a card on {devices} cards: "
            f"{adapter_advice(settings, devices, limit)}")
