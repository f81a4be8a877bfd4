"""Runs the commands, disturbs them at chosen moments, and judges what they leave."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from conftest import EXAMPLE, ROOT

from mindrlhf.checkpoints import containers
from mindrlhf.data import mindrecord

# 3 rows, one a step, 4 epochs: 12 steps, a state after every fourth one
TRAINING = """
dpo: {sft_weight: 0.5}
runner_config: {epochs: 4, batch_size: 1}
lr_schedule: {learning_rate: 1e-3, warmup_ratio: 0.0}
callbacks:
  - {type: DPOMonitor, per_print_times: 1}
  - {type: EvalMonitor, eval_step_interval: 0}
  - {type: DPOCheckpointMonitor, prefix: glm4_dpo, save_checkpoint_steps: 4, keep_checkpoint_max: 2}
"""
EXACT = (
    "step",
    "loss",
    "dpo_loss",
    "sft_loss",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "learning_rate",
    "grad_norm",
    "pairs",
    "tokens",
)
PYTHON = sys.executable
NETWORK = "checkpoint_network/rank_0/glm4_dpo-network.ckpt"


def convert(case, target, *more):
    return [ROOT / "convert_weight.py", "--model", "glm-n", "--input_path", case.hf,
            "--output_path", target, "--dtype", "fp32", *more]  # fmt: skip


def merge(source, target, *more):
    return [ROOT / "transform_checkpoint.py", f"--src_checkpoint={source}",
            f"--dst_checkpoint={target}", *more]  # fmt: skip


def preprocess(case, target, *more):
    return [EXAMPLE / "dpo_preprocess_glm4_parallel.py", "--src", case.pairs, "--dst", target,
            "--config", case.process, "--tokenizer", case.tokenizer, "--load_checkpoint",
            case.checkpoint, *more]  # fmt: skip


def train(case, output, *more, config=None):
    return [EXAMPLE / "run_dpo.py", "--config", config or case.finetune, "--train_dataset",
            case.data, "--vocab_file", case.tokenizer, "--load_checkpoint", case.checkpoint,
            "--output_dir", output, *more]  # fmt: skip


def launch(command, workers, log):
    """A command on several workers, through the launcher."""
    words = " ".join(map(str, command))
    return ["bash", ROOT / "scripts/msrun_launcher.sh", words, str(workers), "0", log, "True", "60"]


def heed_signals():
    """A process that this one starts ignores no signal that pytest ignores."""
    for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)


def start(command, *, prepare: Callable[[], object] = heed_signals, **options):
    """Start a command: a Python script and its arguments, or bash and its own."""
    words = list(map(str, command))
    return subprocess.Popen(
        words if words[0] == "bash" else [sys.executable, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=prepare,
        env={**os.environ, "PYTHON": sys.executable, **options.pop("environment", {})},
        **options,
    )


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    returncode: int
    stdout: str
    stderr: str


def finish(process, seconds=600) -> Ended:
    """Wait for the end of a command."""
    try:
        out, error = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        out, error = process.communicate()
        raise AssertionError(f"still running after {seconds} s:\n{out}\n{error}") from None
    return Ended(process.returncode, out, error)


def run(command, **options) -> Ended:
    return finish(start(command, **options))


def done(command, **options) -> Ended:
    """Run a command that must succeed."""
    result = run(command, **options)
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def assert_refused(result, *parts):
    """Status 2 and one line on stderr, which has all parts."""
    assert result.returncode == 2, result.stdout + result.stderr
    assert len(result.stderr.strip().splitlines()) == 1, result.stderr
    assert result.stderr.startswith("error: ")
    for part in parts:
        assert str(part) in result.stderr


# kills


def snapshot(folder):
    """What a folder holds: path -> size and time, hidden files too."""
    found, left = {}, [str(folder)]
    while left:
        try:
            for entry in list(os.scandir(left.pop())):
                about = entry.stat(follow_symlinks=False)
                if entry.is_dir(follow_symlinks=False):
                    left.append(entry.path)
                found[entry.path] = (about.st_size, about.st_mtime_ns)
        except OSError:
            continue  # removed meanwhile
    return found


@dataclass
class Timeline:
    """How an undisturbed command went: what kills are timed by."""

    seconds: float
    changes: int  # of the folder that it writes


def watch(process, folder, *, seconds=1e9, changes=1 << 60) -> Timeline:
    """Follow a command until it ends, a time has passed or a folder has changed so often."""
    begin, former, seen = time.monotonic(), snapshot(folder), 0
    while process.poll() is None and time.monotonic() - begin < seconds and seen < changes:
        found = snapshot(folder)
        seen += found != former
        former = found
        time.sleep(0.001)
    return Timeline(time.monotonic() - begin, seen)


def kill_at_random(command, folder, timeline, rng: random.Random) -> bool:
    """Kill a command at a random time, or after a random change in its folder.

    Returns:
        whether it was still running.
    """
    process = start(command)
    if rng.random() < 0.5:
        watch(process, folder, seconds=rng.uniform(0, timeline.seconds))
    else:
        watch(process, folder, changes=rng.randint(1, timeline.changes))
    alive = process.poll() is None
    process.kill()
    process.communicate()
    return alive


# what is left


def is_final(path: Path, folder: Path) -> bool:
    """Whether a file has its final name: temporaries are hidden."""
    parts = path.relative_to(folder).parts
    return path.is_file() and not any(part.startswith(".") for part in parts)


def complete_files(folder) -> list[Path]:
    """The files with final names; each is asserted to be complete."""
    found = sorted(path for path in Path(folder).rglob("*") if is_final(path, Path(folder)))
    for path in found:
        CHECKS.get(path.suffix, lambda _: None)(path)
    return found


def _check_ckpt(path):
    if path.parent.name != "strategy":
        containers.require_intact(path, needs_checksum="step_" in path.name)


def _check_mindrecord(path):
    assert mindrecord.find_damage(path, mindrecord.read_data_sidecar(path)) is None


def _check_safetensors(path):
    from safetensors import safe_open

    with safe_open(path, "np"):
        pass


def _check_png(path):
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    assert content.endswith(b"IEND\xaeB\x60\x82")


def _check_lines(path):
    """All lines but the last, which may be cut."""
    for line in path.read_text().splitlines()[:-1]:
        json.loads(line)


CHECKS = {
    ".ckpt": _check_ckpt,
    ".safetensors": _check_safetensors,
    ".mindrecord": _check_mindrecord,
    ".json": lambda path: json.loads(path.read_text()),
    ".jsonl": _check_lines,
    ".png": _check_png,
}


@dataclass
class Result:
    """What counts of an output: equal results have equal contents."""

    files: dict[str, bytes] = field(default_factory=dict)
    metrics: list[dict] = field(default_factory=list)

    @classmethod
    def of_training(cls, output: Path) -> Result:
        """Weights and states of every rank, and all metrics but the times."""
        files = {str(path.relative_to(output)): path.read_bytes()
                 for path in complete_files(output) if path.suffix == ".ckpt"}  # fmt: skip
        lines = (output / "metrics.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        return cls(files, [{name: record.get(name) for name in EXACT} for record in records])

    @classmethod
    def of_folder(cls, folder: Path) -> Result:
        """All files; paths in sidecars count as their names."""
        return cls({str(path.relative_to(folder)): path.read_bytes().replace(
            str(folder).encode(), b"") for path in complete_files(folder)
            if path.suffix != ".png"})  # fmt: skip
