"""What is scored with what: the pairs, the weights to score and those of the reference."""
from __future__ import annotations

import argparse
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mindrlhf import cli, config
from mindrlhf.checkpoints import fingerprints
from mindrlhf.cli import UserError
from mindrlhf.data import preprocess
from mindrlhf.data.reference import Scorer
from mindrlhf.inference import score_results
from mindrlhf.inference.compare import BASE
from mindrlhf.inference.loading import Model, open_model, strategies
from mindrlhf.inference.score_data import ScoreData, open_score_data
from mindrlhf.inference.score_record import CHOICES
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

    @property
    def passes(self) -> list[tuple[str, Weights | None]]:
        """The passes: name, and the weights, or None if the data hold their log-probs."""
        if self.is_reference:  # one pass serves for both
            return [("policy", self.reference and self.policy)]
        policy: tuple[str, Weights | None] = ("policy", self.policy)
        return [("reference", self.reference), policy] if self.reference else [policy]


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
