"""Kills, signals, damage and full disks: what a run leaves behind, and how it resumes."""

import json
import math
import re
import signal
import subprocess
import sys
import time
from itertools import accumulate
from types import SimpleNamespace

import pytest
from conftest import RUN_DPO, arguments, records

from mindrlhf.cli import UserError
from mindrlhf.training import state
from mindrlhf.training.identity import Identity

EXACT = (
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
    "epoch",
    "num_tokens",
)


@pytest.fixture(scope="module")
def sinking(golden, unbroken):
    """The settings of the unbroken run, in sink mode."""
    path = golden.folder / "sinking.yaml"
    path.write_text(
        f"base_config: {unbroken.config.name}\nrunner_config: {{sink_mode: True, sink_size: 1}}\n"
    )
    return path


def start(golden, config, output, *more):
    return subprocess.Popen(
        [sys.executable, str(RUN_DPO), *map(str, arguments(golden, config, output, more=more))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def steps_written(output):
    path = output / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def wait_for(condition, process, seconds=120):
    deadline = time.time() + seconds
    while not condition() and process.poll() is None and time.time() < deadline:
        time.sleep(0.002)


def test_killed_damaged_and_terminated_it_ends_as_the_unbroken_run(
    golden, sinking, unbroken, tmp_path
):
    """kill -9 after step 3; the newest state is truncated, so the run resumes from the one before,
    in sink mode; SIGTERM after step 7 saves a state and ends with 143; the last run finishes.
    """
    process = start(golden, unbroken.config, tmp_path)
    wait_for(lambda: steps_written(tmp_path) >= 3, process)
    process.kill()
    process.communicate()
    newest = list(state.saved_states(tmp_path, 0).values())[-1]
    reached = state.step_in_name(newest)
    newest.chmod(0o600)
    newest.write_bytes(newest.read_bytes()[:-1000])

    process = start(golden, sinking, tmp_path, "--resume", "auto")
    wait_for(lambda: steps_written(tmp_path) >= 7, process)
    process.send_signal(signal.SIGTERM)
    out, error = process.communicate(timeout=200)
    assert process.returncode == 143, error
    assert f"skipped: {newest}" in out
    assert f"step_{reached - 1:08d}.ckpt, step {reached - 1}" in out
    assert "stopped by SIGTERM after step" in out

    process = start(golden, unbroken.config, tmp_path, "--resume", "auto")
    _, error = process.communicate(timeout=200)
    assert process.returncode == 0, error
    found = records(tmp_path)
    assert [record["step"] for record in found] == list(range(1, 13))
    for left, right in zip(found, records(unbroken.output)):
        assert {key: left[key] for key in EXACT} == {key: right[key] for key in EXACT}, left["step"]
    network = "checkpoint_network/rank_0/glm4_dpo-network.ckpt"
    assert (tmp_path / network).read_bytes() == (unbroken.output / network).read_bytes()
    states = state.saved_states(tmp_path, 0)
    assert list(states) == list(range(4, 13))  # keep_checkpoint_max 9
    assert all(state.steps_done(path) == step for step, path in states.items())


def test_auto_without_a_state_starts_anew(tmp_path, capsys):
    from mindrlhf.training import run

    assert run.open_state({"resume_training": "auto", "output_dir": str(tmp_path)}) is None
    assert "starting from the beginning" in capsys.readouterr().out


def test_a_state_behind_others_is_not_resumed_over_them(unbroken):
    output = unbroken.output
    with pytest.raises(UserError, match=r"has states of later steps \(12\)"):
        state.choose_state(output, state.saved_states(output, 0)[11])
    assert (
        state.choose_state(output, state.saved_states(output, 0)[12])
        == state.saved_states(output, 0)[12]
    )


def test_a_flipped_bit_is_found(unbroken, tmp_path):
    source = state.saved_states(unbroken.output, 0)[12]
    path = tmp_path / source.name
    content = bytearray(source.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="checksum mismatch"):
        state.require_intact_state(path)
    state.require_intact_state(source)


def test_curves_events_and_console_are_there(unbroken):
    output = unbroken.output
    assert (output / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list((output / "tensorboard").glob("events.out.tfevents.*"))
    first = records(output)[0]
    for key in (
        "loss",
        "dpo_loss",
        "sft_loss",
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "rewards/accuracies",
        "logps/chosen",
        "logps/rejected",
        "logps/chosen_per_token",
        "learning_rate",
        "grad_norm",
        "epoch",
        "num_tokens",
        "overflow",
        "pairs_per_second",
        "tokens_per_second",
        "memory_gb",
    ):
        assert key in first
    events = b"".join(path.read_bytes() for path in (output / "tensorboard").iterdir())
    names = ("loss", "grad_norm", "learning_rate", "epoch", "num_tokens", "rewards/chosen",
             "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen",
             "logps/rejected")  # fmt: skip
    assert [name for name in names if f"train/{name}".encode() not in events] == []
    assert not re.search(rb"train/(accuracy|margin|\w+_(reward|logps))\b", events)


def test_epochs_and_tokens_are_counted_over_the_whole_run(unbroken):
    steps = records(unbroken.output)
    assert [step["epoch"] for step in steps] == [(number + 1) / 3 for number in range(12)]
    tokens = [step["tokens"] for step in steps]
    assert [step["num_tokens"] for step in steps] == list(accumulate(tokens))


def test_curves_have_units_a_learning_rate_and_whole_steps(tmp_path):
    from mindrlhf.training.journal import Journal

    journal = Journal(tmp_path, 0)
    for step in (1, 2):
        values = {"loss": 0.6, "dpo_loss": 0.6, "rewards/accuracies": 0.9, "learning_rate": 1e-6}
        journal.add("train", step, values)
    figure = journal.plot_curves()
    panels = {axis.get_title(): axis for axis in figure.axes if axis.get_visible()}
    loss, accuracy, rate = (panels[name] for name in ("loss", "reward accuracy", "learning rate"))
    assert "ln 2" in [line.get_label() for line in loss.lines]
    assert [line.get_ydata()[0] for line in loss.lines][-1] == math.log(2)
    assert (loss.get_ylabel(), accuracy.get_ylabel()) == ("nats per pair", "share of pairs")
    assert accuracy.get_ylim() == (0, 1)
    assert list(rate.lines[0].get_ydata()) == [1e-6, 1e-6]
    figure.draw_without_rendering()
    assert all(float(tick).is_integer() for tick in loss.get_xticks())
    journal.close()


def test_training_goes_on_without_a_picture(tmp_path, monkeypatch, capsys):
    """It is drawn before the last state is saved; neither matplotlib nor the disk ends the run."""
    from mindrlhf.training.journal import Journal

    journal = Journal(tmp_path, 0)
    journal.add("train", 1, {"loss": 0.6})
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)
        journal.draw()
    assert not (tmp_path / "curves.png").exists()
    assert capsys.readouterr().out == ""
    (tmp_path / "curves.png").mkdir()
    journal.draw()
    assert capsys.readouterr().out.startswith(f"warning: {tmp_path / 'curves.png'}: ")
    journal.close()


def test_a_journal_that_a_kill_cut_short_is_read_up_to_there(tmp_path):
    from mindrlhf.training.journal import Journal, read_records

    lines = [{"split": "train", "step": step, "loss": 1.0} for step in (1, 2, 3)]
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines) + '{"split": "tr'
    )
    assert [record["step"] for record in read_records(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    journal = Journal(tmp_path, 2)
    journal.add("train", 3, {"loss": float("nan")})
    journal.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert [json.loads(line)["step"] for line in text.splitlines()] == [1, 2, 3]
    assert json.loads(text.splitlines()[-1])["loss"] is None  # JSON has no NaN


def saver(tmp_path, network, free):
    """A checkpoint callback that believes that `free` bytes are left."""
    from mindrlhf.training.callbacks import Progress
    from mindrlhf.training.saving import DPOCheckpointMonitor

    monitor = DPOCheckpointMonitor(
        Progress(first=0, total=9),
        None,
        network,
        output_dir=tmp_path,
        prefix="p",
        save_checkpoint_steps=1,
        keep_checkpoint_max=2,
        run=Identity("0" * 16, {}),
    )
    monitor._free = lambda: free[0]
    return monitor


def test_a_full_disk_is_told_before_it_costs_anything(tmp_path, capsys):
    from mindspore import nn

    network = nn.Dense(100, 100)  # 40,400 bytes
    network.optimizer = SimpleNamespace(global_step=1)
    parameters = SimpleNamespace(network=network, cur_epoch_num=1)
    context = SimpleNamespace(original_args=lambda: parameters)
    free = [1000]
    monitor = saver(tmp_path, network, free)
    with pytest.raises(UserError, match=r"takes 40\.40 KB, 1\.00 KB are free"):
        monitor.on_train_begin(context)
    free[0] = 10**9
    former = signal.getsignal(signal.SIGTERM)
    monitor.on_train_begin(context)
    for step in (1, 2, 3):
        monitor.progress.step = step
        monitor.save_state(parameters)
    assert list(state.saved_states(tmp_path)) == [2, 3]
    free[0] = 1000
    monitor.progress.step = 4
    monitor.save_state(parameters)
    assert "was not saved (no space left on the disk); earlier ones stay" in capsys.readouterr().out
    assert list(state.saved_states(tmp_path)) == [2, 3]
    with pytest.raises(UserError, match="Make room"):
        monitor.on_train_end(context)
    assert signal.getsignal(signal.SIGTERM) == former


def test_pruning_leaves_the_states_of_other_runs(tmp_path):
    """Before: the newest numbers stayed, so a new run deleted its own states."""
    from mindspore import nn

    network = nn.Dense(2, 2)
    network.optimizer = SimpleNamespace(global_step=1)
    parameters = SimpleNamespace(network=network, cur_epoch_num=1)
    other, own = saver(tmp_path, network, [10**9]), saver(tmp_path, network, [10**9])
    other.run = Identity("1" * 16, {})
    for monitor, steps in ((other, (2, 50)), (own, (1, 3, 4, 5))):
        for step in steps:
            monitor.progress.step = step
            monitor.save_state(parameters)
    damaged = state.state_folder(tmp_path) / state.state_name("p", 1)
    damaged.write_bytes(b"damaged")
    own.progress.step = 6
    own.save_state(parameters)
    assert list(state.saved_states(tmp_path)) == [1, 2, 5, 6, 50]


def test_a_rank_without_room_costs_no_other_rank_its_states(tmp_path, monkeypatch, capsys):
    """Before: rank 0 went on and deleted the only step that both had; --resume auto began anew."""
    from mindspore import nn

    monkeypatch.setenv("MS_WORKER_NUM", "2")
    network = nn.Dense(100, 100)
    network.optimizer = SimpleNamespace(global_step=1)
    parameters = SimpleNamespace(network=network, cur_epoch_num=1)
    steps = {rank: [] for rank in range(2)}
    for step in (2, 4, 6, 8, 10):
        for rank in range(2):
            monkeypatch.setenv("RANK_ID", str(rank))
            monitor = saver(tmp_path, network, [1000 if (rank, step > 4) == (1, True) else 10**9])
            monitor.progress.step = step
            monitor.save_state(parameters)
            steps[rank].append(list(state.saved_states(tmp_path)))
    assert steps[1] == [[2], [2, 4], [2, 4], [2, 4], [2, 4]]
    assert steps[0] == [[2], [2, 4], [4, 6], [4, 6, 8], [4, 6, 8, 10]]
    assert state.steps_done(state.choose_state(tmp_path, "auto")) == 4
    state.saved_states(tmp_path, 0)[4].unlink()
    with pytest.raises(UserError, match="no step has an intact state of each of 2 workers; begin"):
        state.choose_state(tmp_path, "auto")
    monkeypatch.setenv("RANK_ID", "0")
    for rank, step in ((0, 8), (0, 10), (1, 2), (1, 4)):
        state.saved_states(tmp_path, rank)[step].unlink()
    assert state.choose_state(tmp_path, "auto") is None  # a kill while the first one was saved
    assert "skipped: step 6, which not all workers had saved" in capsys.readouterr().out


def test_two_workers_stop_after_the_same_step(tmp_path, monkeypatch):
    """One stops after step 5, when the other may be a step ahead: both stop after step 7."""
    from mindspore import nn

    monkeypatch.setenv("MS_WORKER_NUM", "2")
    network = nn.Dense(2, 2)
    told, other = saver(tmp_path, network, [1]), saver(tmp_path, network, [1])
    told.terminated, other.terminated = True, False
    assert [told._stop_now(step) for step in (5, 6, 7)] == [False, False, True]
    assert [other._stop_now(step) for step in (6, 7)] == [False, True]
