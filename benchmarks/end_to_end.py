"""How long do preprocessing and one epoch take, shared and unshared, and how long does TRL take?

    python -m venv scratch && scratch/bin/pip install torch==2.13.0 trl==1.16.0
    python benchmarks/end_to_end.py --trl_python scratch/bin/python

Prints a table with one line per data set, row length and side, then ratios of wall times. Ours are
the commands of the tutorial, from start to end, imports and compilation included. TRL is
DPOTrainer with precomputed reference log-probs, each batch padded to its longest sequence, in one
process; it gets our weights and token ids (`mindrlhf.data.show --json`), so it tokenizes nothing,
and its time begins after its imports.
The model has 8 layers of width 512 and 8192 ids; float32, 2 threads, 6 pairs a step (ours: as many
rows as hold 6 on average). The lengths are those of data_model.py. With "3", a prompt has three
ranked answers, and each two of them are a pair; with "1", a prompt has two answers. "computed" are
positions of an epoch, padding included. "unshared" is --share False, where each pair has its own
prompt. "before" is a checkout of this project in which the rows hold each pair as two sequences:

    git worktree add --detach scratch/before 167c88f
    python benchmarks/end_to_end.py --before scratch/before --prompts 300 --pairs 3 --rows 512

Memory is the largest resident size of a process.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import data_model
import numpy as np
import yaml
from processes import ROOT, cpu_model, table
from train_step import SIZES

EXAMPLE = Path("examples", "glm4_dpo")
PAIRS_A_STEP, THREADS = 6, 2
TAGS = (5, 2)  # tokens that the template adds to a prompt and to an answer


class Side(NamedTuple):
    """A checkout of this project, options of its preprocessing, and sequences of a row."""

    tree: Path
    options: list[str]
    sequences: int = 1


SIDES = {"shared": Side(ROOT, ["--share", "True"]), "unshared": Side(ROOT, ["--share", "False"])}


class Result(NamedTuple):
    """What a side needs: seconds of both stages, computed positions, rows or batches, bytes."""

    reference: float
    training: float
    computed: int
    rows: int
    memory: int

    @property
    def total(self) -> float:
        """Seconds of both stages."""
        return self.reference + self.training


def run(command: list[str], folder: Path, tree: Path = ROOT) -> tuple[float, int]:
    """Run a command in a folder; return its seconds and its largest resident size in bytes.

    Args:
        command: to run.
        folder: that it runs in.
        tree: where mindrlhf is.
    """
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(THREADS),
        "PYTHONPATH": str(tree),
        "GLOG_v": "3",
    }
    begin = time.perf_counter()
    with open(folder / "log.txt", "w", encoding="utf-8") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit((folder / "log.txt").read_text(encoding="utf-8"))
    return time.perf_counter() - begin, usage.ru_maxrss * 1024


def letters(size: int) -> list[bytes]:
    """Tokens of single bytes, filled up with some that no text has."""
    bytes_ = [bytes([byte]) for byte in range(256)]
    return bytes_ + [b"\xff" + number.to_bytes(2, "big") for number in range(size - 256)]


def write_model(folder: Path) -> Path:
    """Write random weights as a Hugging Face folder, with a tokenizer of single letters."""
    from mindrlhf.models.glm4 import tiny

    config = folder / "model.yaml"
    base = yaml.safe_load((ROOT / EXAMPLE / "glm4_tiny.yaml").read_text(encoding="utf-8"))
    base["model"]["model_config"].update(SIZES)
    config.write_text(yaml.safe_dump(base), encoding="utf-8")
    tiny.write_model(folder / "hf", config, letters)
    return folder / "hf"


def write_pairs(path: Path, prompts: int, answers: int) -> int:
    """Write pairs of random letters, a token each; return their number.

    Args:
        path: .jsonl of cvalues pairs.
        prompts: number of prompts.
        answers: to each prompt, from the best to the worst.
    """
    random = np.random.default_rng(1)
    counts = np.minimum(data_model.parts(prompts * 2, seed=1), 150)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))

    def text(tokens: int, tags: int) -> str:
        return "".join(random.choice(letters, max(1, tokens - tags)))

    pairs = 0
    with open(path, "w", encoding="utf-8") as file:
        for prompt, first, last in counts[:prompts]:
            sizes = [first, (first + last) // 2, last] if answers == 3 else [first, last]
            question, texts = text(prompt, TAGS[0]), [text(size, TAGS[1]) for size in sizes]
            for better, worse in itertools.combinations(texts, 2):
                row = {"prompt": question, "pos_resp": better, "neg_resp": worse}
                file.write(json.dumps(row) + "\n")
                pairs += 1
    return pairs


def write_yamls(folder: Path, tree: Path, seq_len: int, batch_size: int) -> None:
    """Write the YAMLs of both commands.

    Args:
        folder: where they go.
        tree: the checkout that runs.
        seq_len: positions of a row.
        batch_size: rows of a training step.
    """
    sizes = {**SIZES, "seq_length": seq_len}
    for name in ("process", "finetune"):
        text = f"base_config: {tree / EXAMPLE / name}_glm4_tiny.yaml\n"
        text += f"model: {{model_config: {json.dumps(sizes)}}}\n"
        if name == "finetune":
            text += f"runner_config: {{epochs: 1, batch_size: {batch_size}}}\n"
            text += "lr_schedule: {learning_rate: 1e-6}\ndpo: {sft_weight: 0.0}\n"
        (folder / f"{name}.yaml").write_text(text)


def run_ours(folder: Path, pairs: str, seq_len: int, side: Side) -> Result:
    """Preprocess and train with the commands of the tutorial.

    Args:
        folder: of the model and the pairs.
        pairs: name of the file of pairs.
        seq_len: positions of a row.
        side: what runs.
    """
    work, example = Path(tempfile.mkdtemp(dir=folder)), side.tree / EXAMPLE
    weights = ["--load_checkpoint", str(folder / "model.ckpt")]
    vocabulary = str(folder / "hf" / "tokenizer.model")
    write_yamls(work, side.tree, seq_len, 4)
    reference, first = run(
        [sys.executable, str(example / "dpo_preprocess_glm4_parallel.py"), *weights]
        + ["--src", str(folder / pairs), "--dst", "dpo.mindrecord", "--config", "process.yaml"]
        + ["--tokenizer", vocabulary, *side.options],
        work,
        side.tree,
    )
    made = json.loads((work / "dpo.mindrecord.json").read_text(encoding="utf-8"))
    rows, written = made["rows"], made["pairs"]["written"]
    write_yamls(work, side.tree, seq_len, max(1, round(PAIRS_A_STEP * rows / written)))
    training, second = run(
        [sys.executable, str(example / "run_dpo.py"), "--config", "finetune.yaml", *weights]
        + ["--train_dataset", "dpo.mindrecord", "--vocab_file", vocabulary],
        work,
        side.tree,
    )
    if side.tree == ROOT and not (folder / f"{pairs}.ids").exists():
        shown = subprocess.run(
            [sys.executable, "-m", "mindrlhf.data.show", str(work / "dpo.mindrecord"), "--json"],
            cwd=ROOT,
            check=True,
            capture_output=True,
        )
        (folder / f"{pairs}.ids").write_bytes(shown.stdout)
    computed = rows * side.sequences * seq_len
    return Result(reference, training, computed, rows, max(first, second))


def run_trl(python: str, folder: Path, pairs: str) -> Result:
    """Train with TRL on the same token ids and weights.

    Args:
        python: with torch and trl.
        folder: of the model and the token ids.
        pairs: name of the file of pairs.
    """
    script = Path(__file__).with_name("end_to_end_trl.py")
    work = Path(tempfile.mkdtemp(dir=folder))
    _, peak = run(
        [python, str(script), str(folder / "hf"), str(folder / f"{pairs}.ids")]
        + [str(PAIRS_A_STEP), str(THREADS)],
        work,
    )
    found = json.loads((work / "log.txt").read_text(encoding="utf-8").splitlines()[-1])
    return Result(found["reference"], found["training"], found["computed"], found["batches"], peak)


def measure(folder: Path, options: argparse.Namespace) -> Iterator[tuple[tuple, Result]]:
    """(pairs a prompt, side, row length) and the result, one after the other.

    Args:
        folder: for all files.
        options: of the command line.
    """
    model = write_model(folder)
    run(
        [sys.executable, str(ROOT / "convert_weight.py"), "--model", "glm-n", "--input_path"]
        + [f"{model}/", "--output_path", str(folder / "model.ckpt"), "--dtype", "fp32"],
        folder,
    )
    sides = dict(SIDES)
    if options.before:
        sides["before"] = Side(Path(options.before).resolve(), [], sequences=2)
    for pairs in options.pairs:
        name, answers = f"{pairs}.jsonl", {3: 3, 1: 2}[pairs]
        write_pairs(folder / name, options.prompts * 3 // pairs, answers)
        for seq_len, (side, what) in itertools.product(options.rows, sides.items()):
            yield (pairs, side, seq_len), run_ours(folder, name, seq_len, what)
        if options.trl_python:
            yield (pairs, "TRL", "-"), run_trl(options.trl_python, folder, name)


def comparisons(found: dict[tuple, Result]) -> Iterator[str]:
    """A line for each result with sharing.

    Args:
        found: what measure() yields.
    """
    for (pairs, side, seq_len), shared in found.items():
        if side != "shared":
            continue
        others = {
            "unshared": found[pairs, "unshared", seq_len],
            "before": found.get((pairs, "before", seq_len)),
            "TRL": found.get((pairs, "TRL", "-")),
        }
        ratios = [
            f"{other.total / shared.total:.2f} x as fast as {name}, with "
            f"{other.computed / shared.computed:.2f} x fewer positions"
            for name, other in others.items()
            if other
        ]
        yield f"{pairs} pair(s) a prompt, S = {seq_len}: shared is {'; '.join(ratios)}"


def main() -> None:
    """Measure, and print the table."""
    parse = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parse.add_argument("--prompts", type=int, default=100, help="with 3 pairs (default: 100)")
    parse.add_argument(
        "--pairs", type=int, nargs="+", choices=(3, 1), default=[3, 1], help="pairs of a prompt"
    )
    parse.add_argument(
        "--rows",
        type=int,
        nargs="+",
        default=[512, 1024],
        help="positions of a row, S (default: 512 1024)",
    )
    parse.add_argument("--before", help="a checkout of commit 167c88f (default: not measured)")
    parse.add_argument("--trl_python", default=os.environ.get("TRL_PYTHON"))
    options = parse.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = dict(measure(Path(folder), options))
    table(
        f"{cpu_model()}: preprocessing and one epoch, {3 * options.prompts} pairs",
        ["pairs a prompt", "side", "S", "rows", "computed", "reference s", "training s", "GB"],
        [
            [str(pairs), side, str(seq_len), str(result.rows), f"{result.computed:,}"]
            + [f"{result.reference:.0f}", f"{result.training:.0f}", f"{result.memory / 1e9:.1f}"]
            for (pairs, side, seq_len), result in found.items()
        ],
    )
    print(*comparisons(found), sep="\n")


if __name__ == "__main__":
    main()
