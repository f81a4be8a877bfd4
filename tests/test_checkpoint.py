"""Checkpoint files: MindSpore reads ours and the reverse; identity, damage, atomic writing."""

import hashlib
import os
import random
import resource
import subprocess
import sys

import numpy as np
import pytest
import xxhash

import mindrlhf.training.state
from mindrlhf import files, json_files
from mindrlhf.checkpoints import ckpt_records, containers, fingerprints, tensors
from mindrlhf.cli import UserError
from mindrlhf.models.glm4 import load

SUFFIXES = (".ckpt", ".safetensors")


def items(arrays, dtype="F32"):
    """What containers.write_tensors takes, from a dict of arrays."""
    return [tensors.TensorItem.of_array(name, dtype, array) for name, array in arrays.items()]


def small():
    """Three tensors, one of one element, one without dimensions."""
    return {
        "b.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
        "a.bias": np.array([-1.5], np.float32),
        "scale": np.array(3.25, np.float32),
    }


def one_line(error):
    """Assert that an error takes one line."""
    assert "\n" not in str(error)


def rewrite(path, content):
    """Replace a file: faster than overwriting it, which waits for the disk."""
    path.unlink()
    path.write_bytes(content)


# formats


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_mindspore_reads_what_is_written(tmp_path, monkeypatch, suffix, dtype):
    """Also where a tensor takes several records of a .ckpt: 12 elements of 2 or 4 bytes, 16 a
    record.
    """
    import mindspore as ms

    monkeypatch.setattr(ckpt_records, "RECORD", 16)
    path = tmp_path / f"x{suffix}"
    stored = {name: tensors.round_to(array, dtype) for name, array in small().items()}
    containers.write_tensors(path, items(stored, dtype))
    read = ms.load_checkpoint(str(path), format=suffix[1:])
    assert sorted(read) == sorted(stored)
    for name, array in small().items():  # the values are exact in each dtype
        assert np.array_equal(read[name].asnumpy().astype(np.float32), array)
        assert (
            str(read[name].dtype) == {"F32": "Float32", "F16": "Float16", "BF16": "BFloat16"}[dtype]
        )


@pytest.mark.parametrize("options", [{}, {"crc_check": True}])
def test_reads_what_mindspore_wrote(tmp_path, options):
    """840 kB: more than one of MindSpore's records of 512 KiB."""
    import mindspore as ms

    array = np.random.default_rng(0).normal(size=(700, 300)).astype(np.float32)
    values = {
        "big": ms.Tensor(array),
        "half": ms.Tensor(array[:3], ms.float16),
        "brain": ms.Tensor(array[:3], ms.bfloat16),
        "step_num": ms.Tensor(7, ms.int32),
        "flag": ms.Tensor([True, False]),
    }
    path = tmp_path / "m.ckpt"
    ms.save_checkpoint(
        [{"name": name, "data": value} for name, value in values.items()],
        str(path),
        append_dict={"epoch": 3, "note": "text"},
        **options,
    )
    read = containers.open_tensors(path)
    assert np.array_equal(read["big"].array(), array)
    assert np.array_equal(read["half"].array(), array[:3].astype(np.float16))
    assert np.array_equal(read["brain"].float32(), values["brain"].astype(ms.float32).asnumpy())
    assert read["flag"].array().tolist() == [True, False]
    assert read["step_num"].shape == ()
    assert mindrlhf.training.state.steps_done(path) == 7
    assert "note" not in read


def test_empty_tensors_and_many_pieces_survive(tmp_path, monkeypatch):
    monkeypatch.setattr(tensors, "PIECE", 5)
    monkeypatch.setattr(ckpt_records, "RECORD", 32)
    arrays = {"none": np.zeros((0, 4), np.float32), "some": np.arange(23, dtype=np.float32)}
    for suffix in SUFFIXES:
        containers.write_tensors(tmp_path / f"x{suffix}", items(arrays))
        read = containers.open_tensors(tmp_path / f"x{suffix}")
        for name, array in arrays.items():
            assert read[name].shape == array.shape
            assert np.array_equal(read[name].array(), array)
        assert [len(chunk) for chunk in read["some"].chunks()] == [5, 5, 5, 5, 3]
        assert read["some"].read(7, 4).tolist() == [7, 8, 9, 10]


# precisions


def test_bfloat16_rounds_to_nearest_and_ties_to_even():
    """Near 1, bfloat16 has steps of 2**-7: 1 + 2**-8 lies halfway and rounds to the even neighbour
    1; 1 + 3 * 2**-8 rounds up.
    """
    step = 2.0**-7
    pairs = [
        (1.0, 1.0),
        (1 + step / 2, 1.0),
        (1 + 3 * step / 2, 1 + 2 * step),
        (1 + 0.51 * step, 1 + step),
        (-0.0, -0.0),
        (np.inf, np.inf),
        (3.4e38, np.inf),
        (1e-45, 0.0),
    ]
    values, wanted = np.array(pairs, np.float32).T
    found = tensors.to_float32(tensors.round_to(np.ascontiguousarray(values), "BF16"), "BF16")
    assert found.tobytes() == np.ascontiguousarray(wanted).tobytes()
    assert np.isnan(
        tensors.to_float32(tensors.round_to(np.array([np.nan], np.float32), "BF16"), "BF16")
    ).all()


def test_all_values_of_16_bits_convert_as_numpy_converts_them():
    """float32 holds every bfloat16 and every float16; from there NumPy rounds."""
    every = np.arange(1 << 16, dtype=np.uint16)
    brain = (every.astype(np.uint32) << 16).view(np.float32)
    half = every.view(np.float16).astype(np.float32)
    with np.errstate(all="ignore"):
        wanted = brain.astype(np.float16)
    found = tensors.convert_dtype(every, "BF16", "F16")
    assert found.dtype == np.float16
    assert np.array_equal(found, wanted, equal_nan=True)
    assert np.array_equal(np.signbit(found), np.signbit(wanted))
    assert np.array_equal(
        tensors.convert_dtype(every.view(np.float16), "F16", "F32"), half, equal_nan=True
    )
    back = tensors.to_float32(tensors.convert_dtype(every.view(np.float16), "F16", "BF16"), "BF16")
    good = np.isfinite(half)
    off = np.abs(back[good] - half[good])
    assert (off <= np.abs(half[good]) * 2.0**-8 + 1e-30).all()  # half a step of 8 bits
    assert np.array_equal(np.isnan(back), np.isnan(half))
    assert np.array_equal(tensors.is_finite(every, "BF16"), np.isfinite(brain))
    assert np.array_equal(tensors.is_finite(every.view(np.float16), "F16"), good)


# identity


def test_fingerprint_is_what_its_documentation_says(tmp_path, monkeypatch):
    monkeypatch.setattr(tensors, "PIECE", 8)
    containers.write_tensors(tmp_path / "x.ckpt", items(small()))

    def sha(content):
        return hashlib.sha256(content).digest()

    def xxh(array):
        return xxhash.xxh3_128_digest(array.tobytes())

    array = small()["b.weight"].ravel()
    parts = [
        sha(b"a.bias F32 [1]\n" + xxh(np.float32(-1.5))),
        sha(b"b.weight F32 [3, 4]\n" + xxh(array[:8]) + xxh(array[8:])),
        sha(b"scale F32 []\n" + xxh(np.float32(3.25))),
    ]
    assert (
        fingerprints.fingerprint(containers.open_tensors(tmp_path / "x.ckpt"))
        == sha(b"".join(parts)).hex()
    )


def test_fingerprint_does_not_depend_on_files(tmp_path):
    arrays = small()
    written = {
        containers.write_tensors(tmp_path / f"x{suffix}", items(arrays)) for suffix in SUFFIXES
    }
    written |= {
        containers.write_tensors(tmp_path / "reordered.ckpt", items(dict(reversed(arrays.items()))))
    }
    for number, name in enumerate(arrays):
        containers.write_tensors(
            tmp_path / f"shard_{number}.safetensors", items({name: arrays[name]})
        )
    shards = {}
    for number in range(len(arrays)):
        shards |= containers.open_tensors(tmp_path / f"shard_{number}.safetensors")
    read = {
        fingerprints.fingerprint(containers.open_tensors(tmp_path / f"x{suffix}"))
        for suffix in SUFFIXES
    }
    assert len(written | read | {fingerprints.fingerprint(shards)}) == 1


@pytest.mark.parametrize(
    "change",
    [
        {"b.weight": np.arange(12, dtype=np.float32).reshape(4, 3)},
        {"a.bias": np.array([-1.5000001], np.float32)},
        {"scale": np.array(3.25, np.float32), "more": np.zeros(1, np.float32)},
    ],
)
def test_fingerprint_depends_on_names_shapes_and_values(tmp_path, change):
    one = containers.write_tensors(tmp_path / "one.ckpt", items(small()))
    assert containers.write_tensors(tmp_path / "two.ckpt", items({**small(), **change})) != one


# writing


def test_an_interrupted_write_leaves_nothing(tmp_path):
    def fail():
        yield np.zeros(1, np.float32)
        raise KeyboardInterrupt

    for suffix in SUFFIXES:
        with pytest.raises(KeyboardInterrupt):
            containers.write_tensors(
                tmp_path / f"x{suffix}",
                [*items(small()), tensors.TensorItem("late", "F32", (1,), fail)],
            )
    with (
        pytest.raises(UserError, match="cannot be written"),
        files.atomic_folder(tmp_path / "folder") as folder,
    ):
        (folder / "file").write_bytes((folder / "absent").read_bytes())
    assert list(tmp_path.iterdir()) == []


def test_pieces_that_do_not_fill_the_shape_are_an_error(tmp_path):
    for pieces in ([], [np.zeros(2, np.float32)], [np.zeros(3, np.float32)] * 2):
        with pytest.raises(ValueError, match="piece"):
            containers.write_tensors(
                tmp_path / "x.ckpt",
                [tensors.TensorItem("a", "F32", (3,), lambda pieces=pieces: pieces)],
            )
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_dead_processes_go_and_of_living_ones_stay(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    temporary = files._temporary(tmp_path / "x.ckpt")
    for number in (dead.pid, os.getppid()):
        temporary.with_name(temporary.name.replace(str(os.getpid()), str(number))).write_text(
            "left"
        )
    containers.write_tensors(tmp_path / "x.ckpt", items(small()))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["x.ckpt", temporary.name.replace(str(os.getpid()), str(os.getppid()))]
    )


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_full_disk_is_one_error_and_leaves_nothing(tmp_path, suffix):
    """A limit on the size of files makes writing fail as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    arrays = {"big": np.zeros(300_000, np.float32)}
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        with pytest.raises(UserError, match="cannot be written"):
            containers.write_tensors(tmp_path / f"x{suffix}", items(arrays))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_wrong_places_are_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "x.ckpt").mkdir()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept").write_text("x")
    for path, said in (
        ("file/x.ckpt", "cannot be written"),
        ("x.ckpt", "is a folder"),
        ("x.bin", "must end in .ckpt or"),
    ):
        with pytest.raises(UserError, match=said):
            containers.write_tensors(tmp_path / path, items(small()))
    with pytest.raises(UserError, match="exists"), files.atomic_folder(tmp_path / "full"):
        pass
    with pytest.raises(UserError, match="GB needed"):
        files.require_space(tmp_path / "new" / "x.ckpt", 1 << 60)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1]", "got list"),
        ("{", "not JSON"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "'c' appears twice"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_json_must_be_an_object_without_doubts(tmp_path, text, said):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match=said):
        json_files.read_json(tmp_path / "x.json")


# damage


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_cut_anywhere_never_gives_other_values(tmp_path, suffix):
    """A .ckpt has no end mark: cut between two records, it is a file of fewer tensors."""
    path = tmp_path / f"x{suffix}"
    containers.write_tensors(path, items(small()))
    whole, lengths = path.read_bytes(), []
    for length in range(len(whole)):
        rewrite(path, whole[:length])
        try:
            found = containers.open_tensors(path)
        except UserError as error:
            one_line(error)
            continue
        lengths.append(len(found))
        assert all(np.array_equal(tensor.array(), small()[name]) for name, tensor in found.items())
    assert lengths == ([] if suffix == ".safetensors" else [1, 2])


def _mutate(content, places, choose):
    """Change, remove, insert or swap a few bytes at the given places."""
    content = bytearray(content)
    for _ in range(choose.choice((1, 1, 1, 2, 3))):
        place, kind = choose.choice(places), choose.randrange(5)
        place = min(place, len(content) - 2)
        if kind == 0:
            content[place] = choose.randrange(256)
        elif kind == 1:
            content[place] ^= 1 << choose.randrange(8)
        elif kind == 2:
            del content[place]
        elif kind == 3:
            content.insert(place, choose.choice((0, 255, *b'0123456789{}[],":FB')))
        else:
            other = choose.choice(places)
            content[place], content[other % len(content)] = (
                content[other % len(content)],
                content[place],
            )
    return bytes(content)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_2000_damaged_headers_never_give_other_values(tmp_path, suffix):
    """A name of the original is read with its value, or with another dtype or shape."""
    path, choose = tmp_path / f"x{suffix}", random.Random(1)
    containers.write_tensors(path, items(small()))
    whole, original = path.read_bytes(), containers.open_tensors(path)
    spans = [span for tensor in original.values() for span in tensor.spans]
    places = [
        place
        for place in range(len(whole))
        if not any(0 <= place - offset < size for offset, size in spans)
    ]
    refused = 0
    for _ in range(2000):
        rewrite(path, _mutate(whole, places, choose))
        try:
            found = containers.open_tensors(path)
        except UserError as error:
            one_line(error)
            refused += 1
            continue
        for name, tensor in found.items():
            known = original.get(name)
            if known and (tensor.dtype, tensor.shape) == (known.dtype, known.shape):
                assert tensor.array().tobytes() == small()[name].tobytes()
    assert refused > 1000


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path):
    path = tmp_path / "x.safetensors"
    containers.write_tensors(path, items(small()))
    read = containers.open_tensors(path)
    os.truncate(path, 100)
    with pytest.raises(UserError, match=r"x\.safetensors: shrank while"):
        [tensor.array() for tensor in read.values()]


# loading


def test_loading_is_strict_and_changes_nothing_where_it_fails(tmp_path):
    import mindspore as ms

    network = ms.nn.Dense(2, 3)
    before = network.weight.asnumpy().copy()
    good = {"weight": np.ones((3, 2), np.float32), "bias": np.full(3, 2, np.float32)}
    path = tmp_path / "x.ckpt"
    for change, said in (
        ({"bias": None}, "missing: bias"),
        ({"step_num": np.ones(1, np.float32)}, "not in the model: step_num"),
        (
            {"weight": np.ones((2, 3), np.float32)},
            r"of another shape: weight \(\[2, 3\] in the file",
        ),
    ):
        arrays = {name: array for name, array in {**good, **change}.items() if array is not None}
        containers.write_tensors(path, items(arrays))
        with pytest.raises(UserError, match=said):
            load.load_weights(network, path)
        assert np.array_equal(network.weight.asnumpy(), before)
    containers.write_tensors(path, items({**good, "step_num": np.ones(1, np.float32)}))
    assert sorted(load.load_weights(network, path, training_state=True)) == ["bias", "weight"]
    assert np.array_equal(network.weight.asnumpy(), good["weight"])
    assert np.array_equal(network.bias.asnumpy(), good["bias"])
