"""Runs do not mix: whose results a folder holds, and which run a state belongs to."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, RUN_DPO, arguments, records, run_script
from test_training import copy_data, other_weights

from mindrlhf import json_files
from mindrlhf.checkpoints import containers
from mindrlhf.cli import UserError
from mindrlhf.json_files import write_json
from mindrlhf.training import identity, state
from mindrlhf.training.identity import Identity

LAUNCHER = ROOT / "scripts/msrun_launcher.sh"
STATE = "checkpoint/rank_0/glm4_dpo-step_00000012.ckpt"


@pytest.fixture(scope="module")
def trained(unbroken):
    """A run of 12 steps: its folder and its YAML."""
    return unbroken.output, unbroken.config


def begin(*words):
    """What a training command does before it builds a model."""
    import run_dpo

    from mindrlhf.training import run

    class Reached(Exception):
        pass

    def reach(*_):
        raise Reached

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.config, "to_mindformers", reach)
        with pytest.raises(Reached):
            run_dpo.main([*map(str, words)])


def test_the_run_and_its_states_hold_the_same_identity(trained):
    output, _ = trained
    path = output / STATE
    saved = identity.identity_in(containers.open_tensors(path), path)
    assert saved.to_bytes() == Identity(**json_files.read_json(output / "run.json")).to_bytes()
    assert saved.values["dpo.beta"] == 0.1
    assert saved.values["workers"] == 1
    assert "rows" in saved.values["training data"]
    step = json_files.read_json(output / "checkpoint_network/rank_0/step.json")
    assert step == {"step": 12, "run": saved.id}


@pytest.mark.parametrize("left", ["all", "metrics.jsonl", "checkpoint", "checkpoint_network"])
def test_a_new_run_does_not_enter_a_folder_with_results(golden, trained, tmp_path, left):
    output, config = trained
    folder = tmp_path / "run"
    if left == "all":
        shutil.copytree(output, folder)
    else:
        folder.mkdir()
        copy = shutil.copytree if (output / left).is_dir() else shutil.copy
        copy(output / left, folder / left)
    before = sorted(folder.rglob("*"))
    with pytest.raises(UserError) as error:
        begin(*arguments(golden, config, folder))
    message = str(error.value)
    assert message.startswith(f"{folder}: holds a run already (")
    assert "--resume auto" in message
    assert "--overwrite" in message
    assert "\n" not in message
    assert sorted(folder.rglob("*")) == before


def test_overwrite_removes_the_run_and_nothing_else(golden, trained, tmp_path):
    """Of all ranks; a stale strategy or best checkpoint would be merged with the new run's."""
    output, config = trained
    folder = tmp_path / "run"
    shutil.copytree(output, folder)
    for path in (
        "checkpoint/rank_1/p-step_00000009.ckpt",
        "checkpoint/rank_1/p-step_00000010.ckpt.unusable",
        "checkpoint_best/rank_1/p-best.ckpt",
        "checkpoint_best/rank_1/step.json",
        "strategy/ckpt_strategy_rank_1.ckpt",
        "card/card.json",
        "card/README_CN.md",
        "tensorboard/events.out.tfevents.1",
        ".stop",
    ):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text("old")
    kept = [folder / "notes.txt", folder / "checkpoint/rank_0/mine.ckpt", folder / "logs/a.log"]
    for path in kept:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    begin(*arguments(golden, config, folder, more=["--overwrite"]))
    found = [path for path in folder.rglob("*") if path.is_file()]
    written = [folder / name for name in ("run.json", "commands.jsonl", "model.json")]
    assert sorted(found) == sorted([*kept, *written])
    assert not (folder / "card").exists()
    assert not (folder / "checkpoint_best").exists()  # transform_checkpoint would miss its ranks


def test_only_rank_0_removes_and_writes(golden, trained, tmp_path, monkeypatch):
    output, config = trained
    folder = tmp_path / "run"
    shutil.copytree(output, folder)
    before = sorted(folder.rglob("*"))
    monkeypatch.setenv("MS_WORKER_NUM", "2")
    monkeypatch.setenv("RANK_ID", "1")
    begin(*arguments(golden, config, folder, more=["--overwrite"]))
    assert sorted(folder.rglob("*")) == before


def test_overwrite_does_not_remove_what_the_run_reads(golden, trained, tmp_path):
    output, config = trained
    folder = tmp_path / "run"
    shutil.copytree(output, folder)
    weights = folder / "checkpoint_network"
    before = sorted(folder.rglob("*"))
    more = ["--overwrite", "--auto_trans_ckpt", "True"]
    with pytest.raises(UserError, match="which this command reads"):
        begin(*arguments(golden, config, folder, weights=weights, more=more))
    assert sorted(folder.rglob("*")) == before


def test_overwrite_and_resume_exclude_each_other(golden, trained):
    output, config = trained
    with pytest.raises(UserError, match="--overwrite removes the run that --resume continues"):
        begin(*arguments(golden, config, output, more=["--overwrite", "--resume", "auto"]))


def test_a_run_that_failed_before_its_first_step_is_no_obstacle(golden, trained, tmp_path):
    _, config = trained
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "strategy").mkdir()
    (tmp_path / "strategy/ckpt_strategy_rank_7.ckpt").write_text("of 8 cards")
    write_json(tmp_path / "run.json", {"id": "0" * 16, "values": {}})
    begin(*arguments(golden, config, tmp_path))
    assert not (tmp_path / "strategy").exists()


def test_auto_continues_a_run_that_has_no_state_yet_but_no_other(golden, trained, tmp_path):
    output, config = trained
    for name in ("run.json", "metrics.jsonl"):
        shutil.copy(output / name, tmp_path)
    begin(*arguments(golden, config, tmp_path, more=["--resume", "auto"]))
    other = changed(golden, config, "optimizer: {weight_decay: 0.5}")
    with pytest.raises(UserError) as error:
        begin(*arguments(golden, other, tmp_path, more=["--resume", "auto"]))
    assert "holds another run already (metrics.jsonl; optimizer.weight_decay was 0.0, now 0.5)" in (
        str(error.value)
    )


def changed(golden, config, text):
    """A YAML over another one, in the folder of the golden case."""
    path = golden.folder / "changed.yaml"
    path.write_text(f"base_config: {Path(config).name}\n{text}\n")
    return path


REFUSED = {
    "dpo: {beta: 0.2}": "dpo.beta was 0.1, now 0.2",
    "dpo: {loss_type: hinge}": "dpo.loss_type was ",
    "lr_schedule: {learning_rate: 2e-3}": "lr_schedule.learning_rate was 0.001, now 0.002",
    "optimizer: {weight_decay: 0.1}": "optimizer.weight_decay was 0.0, now 0.1",
    "runner_wrapper: {max_grad_norm: 2.0}": "runner_wrapper.max_grad_norm was 1.0, now 2.0",
    "runner_config: {batch_size: 2}": "runner_config.batch_size was 1, now 2",
    "runner_config: {gradient_accumulation_steps: 3}": "accumulation_steps was 1, now 3",
    "runner_config: {epochs: 1}": "runner_config.epochs was 4, now 1",
    "runner_config: {max_steps: 4}": "runner_config.max_steps was 0, now 4",
    "seed: 7": "seed was ",
    "train_dataset: {data_loader: {shuffle: False}}": "shuffle was True, now False",
    "lora: {rank: 2, alpha: 4, dropout: 0.0, target_modules: [qkv]}": "lora.rank was not set, now",
}


@pytest.mark.parametrize(("text", "part"), REFUSED.items())
def test_a_state_is_not_resumed_with_other_settings(golden, trained, text, part):
    output, config = trained
    words = arguments(golden, changed(golden, config, text), output, more=["--resume", "auto"])
    with pytest.raises(UserError) as error:
        begin(*words)
    message = str(error.value)
    assert message.startswith(f"{output / STATE}: was saved by a run that differs: ")
    assert part in message
    assert "--allow_changes True" in message


def test_every_difference_is_named(golden, trained):
    output, config = trained
    text = "dpo: {beta: 0.2}\nseed: 7\nrunner_config: {batch_size: 2}"
    with pytest.raises(UserError) as error:
        begin(*arguments(golden, changed(golden, config, text), output, more=["--resume", "auto"]))
    for part in ("dpo.beta was", "seed was", "batch_size was"):
        assert part in str(error.value)


def test_a_state_is_not_resumed_with_other_data_or_weights(golden, trained, tmp_path):
    output, config = trained
    data = copy_data(golden, tmp_path, run="1" * 64)
    resume = ["--resume", "auto"]
    with pytest.raises(UserError, match=f"training data was .*, now {'1' * 16} with 3 rows"):
        begin(*arguments(golden, config, output, data=data, more=resume))
    with pytest.raises(UserError, match="held-out data was not set, now "):
        begin(*arguments(golden, config, output, more=[*resume, "--eval_dataset", data]))
    weights = other_weights(golden, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match="weights was "):
        begin(*arguments(golden, config, output, weights=weights, more=resume))


def test_a_state_in_another_place_is_compared_too(golden, trained, tmp_path):
    output, config = trained
    copied = tmp_path / "copied" / Path(STATE).name
    copied.parent.mkdir()
    shutil.copy(output / STATE, copied)
    other = changed(golden, config, "dpo: {beta: 0.2}")
    with pytest.raises(UserError, match=r"dpo\.beta was 0\.1, now 0\.2"):
        begin(*arguments(golden, other, tmp_path / "new", more=["--resume", copied]))
    assert not (tmp_path / "new").exists()
    begin(*arguments(golden, config, tmp_path / "new", more=["--resume", copied]))


def test_a_run_is_not_resumed_into_the_folder_of_another(golden, trained, tmp_path):
    output, config = trained
    (tmp_path / "metrics.jsonl").write_text('{"split": "train", "step": 1, "loss": 1.0}\n')
    write_json(tmp_path / "run.json", {"id": "0" * 16, "values": {}})
    with pytest.raises(UserError, match="holds another run already"):
        begin(*arguments(golden, config, tmp_path, more=["--resume", output / STATE]))


@pytest.mark.parametrize("resume", ["auto", "path"])
@pytest.mark.parametrize("rank", [0, 1])
def test_more_workers_than_saved_the_state_are_refused(golden, trained, monkeypatch, resume, rank):
    """Before: KeyError on the ranks without a state."""
    output, config = trained
    monkeypatch.setenv("MS_WORKER_NUM", "2")
    monkeypatch.setenv("RANK_ID", str(rank))
    more = ["--resume", "auto" if resume == "auto" else output / STATE, "--allow_changes", "True"]
    with pytest.raises(UserError, match="another number of workers .*: workers was 1, now 2;"):
        begin(*arguments(golden, config, output, more=more))


def test_the_plan_of_a_state_stays_even_with_allow_changes():
    saved = Identity("0" * 16, {"workers": 4, "parallel_config.data_parallel": 4})
    for values in (
        {"workers": 2, "parallel_config.data_parallel": 4},
        {"workers": 4, "parallel_config.data_parallel": 2},
    ):
        with pytest.raises(UserError, match="was 4, now 2; resume with those of the state"):
            identity.continue_run("s.ckpt", saved, Identity("1" * 16, values), allow_changes=True)


def test_allowed_changes_are_said_and_recorded(golden, trained, tmp_path, capsys):
    output, config = trained
    folder = tmp_path / "run"
    shutil.copytree(output, folder)
    other = changed(golden, config, "dpo: {beta: 0.2}")
    more = ["--resume", "auto", "--allow_changes", "True"]
    begin(*arguments(golden, other, folder, more=more))
    assert "resuming with changes: dpo.beta was 0.1, now 0.2" in capsys.readouterr().out
    before, after = (json.loads((each / "run.json").read_text()) for each in (output, folder))
    assert after["id"] == before["id"]
    assert after["values"] == {**before["values"], "dpo.beta": 0.2}


def test_a_state_without_identity_needs_allow_changes():
    with pytest.raises(UserError, match="does not say which run saved it"):
        identity.continue_run("s.ckpt", None, Identity("0" * 16, {}))
    now = Identity("0" * 16, {"seed": 1})
    assert identity.continue_run("s.ckpt", None, now, allow_changes=True) == now


@pytest.mark.parametrize(
    ("name", "before", "after", "safe"),
    [
        ("runner_config.epochs", 2, 3, True),
        ("runner_config.epochs", 3, 2, False),
        ("runner_config.max_steps", 5, 9, True),
        ("runner_config.max_steps", 5, 0, True),
        ("runner_config.max_steps", 0, 5, False),
        ("runner_config.max_steps", 9, 5, False),
        ("callbacks.DPOMonitor.per_print_times", 1, 2, True),
        ("runner_config.batch_size", 1, 2, False),
    ],
)
def test_what_a_resumed_run_may_change(name, before, after, safe):
    saved, now = Identity("0" * 16, {name: before}), Identity("1" * 16, {name: after})
    if safe:
        assert identity.continue_run("s", saved, now) == Identity("0" * 16, {name: after})
    else:
        with pytest.raises(UserError, match=f"{name} was {before}, now {after}"):
            identity.continue_run("s", saved, now)


def test_weights_that_are_not_given_stay_in_the_record():
    saved = Identity("0" * 16, {"weights": "a" * 16})
    assert identity.continue_run("s", saved, Identity("1" * 16, {"weights": None})) == saved


def test_a_longer_run_continues_and_says_so(golden, trained, tmp_path):
    output, config = trained
    folder = tmp_path / "run"
    shutil.copytree(output, folder)
    text = "runner_config: {epochs: 5}"
    words = arguments(golden, changed(golden, config, text), folder, more=["--resume", "auto"])
    result = run_script(RUN_DPO, *words)
    assert result.returncode == 0, result.stderr
    assert "resuming with changes: runner_config.epochs was 4, now 5" in result.stdout
    assert [record["step"] for record in records(folder)] == list(range(1, 16))
    states = state.saved_states(folder, 0)
    ids = {identity.identity_in(containers.open_tensors(path), path).id for path in states.values()}
    assert len(states) == 9
    assert len(ids) == 1  # pruning regards them as one run
    with pytest.raises(UserError, match="holds a run already .* --resume auto, .* --overwrite"):
        begin(*arguments(golden, config, folder))


def test_two_workers_are_refused_and_overwrite_as_one(golden, trained, tmp_path):
    """Real workers: rank 0 removes before the other one writes; one worker cannot resume."""
    output, config = tmp_path / "run", changed(golden, trained[1], "runner_config: {max_steps: 1}")

    def launch(log, *more):
        command = " ".join(map(str, [RUN_DPO, *arguments(golden, config, output, more=more)]))
        return subprocess.run(
            ["bash", LAUNCHER, command, "2", "0", tmp_path / log, "True", "120"],
            capture_output=True,
            text=True,
            timeout=300,
            env={**os.environ, "PYTHON": sys.executable},
        )

    stale = output / "checkpoint/rank_1/glm4_dpo-step_00000700.ckpt"
    stale.parent.mkdir(parents=True)
    stale.write_text("of an earlier run")
    refused = launch("refused")
    assert refused.returncode == 2
    assert f"error: {output}: holds a run already (checkpoint/rank_1/" in refused.stdout
    assert stale.exists()
    result = launch("overwritten", "--overwrite")
    assert result.returncode == 0, result.stdout + result.stderr
    assert not stale.exists()
    assert [list(state.saved_states(output, rank)) for rank in (0, 1)] == [[1], [1]]
    with pytest.raises(UserError, match="another number of workers .*: workers was 2, now 1;"):
        begin(*arguments(golden, config, output, more=["--resume", "auto"]))
