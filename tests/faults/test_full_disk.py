"""A disk that fills while a command writes: one line and status 2, and nothing half-written.

RLIMIT_FSIZE, a limit on the size of a file, makes writing fail in the middle of a file, after the
checks of free space; it needs no rights. With --kills 50, the commands also write to a full tmpfs,
which needs Linux's user namespaces.
"""

import os
import resource
import shutil
import subprocess

import pytest

from faults import harness


def limited(size):
    """Runs in the child: no file may become larger than size bytes."""

    def prepare():
        harness.heed_signals()
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return prepare


@pytest.fixture(scope="module")
def source(case, tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    harness.done(harness.convert(case, folder / "x.ckpt"))
    return folder / "x.ckpt"


def commands(case, source):
    """name -> command that writes to a folder OUT."""
    back = harness.convert(case, "OUT/hf", "--reversed")
    back[back.index(case.hf)] = source
    return {
        "convert_weight.py": harness.convert(case, "OUT/x.ckpt"),
        "convert_weight.py --reversed": back,
        "transform_checkpoint.py": harness.merge(source, "OUT/merged"),
        "preprocessing": harness.preprocess(case, "OUT/x.mindrecord"),
    }


def within(command, folder):
    return [str(word).replace("OUT", str(folder)) for word in command]


@pytest.mark.parametrize(
    "name",
    [
        "convert_weight.py",
        "convert_weight.py --reversed",
        "transform_checkpoint.py",
        "preprocessing",
    ],
)
def test_no_room_in_the_middle_of_a_file(case, source, tmp_path, name, count):
    command = commands(case, source)[name]
    # the writer of MindSpore's own format crashes under small limits, so they are refused before
    sizes = (1 << 20, 48 << 20) if name == "preprocessing" else (0, 100, 5000, 300_000)
    for size in sizes:
        folder = tmp_path / str(size)
        result = harness.run(within(command, folder), prepare=limited(size))
        harness.assert_refused(result, folder)
        harness.complete_files(folder)
        assert not [path for path in folder.rglob("*") if path.name.endswith((".tmp", ".lock"))]
        count(f"full disk, {name}", "one line, nothing half-written")
    result = harness.run(within(command, folder))  # with room it goes on
    assert result.returncode == 0, result.stderr


def test_no_room_in_the_middle_of_a_training_state(case, tmp_path, count):
    """No state can be written: the run says so at each, and ends with status 2."""
    output = tmp_path / "out"
    result = harness.run(harness.train(case, output), prepare=limited(1_500_000))
    assert result.returncode == 2, result.stderr
    assert "was not saved" in result.stdout
    assert result.stderr.startswith(f"error: {output}/checkpoint/rank_0/glm4_dpo-step_00000012")
    assert len(result.stderr.splitlines()) == 1
    assert [path for path in harness.complete_files(output) if path.suffix == ".ckpt"] == [
        output / harness.NETWORK
    ]
    assert len((output / "metrics.jsonl").read_text().splitlines()) == 12
    count("full disk, training state", "one line, earlier files stay")


# a real full disk, in a mount namespace of its own

IN_TMPFS = """
mount -t tmpfs -o size="$1" tmpfs "$2" || exit 77
shift 2
"$@"
status=$?
find "$0" -type f -printf '%P %s\\n' > "$0.list"
exit $status
"""


def has_namespaces():
    return (
        shutil.which("unshare")
        and not subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode
    )


@pytest.mark.parametrize("name", ["convert_weight.py", "preprocessing", "training"])
def test_a_full_tmpfs(case, source, tmp_path, name, kills, count):
    if kills <= 5 or not has_namespaces():
        pytest.skip("by hand, with --kills 50, where user namespaces are allowed")
    command = {**commands(case, source), "training": harness.train(case, "OUT/out")}[name]
    for size in ("64k", "500k") if name != "training" else ("1500k", "5000k"):
        disk = tmp_path / f"{size}"
        disk.mkdir()
        words = within(command, disk)
        script = ["unshare", "-rm", "bash", "-c", IN_TMPFS, disk, size, disk, harness.PYTHON]
        result = harness.finish(
            subprocess.Popen(
                list(map(str, [*script, *words])),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                preexec_fn=harness.heed_signals,
                env=os.environ,
            )
        )
        assert result.returncode == 2, result
        harness.assert_refused(result, disk)
        left = (tmp_path / f"{size}.list").read_text().splitlines()
        assert not [line for line in left if ".tmp" in line]
        count(f"full tmpfs, {name}", "one line, nothing half-written")
