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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mindrlhf import cli, config, locks
from mindrlhf.checkpoints import fingerprints
from mindrlhf.cli import UserError
from mindrlhf.data import preprocess
from mindrlhf.data.parts import Part, Parts, Scored
from mindrlhf.data.passes import Bar, Report, make_parts, missing_parts
from mindrlhf.data.reference import Scorer
from mindrlhf.files import Output, atomic_file, read_head, require_no_loss, require_overwrite
from mindrlhf.inference import score_record, score_report, score_results
from mindrlhf.inference.answer_file import json_line
from mindrlhf.inference.compare import BASE
from mindrlhf.inference.loading import Model, fill_network, open_model, strategies
from mindrlhf.inference.score_data import ChoiceData, ScoreData, open_score_data
from mindrlhf.inference.score_record import CHOICES, PAIRS, PICTURE, RECORD, Score
from mindrlhf.models.glm4 import load, sidecar, template
from mindrlhf.parallel import Plan, Settings


@dataclass
class Weights:
    """Weights that score pairs.

    Attributes:
        model: with its adapters.
        about: files and fingerprints, for score.json.
    """
    model: Model
    about: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        path, (of_weights, of_adapters) = self.model.settings["load_checkpoint"], strategies(
            self.model)
        opened = load.open_weights(path, of_weights)
        found = fingerprints.fingerprint(opened)
        sidecar.require_recorded_weights(path, opened, found)
        self.about = {"file": path, "fingerprint": found, "adapters": None}
        if self.model.adapters:
            adapters = load.open_adapters(self.model.adapters, of_adapters)
            self.about["adapters"] = {"file": self.model.adapters,
                                      "fingerprint": fingerprints.fingerprint(adapters)}

    @property
    def identity(self) -> list[str | None]:
        """Fingerprints of weights and adapters."""
        adapters = self.about["adapters"]
        return [self.about["fingerprint"], adapters and adapters["fingerprint"]]


@dataclass
class Task:
    """What is scored with what, and where the results go.

    Attributes:
        settings: of the run, with the seq_length of the data.
        data: the pairs.
        policy: the weights to score.
        reference: the weights whose log-probs are the reference; None: those in the data, or none.
        folder: of the results.
        identity: what determines the results, as JSON values.
        scorer: the network, built when it is first needed.
    """
    settings: Settings
    data: ScoreData
    policy: Weights
    reference: Weights | None
    folder: Path
    identity: dict[str, Any] = field(default_factory=dict)
    scorer: Scorer | None = None

    @property
    def seq_len(self) -> int:
        """Positions of a row."""
        return self.settings["model"]["model_config"]["seq_length"]

    @property
    def run(self) -> str:
        """SHA-256 of the identity."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()

    @property
    def made_with(self) -> dict[str, Any] | None:
        """File and fingerprint of the reference weights."""
        return self.reference.about if self.reference else self.data.made_with

    @property
    def is_reference(self) -> bool:
        """Whether the weights to score are those of the reference."""
        made = self.made_with
        return made is not None and self.policy.identity == [
            made["fingerprint"], (made.get("adapters") or {}).get("fingerprint")]


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
        if not Plan.of(settings).is_sharded:
            from mindrlhf import runtime
            runtime.leave_cluster()  # each worker computes alone
        run_task(open_task(settings, folder, arguments), overwrite=arguments.overwrite)


def open_task(settings: Settings, folder: Path, arguments: argparse.Namespace) -> Task:
    """Open data and weights, and check that they belong together.

    Args:
        settings: of the run.
        folder: of the results.
        arguments: of the command line.
    """
    from mindrlhf import runtime
    model = open_model(settings, arguments.adapter_checkpoint)
    rows = arguments.batch_size or settings["runner_config"]["batch_size"]
    data = open_score_data(arguments.score_data, model.tokenizer, arguments.dataset_type,
                           batch_positions=rows * settings["model"]["model_config"]["seq_length"])
    settings = _fit_settings(settings, data, arguments)
    model = model._replace(settings=settings)
    reference = _reference_model(model, data, arguments.reference_checkpoint)
    if data.kind != CHOICES and not (reference or data.made_with):
        data.references()  # says what is missing
    if reference and Plan.of(settings).is_sharded:
        raise UserError("with a parallel plan, only one set of weights can be loaded; preprocess "
                        "the pairs with the reference weights and score the .mindrecord")
    task = Task(settings, data, Weights(model), Weights(reference) if reference else None, folder)
    if task.reference and data.made_with and (
            task.reference.identity == [data.made_with["fingerprint"], None]):
        task.reference = None  # the data hold its log-probs
    sections = ("model", "parallel", "parallel_config")
    task.identity = json.loads(json.dumps({
        "data": data.about["hash"], "kind": data.kind, "template": template.VERSION,
        "dataset_type": data.about.get("dataset_type"), "tokenizer": model.tokenizer.fingerprint,
        "policy": task.policy.identity,
        "reference": task.reference.identity if task.reference else data.made_with,
        "dpo": {name: settings["dpo"][name] for name in score_results.SETTINGS},
        "batch_size": settings["runner_config"]["batch_size"],
        "logps_chunk_size": settings["dpo"]["logps_chunk_size"], "versions": runtime.versions(),
        **{name: settings.get(name) for name in sections}}))
    return task


def _fit_settings(settings: Settings, data: ScoreData, arguments: argparse.Namespace) -> Settings:
    """The settings with the row length of the data, and no more rows at once than there are."""
    found = data.pairs if data.rows is None else data.rows
    if (arguments.batch_size or 0) > found:
        raise UserError(f"--batch_size {arguments.batch_size}: {arguments.score_data} has {found} "
                        f"{'pairs' if data.rows is None else 'rows'}; give at most {found}")
    changes = {"runner_config.batch_size": arguments.batch_size,
               "model.model_config.seq_length": data.seq_len}
    given = {name: value for name, value in changes.items() if value}
    return preprocess.with_filled_batches(config.with_changes(settings, given), found)


def _reference_model(model: Model, data: ScoreData, given: str | None) -> Model | None:
    """The model of --reference_checkpoint; None if the data hold log-probs or need none.

    Raises:
        UserError: it has no use, or does not fit.
    """
    if data.kind == CHOICES:
        if given:
            raise UserError("--reference_checkpoint: multiple choice compares log-probs of one "
                            "model; leave it out")
        return None
    if given in (None, BASE):
        if model.adapters and (given or not data.made_with):
            strategy = {"src_strategy": strategies(model).of_weights or ""}
            return model._replace(settings=config.with_changes(model.settings, strategy),
                                  adapters=None)
        if given:
            raise UserError(f"--reference_checkpoint {BASE} needs --adapter_checkpoint; else give "
                            "the path of the weights that training started from")
        return None
    path = config.find_checkpoint(given)
    if not Path(path).is_dir():
        cli.existing_file(path, "the weights of --reference_checkpoint, or base with adapters")
    sidecar.require_same_model(path, model.settings)
    return model._replace(adapters=None, settings=config.with_changes(
        model.settings, {"load_checkpoint": path, "src_strategy": ""}))


def run_task(task: Task, *, overwrite: bool) -> None:
    """Compute what is missing, write the results and print them.

    Args:
        task: to do.
        overwrite: replace another score in its folder.
    """
    passes = passes_of(task)
    todo = {name: _open_parts(task, name, weights) for name, weights in passes}
    if _is_done(task):  # checked last: rank 0 then removes parts
        cli.say(f"{task.folder}: has this score already",
                *score_report.score_lines(score_record.load(task.folder)))
        return
    _require_folder(task, overwrite)
    for name, weights in passes:
        _compute(task, *todo[name], weights)
    if cli.rank() == 0:
        scored = {name: parts.read() for name, (parts, _) in todo.items()}
        _finish(task, scored)
        for parts in task.folder.glob("*.parts"):
            if parts.name.split("-")[0] in ("policy", "reference"):
                Parts(parts.with_suffix(""), 0, {}).remove()


def passes_of(task: Task) -> list[tuple[str, Weights | None]]:
    """The passes of a task: name, and the weights, or None if the data hold their log-probs."""
    if task.is_reference:  # one pass serves for both
        return [("policy", task.reference and task.policy)]
    policy: tuple[str, Weights | None] = ("policy", task.policy)
    return [("reference", task.reference), policy] if task.reference else [policy]


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
               Output(task.folder / PICTURE, "a PNG picture",
                      lambda path: read_head(path).startswith(b"\x89PNG"))]
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
