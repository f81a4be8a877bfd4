"""Runs with one output: one ends as if alone, the others are refused and told who it is."""

import os
import re
import shutil
import socket

import pytest

from faults import harness


def run_all(commands):
    """Start commands at one moment, and wait for all."""
    return [harness.finish(process) for process in [harness.start(each) for each in commands]]


@pytest.mark.parametrize("times", range(3))
def test_conversions(case, tmp_path, times, count):
    """Some may start when the first has finished already: they write the same again."""
    target = tmp_path / "out" / "x.ckpt"
    ended = run_all([harness.convert(case, target)] * 4)
    for each in ended:
        if each.returncode:
            harness.assert_refused(each, f"{target}: another run is writing it (process ")
    assert 0 in [each.returncode for each in ended]
    assert sorted(os.listdir(target.parent)) == ["x.ckpt", "x.ckpt.json"]
    harness.done(harness.merge(target, tmp_path / "again.ckpt"))  # its fingerprint is right
    count("conversions beside each other", "right or refused", 4)


def test_merges(case, tmp_path, count):
    source, other = tmp_path / "source.ckpt", tmp_path / "other.ckpt"
    harness.done(harness.convert(case, source))
    harness.done([*harness.convert(case, other), "--dtype", "bf16"])
    target = tmp_path / "out" / "merged.ckpt"
    commands = [harness.merge(source, target.parent), harness.merge(other, target)] * 2
    for each in run_all(commands):
        if each.returncode:
            harness.assert_refused(each, target)
            assert re.search(r"another run is writing it|made from other inputs", each.stderr)
    harness.done(harness.merge(target, tmp_path / "again.ckpt"))
    count("merges beside each other", "right or refused", 4)


def test_preprocessing(case, tmp_path, count):
    """With two workers each, and other options: parts of both would not fit together."""
    target = tmp_path / "out" / "x.mindrecord"
    commands = [
        harness.launch(harness.preprocess(case, target, *more), 2, tmp_path / f"log{number}")
        for number, more in enumerate(([], ["--pack", "False"]))
    ]
    ended = run_all(commands)
    (winner,) = [number for number, each in enumerate(ended) if each.returncode == 0]
    text = ended[1 - winner].stdout + ended[1 - winner].stderr
    assert f"error: {target}: another run is writing it (process " in text
    assert ended[1 - winner].returncode == 2
    harness.complete_files(target.parent)
    assert not [name for name in os.listdir(target.parent) if name.endswith((".parts", ".lock"))]
    count("preprocessing beside another", "right or refused", 2)


def test_training(case, tmp_path, count):
    """A second run is refused before it removes or resumes anything, whatever its options are."""
    output = tmp_path / "out"
    first = harness.start(harness.train(case, output))
    while not (output / ".lock").exists() and first.poll() is None:
        pass
    words = f"{output}: another run is writing it (process {first.pid} on {socket.gethostname()}"
    for each in run_all(
        harness.train(case, output, *more) for more in ([], ["--overwrite"], ["--resume", "auto"])
    ):
        harness.assert_refused(each, words)
    ended = harness.finish(first)
    assert ended.returncode == 0, ended.stderr
    assert len((output / "metrics.jsonl").read_text().splitlines()) == 12
    assert not (output / ".lock").exists()
    shutil.rmtree(output)
    count("training beside another", "right or refused", 4)
