"""The last screen of quickstart.sh: what training changed, where the files lie, and what to change for 9B."""
import json
import sys
from pathlib import Path


def last_epoch(steps):
    """Metrics over the last epoch: means over pairs. Every epoch has as many pairs, so it is the tail with as many."""
    total = sum(step["pairs"] for step in steps)
    epoch, seen = [], 0
    for step in reversed(steps):
        epoch.append(step)
        seen += step["pairs"]
        if total % seen == 0 and seen >= PAIRS:
            break
    return {key: sum(step[key] * step["pairs"] for step in epoch) / seen for key in ("accuracy", "margin")}


out, question, before, after = sys.argv[1:]
out = Path(out)
PAIRS = json.loads((out / "train.mindrecord.json").read_text())["pairs"]["written"]
records = [json.loads(line) for line in (out / "run/metrics.jsonl").read_text().splitlines()]
train = [record for record in records if record["split"] == "train"]
held_out = [record for record in records if record["split"] == "eval"]
chosen = next(row["pos_resp"] for row in map(json.loads, (out / "train.jsonl").read_text(encoding="utf-8").splitlines())
              if row["prompt"] == question)
trained = last_epoch(train)


def row(title, first, last):
    return f"  {title:<22}{first['accuracy']:>8.2f} ->{last['accuracy']:>6.2f}{first['margin']:>14.2f} ->{last['margin']:>7.2f}"


print(f"""
=============================== summary ===============================
step 0: dpo loss {train[0]['dpo_loss']:.4f} (ln 2 = 0.6931: policy and reference agree), {len(train)} steps

                        reward accuracy          reward margin
                        before -> after          before -> after
{row(f'train ({PAIRS} pairs)', train[0], trained)}
{row(f'held-out ({held_out[0]["pairs"]} pairs)', held_out[0], held_out[-1])}
  (before: all rewards are 0; a tie is no success)

asked      {question}
preferred  {chosen}
before     {before.replace(chr(10), ' ')[:60]}
after      {after}
           {'as preferred, word for word' if after == chosen else 'NOT the preferred answer'}

files      {out}
           train.mindrecord (data), run/metrics.jsonl, merged/merged.ckpt
for GLM-4-9B on 8 NPUs: *_glm4_9b.yaml instead of *_glm4_tiny.yaml, 8 workers,
           --dtype bf16, --seq_len 8192, and your pairs: see README.md
=======================================================================""")
if after != chosen:
    sys.exit("error: the tiny model did not learn the preferred answer")
