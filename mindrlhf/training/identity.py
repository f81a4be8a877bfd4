"""The identity of a run: what its numbers depend on. Each state holds it, and so does run.json.

A new run enters no folder that holds the results of another. A resumed run must have the identity
in its state, or the user must accept each difference.
"""
from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mindrlhf import cli, config
from mindrlhf.checkpoints import fingerprints
from mindrlhf.checkpoints.runs import STEP
from mindrlhf.checkpoints.tensors import StoredTensor
from mindrlhf.cli import UserError
from mindrlhf.json_files import read_json, write_json
from mindrlhf.models.glm4 import load
from mindrlhf.outputs import Output, require_no_loss

FILE = "run.json"  # in output_dir
COMMANDS = "commands.jsonl"  # in output_dir: the command of each start, those of resumed runs too
TENSOR = "run_identity"  # in each state: the content of run.json, as bytes
SECTIONS = ("model", "dpo", "lora", "optimizer", "lr_schedule", "runner_wrapper", "parallel",
            "parallel_config")
RUNNER = {"epochs": 1, "max_steps": 0, "batch_size": 1, "gradient_accumulation_steps": 1}
PLAN = ("workers", "parallel.", "parallel_config.")  # states are shards of it
CALLBACKS = "callbacks."  # no number of training depends on them
# What a run writes. A folder holds results if it has any of the first group
RANKS = [f"{place}/rank_[0-9]*" for place in ("checkpoint", "checkpoint_network",
                                             "checkpoint_best")]
RESULTS = [*(f"{rank}/{name}" for rank in RANKS
             for name in ("*-step_*.ckpt", "*-step_*.ckpt.unusable", "*-network.ckpt",
                          "*-best.ckpt")), "metrics.jsonl"]
BY_PRODUCTS = [*(f"{rank}/{name}" for rank in RANKS for name in (STEP, ".*.tmp")),
               "strategy/*.ckpt", "tensorboard/events.out.tfevents.*", "profile/rank_[0-9]*/*",
               "summary/rank_[0-9]*/*", "curves.png", ".stop", FILE, COMMANDS,
               *(f"card/{name}" for name in ("card.json", "README.md", "README_CN.md",
                                             "curves.png"))]


@dataclass(frozen=True)
class Identity:
    """What determines a run.

    Attributes:
        id: 16 hex digits, of the values with which the run began. It stays when a resumed run
            changes some.
        values: name -> value; settings have the dotted names of the YAML.
    """
    id: str
    values: dict[str, Any]

    def to_bytes(self) -> bytes:
        """The content of TENSOR; the same identity gives the same bytes."""
        return json.dumps(asdict(self), sort_keys=True, ensure_ascii=False).encode()

    @classmethod
    def of_json(cls, content: Any, path: str | Path) -> Identity:
        """The identity in a run.json or a state.

        Raises:
            UserError: it is not one.
        """
        good = (isinstance(content, dict) and isinstance(content.get("id"), str)
                and isinstance(content.get("values"), dict))
        if not good:
            raise UserError(f"{path}: its record of the run cannot be read; use an earlier state, "
                            "or start again with --overwrite")
        return cls(content["id"], content["values"])


def describe_training(settings: Mapping[str, Any], train: Mapping[str, Any],
                      held_out: Mapping[str, Any] | None) -> Identity:
    """The identity of a run that begins now.

    Args:
        settings: as config.load_settings returns them.
        train: sidecar of the training data.
        held_out: sidecar of the held-out data, or None.
    """
    path = settings.get("load_checkpoint")
    weights = load.open_weights(path, settings.get("src_strategy") or None) if path else None
    values = {
        "workers": cli.workers(), "seed": settings["seed"],
        # the first values of each tensor: enough to tell weights apart, and fast. A resumed run
        # needs no weights beside its state
        "weights": fingerprints.fingerprint(weights, sample=True)[:16] if weights else None,
        "training data": _name_data(train),
        "held-out data": _name_data(held_out) if held_out else None,
        **identifying_settings(settings)}
    values = json.loads(json.dumps(values))  # tuples become lists, as in a state
    made_of = {name: value for name, value in values.items() if not name.startswith(CALLBACKS)}
    text = json.dumps(made_of, sort_keys=True)
    return Identity(hashlib.sha256(text.encode()).hexdigest()[:16], values)


def identifying_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that are part of the identity: dotted name -> value."""
    data, runner = settings.get("train_dataset", {}), settings.get("runner_config", {})
    return {
        "train_dataset.data_loader.shuffle": data.get("data_loader", {}).get("shuffle", True),
        **{f"runner_config.{key}": runner.get(key, default) for key, default in RUNNER.items()},
        **dict(flatten({name: settings[name] for name in SECTIONS if name in settings})),
        **dict(flatten(config.callback_options(dict(settings)), CALLBACKS))}


def _name_data(made: Mapping[str, Any]) -> str:
    """A short name of data, from their sidecar."""
    run = made.get("run") or hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()
    return f"{run[:16]} with {made['rows']} rows"


def flatten(section: Mapping[str, Any], prefix: str = "", *, separator: str = "."
            ) -> Iterator[tuple[str, Any]]:
    """Dotted names and values of a section, or names with another separator."""
    for key, value in section.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}{separator}", separator=separator)
        else:
            yield f"{prefix}{key}", value


def identity_in(tensors: Mapping[str, StoredTensor], path: str | Path) -> Identity | None:
    """The identity of the run that saved a state; None if an earlier version saved it.

    Args:
        tensors: of the state.
        path: of the state, for messages.

    Raises:
        UserError: it cannot be read.
    """
    if TENSOR not in tensors:
        return None
    try:
        content = json.loads(tensors[TENSOR].array().astype(np.uint8).tobytes())
    except (ValueError, RecursionError):
        content = None
    return Identity.of_json(content, path)


def find_changes(saved: Identity, now: Identity) -> dict[str, tuple[Any, Any]]:
    """What differs: name -> (value in saved, value now). Weights are compared only if given now."""
    names = dict.fromkeys([*saved.values, *now.values])
    return {name: (saved.values.get(name), now.values.get(name)) for name in names
            if saved.values.get(name) != now.values.get(name)
            and (name, now.values.get(name)) != ("weights", None)}


def _is_safe(name: str, before: Any, after: Any) -> bool:
    """Whether a resumed run may change a value without --allow_changes."""
    if name == "runner_config.max_steps":  # 0: no limit
        return not after or 0 < before < after
    return name.startswith(CALLBACKS) or (name == "runner_config.epochs" and after > before)


def _list_changes(changes: Mapping[str, tuple[Any, Any]]) -> str:
    """Changes, for a message."""
    def show(value: Any) -> str:
        return "not set" if value is None else str(value)

    return ", ".join(f"{name} was {show(before)}, now {show(after)}"
                     for name, (before, after) in changes.items())


def continue_run(path: str | Path, saved: Identity | None, now: Identity, *,
                 allow_changes: bool = False) -> Identity:
    """Compare the run that saved a state with the run that resumes from it, and say what differs.

    Args:
        path: of the state.
        saved: identity in the state.
        now: identity by the settings, data and weights of this command.
        allow_changes: the option --allow_changes.

    Returns:
        the identity for the states that follow.

    Raises:
        UserError: something differs that must not, or needs --allow_changes True.
    """
    if saved is None:
        if not allow_changes:
            raise UserError(f"{path}: does not say which run saved it, so settings and data cannot "
                            "be compared; --allow_changes True resumes from it all the same")
        cli.say(f"warning: {path}: does not say which run saved it; nothing is compared")
        return now
    changes = find_changes(saved, now)
    plan = {name: values for name, values in changes.items() if name.startswith(PLAN)}
    if plan:
        raise UserError(f"{path}: was saved by another number of workers or another parallel plan: "
                        f"{_list_changes(plan)}; resume with those of the state")
    unsafe = {name: values for name, values in changes.items() if not _is_safe(name, *values)}
    if unsafe and not allow_changes:
        raise UserError(f"{path}: was saved by a run that differs: {_list_changes(unsafe)}; resume "
                        "with the settings and data of that run, or add --allow_changes True")
    if changes:
        cli.say(f"resuming with changes: {_list_changes(changes)}")
    kept = {name: value for name, value in saved.values.items() if name == "weights"}
    given = {name: value for name, value in now.values.items() if value is not None}
    return Identity(saved.id, {**now.values, **kept, **given})


def claim_folder(output_dir: str | Path, run: Identity, *, resumed: Path | None, resume: bool,
                 overwrite: bool, inputs: Iterable[str | Path | None]) -> None:
    """Make sure that a folder holds no other run, before the workers connect and write into it.

    All workers check. Rank 0 alone removes and writes; the others write only once they are
    connected with it.

    Args:
        output_dir: of the run.
        run: its identity.
        resumed: the state to resume from, or None.
        resume: whether --resume is given, which may find no state.
        overwrite: remove an earlier run in the folder.
        inputs: files and folders that the run reads; None and "" are skipped.

    Raises:
        UserError: the folder holds another run, and --overwrite is not given.
    """
    folder = Path(output_dir)
    found = [] if overwrite else _written(folder, RESULTS)
    if found and not (resume and _is_owner(folder, run, resumed)):
        raise UserError(f"{folder}: holds {'another' if resume else 'a'} run already "
                        f"({found[0].relative_to(folder)}{_other(folder, run)}); continue it with "
                        "--resume auto, remove it with --overwrite, or give another --output_dir")
    if cli.rank() == 0:
        if not found:
            _remove_run(folder, inputs)
        write_json(folder / FILE, asdict(run), sealed=True)
        with open(folder / COMMANDS, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(json.dumps({"command": cli.command_line(), "run": run.id}) + "\n")


def _is_owner(folder: Path, run: Identity, resumed: Path | None) -> bool:
    """Whether the results in a folder are those of a run that resumes."""
    path = folder / FILE
    if path.exists():
        return Identity.of_json(read_json(path), path).id == run.id
    return resumed is not None and folder.resolve() in resumed.resolve().parents


def _other(folder: Path, run: Identity) -> str:
    """How the run in a folder differs, for a message; "" if that is unknown."""
    with contextlib.suppress(UserError):
        path = folder / FILE
        changes = find_changes(Identity.of_json(read_json(path), path), run)
        return f"; {_list_changes(changes)}" if changes else ""
    return ""


def _written(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """What a run has written into a folder; empty files do not count."""
    found: list[Path] = []
    with contextlib.suppress(FileNotFoundError):  # rank 0 is removing by-products
        for pattern in patterns:
            found += sorted(path for path in folder.glob(pattern) if path.lstat().st_size)
    return found


def _remove_run(folder: Path, inputs: Iterable[str | Path | None]) -> None:
    """Remove what an earlier run wrote, and nothing else.

    Raises:
        UserError: this run reads one of the files, or one cannot be removed.
    """
    found = [path for pattern in (*RESULTS, *BY_PRODUCTS) for path in folder.glob(pattern)]
    require_no_loss([Output(path, "a file of a run", lambda _: True) for path in found
                     if not path.is_dir()], inputs)
    try:
        for path in found:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for pattern in (*RANKS, "profile/rank_[0-9]*", "summary/rank_[0-9]*", "checkpoint",
                        "checkpoint_network", "checkpoint_best", "strategy", "tensorboard",
                        "profile", "summary", "card"):
            for path in folder.glob(pattern):
                if path.is_dir() and not any(path.iterdir()):
                    path.rmdir()
    except OSError as error:
        raise UserError(f"{error.filename or folder}: cannot be removed ({error.strerror}); give "
                        "another --output_dir") from None
