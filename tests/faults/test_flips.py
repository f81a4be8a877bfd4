"""One flipped bit in each kind of file: the next command notices it, or gives the same result.

The commands run in this process, up to the point where MindSpore would build the model.
"""

import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from test_transform_checkpoint import cards, whole, write_shards
from test_transform_checkpoint import run as transform

import convert_weight
from faults import harness
from mindrlhf import config, locks
from mindrlhf.cli import UserError
from mindrlhf.data import show
from mindrlhf.models.glm4 import sidecar
from mindrlhf.training import inputs, run, state

STATE = "out/checkpoint/rank_0/glm4_dpo-step_00000012.ckpt"


def convert(source, target, *more):
    words = ["--model", "glm-n", "--input_path", source, "--output_path", target, "--dtype", "fp32"]
    convert_weight.main(list(map(str, [*words, *more])))


@dataclass
class Place:
    """Copies of all files, one of which is damaged, and a folder for results."""

    folder: Path
    case: object
    results: Path = field(init=False)

    def __post_init__(self):
        self.results = self.folder / "results"

    def __getattr__(self, name):
        return self.folder / name

    def settings(self, **more):
        """Settings of a training with the files of this place."""
        return config.load_settings(self.case.finetune, run_mode="finetune", overrides={
            "train_dataset.data_loader.dataset_dir": str(self.folder / "golden.mindrecord"),
            "processor.tokenizer.vocab_file": str(self.folder / "tokenizer.model"),
            "load_checkpoint": str(self.folder / "x.ckpt"), "output_dir": str(self.folder / "out"),
            **more})  # fmt: skip


# what commands do with the files: Place -> anything that compares


def go_back(place):
    convert(place.folder / "x.ckpt", place.results / "hf", "--reversed")
    return harness.Result.of_folder(place.results)


def merge(place):
    transform(place.folder / "x.ckpt", place.results / "x.safetensors")
    return harness.Result.of_folder(place.results)


def merge_run(place):
    transform(place.folder / "out/checkpoint_network", place.results / "x.safetensors")
    return harness.Result.of_folder(place.results)


def merge_one_rank(place):
    transform(place.folder / "out" / harness.NETWORK, place.results / "x.safetensors")
    return harness.Result.of_folder(place.results)


def join_shards(place):
    source = place.folder / "shards"
    transform(source, place.results / "x.safetensors", src_strategy=source / "strategy")
    return harness.Result.of_folder(place.results)


def show_data(place):
    data, tokenizer = place.folder / "golden.mindrecord", place.folder / "tokenizer.model"
    show.main([str(data), "--tokenizer", str(tokenizer)])


def begin_training(place):
    settings = place.settings()
    data = inputs.open_data(settings)
    sidecar.require_same_model(settings["load_checkpoint"], settings)
    identity = run.identity.describe_training(settings, data.train, data.eval)
    return identity, data.train["rows"], data.train["pairs_per_row"]


def resume(place):
    """Up to the weights and the place in the data."""
    settings = place.settings(resume_training=str(place.folder / STATE))
    data = inputs.open_data(settings)
    path = run.open_state(settings)
    identity = run.begin_run(settings, data, path, overwrite=False, allow_changes=False)
    own = state.own_state(path)
    return identity, state.steps_done(own), own.read_bytes()


KINDS = {  # kind -> (file, what reads it)
    "checkpoint .ckpt, converted": ("x.ckpt", merge),
    "checkpoint .ckpt, converted, to Hugging Face": ("x.ckpt", go_back),
    "checkpoint .safetensors": ("x.safetensors", lambda place: _merge_safetensors(place)),
    "checkpoint .ckpt of a run": (f"out/{harness.NETWORK}", merge_run),
    "checkpoint .ckpt of a run, given as a file": (f"out/{harness.NETWORK}", merge_one_rank),
    "shard of a parallel run": ("shards/rank_1/sharded.ckpt", join_shards),
    "strategy file": ("shards/strategy/ckpt_strategy_rank_0.ckpt", join_shards),
    "sidecar of shards, model.json": ("shards/model.json", join_shards),
    "sidecar of a checkpoint": ("x.ckpt.json", go_back),
    "sidecar of a checkpoint, in training": ("x.ckpt.json", begin_training),
    "step.json": (str(Path(f"out/{harness.NETWORK}").with_name("step.json")), merge_run),
    "training state": (STATE, resume),
    "run.json": ("out/run.json", resume),
    ".mindrecord": ("golden.mindrecord", show_data),
    ".mindrecord.db": ("golden.mindrecord.db", show_data),
    ".mindrecord.json": ("golden.mindrecord.json", begin_training),
    "tokenizer.model": ("tokenizer.model", begin_training),
}


def _merge_safetensors(place):
    transform(place.folder / "x.safetensors", place.results / "x.ckpt")
    return harness.Result.of_folder(place.results)


@pytest.fixture(scope="module")
def place(case, tmp_path_factory):
    folder = tmp_path_factory.mktemp("flips")
    for path in case.data.parent.glob("golden.mindrecord*"):
        shutil.copy(path, folder)
    shutil.copy(case.tokenizer, folder)
    for name in ("x.ckpt", "x.safetensors"):
        convert(case.hf, folder / name)
    transform(folder / "x.ckpt", folder / "again.ckpt")
    write_shards(folder / "source", "2x2", whole())
    one = folder / "one.ckpt"
    transform(folder / "source", one, src_strategy=folder / "source/strategy")
    _with_sidecar(one)
    transform(one, folder / "shards", dst_strategy=folder / "source/strategy")
    assert len(list((folder / "shards").glob("rank_*"))) == cards("2x2")
    harness.done(harness.train(case, folder / "out"))
    return Place(folder, case)


def _with_sidecar(path):
    from test_transform_checkpoint import NUMBERS

    from mindrlhf.checkpoints import containers, fingerprints

    identity = fingerprints.fingerprint(containers.open_tensors(path))
    sidecar.write_sidecar(path, NUMBERS, dtype="F32", fingerprint=identity, source="nowhere")


def outcome(read, place):
    """What a command gives: its result, or the UserError as text."""
    shutil.rmtree(place.results, ignore_errors=True)
    former = (place.folder / "out/run.json").read_bytes()
    try:
        return read(place)
    except UserError as error:
        message = str(error)
    finally:
        (place.folder / "out/run.json").write_bytes(former)
    assert "\n" not in message
    assert not list(place.folder.rglob(".*.tmp"))
    if place.results.exists():
        assert not harness.complete_files(place.results)
    return message


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_bit_is_noticed_or_without_effect(place, kind, flips, seed, count):
    name, read = KINDS[kind]
    path, rng = place.folder / name, random.Random(f"{seed} {kind}")
    path.chmod(0o600)
    good = path.read_bytes()
    wanted = outcome(read, place)
    assert not isinstance(wanted, str), wanted
    try:
        for _ in range(flips):
            bit = rng.randrange(8 * len(good))
            damaged = bytearray(good)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            found = outcome(read, place)
            if isinstance(found, str):
                count(f"flipped bit, {kind}", "noticed")
            else:
                assert found == wanted, f"bit {bit} of {name} changed the result"
                count(f"flipped bit, {kind}", "without effect")
    finally:
        path.write_bytes(good)
    assert not locks.lock_path(path).exists()
