"""What the callbacks and the journal of a run say about odd numbers and odd files."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

from mindrlhf import cli
from mindrlhf.cli import UserError
from mindrlhf.data import summary
from mindrlhf.data.groups import Sizes
from mindrlhf.training import callbacks, inputs, run
from mindrlhf.training.journal import read_records


def warned(capsys, steps):
    """What a run says after steps of these (loss, gradient norm)."""
    progress = callbacks.Progress(first=0, total=len(steps))
    monitor = callbacks.DPOMonitor(
        progress, None, sft_weight=0.0, tolerance=None, operations=1, cards=1
    )
    for loss, grad_norm in steps:
        progress.step += 1
        monitor.warn_of_dead_weights({"loss": loss, "grad_norm": grad_norm})
    return capsys.readouterr().out.splitlines()


def test_a_learning_rate_that_ruins_the_weights_is_reported_once(capsys):
    """Before: the run went on in silence to its end."""
    (line,) = warned(capsys, [(0.69, 3.0), (5.1, 0.0), (5.1, 0.0), (5.1, 0.0), (5.1, 0.0)])
    assert line == (
        "warning: step 4: for 3 steps, the gradient is 0 and the loss stays 5.1: the weights are "
        "ruined. Lower lr_schedule.learning_rate and train again"
    )
    (line,) = warned(capsys, [(0.69, 34.6), (2e5, 2e6), (1e6, 2e6), (1e6, 6e6), (1e6, 1e7)])
    assert "step 4: for 3 steps, the loss is 1e+06, 0.693 at the first step" in line


@pytest.mark.parametrize(
    "steps",
    [
        [(0.69, 3.0)] + [(1e-9, 0.0)] * 9,  # all pairs are separated
        [(0.69, 3.0)] + [(0.0, 0.0)] * 9,  # batches without pairs
        [(2500.0, 1e3)] * 9,  # IPO begins there at beta 0.01
        [(0.69, 3.0), (9.0, 0.0), (9.0, 0.0), (9.0, 1.0)] * 3,
        [(float("nan"), float("nan"))] * 9,  # reported by max_bad_steps
    ],
)
def test_other_runs_are_not_suspected(capsys, steps):
    assert warned(capsys, steps) == []


@pytest.mark.parametrize(
    "line", ["{}", "3", "null", "[" * 100_000, '{"step": "1", "split": "x"}', "\xff", '{"step": 1']
)
def test_a_foreign_line_in_metrics_jsonl_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    good = json.dumps({"split": "eval", "step": 1, "loss": 1.0}).encode() + b"\n"
    path.write_bytes(good + line.encode("latin-1") + b"\n" + good)
    with pytest.raises(UserError, match=r"metrics.jsonl:2: not a record of a run") as error:
        read_records(path)
    assert "\n" not in str(error.value)
    path.write_bytes(good + line.encode("latin-1"))  # cut by a kill
    assert len(read_records(path)) == 1


def test_the_best_evaluation_so_far_skips_those_without_a_number(tmp_path):
    rows = [{"loss": 2.0}, {"loss": None}, {}, {"loss": 1.5}, {"loss": "x"}]
    text = "".join(json.dumps({"split": "eval", "step": 1, **row}) + "\n" for row in rows)
    (tmp_path / "metrics.jsonl").write_text(text)
    assert run.best_so_far(tmp_path, 1, "loss") == 1.5


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0.00 KB"),
        (99, "0.10 KB"),
        (99_999, "100.00 KB"),
        (100_000, "0.10 MB"),
        (9_999_999, "10.00 MB"),
        (10_000_000, "0.01 GB"),
        (18.8e9, "18.80 GB"),
    ],
)
def test_small_sizes_are_not_printed_as_zero(size, text):
    assert cli.size_text(size) == text


@pytest.mark.parametrize(
    ("batch_size", "refused"), [(1, False), (4, False), (192, False), (193, True)]
)
def test_a_batch_far_above_the_rows_is_refused_before_it_fills_the_memory(
    golden, batch_size, refused
):
    """Before: 100,000 rows of padding were made for 3 rows."""
    from mindrlhf import config

    overrides = {"runner_config.batch_size": batch_size}
    settings = config.load_settings(golden.finetune, run_mode="finetune", overrides=overrides)
    data = SimpleNamespace(train={"rows": 3}, train_path="x.mindrecord")
    if not refused:
        inputs.require_filled_batches(settings, data)
        return
    with pytest.raises(UserError, match="batch_size: 193 makes 193 rows a step, .* give at most 3"):
        inputs.require_filled_batches(settings, data)


def test_an_evaluation_without_a_number_is_never_the_best(capsys):
    kept = []
    losses = iter([9.0, math.nan, 0.5, math.nan, 0.6, 0.4])
    values = {"dpo_loss": 0.0, "sft_loss": 0.0, "rewards/accuracies": 0.0, "rewards/margins": 0.0}
    progress = callbacks.Progress(first=0, total=5)
    monitor = callbacks.EvalMonitor(
        progress,
        None,
        lambda: {**values, "loss": next(losses)},
        eval_step_interval=1,
        keep_best=lambda: kept.append(progress.step),
    )
    monitor.on_train_begin(None)
    for progress.step in range(1, 6):
        monitor.on_train_step_end(None)
    assert kept == [2, 5]
    assert len(capsys.readouterr().out.splitlines()) == 6


@pytest.mark.parametrize(
    ("runs", "sources", "warned"),
    [("aa", "ss", False), ("ab", "st", False), ("ab", "ss", True), ("a", "s", False)],
)
def test_data_sets_of_the_same_pairs_by_two_runs_are_told(capsys, runs, sources, warned):
    made = [{"run": run, "source": [{"sha256": sha}]} for run, sha in zip(runs, sources)]
    train, held_out = (*made, None)[:2]
    data = inputs.Data("train.mindrecord", train, held_out and "eval.mindrecord", held_out)
    inputs.warn_of_overlap(data)
    said = capsys.readouterr().out
    assert bool(said) is warned
    if warned:
        assert said.startswith("warning: train.mindrecord and eval.mindrecord were made of the ")


def test_a_plan_whose_cards_get_parts_of_the_batch_is_refused(golden, tmp_path):
    from mindrlhf import config

    settings = config.load_settings(golden.finetune, run_mode="finetune")
    settings["parallel"] = {"parallel_mode": 1, "full_batch": False}
    with pytest.raises(UserError, match="full_batch must be True to train"):
        run.finetune({**settings, "output_dir": str(tmp_path / "out")})
    assert not (tmp_path / "out").exists()


def test_no_row_length_is_advised_where_pairs_were_cut():
    """Their lengths, and which of their prompts are equal, are those of the shorter rows."""
    scored = SimpleNamespace(
        sizes=Sizes(
            np.array([10, 20], np.int32),
            np.array([[0, 5], [0, 5], [1, 5], [1, 5]], np.int32),
            np.array([[0, 1], [2, 3]], np.int32),
        ),
        cut=np.zeros(2, np.int32),
        dropped=np.zeros(0, np.int32),
    )
    report = SimpleNamespace(scored=scored, seq_len=1024)
    assert "--seq_len 512 would train" in summary.length_line(report, lambda length: length)
    scored.cut = np.array([0] * 998 + [1, 2], np.int32)  # few: they change little
    assert "full, not counting 2 pairs cut or dropped at 1024)" in summary.length_line(
        report, float
    )
    scored.dropped = np.arange(10)
    assert "12 pairs were shortened or dropped, so no" in summary.length_line(report, float)
