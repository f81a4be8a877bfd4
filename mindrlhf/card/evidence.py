"""What the records of a run say: metrics, evaluations, shards, settings, commands, versions."""
from __future__ import annotations

import hashlib
import json
import math
import platform
import shlex
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from mindrlhf import config
from mindrlhf.checkpoints import containers, fingerprints
from mindrlhf.checkpoints.runs import STEP
from mindrlhf.cli import UserError
from mindrlhf.files import hash_file
from mindrlhf.json_files import read_json
from mindrlhf.parallel import Settings
from mindrlhf.training import identity
from mindrlhf.training.journal import read_records

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "examples/glm4_dpo"
METRICS, CURVES = "metrics.jsonl", "curves.png"
HASH = "xxh3_128"  # key of a file's content hash
# losses that are ln 2 where policy and reference are the same
LOG_2 = ("sigmoid", "robust")
EVALUATION = ("loss", "dpo_loss", "rewards/accuracies", "rewards/margins", "rewards/chosen",
              "rewards/rejected", "logps/chosen", "logps/rejected")
MEDIANS = ("pairs_per_second", "tokens_per_second", "mfu")
LAST = ("loss", "dpo_loss", "rewards/accuracies", "rewards/margins")
SCRIPTS = ("convert_weight.py", "dpo_preprocess_glm4_parallel.py", "run_dpo.py",
           "transform_checkpoint.py", "make_tiny_glm4.py")
PATIENCE = 10  # seconds to wait for the weights of the other workers


def numbers_of(records: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """The values of a metric where it is a finite number."""
    return [record[name] for record in records
            if isinstance(record.get(name), (int, float)) and math.isfinite(record[name])]


def summarize_metrics(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The training steps in metrics.jsonl in numbers: sums, medians over steps, and the last step.

    Args:
        records: of metrics.jsonl.
    """
    train = [record for record in records if record["split"] == "train"]
    if not train:
        return {}
    found: dict[str, Any] = {
        "first_step": train[0]["step"], "steps": train[-1]["step"],
        **{name: sum(numbers_of(train, name)) for name in ("pairs", "tokens", "seconds")},
        "skipped_steps": sum(record.get("overflow") is True for record in train)}
    medians = {name: numbers_of(train, name) for name in MEDIANS}
    found |= {name: statistics.median(values) for name, values in medians.items() if values}
    found |= {name: train[-1].get(name) for name in LAST}
    if memory := numbers_of(train, "memory_gb"):
        found["memory_gb"] = max(memory)
    return found


def check_at_step_0(records: Sequence[Mapping[str, Any]], loss_type: str) -> dict[str, Any]:
    """Whether policy and reference were the same before the first update; {} if nothing tells.

    Args:
        records: of metrics.jsonl.
        loss_type: dpo.loss_type.
    """
    first = next((record for record in records
                  if record["split"] == "train" and record["step"] == 1), None)
    if first is None:
        return {}
    expected = {"expected_loss": math.log(2)} if loss_type in LOG_2 else {}
    return {"dpo_loss": first.get("dpo_loss"), "logratio_size": first.get("logratio_size"),
            **expected}


def evaluations(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Metrics of the held-out pairs before and after training; {} unless there are both."""
    held_out = [record for record in records if record["split"] == "eval"]
    if len(held_out) < 2 or held_out[0]["step"] != 0:
        return {}
    return {when: {"step": record["step"], "pairs": record.get("pairs"),
                   **{name: record.get(name) for name in EVALUATION}}
            for when, record in (("before", held_out[0]), ("after", held_out[-1]))}


def read_metrics(folder: Path, loss_type: str) -> dict[str, Any]:
    """What the metrics.jsonl in a folder says, as card.json has it."""
    path = folder / METRICS
    records = read_records(path)
    return {"metrics": {**summarize_metrics(records), HASH: hash_file(path)},
            "step_0": check_at_step_0(records, loss_type), "evaluation": evaluations(records)}


def read_shards(output_dir: Path, saved: Mapping[str, Any], workers: int,
                patience: float = PATIENCE) -> dict[str, str]:
    """Fingerprints of the final weights of the ranks on this machine: rank_N -> fingerprint.

    Args:
        output_dir: of the run.
        saved: what the step.json beside final weights of this run holds: step and run.
        workers: number of ranks.
        patience: seconds to wait for other workers, which save at the same time.
    """
    found: dict[str, str] = {}
    end = time.monotonic() + patience
    for rank in range(workers):
        folder = output_dir / "checkpoint_network" / f"rank_{rank}"
        while not (is_last := read_optional(folder / STEP) == saved) and time.monotonic() < end:
            time.sleep(0.1)
        files = sorted(folder.glob("*-network.ckpt"))
        if is_last and files:
            found[folder.name] = fingerprints.fingerprint(containers.open_tensors(files[0]))
    return found


def compare_settings(settings: Settings) -> dict[str, Any]:
    """The settings that differ from the shipped YAML that is most like them, or else from nothing.

    Args:
        settings: of the run.

    Returns:
        `like`, the name of the YAML, and `values`, dotted name -> value; None: not set.
    """
    own = _named(settings)
    found: tuple[str | None, dict[str, Any]] = None, own
    for path in sorted(SHIPPED.glob("finetune_*.yaml")):
        other = _named(config.resolve(path, run_mode="finetune").settings)
        differing = {name: own.get(name) for name in [*own, *other]
                     if own.get(name) != other.get(name)}
        if found[0] is None or len(differing) < len(found[1]):
            found = path.name, differing
    return {"like": found[0], "values": json.loads(json.dumps(found[1]))}


def _named(settings: Settings) -> dict[str, Any]:
    """The settings of the identity, and those of recomputation."""
    again = settings.get("recompute_config", {})
    return {**identity.identifying_settings(settings), "seed": settings["seed"],
            **{f"recompute_config.{key}": value for key, value in again.items()}}


def read_commands(output_dir: Path, run_id: str) -> list[str]:
    """The commands with which a run was started and resumed, each once."""
    lines: list[str] = []
    path = output_dir / identity.COMMANDS
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            start = json.loads(line)
            if start["run"] == run_id:
                lines.append(start["command"])
        except (ValueError, TypeError, KeyError):  # a line that a kill cut
            continue
    return plain_commands(lines)


def plain_commands(commands: Sequence[object]) -> list[str]:
    """Those of the commands that are this project's, each once and quoted anew.

    They are from files that others may have written. Quoted anew, a command is one program and its
    arguments, whatever stands in it.
    """
    return list(dict.fromkeys(_plain(commands)))


def _plain(commands: Sequence[object]) -> Iterator[str]:
    for command in commands:
        try:
            words = shlex.split(command) if isinstance(command, str) else []
            inner = shlex.split(words[2]) if words[0] == "bash" else words[1:]
            program, script = Path(words[1]).name, Path(inner[0]).name
        except (ValueError, IndexError):
            continue
        if script not in SCRIPTS:
            continue
        if words[0] == "python":
            yield shlex.join(words)
        elif words[0] == "bash" and program == "msrun_launcher.sh":
            words[2] = shlex.join(inner)
            yield " ".join(map(_quote, words))


def _quote(word: str) -> str:
    """A word as a shell reads it, in double quotes if it has single ones."""
    is_plain = "'" in word and not set('"$`\\!') & set(word)
    return f'"{word}"' if is_plain else shlex.quote(word)


def software() -> dict[str, str]:
    """Versions of what trained: Python, MindSpore, MindFormers, and this project."""
    from mindrlhf import runtime
    commit = read_commit(ROOT)
    return {"python": platform.python_version(), **runtime.versions(),
            **({"commit": commit} if commit else {}), "code": hash_code()}


@lru_cache
def hash_code() -> str:
    """SHA-256 of the modules of mindrlhf, 16 hex digits."""
    content = hashlib.sha256()
    for path in sorted((ROOT / "mindrlhf").rglob("*.py")):
        content.update(f"{path.relative_to(ROOT).as_posix()}\n".encode() + path.read_bytes())
    return content.hexdigest()[:16]


def read_commit(root: Path) -> str | None:
    """The commit that a folder has checked out, read from its .git without calling git, or None."""
    place = root / ".git"
    try:
        if place.is_file():  # a work tree
            place = root / place.read_text(encoding="utf-8").removeprefix("gitdir:").strip()
        head = (place / "HEAD").read_text(encoding="utf-8").strip()
        if head.startswith("ref: "):
            name, common = head[5:], place / "commondir"
            if common.is_file():
                place = place / common.read_text(encoding="utf-8").strip()
            if (place / name).is_file():
                head = (place / name).read_text(encoding="utf-8").strip()
            else:
                packed = (place / "packed-refs").read_text(encoding="utf-8").splitlines()
                head = next(line.split()[0] for line in packed if line.endswith(f" {name}"))
    except (OSError, UnicodeDecodeError, StopIteration, IndexError):
        return None
    is_hash = len(head) in (40, 64) and set(head) <= set("0123456789abcdef")
    return head if is_hash else None


def read_optional(path: Path) -> dict[str, Any]:
    """The content of a JSON file; {} if there is none or it is damaged."""
    try:
        return read_json(path) if path.is_file() else {}
    except UserError:
        return {}
