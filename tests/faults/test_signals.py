"""Signals to the launcher of a training with two workers, and what a resumed run makes of it."""

import json
import os
import signal
import time

import pytest

from faults import harness

STOPPED = {  # signal -> exit status of the launcher
    signal.SIGTERM: 143,
    signal.SIGKILL: -9,
    signal.SIGQUIT: 131,
    signal.SIGPIPE: 141,
}
WORKERS = 2


def two_workers(case, output, log, *more):
    """12 steps: 6 epochs of 3 rows, one a step and worker."""
    config = case.folder / "two.yaml"
    config.write_text(f"base_config: {case.finetune.name}\nrunner_config: {{epochs: 6}}\n")
    return harness.launch(harness.train(case, output, *more, config=config), WORKERS, log)


def steps_printed(log):
    """Steps that the first worker of a launch has printed."""
    path = log / "worker_0.log"
    lines = path.read_text().splitlines() if path.exists() else []
    return sum(line.startswith("step ") for line in lines)


def processes_of(output):
    """Processes with a folder in their command line."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                if str(output).encode() in file.read():
                    found.append(int(pid))
        except OSError:
            continue
    return found


def assert_no_process(output, seconds=10):
    deadline = time.monotonic() + seconds
    while (left := processes_of(output)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left


@pytest.fixture(scope="module")
def undisturbed(case, tmp_path_factory):
    """Result of two workers that nothing disturbs."""
    folder = tmp_path_factory.mktemp("two")
    harness.done(two_workers(case, folder / "out", folder / "log"))
    return harness.Result.of_training(folder / "out")


CHAINS = ((signal.SIGTERM, signal.SIGKILL), (signal.SIGQUIT,), (signal.SIGPIPE,))
BY_HAND = "by hand: --kills 50"


def names(chain):
    return " ".join(number.name for number in chain)


@pytest.mark.parametrize("chain", CHAINS, ids=names)
def test_stopped_by_signals_and_resumed_it_ends_as_the_undisturbed_run(
    case, undisturbed, tmp_path, kills, count, chain
):
    """SIGTERM saves a state on both workers; after kill -9 of the launcher, its workers end too."""
    if kills <= 5 and chain != CHAINS[0]:
        pytest.skip(BY_HAND)
    output, more = tmp_path / "out", []
    for number in chain:
        log = tmp_path / number.name
        process = harness.start(two_workers(case, output, log, *more))
        deadline = time.monotonic() + 300
        while steps_printed(log) < 2 and time.monotonic() < deadline:
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        process.send_signal(number)
        ended = harness.finish(process)
        assert ended.returncode == STOPPED[number], ended
        assert_no_process(output)
        harness.complete_files(output)
        states = [sorted(os.listdir(output / f"checkpoint/rank_{rank}")) for rank in range(WORKERS)
                  if (output / "checkpoint").exists()]  # fmt: skip
        if number == signal.SIGTERM:
            assert states[0]
            assert states[0] == states[1]
        count(f"{number.name} to the launcher of 2 workers", "ended as if undisturbed")
        more = ["--resume", "auto"]
    ended = harness.run(two_workers(case, output, tmp_path / "log", *more))
    is_complete = "so the run is complete" in ended.stdout + ended.stderr
    assert ended.returncode == 0 or is_complete, ended
    found = harness.Result.of_training(output)
    assert found.metrics == undisturbed.metrics
    last = {name: content for name, content in undisturbed.files.items() if "_network" in name}
    assert len(last) == WORKERS
    assert {name: found.files[name] for name in last} == last


@pytest.mark.parametrize("number", STOPPED, ids=lambda number: number.name)
def test_preprocessing_stopped_by_a_signal_ends_as_the_undisturbed_one(
    case, tmp_path, kills, count, number
):
    if kills <= 5:
        pytest.skip(f"{BY_HAND}; tests/faults/test_kills.py kills preprocessing")
    harness.done(harness.preprocess(case, tmp_path / "undisturbed/x.mindrecord"))
    output = tmp_path / "out"
    command = harness.preprocess(case, output / "x.mindrecord")
    process = harness.start(harness.launch(command, WORKERS, tmp_path / "log"))
    deadline = time.monotonic() + 300
    while not list(output.glob("*.parts/part*.safetensors")) and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)
    process.send_signal(number)
    assert harness.finish(process).returncode == STOPPED[number]
    assert_no_process(output)
    harness.complete_files(output)
    harness.done(harness.launch(command, WORKERS, tmp_path / "log"))
    made = [harness.Result.of_folder(tmp_path / name) for name in ("undisturbed", "out")]
    assert made[0] == made[1]
    count(f"{number.name} to the launcher of 2 workers that preprocess", "ended as if undisturbed")


@pytest.mark.parametrize("rank", range(WORKERS))
def test_a_worker_that_is_killed_ends_all_and_says_so(case, tmp_path, kills, count, rank):
    if kills <= 5:
        pytest.skip(f"{BY_HAND}; tests/test_launcher.py has workers that fail")
    output = tmp_path / "out"
    process = harness.start(two_workers(case, output, tmp_path / "log"))
    deadline = time.monotonic() + 300
    while steps_printed(tmp_path / "log") < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    owner = json.loads((output / ".lock").read_text())["pid"]
    workers = [pid for pid in processes_of(output) if _environment(pid, "MS_ROLE") == "MS_WORKER"]
    (victim,) = [pid for pid in workers if _environment(pid, "RANK_ID") == str(rank)]
    assert (victim == owner) == (rank == 0)
    os.kill(victim, signal.SIGKILL)
    ended = harness.finish(process, seconds=30)
    assert ended.returncode == 137
    assert f"worker {rank} ended with status 137 (SIGKILL, " in ended.stderr
    assert "memory runs out); the others were stopped" in ended.stderr
    assert_no_process(output)
    harness.complete_files(output)
    count("kill -9 of one of 2 workers", "all ended, and said why")


def _environment(pid, name):
    with open(f"/proc/{pid}/environ") as file:
        return dict(entry.split("=", 1) for entry in file.read().split("\0") if "=" in entry).get(
            name
        )
