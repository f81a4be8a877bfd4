"""Weight conversion in both directions, against the golden files' own bytes; damaged input, kills,
and memory.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import GOLDEN, ROOT, assert_one_error, run_script

import convert_weight
from mindrlhf import cli
from mindrlhf.checkpoints import ckpt_records, containers, fingerprints, tensors
from mindrlhf.cli import UserError
from mindrlhf.models.glm4 import hf, model_config, sidecar, weight_names

STORED = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
DTYPES = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}


def convert(source, target, *options):
    """Run the command in this process."""
    convert_weight.main(
        ["--model", "glm-n", "--input_path", str(source), "--output_path", str(target), *options]
    )
    return Path(target)


def raw(path):
    """Tensors of a .safetensors or a folder, read without the project: name -> (dtype, array)."""
    if path.is_dir():
        return {
            name: found
            for each in sorted(path.glob("*.safetensors"))
            for name, found in raw(each).items()
        }
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header, found = json.loads(content[8:start]), {}
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            array = np.frombuffer(content[start + begin : start + end], STORED[entry["dtype"]])
            found[name] = entry["dtype"], array.reshape(entry["shape"])
    return found


def same(one, two):
    """Whether two dicts of (dtype, array) agree bit by bit."""
    return one.keys() == two.keys() and all(
        one[name][0] == two[name][0]
        and one[name][1].shape == two[name][1].shape
        and one[name][1].tobytes() == two[name][1].tobytes()
        for name in one
    )


def by_hand():
    """The golden model in float32 and MindFormers' names: an independent copy of the name table."""
    source = {name: array for name, (_, array) in raw(GOLDEN / "hf_glm").items()}
    made = {
        "transformer.embedding.embedding_weight": source["model.embed_tokens.weight"],
        "transformer.encoder.final_layernorm.weight": source["model.norm.weight"],
        "transformer.output_layer.weight": source["lm_head.weight"],
    }
    for n in range(3):
        ours, theirs = f"transformer.encoder.layers.{n}.", f"model.layers.{n}."
        for kind in ("weight", "bias"):
            made[f"{ours}self_attention.query_key_value.{kind}"] = np.concatenate(
                [source[f"{theirs}self_attn.{part}_proj.{kind}"] for part in "qkv"]
            )
        for mine, other in (
            ("self_attention.dense", "self_attn.o_proj"),
            ("mlp.dense_h_to_4h", "mlp.gate_up_proj"),
            ("mlp.dense_4h_to_h", "mlp.down_proj"),
            ("input_layernorm", "input_layernorm"),
            ("post_attention_layernorm", "post_attention_layernorm"),
        ):
            made[f"{ours}{mine}.weight"] = source[f"{theirs}{other}.weight"]
    return made


def in_dtype(array, dtype):
    """float32 values that bfloat16 holds exactly -> as they are stored in a dtype."""
    if dtype == "BF16":
        bits = array.view(np.uint32)
        assert not (bits & 0xFFFF).any()
        return (bits >> 16).astype(np.uint16)
    return array.astype(STORED[dtype])


@pytest.fixture
def folder(tmp_path):
    """A copy of the golden hf_chatglm that a test may damage."""
    return Path(shutil.copytree(GOLDEN / "hf_chatglm", tmp_path / "hf"))


# both ways


@pytest.mark.parametrize("layout", ["glm", "chatglm"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_golden_forward(tmp_path, layout, dtype, suffix):
    """Both folders hold the same values; hf_chatglm is bfloat16."""
    path = convert(f"{GOLDEN / f'hf_{layout}'}/", tmp_path / f"x{suffix}", "--dtype", dtype)
    found = containers.open_tensors(path)
    wanted = by_hand()
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert found[name].dtype == DTYPES[dtype]
        assert (
            found[name].array().tobytes()
            == in_dtype(np.ascontiguousarray(array), DTYPES[dtype]).tobytes()
        )
    about = json.loads(sidecar.path_beside(path).read_text())
    assert about["fingerprint"] == fingerprints.fingerprint(found)
    assert (about["dtype"], about["source_layout"]) == (DTYPES[dtype], layout)
    assert sorted(each.name for each in tmp_path.iterdir()) == [path.name, f"{path.name}.json"]


@pytest.mark.parametrize(("layout", "dtype"), [("glm", "fp32"), ("chatglm", "bf16")])
@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_golden_there_and_back_is_bit_exact(tmp_path, monkeypatch, layout, dtype, suffix):
    """In several shards, in pieces that end within q, k and v, and in a .ckpt of many records."""
    monkeypatch.setattr(tensors, "PIECE", 1000)
    monkeypatch.setattr(ckpt_records, "RECORD", 4096)
    monkeypatch.setattr(hf, "SHARD", 150_000)
    source = GOLDEN / f"hf_{layout}"
    path = convert(source, tmp_path / f"x{suffix}", "--dtype", dtype)
    back = convert(path, tmp_path / "back", "--reversed", "--hf_layout", layout, "--dtype", dtype)
    assert same(raw(source), raw(back))
    index = json.loads((back / "model.safetensors.index.json").read_text())
    shards = sorted(back.glob("*.safetensors"))
    assert [shard.name for shard in shards] == [
        f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)
    ]
    assert len(shards) > 2
    assert index["weight_map"] == {name: shard.name for shard in shards for name in raw(shard)}
    assert index["metadata"]["total_size"] == sum(array.nbytes for _, array in raw(back).values())
    for shard in shards:
        assert (
            len(raw(shard)) == 1 or sum(array.nbytes for _, array in raw(shard).values()) <= 150_000
        )
        content = shard.read_bytes()
        assert json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])[
            "__metadata__"
        ] == {"format": "pt"}


@pytest.mark.parametrize(
    ("source", "target", "dtype"), [("glm", "chatglm", "bf16"), ("chatglm", "glm", "fp32")]
)
def test_one_spelling_to_the_other(tmp_path, source, target, dtype):
    """Including rotary_pos_emb.inv_freq, which transformers' spelling lacks."""
    path = convert(GOLDEN / f"hf_{source}", tmp_path / "x.ckpt", "--dtype", "fp32")
    back = convert(path, tmp_path / "back", "--reversed", "--hf_layout", target, "--dtype", dtype)
    assert same(raw(GOLDEN / f"hf_{target}"), raw(back))
    assert model_config.parse_hf_config(
        json.loads((back / "config.json").read_text()), "x"
    ) == model_config.parse_hf_config(
        json.loads((GOLDEN / "hf_glm" / "config.json").read_text()), "x"
    )


@pytest.mark.parametrize("layout", ["glm", "chatglm"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_trained_checkpoint_there_and_back_is_bit_exact(tmp_path, layout, dtype):
    """Any bits but NaN and inf; the source's frequencies come back, whatever they were."""
    convert(GOLDEN / "hf_chatglm", tmp_path / "source.ckpt")
    numbers = sidecar.read_config_of(tmp_path / "source.ckpt").config
    choose = np.random.default_rng(0)

    def values(shape):
        array = (
            choose.integers(0, 1 << 8 * STORED[DTYPES[dtype]].itemsize, shape, np.uint64)
            .astype(f"u{STORED[DTYPES[dtype]].itemsize}")
            .view(STORED[DTYPES[dtype]])
        )
        return np.where(tensors.is_finite(array, DTYPES[dtype]), array, array.dtype.type(1))

    trained = {
        name: values(shape) for name, shape in weight_names.parameter_shapes(numbers).items()
    }
    containers.write_tensors(
        tmp_path / "trained.ckpt",
        [
            tensors.TensorItem.of_array(name, DTYPES[dtype], array)
            for name, array in trained.items()
        ],
    )
    shutil.copy(GOLDEN / "hf_chatglm" / "config.json", tmp_path / "config.json")
    back = convert(
        tmp_path / "trained.ckpt",
        tmp_path / "back",
        "--reversed",
        "--hf_layout",
        layout,
        "--dtype",
        dtype,
        "--config",
        str(tmp_path / "config.json"),
    )
    again = containers.open_tensors(convert(back, tmp_path / "again.safetensors", "--dtype", dtype))
    assert all(again[name].array().tobytes() == array.tobytes() for name, array in trained.items())


# config for the reverse conversion


def test_the_way_back_needs_numbers(tmp_path):
    path = convert(GOLDEN / "hf_glm", tmp_path / "x.ckpt")
    config = tmp_path / "config.json"
    other = json.loads((GOLDEN / "hf_chatglm" / "config.json").read_text())
    config.write_text(json.dumps({**other, "rope_ratio": 1}))
    with pytest.raises(
        UserError,
        match=r"config\.json: does not describe this checkpoint: rope_ratio is 1 there, 500 in",
    ):
        convert(path, tmp_path / "back", "--reversed", "--config", str(config))
    kept = sidecar.path_beside(path).rename(tmp_path / "kept.json")
    with pytest.raises(UserError, match=r"x\.ckpt: has no x\.ckpt\.json next to it; .*--config"):
        convert(path, tmp_path / "back", "--reversed")
    assert not (tmp_path / "back").exists()
    convert(path, tmp_path / "one", "--reversed", "--config", str(kept))
    convert(path, tmp_path / "two", "--reversed", "--config", str(config))
    theta = [
        json.loads((tmp_path / name / "config.json").read_text())["rope_theta"]
        for name in ("one", "two")
    ]
    assert theta == [5e6, 1e4]
    config.write_text(json.dumps({**other, "num_layers": 2}))
    with pytest.raises(
        UserError,
        match=r"do not have the shapes that its config implies\. not in the model: "
        r"transformer\.encoder\.layers\.2",
    ):
        convert(path, tmp_path / "back", "--reversed", "--config", str(config))


def test_an_old_sidecar_does_not_outlive_its_checkpoint(tmp_path, folder):
    path = convert(folder, tmp_path / "x.ckpt")
    shard = folder / "model-00001-of-00002.safetensors"
    content = bytearray(shard.read_bytes())
    content[-2:] = (0x7FC0).to_bytes(2, "little")  # NaN
    shard.write_bytes(content)
    before = path.read_bytes()
    with pytest.raises(UserError):
        convert(folder, path, "--overwrite")
    assert path.read_bytes() == before
    assert not sidecar.path_beside(path).exists()


# values


def set_last(folder, bits):
    """Set the last value of the first shard to other bits; return the tensor's name."""
    shard = folder / "model-00001-of-00002.safetensors"
    content = bytearray(shard.read_bytes())
    content[-2:] = bits.to_bytes(2, "little")
    shard.write_bytes(content)
    return list(raw(shard))[-1]


@pytest.mark.parametrize(
    ("bits", "dtype", "said"),
    [
        (0x7FC0, "bf16", "holds NaN or inf"),
        (0xFF80, "fp32", "holds NaN or inf"),
        (0x7F80, "fp16", "holds NaN or inf"),
        (0x4780, "fp16", "holds 65536, beyond the range of the output .*65504"),
        (0xC780, "fp16", "65536, beyond"),
    ],
)
def test_bad_values_name_their_tensor(tmp_path, folder, bits, dtype, said):
    """0x4780 is 2**16 in bfloat16; float16 ends at 65504."""
    name = set_last(folder, bits)
    with pytest.raises(UserError, match=said) as error:
        convert(folder, tmp_path / "out" / "x.ckpt", "--dtype", dtype)
    assert name in str(error.value)
    assert not (tmp_path / "out").exists()


def test_not_finite_may_pass_but_overflow_may_not(tmp_path, folder):
    name = set_last(folder, 0x7F80)
    path = convert(folder, tmp_path / "x.ckpt", "--dtype", "fp16", "--allow_nonfinite")
    assert (
        sum(np.isinf(tensor.float32()).sum() for tensor in containers.open_tensors(path).values())
        == 1
    )
    set_last(folder, 0x4780)
    with pytest.raises(UserError, match=f"{name} holds 65536"):
        convert(folder, tmp_path / "x.ckpt", "--dtype", "fp16", "--allow_nonfinite")


# bad input


def edit_json(path, change):
    content = json.loads(path.read_text())
    content.pop("seal", None)
    change(content)
    path.write_text(json.dumps(content))


def edit_header(path, change):
    """Change the header of a .safetensors, and only that."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[start:])


INDEX, FIRST, SECOND = (
    hf.INDEX,
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
)
EMBEDDING = "transformer.embedding.word_embeddings.weight"
NORM = "transformer.encoder.layers.0.input_layernorm.weight"


def twice(folder):
    shutil.copy(folder / FIRST, folder / "extra.safetensors")
    (folder / INDEX).unlink()


def twice_in_the_index(folder):
    text = (folder / INDEX).read_text()
    (folder / INDEX).write_text(
        text.replace('"weight_map": {', f'"weight_map": {{"{NORM}": "{SECOND}", ', 1)
    )


def pickles(folder):
    for path in folder.glob("model*"):
        path.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"x")


def swap_shape(folder):
    edit_header(
        folder / FIRST,
        lambda header: header[EMBEDDING].update(shape=header[EMBEDDING]["shape"][::-1]),
    )


def rename(folder):
    edit_header(folder / FIRST, lambda header: header.update({"other": header.pop(NORM)}))
    (folder / INDEX).unlink()


def drop_second(folder):
    (folder / SECOND).unlink()
    (folder / INDEX).unlink()


BAD = {
    "no folder": (lambda folder: shutil.rmtree(folder), "no such folder"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json: no such file"),
    "config no json": (
        lambda folder: (folder / "config.json").write_text("{"),
        "config.json: not JSON",
    ),
    "tied": (
        lambda folder: edit_json(
            folder / "config.json", lambda c: c.update(tie_word_embeddings=True)
        ),
        "is True",
    ),
    "layers": (
        lambda folder: edit_json(folder / "config.json", lambda c: c.update(num_layers=4)),
        "missing: transformer.encoder.layers.3",
    ),
    "dtype": (
        lambda folder: edit_json(folder / "config.json", lambda c: c.update(torch_dtype="float8")),
        "'float8'",
    ),
    "two dtypes": (
        lambda folder: edit_json(folder / "config.json", lambda c: c.update(dtype="float16")),
        "torch_dtype 'bfloat16', dtype 'float16'",
    ),
    "missing shard": (
        lambda folder: (folder / SECOND).unlink(),
        f"lists {SECOND}, not in the folder",
    ),
    "index list": (lambda folder: (folder / INDEX).write_text("[]"), "got list"),
    "index empty": (lambda folder: (folder / INDEX).write_text("{}"), "has no weight_map"),
    "index leads out": (
        lambda folder: edit_json(folder / INDEX, lambda c: c["weight_map"].update({NORM: "../x"})),
        "has no weight_map of file names",
    ),
    "index wrong": (
        lambda folder: edit_json(folder / INDEX, lambda c: c["weight_map"].update({NORM: SECOND})),
        f"lists {NORM} in {SECOND}",
    ),
    "index twice": (twice_in_the_index, f"'{NORM}' appears twice"),
    "truncated": (
        lambda folder: os.truncate(folder / FIRST, 200_000),
        f"{FIRST}: incomplete or damaged safetensors file",
    ),
    "empty": (lambda folder: os.truncate(folder / FIRST, 0), f"{FIRST}: is empty"),
    "no safetensors": (
        lambda folder: (folder / FIRST).write_bytes(b"\0" * 300),
        "incomplete or damaged safetensors file",
    ),
    "twice": (twice, "is in both"),
    "pickles": (pickles, "pickles, which can run code"),
    "renamed": (rename, "not in the model: other"),
    "shape": (swap_shape, f"of another shape: {EMBEDDING}"),
    "tensors missing": (drop_second, "missing: transformer."),
    "kind": (
        lambda folder: edit_header(folder / FIRST, lambda h: h[NORM].update(dtype="I16")),
        f"{NORM} has dtype I16",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, folder, case):
    damage, said = BAD[case]
    damage(folder)
    with pytest.raises(UserError) as error:
        convert(folder, tmp_path / "out" / "x.ckpt")
    assert said in str(error.value)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--output_path", "x.bin"], "must end in .ckpt or .safetensors"),
        (["--hf_layout", "glm", "--output_path", "x.ckpt"], "--reversed"),
        (["--reversed", "--output_path", "x"], "is a folder"),
        (["--output_path", f"{__file__}/x.ckpt"], "cannot be written"),
        (["--input_path", "no.ckpt", "--reversed", "--output_path", "x"], "no.ckpt: no such file"),
        (["--input_path", __file__, "--output_path", "x.ckpt"], "--reversed takes a file"),
    ],
)
def test_wrong_use_is_one_line(tmp_path, monkeypatch, options, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=said) as error:
        convert_weight.main(["--model", "glm-n", "--input_path", str(GOLDEN / "hf_glm"), *options])
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_something_is_not_touched(tmp_path):
    path = convert(GOLDEN / "hf_glm", tmp_path / "x.ckpt")
    (tmp_path / "back").mkdir()
    (tmp_path / "back" / "kept").write_text("x")
    with pytest.raises(UserError, match="back: exists"):
        convert(path, tmp_path / "back", "--reversed")
    assert [each.name for each in (tmp_path / "back").iterdir()] == ["kept"]


def test_a_full_disk_is_seen_before_writing(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match=r"\d\.\d\d [MK]B needed"):
        convert(GOLDEN / "hf_glm", tmp_path / "x.ckpt")
    assert list(tmp_path.iterdir()) == []


def test_the_command_ends_with_status_2_and_one_line(tmp_path):
    result = run_script(
        ROOT / "convert_weight.py",
        "--model",
        "glm-n",
        "--input_path",
        tmp_path,
        "--output_path",
        tmp_path / "x.ckpt",
    )
    assert_one_error(result, tmp_path / "config.json")


def test_2000_damaged_shards_never_give_other_values(tmp_path):
    """A one-layer model. Damage hits the length and the header of its only shard: dtypes, shapes,
    offsets, names. Whatever can still be read must equal the original.
    """
    numbers = model_config.ModelConfig(1, 4, 4, 4, 2, 1, 2, 1e-5, 1, (1,), 1)
    source, choose = tmp_path / "hf", random.Random(0)
    values = np.random.default_rng(0)
    hf.write_hf_folder(
        source,
        numbers,
        "glm",
        "F32",
        [
            tensors.TensorItem(
                name, "F32", shape, lambda shape=shape: values.normal(size=shape).astype(np.float32)
            )
            for name, shape in weight_names.hf_shapes(numbers, "glm").items()
        ],
    )
    (source / hf.INDEX).unlink()
    (shard,) = source.glob("*.safetensors")
    whole = shard.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    wanted = {
        name: tensor.array().tobytes() for name, tensor in hf.read_hf_folder(source).tensors.items()
    }
    refused, harmless = 0, 0
    for _ in range(2000):
        content = bytearray(whole)
        for _ in range(choose.choice((1, 1, 2, 4))):
            place, kind = choose.randrange(start), choose.randrange(5)
            if kind < 2:
                content[place] = (
                    choose.choice(b'0123456789{}[],:"FIB\0\xff') if kind else choose.randrange(256)
                )
            elif kind == 2:
                content[place], content[place - 1] = content[place - 1], content[place]
            else:
                content[place : place + kind - 3] = bytes([content[place]])
        shard.unlink()
        shard.write_bytes(content)
        try:
            found = hf.read_hf_folder(source).tensors
        except UserError as error:
            refused += "\n" not in str(error)
            continue
        assert {name: tensor.array().tobytes() for name, tensor in found.items()} == wanted
        harmless += 1
    assert refused + harmless == 2000
    assert refused > 1500


# kills and memory


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A folder of 430 MB that takes no disk space: after its header, the shard is a sparse file of
    zeros.
    """
    numbers = model_config.ModelConfig(4, 65536, 1024, 3072, 8, 2, 128, 1e-5, 1, (1,), 1)
    folder, header, offset = tmp_path_factory.mktemp("large") / "hf", {}, 0
    folder.mkdir()
    for name, shape in weight_names.hf_shapes(numbers, "glm").items():
        end = offset + 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(folder / "model.safetensors", 8 + len(text) + offset)
    (folder / "config.json").write_text(json.dumps(hf.config_json(numbers, "glm", "BF16")))
    return folder


@pytest.mark.parametrize("kill", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_kill_in_the_middle_leaves_nothing_under_the_name(tmp_path, large, kill):
    """SIGKILL leaves hidden files, which the next conversion removes."""
    target = tmp_path / "x.safetensors"
    command = [
        "--model",
        "glm-n",
        "--input_path",
        str(large),
        "--output_path",
        str(target),
        "--dtype",
        "fp32",
    ]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "convert_weight.py"), *command],
        text=True,
        stderr=subprocess.PIPE,
    )
    while process.poll() is None and not any(
        path.stat().st_size for path in tmp_path.glob("*.tmp")
    ):
        time.sleep(0.001)
    process.send_signal(kill)
    _, errors = process.communicate(timeout=60)
    left = list(tmp_path.iterdir())
    if kill == signal.SIGKILL:
        assert process.returncode == -kill
        assert {path.suffix for path in left} == {".tmp", ".lock"}
    else:
        assert process.returncode == 2, errors
        assert errors.splitlines() == [f"error: {target}: stopped; nothing was written there"]
        assert left == []
    convert(GOLDEN / "hf_glm", target)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "x.safetensors",
        "x.safetensors.json",
    ]


CHILD = """
import sys
sys.path.insert(0, sys.argv[1])
import convert_weight
memory = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
before = memory()
convert_weight.main(sys.argv[2:])
print(memory() - before)
"""


def test_memory_does_not_grow_with_the_model(tmp_path, large):
    """430 MB in one shard to 430 MB, and back; the embedding alone has 134 MB."""
    for target, options in (
        ("x.ckpt", ["--input_path", large]),
        ("back", ["--input_path", tmp_path / "x.ckpt", "--reversed"]),
    ):
        result = subprocess.run(
            [
                sys.executable,
                "-c",
                CHILD,
                ROOT,
                "--model",
                "glm-n",
                "--output_path",
                tmp_path / target,
                *options,
            ],
            capture_output=True,
            text=True,
            check=True,
        )
        assert int(result.stdout.splitlines()[-1]) < 100_000  # kilobytes


def test_progress_counts_bytes(tmp_path, monkeypatch):
    seen = []

    class Bar:
        total = None

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def refresh(self):
            seen.append(self.total)

        def update(self, count):
            seen.append(count)

    monkeypatch.setattr(cli, "progress_bar", lambda *_, **__: Bar())
    path = convert(GOLDEN / "hf_chatglm", tmp_path / "x.ckpt")
    size = sum(tensor.nbytes for tensor in containers.open_tensors(path).values())
    assert seen[0] == size == sum(seen[1:])
