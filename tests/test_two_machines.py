"""A job on two machines: two network namespaces with a virtual cable and their own host names.

They share the file system, as two machines share a network disk. `ip netns` needs root.
"""

import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import EXAMPLE, GOLDEN, ROOT, arguments, records, training_yaml
from test_launcher import SCRIPT

from mindrlhf.checkpoints import containers
from mindrlhf.data import mindrecord

LAUNCHER = ROOT / "scripts" / "msrun_launcher.sh"
ENVIRONMENT = {**os.environ, "PYTHON": sys.executable}
PORT = 23456


class Network:
    """Two namespaces with the addresses 10.77.0.1 and 10.77.0.2, one cable between them."""

    names = [f"machine{number}-{os.getpid()}" for number in range(2)]
    addresses = ["10.77.0.1", "10.77.0.2"]

    def __init__(self):
        ends = [f"veth{number}-{os.getpid()}" for number in range(2)]
        for name in self.names:
            ip("netns", "add", name)
        ip(
            "link",
            "add",
            ends[0],
            "netns",
            self.names[0],
            "type",
            "veth",
            "peer",
            "name",
            ends[1],
            "netns",
            self.names[1],
        )
        for name, end, address in zip(self.names, ends, self.addresses):
            ip("-n", name, "address", "add", f"{address}/24", "dev", end)
            ip("-n", name, "link", "set", end, "up")
            ip("-n", name, "link", "set", "lo", "up")
        self.cable = ("-n", self.names[0], "link", "set", ends[0])

    def remove(self):
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)

    def start(self, folder, command, *, timeout=300, workers=2, nodes=(0, 1)):
        """Run the launcher on each machine and return the processes. Logs go to folder/logs0 and
        logs1.
        """
        processes = []
        for node in nodes:
            machine = [
                "ip",
                "netns",
                "exec",
                self.names[node],
                "unshare",
                "--uts",
                "sh",
                "-c",
                f'hostname machine{node}; exec "$@"',
                "sh",
            ]
            launcher = [
                "bash",
                LAUNCHER,
                command,
                workers,
                workers // 2,
                self.addresses[0],
                PORT,
                node,
                f"logs{node}",
                True,
                timeout,
            ]
            processes.append(
                subprocess.Popen(
                    [*machine, *map(str, launcher)],
                    cwd=folder,
                    text=True,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    env=ENVIRONMENT,
                )
            )
        return processes


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def network():
    if not shutil.which("ip") or not shutil.which("unshare"):
        pytest.skip("needs the commands ip and unshare (packages iproute2, util-linux)")
    network = None
    try:
        network = Network()
        yield network
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces are not allowed here: {error.stderr.strip()}")
    finally:
        Network.remove(network or Network)


def ends(processes, seconds=60):
    """Wait for both launchers: list of (exit status, output)."""
    deadline = time.monotonic() + seconds
    outputs = [
        process.communicate(timeout=max(1, deadline - time.monotonic()))[0] for process in processes
    ]
    return list(zip([process.returncode for process in processes], outputs))


def running(folder):
    """Command lines, pid -> words, of processes that were started in a folder or work for them."""
    found = {}
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if os.readlink(f"/proc/{pid}/cwd") == str(folder):
                found[int(pid)] = open(f"/proc/{pid}/cmdline").read().split("\0")
        except OSError:
            continue
    return found


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def wait_until_met(folder):
    """Wait until both workers run and the launchers' links have found each other."""
    logs = [folder / f"logs{node}/worker_{node}.log" for node in range(2)]
    wait_for(lambda: all(log.exists() and log.read_text() for log in logs))
    wait_for(
        lambda: sum("launcher_link" in "".join(words) for words in running(folder).values()) == 2
    )
    time.sleep(2)  # they try to meet every half a second


def gone(folder):
    """Whether no process of a job is left, a moment after its launchers ended."""
    wait_for(lambda: not running(folder), 10)
    return True


# the launchers, with a script that needs no MindSpore


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    return tmp_path


def test_a_failing_worker_is_named_on_both_machines(network, folder):
    (first, here), (second, there) = ends(network.start(folder, "script.py --fail 3", workers=4))
    assert (first, second) == (7, 7)
    assert (
        "stops: worker 3 on machine 1 ended with status 7; its log ends: reason of rank 3" in here
    )
    assert "worker 3 ended with status 7" in there
    assert gone(folder)


def test_a_machine_whose_launcher_is_killed_ends_both(network, folder):
    processes = network.start(folder, "script.py --wait")
    wait_until_met(folder)
    os.kill(processes[1].pid, signal.SIGKILL)
    (first, here), _ = ends(processes)
    assert first == 137
    assert "machine 0 stops: the launcher of machine 1 was killed" in here
    assert gone(folder)


def test_a_cut_cable_ends_both(network, folder):
    processes = network.start(folder, "script.py --wait")
    wait_until_met(folder)
    ip(*network.cable, "down")
    try:
        for node, (status, out) in enumerate(ends(processes)):
            assert status == 1
            assert f"machine {node} stops: machine {1 - node} gives no sign of life" in out
    finally:
        ip(*network.cable, "up")
    assert gone(folder)


def test_a_machine_that_never_comes_is_named(network, folder):
    for node, sentence in (
        (0, "machine 1 did not connect"),
        (1, "this machine, 1, did not connect"),
    ):
        ((status, out),) = ends(network.start(folder, "script.py --wait", timeout=3, nodes=[node]))
        assert status == 1
        assert f"{sentence} to 10.77.0.1:{PORT + 1}" in out
    assert gone(folder)


def test_a_terminated_launcher_takes_the_other_along(network, folder):
    processes = network.start(folder, "script.py --wait")
    wait_until_met(folder)
    os.kill(processes[0].pid, signal.SIGTERM)
    (first, _), (second, there) = ends(processes)
    assert (first, second) == (143, 143)
    assert "machine 1 stops: the launcher of machine 0 was terminated" in there
    assert gone(folder)


# the commands, with MindSpore


@pytest.fixture(scope="module")
def data(network, golden, tmp_path_factory):
    """The golden pairs twice, 16 of them in two parts, one for each machine."""
    folder = tmp_path_factory.mktemp("preprocess")
    pairs = folder / "pairs.jsonl"
    pairs.write_bytes(2 * (GOLDEN / "pairs.jsonl").read_bytes())
    words = [
        "--src",
        pairs,
        "--dst",
        folder / "pairs.mindrecord",
        "--config",
        golden.process,
        "--tokenizer",
        golden.tokenizer,
        "--load_checkpoint",
        golden.checkpoint,
    ]
    processes = network.start(folder, command(EXAMPLE / "dpo_preprocess_glm4_parallel.py", *words))
    for status, out in ends(processes, 300):
        assert status == 0, out
    return folder / "pairs.mindrecord"


def command(script, *words):
    return " ".join(map(str, (script, *words)))


def test_pairs_are_preprocessed_by_both(data, expected):
    """Each machine scored a part; the log-probs are PyTorch's."""
    wanted = dict(enumerate(2 * expected["pairs"]))
    for row in mindrecord.read_rows(data):
        for place, number in enumerate(row["pair_ids"]):
            if number >= 0:
                pair = wanted.pop(int(number))
                for side in ("chosen", "rejected"):
                    found = row["reference_logps"][row[side][place]]
                    assert found == pytest.approx(pair[f"ref_{side}_logps"], abs=3e-4)
    assert not wanted


def training(golden, data, output, epochs=2):
    """The command line of a training."""
    config = training_yaml(output.parent, output.name, shuffle=False, sft_weight=1.0)
    config.write_text(config.read_text().replace("epochs: 2", f"epochs: {epochs}"))
    return command(EXAMPLE / "run_dpo.py", *arguments(golden, config, output, data=data))


def test_two_machines_train_as_one_with_two_workers(network, golden, data, tmp_path):
    processes = network.start(tmp_path, training(golden, data, tmp_path / "two"))
    for status, out in ends(processes, 300):
        assert status == 0, out
    subprocess.run(
        ["bash", str(LAUNCHER), training(golden, data, tmp_path / "one"), "2"],
        cwd=tmp_path,
        check=True,
        env=ENVIRONMENT,
        timeout=300,
        capture_output=True,
    )
    names = (
        "step",
        "pairs",
        "loss",
        "dpo_loss",
        "sft_loss",
        "rewards/margins",
        "grad_norm",
        "learning_rate",
    )
    two, one = (
        [[step[name] for name in names] for step in records(tmp_path / run)]
        for run in ("two", "one")
    )
    assert len(one) > 3
    assert two == one
    for rank in ("rank_0", "rank_1"):
        folders = [tmp_path / run / "checkpoint_network" / rank for run in ("two", "one")]
        two, one = (containers.open_tensors(next(folder.glob("*.ckpt"))) for folder in folders)
        assert list(two) == list(one)
        assert all(np.array_equal(two[name].array(), one[name].array()) for name in one)


def test_a_worker_killed_in_training_ends_both_machines(network, golden, data, tmp_path):
    processes = network.start(tmp_path, training(golden, data, tmp_path / "killed", epochs=10000))
    metrics = tmp_path / "killed/metrics.jsonl"
    wait_for(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 3, 300)
    (worker,) = [
        pid
        for pid, words in running(tmp_path).items()
        if "run_dpo.py" in "".join(words[:3])
        and "MS_NODE_ID=1\0" in open(f"/proc/{pid}/environ").read()
    ]
    os.kill(worker, signal.SIGKILL)
    (first, here), (second, there) = ends(processes, 60)
    assert (first, second) == (137, 137)
    assert "machine 0 stops: worker 1 on machine 1 ended with status 137 (SIGKILL" in here
    assert "memory runs out); the others were stopped" in there
    assert "worker 1 ended with status 137 (SIGKILL, " in there
    assert gone(tmp_path)
