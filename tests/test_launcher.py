"""The launcher, with scripts that need no MindSpore: they print their arguments, fail, or wait."""

import importlib
import os
import random
import signal
import socket
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from mindrlhf import rehearsal

LAUNCHER = ROOT / "scripts" / "msrun_launcher.sh"
sys.path.insert(0, str(ROOT / "scripts"))
SCRIPT = """
import os, sys, time
role, rank = os.environ.get("MS_ROLE", "none"), os.environ["RANK_ID"]
if role == "MS_SCHED":
    time.sleep(1000)
print("rank", rank, "of", os.environ["MS_WORKER_NUM"], "device", os.environ["DEVICE_ID"], role,
      sys.argv[1:], flush=True)
if "--fail" in sys.argv and rank == sys.argv[sys.argv.index("--fail") + 1]:
    print("reason of rank", rank, file=sys.stderr)
    sys.exit(7)
if "--kill" in sys.argv and rank == "1":
    os.kill(os.getpid(), int(sys.argv[-1]))
if "--wait" in sys.argv or "--fail" in sys.argv:
    time.sleep(1000)
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    return tmp_path


def heed_signals():
    """Bash traps no signal that it inherits ignored, and a job in the background ignores these."""
    for number in (signal.SIGINT, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)


def start(folder, *arguments):
    environment = {**os.environ, "PYTHON": sys.executable}
    return subprocess.Popen(
        ["bash", str(LAUNCHER), *arguments],
        cwd=folder,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        start_new_session=True,
        preexec_fn=heed_signals,
    )


def launch(folder, *arguments):
    process = start(folder, *arguments)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def left_over(folder):
    """Processes that still run the folder's script."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if (
                os.readlink(f"/proc/{pid}/cwd") == str(folder)
                and "script.py" in open(f"/proc/{pid}/cmdline").read()
            ):
                found.append(pid)
        except OSError:
            continue
    return found


def test_one_worker_runs_without_a_cluster(folder):
    status, out, _ = launch(folder, "script.py --x 'two words' 中文", "1")
    assert status == 0
    assert out.strip() == "rank 0 of 1 device 0 none ['--x', 'two words', '中文']"


def test_workers_get_ranks_and_the_first_is_shown(folder):
    status, out, _ = launch(folder, "python script.py", "3", "0", "logs", "True", "60")
    assert status == 0
    assert out.strip() == "rank 0 of 3 device 0 MS_WORKER []"
    assert sorted(os.listdir(folder / "logs")) == [
        "scheduler.log",
        "worker_0.log",
        "worker_1.log",
        "worker_2.log",
    ]
    assert (folder / "logs/worker_2.log").read_text().startswith("rank 2 of 3 device 2")
    assert not left_over(folder)


def test_nine_arguments_number_the_workers_of_each_machine(folder):
    both = [
        start(
            folder, "script.py", "4", "2", "127.0.0.1", "12345", node, f"logs{node}", "True", "60"
        )
        for node in "01"
    ]
    for node, process in enumerate(both):
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, err
        assert out.strip() == f"rank {2 * node} of 4 device 0 MS_WORKER []"
    assert sorted(os.listdir(folder / "logs0")) == ["scheduler.log", "worker_0.log", "worker_1.log"]
    assert sorted(os.listdir(folder / "logs1")) == [
        "worker_2.log",
        "worker_3.log",
    ]  # no scheduler there
    assert not left_over(folder)


def test_machines_that_were_started_otherwise_are_refused(folder):
    both = [
        start(
            folder,
            "script.py --wait",
            workers,
            "2",
            "127.0.0.1",
            "12355",
            node,
            f"logs{node}",
            "True",
            "60",
        )
        for node, workers in (("0", "4"), ("1", "6"))
    ]
    for node, process in enumerate(both):
        err = process.communicate(timeout=60)[1]
        assert process.returncode == 2
        assert (
            f"machine {node} stops: machine 0 was started for 4 workers on 2 machines, "
            "machine 1 for 6 workers on 3 machines"
        ) in err
    assert not left_over(folder)


def test_eight_workers_are_the_default(folder):
    status, out, _ = launch(folder, "script.py")
    assert status == 0
    assert "rank 0 of 8" in out


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_failing_worker_ends_all_and_its_log_is_shown(folder, rank):
    status, out, err = launch(folder, f"script.py --fail {rank}", "2")
    assert status == 7
    assert f"reason of rank {rank}" in out + err
    assert f"worker {rank} ended with status 7" in err
    assert not left_over(folder)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (signal.SIGKILL, "status 137 (SIGKILL, which the kernel sends when memory runs out)"),
        (signal.SIGSEGV, "status 139 (SIGSEGV)"),
    ],
)
def test_the_signal_that_ended_a_worker_is_named(folder, number, words):
    status, _, err = launch(folder, f"script.py --wait --kill {number.value}", "2")
    assert status == 128 + number
    assert f"worker 1 ended with {words}; the others were stopped. Its log: " in err
    (folder / "many.txt").write_text(err)
    assert rehearsal.explain_failure(folder / "many.txt", folder).startswith(
        f"many failed: worker 1 ended with {words}; see "
    )
    assert not left_over(folder)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_leaves_no_process(folder, number, status):
    process = start(folder, "script.py --wait", "2")
    deadline = time.time() + 20
    while len(left_over(folder)) < 4 and time.time() < deadline:  # launcher, scheduler, two workers
        time.sleep(0.1)
    os.kill(process.pid, number)
    process.communicate(timeout=20)
    assert process.returncode == status
    assert not left_over(folder)


def test_two_launches_beside_each_other(folder):
    both = [start(folder, "script.py", "2") for _ in range(2)]
    for process in both:
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        assert "rank 0 of 2" in out
    assert len(os.listdir(folder / "output/msrun_log")) == 2


def test_join_false_leaves_the_workers_running(folder):
    status, out, _ = launch(folder, "script.py", "2", "0", "logs", "False", "60")
    assert status == 0
    assert "run in the background" in out
    for pid in left_over(folder):
        os.kill(int(pid), signal.SIGKILL)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ((), "usage:"),
        (("a", "1", "2"), "usage:"),
        (("script.py", "two"), "WORKERS is 'two'"),
        (("script.py", "0"), "from 1 to WORKERS"),
        (("none.py", "1"), "none.py: no such script"),
        (("", "1"), "usage:"),
        (("script.py", "1", "0", "logs", "maybe", "60"), "JOIN is 'maybe'"),
        (("script.py", "1", "2", "h", "1", "0", "logs", "True", "60"), "LOCAL_WORKERS 2"),
        (
            ("script.py", "4", "3", "h", "1", "0", "logs", "True", "60"),
            "each machine must run as many workers",
        ),
        (("script.py", "4", "2", "h", "1", "2", "logs", "True", "60"), "NODE_RANK 2"),
        (
            ("script.py", "4", "2", "h", "0", "0", "logs", "True", "60"),
            "PORT is 0; several machines",
        ),
        (("script.py 'x", "1"), "quotes"),
        (("script.py x\\", "1"), "quotes"),
        (("script.py", "2", "65536", "logs", "True", "60"), "PORT is 65536; from 1 to 65535"),
        (("script.py", "2", "99999999999999999999", "logs", "True", "60"), "at most 9 digits"),
        (("script.py", "08"), "WORKERS is '08'; a whole number"),
        (("script.py", "2", "0", "x" * 300, "True", "60"), "cannot be created"),
        (("bad\x1b[31m\n.py", "1"), "bad?[31m"),
        ((f"{'x' * 300}.py", "1"), "no such script"),
    ],
)
def test_wrong_arguments_are_named(folder, arguments, part):
    status, _, err = launch(folder, *arguments)
    assert status == 2
    assert part in err
    assert "usage:" in err or len(err.splitlines()) == 1
    assert all(char.isprintable() or char == "\n" for char in err)


def test_a_port_in_use_is_named(folder):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        status, _, err = launch(folder, "script.py", "2", port, "logs", "True", "60")
    assert status == 2
    assert err == (
        f"error: PORT {port}: Address already in use; give another one, or 0 for any free port\n"
    )


HOSTILE = "$(touch evil) `touch evil` ; touch evil & | > evil * ~ $HOME ); touch evil # (x {a,b} !"


def test_the_command_is_split_and_never_evaluated(folder):
    status, out, _ = launch(folder, f"script.py {HOSTILE} '{HOSTILE}'", "1")
    assert status == 0
    assert out.strip().endswith(str([*HOSTILE.split(), HOSTILE]))
    assert sorted(os.listdir(folder)) == ["output", "script.py"]


def test_the_command_is_split_as_bash_does(tmp_path):
    """2,000 random words of the characters that matter, in one call of bash."""
    words = importlib.import_module("launcher_words")
    rng = random.Random(0)
    commands = []
    while len(commands) < 2000:
        command = "".join(rng.choice("ab 中'\"\\\n") for _ in range(rng.randrange(1, 12)))
        try:
            words.split(command)
        except ValueError:
            continue
        commands.append(command)
    script = "".join(f'a=({command}\n)\nf "${{a[@]}}"\n' for command in commands)
    result = subprocess.run(
        ["bash", "-c", "f() { printf '%s\\0' \"$@\"; printf '\\1\\0'; }\n" + script],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    expected = [call.split("\0")[:-1] for call in result.stdout.split("\1\0")[:-1]]
    assert len(expected) == len(commands)
    for command, split in zip(commands, expected):
        assert (words.split(command) or [""]) == split, command


@pytest.mark.parametrize("number", ["SIGKILL", "SIGQUIT", "SIGPIPE", "SIGSEGV"])
@pytest.mark.parametrize("machines", [1, 2])
def test_workers_end_with_their_launcher_whatever_ends_it(folder, number, machines):
    """Three workers that sleep, and their scheduler; with two machines, the first of them."""
    if machines == 1:
        process = start(folder, "script.py --wait", "3")
    else:
        where = ("6", "3", "127.0.0.1", "12375", "0", "logs", "True", "600")
        process = start(folder, "script.py --wait", *where)
    deadline = time.time() + 20
    while len(left_over(folder)) < 5 and time.time() < deadline:
        time.sleep(0.1)
    time.sleep(0.5)  # until they sleep
    os.kill(process.pid, signal.Signals[number])
    process.wait(timeout=20)
    deadline = time.time() + 5
    while left_over(folder) and time.time() < deadline:
        time.sleep(0.1)
    assert not left_over(folder)


def test_a_worker_whose_launcher_has_ended_already_does_not_start(folder):
    tool = ROOT / "scripts" / "launcher_worker.py"
    result = subprocess.run([sys.executable, tool, "1", "touch", "evil"], cwd=folder)
    assert result.returncode == 137
    assert not (folder / "evil").exists()


def test_a_process_that_leaves_the_cluster_keeps_nothing_that_mindspore_takes_it_for_one_of_it(
    monkeypatch,
):
    """MindSpore 2.4's UseDynamicCluster looks at MS_ROLE and at MS_SCHED_HOST."""
    from mindrlhf import cli, runtime

    launched = {
        "MS_ROLE": "MS_WORKER",
        "MS_SCHED_HOST": "127.0.0.1",
        "MS_SCHED_PORT": "8118",
        "MS_TOPO_TIMEOUT": "600",
        "MS_NODE_ID": "1",
        "MS_NODE_RANK": "0",
        "MS_WORKER_NUM": "2",
        "RANK_ID": "1",
        "RANK_SIZE": "2",
    }
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    runtime.leave_cluster()
    assert {name for name in os.environ if name.startswith("MS_")} == {"MS_WORKER_NUM"}
    assert (cli.rank(), cli.workers()) == (1, 2)
    monkeypatch.setenv("MS_ROLE", "MS_SCHED")
    with pytest.raises(SystemExit):
        runtime.leave_cluster()
