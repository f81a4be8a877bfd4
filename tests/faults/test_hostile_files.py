"""Real commands with files that are none: pipes that nobody writes to, devices, folders, links."""

import os

import pytest

from faults import harness

PLACES = ["fifo", "/dev/zero", "/dev/full", "/proc/self/mem", "loop", "folder", "x" * 300]


@pytest.fixture
def place(tmp_path):
    """A folder with a pipe, a link to itself, and a folder."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "folder").mkdir()
    return tmp_path


def replaced(command, option, value):
    """A command with another value of an option."""
    words = list(command)
    words[words.index(option) + 1] = value
    return words


def assert_all_refused(commands, place, count, what):
    before = sorted(os.listdir(place))
    for process in [harness.start(command, cwd=place) for command in commands]:
        harness.assert_refused(harness.finish(process, seconds=60))
        count(f"hostile file, {what}", "one line")
    assert sorted(os.listdir(place)) == before


def test_no_command_waits_for_a_pipe_or_reads_a_device(case, place, count):
    convert = harness.convert(case, place / "new.ckpt")
    back = harness.convert(case, place / "new", "--reversed")
    preprocess = harness.preprocess(case, place / "new.mindrecord")
    for path in PLACES:
        commands = [replaced(back, "--input_path", path), harness.merge(path, place / "new.ckpt")]
        if path != "folder":  # an empty folder of pairs has no pairs, and says so
            commands.append(replaced(preprocess, "--src", path))
        commands += [replaced(convert, "--input_path", path)]
        assert_all_refused(commands, place, count, "as input")


def test_no_command_writes_to_a_device_or_an_impossible_place(case, place, count):
    checkpoint = case.checkpoint
    for path in ("/dev/full/x.ckpt", "/proc/x/x.ckpt", "loop/x.ckpt", f"{'x' * 300}.ckpt"):
        assert_all_refused(
            [
                harness.convert(case, path),
                harness.merge(checkpoint, path),
                harness.preprocess(case, path.replace("ckpt", "mindrecord")),
            ],
            place,
            count,
            "as output",
        )
