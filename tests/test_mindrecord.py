"""The training file: rows are read as written, writes are atomic, batching loses no row."""

import json
import random

import numpy as np
import pytest
import xxhash

from mindrlhf.cli import UserError
from mindrlhf.data import mindrecord
from mindrlhf.data.dataset import open_dataset
from mindrlhf.data.features import ComparedPair, TokenGroup
from mindrlhf.records import COLUMNS

S, A, P = 24, 4, 3
SIDECAR = {
    "rows": 5,
    "answers_per_row": A,
    "pairs_per_row": P,
    "seq_len": S,
    "pairs": {"written": 5},
    "template": "t",
    "tokenizer": {"file": "tokenizer.model", "sha256": "a" * 64},
    "checkpoint": {"file": "model.ckpt", "fingerprint": "b" * 64},
}


def rows(count=5):
    for number in range(count):
        group = TokenGroup(
            [1, 2, 3 + number], [[7, 8], [9]], [ComparedPair(0, 1, number)], [-1.5 - number, -2.5]
        )
        yield mindrecord.make_row([group], pad_id=0, seq_len=S, answers=A, pairs=P)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "new folder" / "train.set.1.mindrecord"
    mindrecord.write_rows(path, rows(), SIDECAR)
    return path


def test_a_row_by_hand():
    groups = [
        TokenGroup([1, 2], [[3], [4, 5]], [ComparedPair(1, 0, 17)], [-1, -2]),
        TokenGroup([6], [[7, 8], [9]], [ComparedPair(0, 1, 4), ComparedPair(1, 0, 5)], [-3, -4]),
    ]
    row = mindrecord.make_row(groups, pad_id=0, seq_len=8, answers=5, pairs=4)
    assert list(row) == list(COLUMNS)
    assert {name: values.tolist() for name, values in row.items()} == {
        "input_ids": [1, 2, 2, 4, 6, 7, 6, 0],
        "labels": [0, 3, 4, 5, 7, 8, 9, 0],
        "group_ids": [1, 1, 1, 1, 2, 2, 2, 0],
        "answer_ids": [0, 1, 2, 2, 3, 3, 4, 0],
        "positions": [0, 1, 1, 2, 0, 1, 0, 0],
        "reference_logps": [-1, -2, -3, -4, 0],
        "answer_tokens": [1, 2, 2, 1, 0],
        "chosen": [1, 2, 3, -1],
        "rejected": [0, 3, 2, -1],
        "pair_ids": [17, 4, 5, -1],
    }
    for name, column in COLUMNS.items():
        assert row[name].dtype == column.dtype
        assert row[name].shape == ({"seq_len": 8, "answers": 5, "pairs": 4}[column.size],)


def test_what_is_written_is_read(path):
    read = list(mindrecord.read_rows(path))
    for row, wanted in zip(read, rows(), strict=True):
        assert {name: values.tolist() for name, values in row.items()} == {
            name: values.tolist() for name, values in wanted.items()
        }
    found = mindrecord.read_data_sidecar(path)
    hashes = found.pop(mindrecord.HASHES)
    assert found == {"format": mindrecord.SIDECAR_FORMAT, **SIDECAR}
    assert hashes == {
        "rows": xxhash.xxh3_128_hexdigest(path.read_bytes()),
        "index": xxhash.xxh3_128_hexdigest(path.with_name(f"{path.name}.db").read_bytes()),
    }
    assert sorted(file.name for file in path.parent.iterdir()) == [
        f"{path.name}{end}" for end in ("", ".db", ".json")
    ]


def test_a_second_file_takes_the_place_of_the_first(path):
    mindrecord.write_rows(path, rows(2), {**SIDECAR, "rows": 2})
    assert len(list(mindrecord.read_rows(path))) == 2
    assert mindrecord.read_data_sidecar(path)["rows"] == 2


def test_nothing_stands_under_the_final_name_when_writing_fails(tmp_path):
    def broken():
        yield from rows(2)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mindrecord.write_rows(tmp_path / "a.mindrecord", broken(), SIDECAR)
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot be written"):
        mindrecord.write_rows(tmp_path / "file" / "a.mindrecord", rows(), SIDECAR)


def test_a_missing_or_damaged_file_is_named(path):
    for end, why in ((".json", "sidecar"), (".db", "index"), ("", "no such file")):
        hidden = path.with_name("hidden")
        path.with_name(path.name + end).rename(hidden)
        with pytest.raises(UserError, match=why):
            mindrecord.read_data_sidecar(path)
        hidden.rename(path.with_name(path.name + end))
    path.write_bytes(b"junk" * 1000)
    with pytest.raises(UserError, match="cannot be read"):
        list(mindrecord.read_rows(path))


def flip(path, position):
    """Flip one bit of a file; doing it twice restores the file."""
    with open(path, "r+b") as file:
        file.seek(position // 8)
        byte = file.read(1)[0]
        file.seek(position // 8)
        file.write(bytes([byte ^ 1 << position % 8]))


@pytest.mark.parametrize("end", ["", ".db"])
def test_every_flipped_bit_is_refused_with_one_line(path, end):
    """MindSpore's reader misses most of them, and some end the process."""
    choose, damaged = random.Random(15), path.with_name(path.name + end)
    sidecar = mindrecord.read_data_sidecar(path)
    mindrecord.require_unchanged(path, sidecar)
    for _ in range(10):
        position = choose.randrange(8 * damaged.stat().st_size)
        flip(damaged, position)
        with pytest.raises(UserError, match="changed or damaged") as error:
            mindrecord.require_unchanged(path, sidecar)
        assert str(error.value).startswith(f"{damaged}: ")
        assert "\n" not in str(error.value)
        flip(damaged, position)
    mindrecord.require_unchanged(path, sidecar)
    assert len(list(mindrecord.read_rows(path))) == 5
    mindrecord.require_unchanged(path, sidecar)  # reading changes nothing


def test_a_cut_file_and_missing_hashes_are_refused(path):
    sidecar = mindrecord.read_data_sidecar(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(UserError, match="changed or damaged"):
        mindrecord.require_unchanged(path, sidecar)
    del sidecar[mindrecord.HASHES]
    with pytest.raises(UserError, match=r"mindrecord\.json: has no xxh3_128.*preprocess again"):
        mindrecord.require_unchanged(path, sidecar)


def test_only_rank_0_reads_the_content(path, monkeypatch):
    monkeypatch.setattr(mindrecord, "hash_file", None)
    monkeypatch.setenv("RANK_ID", "1")
    mindrecord.require_unchanged(path, mindrecord.read_data_sidecar(path))


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", json.dumps({"format": mindrecord.SIDECAR_FORMAT, "rows": 1})]
)
def test_a_sidecar_that_is_none(path, content):
    mindrecord.data_sidecar_path(path).write_text(content)
    with pytest.raises(UserError, match=r"\.json: (not a sidecar|is empty)"):
        mindrecord.read_data_sidecar(path)


def test_data_of_an_older_format_are_refused(path):
    mindrecord.data_sidecar_path(path).write_text(json.dumps({**SIDECAR, "format": 1}))
    with pytest.raises(UserError, match=r"format 1, not 2\); preprocess again"):
        mindrecord.read_data_sidecar(path)


def test_data_of_another_run_are_refused_and_the_difference_named():
    same = {"seq_len": S, "template": "t", "tokenizer": "a" * 64, "checkpoint": "b" * 64}
    mindrecord.require_made_for("f", SIDECAR, **same)
    mindrecord.require_made_for("f", SIDECAR, **{**same, "checkpoint": None})
    for name, value, words in (
        ("seq_len", 99, f"seq_len was {S} .* now 99"),
        ("template", "u", "template was t"),
        ("tokenizer", "c" * 64, "tokenizer was aaaaaaaaaaaa.*tokenizer.model.*cccccccccccc"),
        ("checkpoint", "c" * 64, "checkpoint was bbbbbbbbbbbb.*model.ckpt"),
    ):
        with pytest.raises(UserError, match=words):
            mindrecord.require_made_for("f", SIDECAR, **{**same, name: value})


@pytest.mark.parametrize(
    ("batch_size", "shards"), [(1, 1), (2, 1), (5, 1), (8, 1), (1, 2), (2, 2), (3, 4)]
)
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_pair_is_in_one_batch_of_one_worker(path, batch_size, shards, shuffle):
    seen, sizes = [], []
    for shard in range(shards):
        data = open_dataset(
            path, SIDECAR, batch_size=batch_size, shuffle=shuffle, shards=shards, shard=shard
        )
        batches = list(data.create_dict_iterator(num_epochs=1, output_numpy=True))
        sizes.append(len(batches))
        assert all(batch["pair_ids"].shape == (batch_size, P) for batch in batches)
        seen += [
            number
            for batch in batches
            for number in batch["pair_ids"].ravel().tolist()
            if number >= 0
        ]
    assert sorted(seen) == list(range(5))
    assert len(set(sizes)) == 1
    assert sizes[0] == -(-5 // (batch_size * shards))


def test_a_row_without_pairs_weighs_nothing():
    row = mindrecord.make_row([], pad_id=0, **mindrecord.column_sizes(SIDECAR))
    assert not any(
        np.any(row[name])
        for name in ("group_ids", "answer_ids", "reference_logps", "answer_tokens")
    )
    for name in ("chosen", "rejected", "pair_ids"):
        assert (row[name] == -1).all()
