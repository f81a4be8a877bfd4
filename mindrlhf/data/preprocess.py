"""Preprocessing: files of pairs to training data, split over the workers of a launch."""
from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from mindrlhf import cli, config, files, locks
from mindrlhf.arithmetic import ceil_div
from mindrlhf.checkpoints import fingerprints
from mindrlhf.cli import UserError
from mindrlhf.config import Settings
from mindrlhf.data import merge, mindrecord, preference, reference, sources, summary
from mindrlhf.data.parts import Parts, split_pairs
from mindrlhf.data.passes import Bar, Report, make_parts, missing_parts
from mindrlhf.data.scored import Part
from mindrlhf.models.glm4 import load, sidecar, template
from mindrlhf.models.glm4.operations import model_operations
from mindrlhf.models.glm4.tokenizer import Glm4Tokenizer
from mindrlhf.outputs import require_no_loss, require_overwrite
from mindrlhf.parallel import Plan
from mindrlhf.pictures import picture_output


@dataclass(frozen=True)
class Options:
    """Command-line options for the data; dpo_preprocess_glm4_parallel.py --help explains each."""
    src: Sequence[str]
    dst: str
    dataset_type: str = "auto"
    truncation: str = "keep_end"
    on_bad_row: str = "error"
    identical: str = "keep"
    duplicates: str = "keep"
    eval_ratio: float = 0.0
    share: bool = True
    pack: bool = True
    overwrite: bool = False


OPTION_NAMES = [field.name for field in fields(Options)]
# Options that the sidecar of the data records.
RECORDED = ("truncation", "on_bad_row", "identical", "duplicates", "eval_ratio", "share", "pack")


class RunDescription(NamedTuple):
    """How a run makes its data.

    Attributes:
        origin: what the sidecar says about it, `run` (the SHA-256 of identity) included.
        identity: everything that determines the content of the data, as JSON values.
    """
    origin: dict[str, Any]
    identity: dict[str, Any]


def preprocess(options: Options, config_path: str, overrides: dict[str, Any]) -> None:
    """Tokenize and score the pairs and write the training data; rank 0 prints a summary.

    Args:
        options: what to read and how.
        config_path: YAML with run_mode preprocess.
        overrides: settings from the command line, dotted key -> value, None for options not given.

    Raises:
        UserError: a file, a row or a setting is wrong, or the model gives log-probs that are not
            finite, or another run writes the same data.
    """
    settings = load_preprocess_settings(options, config_path, overrides)
    with locks.hold(options.dst):
        make_data(options, settings)
    from mindrlhf import runtime
    runtime.end_worker()


def make_data(options: Options, settings: Settings) -> None:
    """Make the training data, while no other run writes them.

    Args:
        options: what to read and how.
        settings: of the run.
    """
    plan = Plan.of(settings)
    source, held_out = read_source(options)
    sidecar.require_same_model(settings.get("load_checkpoint"), settings)

    from mindrlhf import runtime
    if not plan.is_sharded:
        runtime.leave_cluster()  # each worker computes alone
    runtime.quiet_mindformers()
    tokenizer = Glm4Tokenizer(settings["processor"]["tokenizer"]["vocab_file"])
    tokenizer.check_vocabulary(settings["model"]["model_config"]["padded_vocab_size"])
    run = describe_run(options, settings, source, tokenizer)

    members = split_pairs(
        source.pairs, share=options.share,
        batch_positions=run.origin["seq_len"] * settings["runner_config"]["batch_size"])
    parts = Parts(options.dst, len(members), run.identity)
    parts.check()
    todo = missing_parts(parts, plan)
    paths = [Path(options.dst), *([merge.eval_path(options.dst)] if any(held_out) else [])]
    if is_made(paths, run.origin["run"]):  # checked last: rank 0 then removes parts
        cli.say(f"{options.dst}: exists already, made from the same data, weights and options. "
                "Nothing to do")
        finish_picture(options, parts)
        return
    for path in paths:
        require_overwrite(path, options.overwrite, partial(is_of_run, path, run.origin["run"]))
    score_parts(parts, {number: members[number] for number in todo}, source,
                with_filled_batches(settings, max(map(len, members))),  # a row has at least a pair
                tokenizer, options)
    if cli.rank() == 0:
        if not any(held_out):
            remove_former_eval(options.dst)
        report = merge.merge_parts(
            parts, source, held_out, destination=options.dst, packed=options.pack,
            share=options.share, seq_len=run.origin["seq_len"], pad_id=tokenizer.pad_id,
            sidecar=run.origin)
        is_drawn = summary.draw_summary(f"{options.dst}.png", report.scored)
        parts.remove()
        picture = f"{options.dst}.png" if is_drawn else "none: matplotlib is not installed"
        cli.say(*summary.summary_lines(report),
                summary.length_line(report, partial(operations_at, settings)),
                f"  picture    {picture}")


def remove_former_eval(destination: str) -> None:
    """Remove the evaluation file of the run whose training file is about to be replaced, if any.

    The new training file has its pairs.
    """
    path = merge.eval_path(destination)
    try:
        former = mindrecord.read_data_sidecar(destination)["run"]
    except (UserError, KeyError):
        return
    if is_of_run(path, former):
        for output in mindrecord.data_outputs(path):
            output.path.unlink(missing_ok=True)
        cli.say(f"{path}: removed with the training file that it was made with")


def finish_picture(options: Options, parts: Parts) -> None:
    """Draw the picture if a kill came between data and picture, and remove the parts (rank 0)."""
    picture = Path(f"{options.dst}.png")
    if cli.rank() == 0:
        if not picture.exists() and parts.done() == parts.count:
            summary.draw_summary(picture, parts.read(options.share))
        parts.remove()


def load_preprocess_settings(options: Options, config_path: str, overrides: dict[str, Any]
                             ) -> Settings:
    """Load the settings of a run, and check what can be checked without MindSpore.

    Args:
        options: of the command line.
        config_path: YAML with run_mode preprocess.
        overrides: dotted key -> value; None if the command line does not say.

    Raises:
        UserError: a setting, a file or the number of workers is wrong.
    """
    settings = config.load_settings(config_path, run_mode="preprocess", overrides=overrides)
    config.require_weights(settings)
    config.require_workers(settings, cli.workers())
    config.require_full_batch(settings, "preprocess", config_path)
    outputs = [*mindrecord.data_outputs(options.dst), picture_output(f"{options.dst}.png")]
    if options.eval_ratio:
        outputs += mindrecord.data_outputs(merge.eval_path(options.dst))
    require_no_loss(outputs, [  # shards in a folder are no MindRecords
        *sources.find_files(options.src), config_path,
        settings["load_checkpoint"] if Path(settings["load_checkpoint"]).is_file() else None,
        settings["processor"]["tokenizer"]["vocab_file"]])
    files.require_file_size(options.dst, mindrecord.SMALLEST)  # before the pairs are scored
    return settings


def read_source(options: Options) -> tuple[preference.PairSource, list[bool]]:
    """Read the pairs, choose which are held out, and print what was found."""
    choices = {preference.IDENTICAL: options.identical, preference.DUPLICATE: options.duplicates}
    source = preference.read_pairs(
        options.src, options.dataset_type, skip_bad=options.on_bad_row == "skip",
        drop=[reason for reason, choice in choices.items() if choice == "drop"])
    detected = " (detected from its fields)" if options.dataset_type == "auto" else ""
    cli.say(f"{len(source.pairs):,} pairs in {len(source.files)} file(s), "
            f"--dataset_type {source.dataset_type}{detected}", *summary.source_lines(source))
    return source, preference.choose_held_out(source.pairs, options.eval_ratio)


def describe_run(options: Options, settings: Settings, source: preference.PairSource,
                 tokenizer: Glm4Tokenizer) -> RunDescription:
    """Describe how a run makes its data.

    Args:
        options: of the data.
        settings: of the run.
        source: the pairs.
        tokenizer: of the model.
    """
    from mindrlhf import runtime
    hashes = [files.hash_file(file, hashlib.sha256) for file in source.files]
    opened = load.open_weights(settings["load_checkpoint"], settings.get("src_strategy"))
    weights = fingerprints.fingerprint(opened)
    sidecar.require_recorded_weights(settings["load_checkpoint"], opened, weights)
    about = {
        "format": mindrecord.SIDECAR_FORMAT,
        "seq_len": settings["model"]["model_config"]["seq_length"], "template": template.VERSION,
        "dataset_type": source.dataset_type, "versions": runtime.versions(),
        "options": {name: getattr(options, name) for name in RECORDED}}
    sections = ("model", "runner_config", "parallel", "parallel_config")
    identity = {
        **about, "data": hashes, "tokenizer": tokenizer.fingerprint, "checkpoint": weights,
        "logps_chunk_size": settings["dpo"].get("logps_chunk_size"),
        **{name: settings.get(name) for name in sections}}
    origin = {
        **about,
        "source": [{"file": str(file), "sha256": sha} for file, sha in zip(source.files, hashes)],
        "tokenizer": {"file": str(tokenizer.path), "sha256": tokenizer.fingerprint},
        "checkpoint": {"file": settings["load_checkpoint"], "fingerprint": weights},
        "command": cli.command_line(),
        "run": hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()}
    return RunDescription(origin, identity)


def operations_at(settings: Settings, seq_len: int) -> float:
    """Operations of a position when the model trains on rows of a length.

    Args:
        settings: of the run.
        seq_len: positions of a row.
    """
    return model_operations(
        config.with_changes(settings, {"model.model_config.seq_length": seq_len}))


def is_of_run(path: str | Path, run: str) -> bool:
    """Whether a training file exists and its sidecar names the run."""
    try:
        return mindrecord.read_data_sidecar(path).get("run") == run
    except UserError:
        return False


def is_made(paths: Iterable[str | Path], run: str) -> bool:
    """Whether all files exist already, undamaged and made by the same run.

    Every worker hashes the files: all must come to the same answer.
    """
    try:
        made = {path: mindrecord.read_data_sidecar(path) for path in paths}
        return all(content.get("run") == run and not mindrecord.find_damage(path, content)
                   for path, content in made.items())
    except UserError:
        return False


def open_scorer(settings: Settings, tokenizer: Glm4Tokenizer, *, packed: bool) -> reference.Scorer:
    """Build the reference model and load its weights.

    Args:
        settings: of the run.
        tokenizer: of the model.
        packed: whether a row holds as many groups as fit, or one.
    """
    scorer = build_scorer(settings, tokenizer, packed=packed)
    load.load_weights(scorer.network.model, settings["load_checkpoint"],
                      strategy=settings.get("src_strategy"))
    return scorer


def build_scorer(settings: Settings, tokenizer: Glm4Tokenizer, *,
                 packed: bool = True) -> reference.Scorer:
    """Start the device and build the network, with random weights.

    Args:
        settings: of the run.
        tokenizer: of the model.
        packed: whether a row holds as many groups as fit, or one.
    """
    from mindrlhf import runtime
    from mindrlhf.models.glm4 import build
    run_config = config.to_mindformers(settings)
    runtime.start_device(run_config, parallel=Plan.of(settings).is_sharded and cli.workers() > 1)
    return reference.Scorer(build.build_network(run_config),
                            seq_len=settings["model"]["model_config"]["seq_length"],
                            batch_size=settings["runner_config"]["batch_size"],
                            pad_id=tokenizer.pad_id, packed=packed)


def with_filled_batches(settings: Settings, rows: int) -> Settings:
    """Settings whose batch has no rows that nothing can fill: they would take memory for nothing.

    Args:
        settings: of the run.
        rows: that are computed at once, at most.
    """
    plan = Plan.of(settings)
    groups = plan.data if plan.is_sharded else 1  # a batch is cut into as many pieces
    rows = min(settings["runner_config"]["batch_size"], ceil_div(rows, groups) * groups)
    return config.with_changes(settings, {"runner_config.batch_size": rows})


def score_parts(parts: Parts, todo: Mapping[int, Sequence[int]], source: preference.PairSource,
                settings: Settings, tokenizer: Glm4Tokenizer, options: Options) -> None:
    """Make the parts in todo; rank 0 then waits for the parts of the other workers.

    Args:
        parts: of the run.
        todo: number of each part that this worker makes -> numbers of its pairs.
        source: the pairs.
        settings: of the run.
        tokenizer: of the model.
        options: of the data.
    """
    bar = Bar(parts, len(source.pairs))
    if todo:
        locks.wait_for_rank_0(options.dst)
        scorer = open_scorer(settings, tokenizer, packed=options.pack)

    def score_part(number: int, report: Report) -> Part:
        members = todo[number]
        return reference.make_part(
            tokenizer, [source.pairs[member] for member in members], members,
            seq_len=scorer.seq_len, score=lambda found: scorer(found, report),
            truncation=options.truncation, share=options.share)

    make_parts(parts, todo, score_part, bar=bar, plan=Plan.of(settings))
