"""The last screen of quickstart.sh: the effect of training, the files, and what to change for 9B.

    quickstart_summary.py FOLDER
"""
from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mindrlhf.inference import score_record
from mindrlhf.inference.compare import wrap_cells

SUMMARY = """
=============================== summary ===============================
step 0: dpo loss {loss:.4f} (ln 2 = 0.6931: policy and reference agree), {steps} steps
  before -> after         reward accuracy          reward margin
{train}
{held_out}
  (before: all rewards are 0, ties. Held-out accuracy: 95 % interval {low:.2f} to {high:.2f})
{answers}
card       {card}/README.md, README_CN.md; to recompute what they say:
           .venv/bin/python -m mindrlhf.card verify {card}
to talk to it, in the project's folder:
  .venv/bin/python examples/glm4_dpo/run_dpo.py --chat --config \\
    examples/glm4_dpo/predict_glm4_tiny.yaml --load_checkpoint \\
    {short}/merged/merged.ckpt --vocab_file {short}/hf/tokenizer.model
for GLM-4-9B on 8 NPUs: *_glm4_9b.yaml instead of *_glm4_tiny.yaml, 8 workers,
           --dtype bf16, --seq_len 8192, and your pairs: see README.md
======================================================================="""
SHORT = "output/quickstart"  # the folder, as quickstart.sh calls it
WIDTH = 60  # columns of an answer


def last_epoch(steps: Sequence[Mapping[str, Any]], pairs: int) -> dict[str, float]:
    """Accuracy and margin over the last epoch, means over pairs.

    Every epoch has the same pairs, so the last one is the tail of the steps with that many pairs.

    Args:
        steps: metrics of each training step.
        pairs: number of pairs in the data.
    """
    total = sum(step["pairs"] for step in steps)
    epoch: list[Mapping[str, Any]] = []
    seen = 0
    for step in reversed(steps):
        epoch.append(step)
        seen += step["pairs"]
        if total % seen == 0 and seen >= pairs:
            break
    return {key: sum(step[key] * step["pairs"] for step in epoch) / seen
            for key in ("rewards/accuracies", "rewards/margins")}


def table_row(title: str, first: Mapping[str, Any], last: Mapping[str, Any]) -> str:
    """Accuracy and margin before and after training, as a line of the summary.

    Args:
        title: of the line.
        first: metrics before training.
        last: metrics after training.
    """
    return (f"  {title:<22}{first['rewards/accuracies']:>8.2f} ->{last['rewards/accuracies']:>6.2f}"
            f"{first['rewards/margins']:>14.2f} ->{last['rewards/margins']:>7.2f}")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def one_line(text: str) -> str:
    """The beginning of a text, as long as a line of the summary has room."""
    return wrap_cells(text.replace("\n", " "), WIDTH)[0]


def answer_lines(answers: Sequence[Mapping[str, Any]], preferred: Mapping[str, str]) -> list[str]:
    """Each question with the answers before and after training.

    Args:
        answers: lines of --compare_with.
        preferred: question -> the chosen answer in the pairs.
    """
    lines = []
    for entry in answers:
        question = entry["messages"][-1]["content"]
        same = entry["answer"] == preferred[question]
        lines += [question, f"  before   {one_line(entry['other_answer'])}",
                  f"  after    {one_line(entry['answer'])}"
                  f"{' (as preferred, word for word)' if same else ''}"]
    return lines


def main() -> None:
    """Print the summary; exit status 1 if the model does not give the first preferred answer."""
    out = Path(sys.argv[1])
    sidecar = json.loads((out / "train.mindrecord.json").read_text(encoding="utf-8"))
    pairs = sidecar["pairs"]["written"]
    records = read_lines(out / "run/metrics.jsonl")
    train = [record for record in records if record["split"] == "train"]
    held_out = [record for record in records if record["split"] == "eval"]
    rows = read_lines(out / "train.jsonl") + read_lines(out / "held_out.jsonl")
    preferred = {row["prompt"]: row["pos_resp"] for row in reversed(rows)}
    score = score_record.load(out / "score").accuracy
    answers = read_lines(out / "answers.jsonl")
    print(SUMMARY.format(
        loss=train[0]["dpo_loss"], steps=len(train),
        train=table_row(f"train ({pairs} pairs)", train[0], last_epoch(train, pairs)),
        held_out=table_row(f"held-out ({held_out[0]['pairs']} pairs)", held_out[0], held_out[-1]),
        low=score.low, high=score.high,
        answers="\n".join(answer_lines(answers, preferred)),
        card=f"{SHORT}/run/card", short=SHORT))
    first = answers[0]
    if first["answer"] != preferred[first["messages"][-1]["content"]]:
        sys.exit("error: the tiny model did not learn the preferred answer")


if __name__ == "__main__":
    main()
