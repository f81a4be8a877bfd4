"""The last screen of quickstart.sh: the effect of training, the files, and what to change for 9B.

    quickstart_summary.py FOLDER QUESTION ANSWER_BEFORE ANSWER_AFTER
"""
from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

SUMMARY = """
=============================== summary ===============================
step 0: dpo loss {loss:.4f} (ln 2 = 0.6931: policy and reference agree), {steps} steps

                        reward accuracy          reward margin
                        before -> after          before -> after
{train}
{held_out}
  (before: all rewards are 0; a tie does not count as accurate)

question   {question}
preferred  {preferred}
before     {before}
after      {after}
           {verdict}

files      {out}
           train.mindrecord (data), run/metrics.jsonl, merged/merged.ckpt
for GLM-4-9B on 8 NPUs: *_glm4_9b.yaml instead of *_glm4_tiny.yaml, 8 workers,
           --dtype bf16, --seq_len 8192, and your pairs: see README.md
======================================================================="""


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


def preferred_answer(pairs: Path, question: str) -> str:
    """The chosen answer to a question in a file of cvalues pairs."""
    rows = map(json.loads, pairs.read_text(encoding="utf-8").splitlines())
    return next(row["pos_resp"] for row in rows if row["prompt"] == question)


def main() -> None:
    """Print the summary; exit status 1 if the model does not give the preferred answer."""
    out, question, before, after = Path(sys.argv[1]), *sys.argv[2:]
    sidecar = json.loads((out / "train.mindrecord.json").read_text(encoding="utf-8"))
    pairs = sidecar["pairs"]["written"]
    metrics = (out / "run/metrics.jsonl").read_text(encoding="utf-8")
    records = [json.loads(line) for line in metrics.splitlines()]
    train = [record for record in records if record["split"] == "train"]
    held_out = [record for record in records if record["split"] == "eval"]
    preferred = preferred_answer(out / "train.jsonl", question)
    print(SUMMARY.format(
        loss=train[0]["dpo_loss"], steps=len(train),
        train=table_row(f"train ({pairs} pairs)", train[0], last_epoch(train, pairs)),
        held_out=table_row(f"held-out ({held_out[0]['pairs']} pairs)", held_out[0], held_out[-1]),
        question=question, preferred=preferred, before=before.replace("\n", " ")[:60], after=after,
        verdict="as preferred, word for word" if after == preferred else "NOT the preferred answer",
        out=out))
    if after != preferred:
        sys.exit("error: the tiny model did not learn the preferred answer")


if __name__ == "__main__":
    main()
