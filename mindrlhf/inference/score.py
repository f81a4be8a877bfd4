"""run_mode score: how often a model prefers the chosen answer, on pairs that it was not trained on.

The log-probs are those of preprocessing's reference pass: the same rows, network and part files,
split over the workers in the same way. So a score equals the evaluation of a training, N workers
equal one, and a stopped run goes on.
"""
from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
from pathlib import Path

import numpy as np

from mindrlhf import cli, config, locks, pictures
from mindrlhf.cli import UserError
from mindrlhf.data import preprocess
from mindrlhf.data.parts import Parts
from mindrlhf.data.passes import Bar, Report, make_parts, missing_parts
from mindrlhf.data.scored import Part, Scored
from mindrlhf.files import atomic_file
from mindrlhf.inference import score_record, score_report, score_results
from mindrlhf.inference.answer_file import json_line
from mindrlhf.inference.loading import fill_network
from mindrlhf.inference.score_data import ChoiceData
from mindrlhf.inference.score_record import PAIRS, PICTURE, RECORD, Score
from mindrlhf.inference.score_task import Task, Weights, open_task
from mindrlhf.outputs import Output, require_no_loss, require_overwrite
from mindrlhf.parallel import Plan, Settings


def score(settings: Settings, arguments: argparse.Namespace) -> None:
    """Score weights, as one worker of a launch.

    Args:
        settings: as config.load_settings returns them, of run_mode score.
        arguments: the options of options.add_scoring(), with output, batch_size, overwrite and
            adapter_checkpoint.

    Raises:
        UserError: options, data, weights and YAML do not match, the folder holds another score, or
            another run writes into it.
    """
    if not arguments.score_data:
        raise UserError("run_mode score needs --score_data, a .mindrecord or preference pairs")
    config.require_weights(settings)
    config.require_workers(settings, cli.workers())
    config.require_full_batch(settings, "score")
    folder = Path(arguments.output or Path(settings["output_dir"]) / "score")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; --output is the folder of a score")
    with locks.hold(folder / RECORD):
        from mindrlhf import runtime
        if not Plan.of(settings).is_sharded:
            runtime.leave_cluster()  # each worker computes alone
        run_task(open_task(settings, folder, arguments), overwrite=arguments.overwrite)
    runtime.end_worker()


def run_task(task: Task, *, overwrite: bool) -> None:
    """Compute what is missing, write the results and print them.

    Args:
        task: to do.
        overwrite: replace another score in its folder.
    """
    todo = {name: _open_parts(task, name, weights) for name, weights in task.passes}
    if _is_done(task):  # checked last: rank 0 then removes parts
        cli.say(f"{task.folder}: has this score already",
                *score_report.score_lines(score_record.load(task.folder)))
        return
    _require_folder(task, overwrite)
    for name, weights in task.passes:
        _compute(task, *todo[name], weights)
    if cli.rank() == 0:
        scored = {name: parts.read() for name, (parts, _) in todo.items()}
        _finish(task, scored)
        for parts in task.folder.glob("*.parts"):
            if parts.name.split("-")[0] in ("policy", "reference"):
                Parts(parts.with_suffix(""), 0, {}).remove()


def _open_parts(task: Task, name: str, weights: Weights | None) -> tuple[Parts, list[int]]:
    """The parts of a pass, and those that this worker has to make."""
    identity = {"data": task.data.about["hash"], "weights": weights and weights.identity,
                **{key: task.identity[key] for key in (
                    "kind", "dataset_type", "tokenizer", "template", "batch_size", "versions",
                    "logps_chunk_size", "model", "parallel", "parallel_config")}}
    short = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    parts = Parts(task.folder / f"{name}-{short}", task.data.parts, identity)
    parts.check()
    return parts, missing_parts(parts, Plan.of(task.settings))


def _is_done(task: Task) -> bool:
    """Whether the folder holds this score, undamaged."""
    with contextlib.suppress(UserError):
        return score_record.load(task.folder).run == task.run
    return False


def _require_folder(task: Task, overwrite: bool) -> None:
    """Refuse a folder with another score or with files of other kinds."""
    outputs = [Output(task.folder / RECORD, "a score", score_record.is_score),
               Output(task.folder / PAIRS, "a score's list of pairs",
                      score_record.is_list_of_pairs),
               pictures.picture_output(task.folder / PICTURE)]
    weights = [weights.about["file"] for weights in (task.policy, task.reference) if weights]
    model = task.policy.model
    require_no_loss(outputs, [*task.data.files, *weights, model.adapters, model.tokenizer.path])
    require_overwrite(task.folder / RECORD, overwrite, lambda: False)


def _compute(task: Task, parts: Parts, todo: list[int], weights: Weights | None) -> None:
    """Make the parts of a pass; rank 0 then waits for those of the other workers.

    Args:
        task: that they belong to.
        parts: of the pass.
        todo: those that this worker makes.
        weights: that score them; None: the log-probs in the data are read instead.
    """
    bar = Bar(parts, task.data.pairs)
    if todo:
        locks.wait_for_rank_0(task.folder / RECORD)
        if weights:
            if task.scorer is None:
                task.scorer = preprocess.build_scorer(task.settings, weights.model.tokenizer)
            fill_network(task.scorer.network.model, weights.model)

    def make(number: int, report: Report) -> Part:
        return task.data.part(number, task.scorer if weights else None, report)

    make_parts(parts, todo, make, bar=bar, plan=Plan.of(task.settings))


def _finish(task: Task, scored: dict[str, Scored]) -> None:
    """Write and print the results: score.json last."""
    found, dpo = scored["policy"], task.settings["dpo"]
    if not len(found.numbers):
        raise UserError(f"{task.data.about['file']}: no pair fits into {task.seq_len} tokens; "
                        "raise seq_length")
    references: np.ndarray | None = None
    if "reference" in scored:
        references = scored["reference"].logps[scored["reference"].sizes.pairs]
    elif task.reference:
        references = found.logps[found.sizes.pairs]  # the same weights
    elif task.data.made_with:
        references = task.data.references()
    logps = found.logps[found.sizes.pairs]
    if task.is_reference and references is not None:
        logps = references
    values = score_results.PairValues.of(found, logps, references, dpo)
    model = {**task.policy.about, "tokenizer": task.policy.model.tokenizer.fingerprint}
    dropped = {"longer than a row": len(found.dropped)} if len(found.dropped) else {}
    about = {"kind": task.data.kind, "run": task.run, "model": model, "reference": task.made_with,
             "data": {**task.data.about, "scored": len(found.numbers), "dropped": dropped,
                      "prompts shortened": int((found.cut > 0).sum())},
             "versions": task.identity["versions"], "seq_len": task.seq_len}
    result: Score = (
        score_results.choice_score(values, found, task.data, **about)
        if isinstance(task.data, ChoiceData)
        else score_results.preference_score(values, found, task.data, dpo=dpo, **about))
    with atomic_file(task.folder / PAIRS) as file:
        for line in score_results.pair_records(values, found, task.data):
            file.write(json_line(line))
    drawn = score_report.draw_margins(task.folder / PICTURE, values.margins,
                                      task.data.types(found), result)
    score_record.write_score(result, task.folder / RECORD)
    files = [RECORD, PAIRS, *([PICTURE] if drawn else [])]
    cli.say(*score_report.score_lines(result), f"  files      {task.folder}: {', '.join(files)}")
