"""What commands replace: nothing that they read, nothing of another kind, and results made from
other inputs only with --overwrite. Damaged sources are not passed on as verified.
"""

import json
import os
import shutil

import numpy as np
import pytest
from conftest import GOLDEN
from test_convert_weight import convert
from test_preprocess import ROWS, by_pair, one_model, rank, write  # noqa: F401  a fixture
from test_preprocess import run as preprocess
from test_transform_checkpoint import NUMBERS, STRATEGIES, whole, write_shards
from test_transform_checkpoint import run as transform
from test_transform_checkpoint import write as write_weights

from mindrlhf.checkpoints import ckpt_records, containers, fingerprints
from mindrlhf.cli import UserError
from mindrlhf.data import mindrecord, show
from mindrlhf.models.glm4 import sidecar
from mindrlhf.outputs import Output, require_no_loss
from mindrlhf.training import state

SHARD = "model-00001-of-00002.safetensors"


def content(folder):
    """Path -> bytes of every file, links followed."""
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def refused(folder, words, command, *arguments, **options):
    """Assert that a command fails with one line of these words, and changes no file."""
    before = content(folder)
    with pytest.raises(UserError, match=words) as error:
        command(*arguments, **options)
    assert "\n" not in str(error.value)
    assert content(folder) == before


# the rule


def always(path):
    return True


@pytest.mark.parametrize("link", ["same", "symlink", "hard link", "in a folder", "linked folder"])
def test_an_input_is_recognized_under_any_name(tmp_path, link):
    source = tmp_path / "data" / "deep" / "source"
    source.parent.mkdir(parents=True)
    source.write_text("x")
    (source.parent / "loop").symlink_to(tmp_path / "data")  # must not be followed for ever
    target, read = tmp_path / "target", source
    if link == "same":
        target = tmp_path / "data" / ".." / "data" / "deep" / "source"
    elif link == "symlink":
        target.symlink_to(source)
    elif link == "hard link":
        os.link(source, target)
    elif link == "in a folder":
        target, read = source, tmp_path / "data"
    else:
        (tmp_path / "elsewhere").symlink_to(tmp_path / "data")
        target, read = tmp_path / "elsewhere" / "deep" / "source", tmp_path / "data"
    outputs = [Output(target, "a file", always)]
    with pytest.raises(UserError, match="is the same file as .*/source, which this command reads"):
        require_no_loss(outputs, [None, "", tmp_path / "missing", read])
    require_no_loss(outputs, [tmp_path / "missing"])


def test_new_names_and_broken_links_are_free(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "missing")
    for name in ("new", "link", "no folder/new", "x" * 300):
        require_no_loss([Output(tmp_path / name, "a file", None)], [tmp_path])


def test_a_file_that_goes_while_it_is_looked_at_is_no_obstacle(tmp_path):
    """Another run may be replacing it. Before, a file that had just gone was of another kind."""
    path = tmp_path / "x.ckpt.json"
    path.touch()
    require_no_loss([Output(path, "a sidecar", lambda path: path.unlink())], [])
    path.touch()
    with pytest.raises(UserError, match="exists and is not a sidecar"):
        require_no_loss([Output(path, "a sidecar", lambda _: False)], [])


# convert_weight.py


@pytest.fixture
def folder(tmp_path):
    """A copy of the golden hf_chatglm."""
    return shutil.copytree(GOLDEN / "hf_chatglm", tmp_path / "hf")


def test_convert_does_not_write_over_its_shards(tmp_path, folder):
    refused(tmp_path, "same file as", convert, folder, folder / SHARD)
    (tmp_path / "soft.safetensors").symlink_to(folder / SHARD)
    os.link(folder / SHARD, tmp_path / "hard.safetensors")
    for name in ("soft", "hard"):
        refused(
            tmp_path,
            "same file as",
            convert,
            folder,
            tmp_path / f"{name}.safetensors",
            "--overwrite",
        )


def test_convert_replaces_only_checkpoints(tmp_path, folder):
    (tmp_path / "thesis.ckpt").write_text("three years of work")
    refused(tmp_path, "not an intact checkpoint", convert, folder, tmp_path / "thesis.ckpt")
    (tmp_path / "x.ckpt.json").write_text('{"my": "notes"}')
    refused(tmp_path, r"x\.ckpt\.json: exists and is not the sidecar", convert, folder,
            tmp_path / "x.ckpt", "--overwrite")  # fmt: skip
    (tmp_path / "back").mkdir()
    (tmp_path / "back" / "thesis.txt").write_text("three years of work")
    path = convert(folder, tmp_path / "y.ckpt")
    refused(tmp_path, "exists", convert, path, tmp_path / "back", "--reversed")
    refused(tmp_path, "exists", convert, path, path, "--reversed")
    refused(tmp_path, "leave --overwrite out", convert, path, tmp_path / "back", "--reversed",
            "--overwrite")  # fmt: skip


def test_convert_replaces_other_weights_only_when_told(tmp_path, folder):
    path = convert(folder, tmp_path / "x.ckpt")
    first = path.read_bytes()
    assert convert(folder, path).read_bytes() == first  # the same again
    assert convert(folder, convert(folder, folder / "x.ckpt")).read_bytes() == first
    refused(tmp_path, "made from other inputs.*--overwrite", convert, folder, path, "--dtype",
            "fp32")  # fmt: skip
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rope_ratio": 1}))
    refused(tmp_path, "made from other inputs", convert, folder, path)
    convert(folder, path, "--overwrite")
    assert path.read_bytes() == first
    assert sidecar.read_config_of(path).config.rope_ratio == 1
    convert(folder, path, "--overwrite", "--dtype", "fp32")
    assert containers.open_tensors(path)["transformer.output_layer.weight"].dtype == "F32"


def damage_value(path):
    """Flip a bit in the last value of the last tensor, far behind the sample of large tensors."""
    tensor = list(containers.open_tensors(path).values())[-1]
    offset, size = tensor.spans[-1]
    with open(path, "r+b") as file:
        file.seek(offset + size - 1)
        byte = file.read(1)[0]
        file.seek(offset + size - 1)
        file.write(bytes([byte ^ 1]))


def test_reversed_refuses_damaged_weights(tmp_path, folder):
    path = convert(folder, tmp_path / "x.ckpt")
    damage_value(path)
    about = json.loads(sidecar.path_beside(path).read_text())
    about["sample_fingerprint"] = sidecar.sample_fingerprint(path)  # the sample missed it
    del about["seal"]
    sidecar.path_beside(path).write_text(json.dumps(about))
    refused(tmp_path, r"x\.ckpt: was changed or damaged", convert, path, tmp_path / "back",
            "--reversed")  # fmt: skip


# transform_checkpoint.py


def with_sidecar(path, arrays):
    write_weights(path, arrays)
    identity = fingerprints.fingerprint(containers.open_tensors(path))
    sidecar.write_sidecar(path, NUMBERS, dtype="F32", fingerprint=identity, source="nowhere")
    return path


def test_transform_writes_over_nothing_that_it_reads(tmp_path):
    source = write_shards(tmp_path / "source", "2x2", whole())
    one = with_sidecar(tmp_path / "one.ckpt", whole())
    strategy = tmp_path / "source/strategy/ckpt_strategy_rank_0.ckpt"
    os.link(one, tmp_path / "hard.ckpt")
    (tmp_path / "soft.ckpt").symlink_to(one)
    for target in (one, tmp_path / "hard.ckpt", tmp_path / "soft.ckpt"):
        refused(tmp_path, "same file as", transform, one, target)
    for target in (source / "rank_1/x.ckpt", strategy):
        refused(tmp_path, "same file as", transform, source, target,
                src_strategy=source / "strategy")  # fmt: skip


def test_transform_replaces_only_checkpoints_and_others_only_when_told(tmp_path):
    source = write_shards(tmp_path / "source", "2x2", whole())
    options = {"src_strategy": source / "strategy"}
    (tmp_path / "thesis.ckpt").write_text("three years of work")
    refused(tmp_path, "not an intact checkpoint", transform, source, tmp_path / "thesis.ckpt",
            **options)  # fmt: skip
    transform(source, tmp_path / "merged", **options)
    transform(source, tmp_path / "merged", **options)  # the same again
    for _ in range(2):
        transform(source, source / "merged.ckpt", **options)  # beside rank_0, rank_1, ...
    merged = tmp_path / "merged" / "merged.ckpt"
    first = merged.read_bytes()
    shutil.rmtree(source)
    write_shards(source, "2x2", whole(1))
    refused(tmp_path, "made from other inputs.*--overwrite", transform, source,
            tmp_path / "merged", **options)  # fmt: skip
    import transform_checkpoint

    transform_checkpoint.main(
        [
            f"--src_checkpoint={source}",
            f"--src_strategy={source / 'strategy'}",
            f"--dst_checkpoint={tmp_path / 'merged'}",
            "--overwrite",
        ]
    )
    assert merged.read_bytes() != first
    with pytest.raises(UserError, match="leave --overwrite out"):
        transform_checkpoint.main(
            [
                f"--src_checkpoint={merged}",
                f"--dst_strategy={STRATEGIES / '2x2.ckpt'}",
                f"--dst_checkpoint={tmp_path / 'shards'}",
                "--overwrite",
            ]
        )


def test_transform_refuses_a_damaged_source(tmp_path):
    """One file, and shards that were split from one: the fingerprint travels with both."""
    one = with_sidecar(tmp_path / "one.ckpt", whole())
    transform(one, tmp_path / "shards", dst_strategy=STRATEGIES / "2x2.ckpt")
    damage_value(one)
    refused(tmp_path, r"one\.ckpt: was changed or damaged", transform, one, tmp_path / "two.ckpt")
    transform(
        tmp_path / "shards", tmp_path / "back.ckpt", src_strategy=tmp_path / "shards/strategy"
    )
    for rank_folder in (tmp_path / "shards").glob("rank_*"):
        shard = rank_folder / "sharded.ckpt"
        tensors = {name: each.array() for name, each in containers.open_tensors(shard).items()}
        name = "transformer.encoder.layers.0.self_attention.query_key_value.bias"
        tensors[name] = tensors[name] + np.float32(1)  # alike on all cards, so no copy differs
        shard.unlink()
        write_weights(shard, tensors)
    refused(tmp_path, "shards: was changed or damaged", transform, tmp_path / "shards",
            tmp_path / "new.ckpt", src_strategy=tmp_path / "shards/strategy")  # fmt: skip


# dpo_preprocess_glm4_parallel.py


@pytest.fixture
def pairs(tmp_path):
    return write(tmp_path / "data.jsonl", ROWS)


@pytest.mark.parametrize("which", ["src", "weights", "tokenizer", "config"])
def test_preprocessing_writes_over_nothing_that_it_reads(golden, pairs, tmp_path, which):
    weights = shutil.copy(golden.checkpoint, tmp_path / "x.ckpt")
    tokenizer = shutil.copy(golden.tokenizer, tmp_path / "tokenizer.model")
    config = shutil.copy(golden.process, golden.folder / "copy.yaml")
    target = {"src": pairs, "weights": weights, "tokenizer": tokenizer, "config": config}[which]
    (tmp_path / "link").symlink_to(target)
    more = ["--load_checkpoint", weights, "--tokenizer", tokenizer, "--config", config]
    for place in (target, tmp_path / "link"):
        refused(tmp_path, "same file as", preprocess, golden, pairs, place, *more, "--overwrite")
    refused(tmp_path, "same file as", preprocess, golden, tmp_path, pairs)


@pytest.mark.parametrize("end", ["", ".db", ".json", ".png"])
def test_preprocessing_replaces_only_its_own_kind(golden, pairs, tmp_path, end):
    (tmp_path / f"a.mindrecord{end}").write_text('{"three": "years of work"}')
    refused(tmp_path, f"a.mindrecord{end}: exists and is not", preprocess, golden, pairs,
            tmp_path / "a.mindrecord", "--overwrite")  # fmt: skip
    (tmp_path / f"a.mindrecord{end}").unlink()
    (tmp_path / f"b_eval.mindrecord{end}").write_text("three years of work")
    if end != ".png":  # the evaluation set has no picture
        refused(tmp_path, f"b_eval.mindrecord{end}: exists and is not", preprocess, golden, pairs,
                tmp_path / "b.mindrecord", "--eval_ratio", "0.3")  # fmt: skip


def test_other_data_are_replaced_only_when_told(golden, pairs, tmp_path, capsys):
    path = preprocess(golden, pairs, tmp_path / "a.mindrecord")
    capsys.readouterr()
    preprocess(golden, pairs, path)
    assert "Nothing to do" in capsys.readouterr().out
    inside = preprocess(golden, tmp_path, tmp_path / "b.mindrecord")
    capsys.readouterr()
    preprocess(golden, tmp_path, inside)  # it lies in the folder of the pairs
    assert "Nothing to do" in capsys.readouterr().out
    write(pairs, ROWS[:3])
    refused(tmp_path, "made from other inputs.*--overwrite", preprocess, golden, pairs, path)
    preprocess(golden, pairs, path, "--overwrite")
    assert len(by_pair(path)) == 3
    preprocess(golden, pairs, path, "--overwrite")
    assert "Nothing to do" in capsys.readouterr().out


def test_an_evaluation_set_of_other_data_is_kept(golden, pairs, tmp_path):
    other = preprocess(golden, pairs, tmp_path / "a_eval.mindrecord")
    refused(tmp_path, "a_eval.mindrecord: exists, made from other inputs", preprocess, golden,
            pairs, tmp_path / "a.mindrecord", "--eval_ratio", "0.3")  # fmt: skip
    assert len(by_pair(other)) == 8


def test_damaged_data_are_refused_and_made_again_by_every_worker(
    golden, pairs, tmp_path, capsys, monkeypatch
):
    path = preprocess(golden, pairs, tmp_path / "a.mindrecord")
    good = by_pair(path)
    with open(path, "r+b") as file:
        file.seek(-100, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-100, os.SEEK_END)
        file.write(bytes([byte ^ 4]))
    refused(tmp_path, "a.mindrecord: was changed or damaged after preprocessing", show.main,
            [str(path), "--tokenizer", str(golden.tokenizer)])  # fmt: skip
    capsys.readouterr()
    for number in (1, 0):
        rank(monkeypatch, number, 2)
        preprocess(golden, pairs, path)
    assert "exists already" not in capsys.readouterr().out
    assert by_pair(path) == good
    mindrecord.require_unchanged(path, mindrecord.read_data_sidecar(path))


def test_training_refuses_damaged_data_before_it_opens_them(golden, tmp_path):
    from mindrlhf import config
    from mindrlhf.training import inputs

    for end in ("", ".db", ".json"):
        shutil.copy(f"{golden.data}{end}", tmp_path / f"a.mindrecord{end}")
    path = tmp_path / "a.mindrecord"
    settings = config.load_settings(golden.finetune, run_mode="finetune", overrides={
        "train_dataset.data_loader.dataset_dir": str(path),
        "processor.tokenizer.vocab_file": str(golden.tokenizer),
        "load_checkpoint": str(golden.checkpoint)})  # fmt: skip
    inputs.open_data(settings)
    with open(f"{path}.db", "ab") as file:
        file.write(b"\0")
    with pytest.raises(UserError, match=r"a\.mindrecord\.db: was changed or damaged"):
        inputs.open_data(settings)


# training states


def test_a_state_without_its_checksum_is_none(tmp_path):
    """Weights from elsewhere may lack one; states are always written with it."""
    import mindspore as ms

    whole_file = tmp_path / "x-step_00000003.ckpt"
    tensors = [
        {"name": "a", "data": ms.Tensor(np.ones(9, np.float32))},
        {"name": "step_num", "data": ms.Tensor(3, ms.int32)},
    ]
    ms.save_checkpoint(tensors, str(whole_file), crc_check=True)
    state.require_intact_state(whole_file)
    cut = whole_file.read_bytes()[: -len(ckpt_records.CLOSING) - 10]
    whole_file.unlink()
    whole_file.write_bytes(cut)
    containers.require_intact(whole_file)
    with pytest.raises(UserError, match="its end, the checksum, is missing"):
        state.require_intact_state(whole_file)
