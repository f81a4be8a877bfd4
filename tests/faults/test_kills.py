"""kill -9 at random moments: what is repeated or resumed ends as the undisturbed run does."""

import random
import shutil

import pytest

from faults import harness

LONGEST_CHAIN = 10  # kills before a run may finish
COMPLETE = (  # killed when all was written
    "so the run is complete",
    "exists; remove it, or give the name of a new folder",  # it gets its name when it is complete
)


def kill_and_finish(commands, folder, expected, result_of, kills, seed, count, what):
    """Kill a command again and again; between chains of kills, let it finish and compare.

    Args:
        commands: the command that begins, and the one that continues.
        folder: that it writes to.
        expected: (Timeline, Result) of an undisturbed run.
        result_of: folder -> Result.
        kills, seed: of the suite.
        count: the fixture.
        what: name in the table.
    """
    rng = random.Random(f"{seed} {what}")
    timeline, wanted = expected
    first, again = commands
    left = kills
    while left:
        shutil.rmtree(folder, ignore_errors=True)
        for _ in range(min(left, rng.randint(LONGEST_CHAIN // 2, LONGEST_CHAIN))):
            command = again if folder.exists() else first
            alive = harness.kill_at_random(command, folder, timeline, rng)
            harness.complete_files(folder)
            left -= alive
            if alive:
                count(f"kill -9 of {what}", "ended as if undisturbed")
            else:  # it was faster than the moment
                assert result_of(folder) == wanted
                shutil.rmtree(folder)
        ended = harness.run(again if folder.exists() else first)
        refused = any(words in ended.stderr for words in COMPLETE)
        assert ended.returncode == 0 or refused, ended.stderr
        assert result_of(folder) == wanted


@pytest.fixture(scope="module")
def undisturbed(case, tmp_path_factory):
    """name -> (Timeline, Result) of undisturbed commands."""
    made = {}

    def get(name, command, folder, result_of):
        if name not in made:
            process = harness.start(command)
            timeline = harness.watch(process, folder)
            ended = harness.finish(process)
            assert ended.returncode == 0, ended.stderr
            made[name] = timeline, result_of(folder)
        return made[name]

    return get


def test_conversion(case, tmp_path, undisturbed, kills, seed, count):
    folder = tmp_path / "out"
    command = harness.convert(case, folder / "x.ckpt")
    expected = undisturbed("convert", command, folder, harness.Result.of_folder)
    kill_and_finish((command, command), folder, expected, harness.Result.of_folder, kills, seed,
                    count, "convert_weight.py")  # fmt: skip


def test_merging(case, tmp_path, undisturbed, kills, seed, count):
    folder, source = tmp_path / "out", tmp_path / "source.ckpt"
    harness.done(harness.convert(case, source))
    command = harness.merge(source, folder / "x.safetensors")
    expected = undisturbed("merge", command, folder, harness.Result.of_folder)
    kill_and_finish((command, command), folder, expected, harness.Result.of_folder, kills, seed,
                    count, "transform_checkpoint.py")  # fmt: skip


def test_the_way_back(case, tmp_path, undisturbed, kills, seed, count):
    folder, source = tmp_path / "out", tmp_path / "source.ckpt"
    harness.done(harness.convert(case, source))
    command = [*harness.convert(case, folder / "hf", "--reversed")]
    command[command.index(case.hf)] = source
    expected = undisturbed("back", command, folder, harness.Result.of_folder)
    kill_and_finish((command, command), folder, expected, harness.Result.of_folder, kills, seed,
                    count, "convert_weight.py --reversed")  # fmt: skip


def test_preprocessing(case, tmp_path, undisturbed, kills, seed, count):
    folder = tmp_path / "out"
    command = harness.preprocess(case, folder / "x.mindrecord", "--eval_ratio", "0.3")
    expected = undisturbed("preprocess", command, folder, harness.Result.of_folder)
    kill_and_finish((command, command), folder, expected, harness.Result.of_folder, kills, seed,
                    count, "preprocessing")  # fmt: skip
    assert not list(folder.glob("*.parts"))


def test_training(case, tmp_path, undisturbed, kills, seed, count):
    folder = tmp_path / "out"
    begin, resume = harness.train(case, folder), harness.train(case, folder, "--resume", "auto")
    expected = undisturbed("train", begin, folder, harness.Result.of_training)
    kills = max(kills * 2 // 5, 1)  # each start takes ten seconds
    kill_and_finish((begin, resume), folder, expected, harness.Result.of_training, kills, seed,
                    count, "training")  # fmt: skip
