"""card.json: what a training run made, from what, how and how well."""
from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mindrlhf import cli, config
from mindrlhf.card import evidence, render
from mindrlhf.card.evidence import CURVES, HASH
from mindrlhf.cli import UserError
from mindrlhf.data import mindrecord
from mindrlhf.files import atomic_file, hash_file, read_head
from mindrlhf.inference.score_record import Score
from mindrlhf.json_files import read_json, read_unsealed, write_json
from mindrlhf.models.glm4 import sidecar
from mindrlhf.outputs import Output, require_no_loss
from mindrlhf.parallel import Plan, Settings
from mindrlhf.training import identity

FOLDER, RECORD = "card", "card.json"
FORMAT = 1
DOCUMENTS = {"README.md": "en", "README_CN.md": "zh"}  # file -> language
# section of a card -> its type; those of NEEDED are in every card
SECTIONS = {"run": dict, "base": dict, "data": dict, "tokenizer": dict, "plan": dict,
            "settings": dict, "metrics": dict, "step_0": dict, "evaluation": dict, "curves": dict,
            "versions": dict, "commands": list, "result": dict, "score": dict, "answers": dict,
            "documents": dict}
NEEDED = ("run", "base", "data", "tokenizer", "plan", "settings", "metrics", "result")
DATA = ("rows", "seq_len", "prompts", "answers", "tokens", "template", "dataset_type", "source",
        HASH)


def write_after_training(config_path: str | Path, settings: Settings) -> None:
    """Write the card of a run that has just ended. Whatever goes wrong is one line.

    Args:
        config_path: the YAML of the run.
        settings: of the run.
    """
    folder = Path(settings["output_dir"]) / FOLDER
    try:
        card = describe_training_run(config_path, settings)
        card["curves"] = copy_curves(folder.parent / CURVES, folder)
        write_card(folder, card)
        cli.say(f"card: {folder / 'README.md'}")
    except Exception as error:
        # the training is complete and saved: no fault of a report may change its exit status
        why = (str(error).splitlines() or [type(error).__name__])[0]
        cli.say(f"warning: {folder}: the card was not written ({why}); the run is complete")


def describe_training_run(config_path: str | Path, settings: Settings) -> dict[str, Any]:
    """The card of a run, from its records.

    Args:
        config_path: the YAML of the run.
        settings: of the run.
    """
    output = Path(settings["output_dir"])
    run = identity.Identity.of_json(read_json(output / identity.FILE), output / identity.FILE)
    paths = {name: config.get_setting(settings, f"{section}.data_loader.dataset_dir")
             for name, section in (("train", "train_dataset"), ("held_out", "eval_dataset"))}
    made = {name: mindrecord.read_data_sidecar(path) for name, path in paths.items() if path}
    base, commands = _describe_base(settings, output, made["train"])
    commands += [content.get("command") for content in made.values()]
    workers = run.values["workers"]
    metrics = evidence.read_metrics(output, settings["dpo"]["loss_type"])
    saved = {"step": metrics["metrics"].get("steps"), "run": run.id}
    return {
        "run": {"id": run.id, "config": str(config_path), "workers": workers},
        "base": base,
        "data": {name: describe_data(paths[name], content) for name, content in made.items()},
        "tokenizer": {"file": settings["processor"]["tokenizer"]["vocab_file"],
                      "sha256": made["train"]["tokenizer"]["sha256"]},
        "plan": describe_plan(settings, workers),
        "settings": {**evidence.compare_settings(settings), "dpo": dict(settings["dpo"])},
        **metrics,
        "versions": evidence.software(),
        "commands": [*evidence.plain_commands(commands),
                     *evidence.read_commands(output, run.id)],
        "result": {"shards": evidence.read_shards(output, saved, workers)}}


def _describe_base(settings: Settings, output: Path, data: Mapping[str, Any]
                   ) -> tuple[dict[str, Any], list[Any]]:
    """The weights that training began with, and the commands that made them."""
    recorded = evidence.read_optional(output / sidecar.MODEL)
    path = settings.get("load_checkpoint") or recorded.get("source")
    # with dpo.check_reference, training has compared the weights with those of the data
    checked = settings["dpo"]["check_reference"]
    known = recorded.get("source_fingerprint") or (
        data["checkpoint"]["fingerprint"] if checked else None)
    found = {"file": path, "strategy": settings.get("src_strategy"), "fingerprint": known,
             "model": recorded.get("numbers")}
    beside = sidecar.find_sidecar(path) if path else None
    about = evidence.read_optional(beside) if beside else {}
    found |= {"source": about.get("source"), "layout": about.get("source_layout")}
    return ({name: value for name, value in found.items() if value}, [about.get("command")])


def describe_data(path: str, made: Mapping[str, Any]) -> dict[str, Any]:
    """Data of the run, from their sidecar."""
    dropped = made["pairs"].get("dropped", {})
    return {"file": path, "pairs": made["pairs"]["written"],
            **({"dropped": dropped} if dropped else {}),
            **{name: made[name] for name in DATA if name in made}}


def describe_score(path: str | Path, score: Score) -> dict[str, Any]:
    """A score as the card has it.

    Args:
        path: of its score.json.
        score: its content.
    """
    kept = ("kind", "run", "data", "model", "reference", "accuracy", "margin", "slices")
    whole = json.loads(json.dumps(asdict(score)))
    return {"file": str(path), HASH: hash_file(path), **{name: whole[name] for name in kept}}


def describe_plan(settings: Settings, workers: int) -> dict[str, Any]:
    """How the work was spread over the cards."""
    plan, runner = Plan.of(settings, workers), settings["runner_config"]
    model, lora = settings["model"]["model_config"], settings.get("lora")
    parts = runner.get("gradient_accumulation_steps", 1)
    return {
        "device": settings["context"]["device_target"], "data_parallel": plan.data,
        "model_parallel": plan.model, "optimizer_sharded": plan.shards_optimizer,
        "rows_per_step": runner["batch_size"] * parts * plan.data,
        "seq_length": model["seq_length"], "compute_dtype": model.get("compute_dtype"),
        **({"lora": dict(lora)} if lora else {})}


def write_card(folder: Path, content: Mapping[str, Any]) -> None:
    """Write card.json and, from it, the documents. A file that is not ours is not replaced.

    Args:
        folder: of the card.
        content: the sections of the card; empty ones are left out.

    Raises:
        UserError: a file cannot be written, or is somebody else's.
    """
    content = {name: content[name] for name in SECTIONS if content.get(name)}
    require_no_loss([Output(folder / name, "a document of this card", _is_ours)
                     for name in DOCUMENTS], [])
    texts = {name: render.render_card(content, language) for name, language in DOCUMENTS.items()}
    content["documents"] = {"code": evidence.hash_code(),
                            **{name: hash_text(text) for name, text in texts.items()}}
    write_json(folder / RECORD, {"format": FORMAT, **content}, sealed=True)
    for name, text in texts.items():
        with atomic_file(folder / name) as file:
            file.write(text.encode())


def hash_text(text: str) -> str:
    """SHA-256 of a document, 64 hex digits."""
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()


def copy_curves(picture: Path, folder: Path) -> dict[str, str]:
    """Copy the picture of a run to its card; return what the card says about it."""
    if not picture.is_file():
        return {}
    with atomic_file(folder / CURVES) as target, open(picture, "rb") as source:
        shutil.copyfileobj(source, target)
    return {HASH: hash_file(folder / CURVES)}


def _is_ours(path: Path) -> bool:
    """Whether a document is one that write_card() wrote."""
    return render.MARK.encode() in read_head(path)


def read_card(folder: str | Path, *, sealed: bool = True) -> dict[str, Any]:
    """The sections of the card in a folder.

    Args:
        folder: of the card, or the output folder of its run.
        sealed: refuse a card.json that was changed.

    Raises:
        UserError: there is no card, or it is damaged or of another version.
    """
    path = find_folder(folder) / RECORD
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the folder of a card, such as output/card")
    content = (read_json if sealed else read_unsealed)(path)
    if content.pop("format", None) != FORMAT:
        raise UserError(f"{path}: is no card of this version of the project (format {FORMAT}); "
                        "train again")
    wrong = [name for name, kind in SECTIONS.items()
             if (name in content or name in NEEDED) and not isinstance(content.get(name), kind)]
    if wrong:
        raise UserError(f"{path}: its {wrong[0]} is missing or no {SECTIONS[wrong[0]].__name__}; "
                        "copy the card again")
    return content


def find_folder(folder: str | Path) -> Path:
    """The folder of a card, given it or the output folder of its run."""
    path = Path(folder)
    if not (path / RECORD).is_file() and (path / FOLDER / RECORD).is_file():
        return path / FOLDER
    return path


@contextlib.contextmanager
def one_line(path: Path) -> Iterator[None]:
    """Turn the error of a card whose values have wrong types into one line."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise UserError(f"{path}: has a value that a card cannot have ({error}); copy the card "
                        "again") from None
