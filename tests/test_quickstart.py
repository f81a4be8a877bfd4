"""quickstart.sh from end to end, and the tiny model that it starts from."""

import json
import os
import shlex
import subprocess

import dpo_preprocess_glm4_parallel as preprocess
import pytest
from conftest import EXAMPLE, ROOT, run_script

from mindrlhf.data import samples
from mindrlhf.models.glm4 import tiny


@pytest.fixture(scope="module")
def screen():
    result = subprocess.run(
        ["bash", "quickstart.sh"], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_it_ends_on_one_screen_with_the_preferred_answer(screen):
    summary = screen[screen.index("== summary ==") :].splitlines()
    text = "\n".join(summary)
    assert len(summary) <= 24
    assert "step 0: dpo loss 0.6931" in text
    assert "as preferred, word for word" in text
    assert "8 NPUs" in text


def shown_command(screen, start):
    """A command of the summary, as a shell reads it."""
    summary = screen[screen.index("== summary ==") :]
    text = summary[summary.index(start) :].replace("\\\n", " ")
    return shlex.split(text.splitlines()[0])


def run_shown(command, **options):
    """Run a command in the project's folder, in a shell that knows nothing of the project."""
    environment = {key: os.environ[key] for key in ("PATH", "HOME") if key in os.environ}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, **options
    )


def test_the_chat_command_works_as_printed(screen):
    command = shown_command(screen, ".venv/bin/python examples")
    assert command[-1].endswith("tokenizer.model")
    result = run_shown(command, input="怎么开始学跑步？\n/quit\n")
    assert result.returncode == 0, result.stderr
    assert "可以先定一个小目标，每天练一点跑步，慢慢就会进步。" in result.stdout


def test_the_card_has_everything_and_holds(screen):
    command = shown_command(screen, ".venv/bin/python -m mindrlhf.card verify")
    result = run_shown([*command, "--score", "examples/glm4_dpo/score_glm4_tiny.yaml"])
    assert result.returncode == 0, result.stdout + result.stderr
    assert "holds              score, computed again: accuracy" in result.stdout
    assert "0 differ, 0 cannot be checked" in result.stdout
    card = json.loads((ROOT / "output/quickstart/run/card/card.json").read_text(encoding="utf-8"))
    held_out = card["evaluation"]["after"]
    assert card["score"]["margin"]["value"] == pytest.approx(held_out["rewards/margins"], 1e-5)
    assert card["answers"]["all"] == 3
    scripts = " ".join(card["commands"])
    for name in ("convert_weight", "dpo_preprocess", "run_dpo", "transform_checkpoint"):
        assert name in scripts


def test_training_raises_accuracy_and_margin_on_pairs_it_never_saw(screen):
    lines = (ROOT / "output/quickstart/run/metrics.jsonl").read_text().splitlines()
    before, after = [record for record in map(json.loads, lines) if record["split"] == "eval"]
    assert abs(before["rewards/margins"]) < 1e-4
    assert after["rewards/accuracies"] > 0.9
    assert after["rewards/margins"] > 1
    assert before["pairs"] == after["pairs"] == 28


def test_flipped_preferences_make_it_worse(screen, tmp_path):
    """The same training on pairs whose answers are swapped: a check that can go wrong."""
    out = ROOT / "output/quickstart"
    rows = [
        json.loads(line) for line in (out / "train.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    flipped = [{**row, "pos_resp": row["neg_resp"], "neg_resp": row["pos_resp"]} for row in rows]
    (tmp_path / "flipped.jsonl").write_text("".join(json.dumps(row) + "\n" for row in flipped))
    preprocess.main(
        [
            "--src",
            str(tmp_path / "flipped.jsonl"),
            "--dst",
            str(tmp_path / "flipped.mindrecord"),
            "--config",
            str(EXAMPLE / "process_glm4_tiny.yaml"),
            "--tokenizer",
            str(out / "hf/tokenizer.model"),
            "--load_checkpoint",
            str(out / "glm4_tiny.ckpt"),
        ]
    )
    config = tmp_path / "flipped.yaml"
    config.write_text(
        f"base_config: {EXAMPLE / 'finetune_glm4_tiny.yaml'}\nrunner_config: {{max_steps: 60}}\n"
    )
    result = run_script(
        EXAMPLE / "run_dpo.py",
        "--config",
        config,
        "--train_dataset",
        tmp_path / "flipped.mindrecord",
        "--eval_dataset",
        out / "held_out.mindrecord",
        "--vocab_file",
        out / "hf/tokenizer.model",
        "--load_checkpoint",
        out / "glm4_tiny.ckpt",
        "--output_dir",
        tmp_path / "run",
    )
    assert result.returncode == 0, result.stderr
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    after = [record for record in map(json.loads, lines) if record["split"] == "eval"][-1]
    assert after["rewards/accuracies"] < 0.1
    assert after["rewards/margins"] < -1


def test_the_console_is_quiet(screen):
    for word in ("WARNING", "[INFO]", "Traceback", "deprecated"):
        assert word not in screen


def test_pairs_are_enough_and_disjoint():
    train, held_out = samples.make_pairs()
    assert len(train) >= 64  # three pairs where a question has three answers
    assert len(held_out) >= 16
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in held_out}
    assert any(row["prompt"].isascii() for row in train)
    assert all(row["pos_resp"] != row["neg_resp"] for row in train + held_out)


def test_tokenizer_joins_the_most_frequent_pair_first():
    """By hand: "ab ab abc" has the pair (a, b) 3 times, then (space, ab) twice; GLM-4's split gives
    "ab", " ab", " abc".
    """
    tokens = tiny.train_tokenizer("ab ab abc", 258)
    assert tokens[:256] == [bytes([byte]) for byte in range(256)]
    assert tokens[256:] == [b"ab", b" ab"]
