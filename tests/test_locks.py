"""One run at a time writes an output; what dead runs leave is taken over."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace

import numpy as np
import pytest
from conftest import ROOT

from mindrlhf import locks
from mindrlhf.cli import UserError
from mindrlhf.data.features import TokenPair
from mindrlhf.data.groups import find_sequences
from mindrlhf.data.parts import Parts
from mindrlhf.data.scored import Part

HOLD = """
import sys, time
from mindrlhf import locks
with locks.hold(sys.argv[1]):
    print("held", flush=True)
    time.sleep(1000)
"""


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in (locks.LAUNCH, "MS_SCHED_HOST", "MS_SCHED_PORT", "RANK_ID", "MS_ROLE"):
        monkeypatch.delenv(name, raising=False)


def start_holder(output, **environment):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(output)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
    )
    assert process.stdout.readline() == "held\n"
    return process


def end(process):
    process.kill()
    process.wait()
    process.stdout.close()


def refused(output, words, **options):
    with pytest.raises(UserError) as error, locks.hold(output, **options):
        raise AssertionError
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.fixture
def holder(tmp_path):
    process = start_holder(tmp_path / "out")
    yield process
    end(process)


def without_flock(monkeypatch):
    def unsupported(file, operation):
        raise OSError(locks.errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", unsupported)


@pytest.mark.parametrize("flock", [True, False])
def test_a_second_run_is_refused_and_told_the_owner(tmp_path, holder, monkeypatch, flock):
    if not flock:
        without_flock(monkeypatch)
    where = f"(process {holder.pid} on {socket.gethostname()}, since"
    refused(tmp_path / "out", f"out: another run is writing it {where}")
    end(holder)
    with locks.hold(tmp_path / "out"):  # at once after kill -9
        pass
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("flock", [True, False])
@pytest.mark.parametrize(
    "changes",
    [
        {"pid": 1 << 22},  # above the largest number that Linux gives
        {"start": "1"},  # the number belongs to another process now
        {"boot": "of yesterday"},
        {"start": ""},
    ],
    ids=str,
)
def test_a_stale_lock_is_taken_over(tmp_path, monkeypatch, flock, changes):
    if not flock:
        without_flock(monkeypatch)
    path = locks.lock_path(tmp_path / "out")
    path.write_text(json.dumps(asdict(replace(locks.Owner.current(), **changes))))
    with locks.hold(tmp_path / "out"):
        assert locks._read_owner(path) == locks.Owner.current()
    assert not path.exists()


def test_without_flock_another_machine_cannot_be_judged(tmp_path, monkeypatch):
    path = locks.lock_path(tmp_path / "out")
    other = replace(locks.Owner.current(), host="elsewhere", boot="another")
    path.write_text(json.dumps(asdict(other)))
    with monkeypatch.context() as patch:
        without_flock(patch)
        refused(tmp_path / "out", f"; if it has ended, remove {path}")
    with locks.hold(tmp_path / "out"):  # with flock, the kernels of both machines have judged
        pass


@pytest.mark.parametrize(
    "content", ["three years of work", "{}", '{"host": 1}', "[" * 100_000, "null"]
)
def test_a_file_that_is_no_lock_is_kept(tmp_path, content):
    path = locks.lock_path(tmp_path / "out")
    path.write_text(content)
    refused(tmp_path / "out", "exists and is not the lock of a run; move it away")
    assert path.read_text() == content


def test_a_link_is_not_followed(tmp_path):
    (tmp_path / "thesis").write_text("")
    locks.lock_path(tmp_path / "out").symlink_to(tmp_path / "thesis")
    refused(tmp_path / "out", "cannot be written")


def test_folders_are_made_and_removed_again_unless_used(tmp_path):
    with locks.hold(tmp_path / "a" / "b" / "out", is_folder=True):
        assert (tmp_path / "a" / "b" / "out" / ".lock").is_file()
    assert os.listdir(tmp_path) == []
    with locks.hold(tmp_path / "a" / "out"):
        (tmp_path / "a" / "out").write_text("x")
    assert os.listdir(tmp_path / "a") == ["out"]
    for name in ("x" * 300, "x" * 300 + "/out", "a/out/below"):
        refused(tmp_path / name, "cannot be written")


def test_where_nothing_can_be_written_there_is_nothing_to_lock(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(locks.errno.EROFS, "Read-only file system")

    monkeypatch.setattr(locks.os, "open", refuse)
    with locks.hold(tmp_path / "out"):
        pass


def test_one_of_many_that_start_together_wins(tmp_path):
    """30 processes, and a stale lock that each of them would take over."""
    path = locks.lock_path(tmp_path / "out")
    path.write_text(json.dumps(asdict(replace(locks.Owner.current(), pid=1 << 22))))
    script = HOLD.replace("time.sleep(1000)", "sys.stdin.read()")
    command = [sys.executable, "-c", "import time\n" + script, str(tmp_path / "out")]
    processes = [
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        for _ in range(30)
    ]
    deadline = time.time() + 60
    while sum(process.poll() is None for process in processes) > 1 and time.time() < deadline:
        time.sleep(0.05)
    (winner,) = [process for process in processes if process.poll() is None]
    assert locks._read_owner(path).pid == winner.pid
    winner.stdin.close()
    assert winner.wait(timeout=20) == 0
    assert [process.returncode for process in processes].count(0) == 1
    assert os.listdir(tmp_path) == []
    for process in processes:
        process.stdout.close()
        process.stderr.close()


@pytest.mark.parametrize("before", ["", "stale"])
def test_a_refused_run_waits_for_the_name_of_the_one_that_has_just_begun(tmp_path, before):
    path, owner = locks.lock_path(tmp_path / "out"), locks.Owner.current()
    path.write_text(before and json.dumps(asdict(replace(owner, pid=1 << 22))))
    with open(path, "r+") as file:
        locks.fcntl.flock(file, locks.fcntl.LOCK_EX)
        timer = threading.Timer(0.3, lambda: path.write_text(json.dumps(asdict(owner))))
        timer.start()
        refused(tmp_path / "out", f"another run is writing it (process {os.getpid()} on ")
        timer.join()


def test_a_run_without_a_name_ends_the_wait(tmp_path, monkeypatch):
    """Its disk was full; nobody writes beside it all the same, until it has ended."""
    monkeypatch.setattr(locks, "NAMED", 0.2)
    path = locks.lock_path(tmp_path / "out")
    with open(path, "w") as file:
        locks.fcntl.flock(file, locks.fcntl.LOCK_EX)
        refused(tmp_path / "out", "another run is writing it (its lock names no process); wait")
    with locks.hold(tmp_path / "out"):
        pass
    assert os.listdir(tmp_path) == []


# launches


def test_workers_share_the_lock_of_their_rank_0_and_refuse_another_launch_s(tmp_path, monkeypatch):
    owner = start_holder(tmp_path / "out", **{locks.LAUNCH: "one"})
    try:
        monkeypatch.setenv("RANK_ID", "1")
        monkeypatch.setenv(locks.LAUNCH, "one")
        with locks.hold(tmp_path / "out"):
            locks.wait_for_rank_0(tmp_path / "out")
        monkeypatch.setenv(locks.LAUNCH, "two")
        for use in (locks.wait_for_rank_0, lambda path: locks.hold(path).__enter__()):
            with pytest.raises(
                UserError, match=rf"another run is writing it \(process {owner.pid}"
            ):
                use(tmp_path / "out")
    finally:
        end(owner)
    with pytest.raises(UserError, match="worker 0 has not begun to write it within 0.2 s"):
        locks.wait_for_rank_0(tmp_path / "out", patience=0.2)


def test_the_scheduler_of_a_launch_holds_no_lock(tmp_path, monkeypatch):
    monkeypatch.setenv("MS_ROLE", "MS_SCHED")
    with locks.hold(tmp_path / "out"):
        assert os.listdir(tmp_path) == []


def test_a_launch_is_known_by_the_launcher_or_by_msrun_s_scheduler(monkeypatch):
    assert str(os.getpid()) in locks.launch_id()
    monkeypatch.setenv("MS_SCHED_HOST", "127.0.0.1")
    monkeypatch.setenv("MS_SCHED_PORT", "8118")
    assert locks.launch_id() == "127.0.0.1:8118"
    monkeypatch.setenv(locks.LAUNCH, "one")
    assert locks.launch_id() == "one"


def test_the_launcher_gives_all_workers_one_name_and_each_launch_another(tmp_path):
    (tmp_path / "script.py").write_text("import os; print(os.environ['MINDRLHF_LAUNCH'])")
    names = []
    for number in "12":
        log = str(tmp_path / number)
        subprocess.run(
            ["bash", ROOT / "scripts/msrun_launcher.sh", "script.py", "2", "0", log, "True", "60"],
            cwd=tmp_path,
            check=True,
            capture_output=True,
            env={**os.environ, "PYTHON": sys.executable},
        )
        both = {(tmp_path / number / f"worker_{rank}.log").read_text() for rank in "01"}
        assert len(both) == 1
        names += both
    assert names[0] != names[1]


# the wait for the parts of other workers


def part(pairs):
    found = find_sequences([TokenPair([1], [2], [3])] * pairs, share=False)
    logps = np.zeros(len(found.answers), np.float32)
    return Part.of(found, logps, numbers=range(pairs), cut=[0] * pairs, dropped=[])


def test_the_wait_for_a_dead_worker_ends_in_one_line(tmp_path):
    parts = Parts(tmp_path / "out", 3, {})
    parts.write(0, part(2))
    reports = iter(range(5))

    def work():
        for number in reports:
            parts.report(1, number, number)
            return

    start = time.monotonic()
    with pytest.raises(UserError, match="no progress for 0.3 s; 2 of 3 parts are missing"):
        parts.wait(work, poll=0.1, patience=0.3)
    assert time.monotonic() - start > 0.7  # the five reports counted as progress


def test_parts_that_somebody_removes_end_the_wait(tmp_path):
    parts = Parts(tmp_path / "out", 2, {})
    parts.write(0, part(2))
    with pytest.raises(UserError, match="parts were removed; 2 of 2 parts are missing"):
        parts.wait(parts.remove, poll=0.01)


# Ctrl-C


def test_ctrl_c_is_one_line(tmp_path):
    code = "from mindrlhf import cli, locks\nimport sys, time\ndef main():\n"
    code += (
        "    with locks.hold('out'):\n        print('held', flush=True)\n        time.sleep(99)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code + "cli.run_command(main)"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout.readline() == "held\n"
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=20)
    assert (process.returncode, error) == (130, "stopped\n")
    assert os.listdir(tmp_path) == []
