"""Files of strangers: each ends in one line and in bounded time, and runs or writes nothing."""

import base64
import itertools
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
from conftest import EXAMPLE, ROOT, assert_one_error, run_script

from mindrlhf import cli, config, schema
from mindrlhf.checkpoints import ckpt_records, containers, tensors
from mindrlhf.cli import UserError
from mindrlhf.data import sources
from mindrlhf.models.glm4.tokenizer import Glm4Tokenizer

BASE = f"base_config: {EXAMPLE / 'finetune_glm4_tiny.yaml'}\n"
SECONDS = 30  # of processor time for each file; the longest takes 5


@pytest.fixture(autouse=True)
def in_time():
    start = time.process_time()
    yield
    assert time.process_time() - start < SECONDS


def refused(function, *arguments, **options):
    """The message of the UserError that a call ends in; it has one line of bounded length."""
    with pytest.raises(UserError) as error:
        function(*arguments, **options)
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 4000
    return text


# YAML


def bomb(levels=30, width=9):
    """width ** levels values, from a few lines of aliases."""
    lines = ["a0: &a0 [x, x]"]
    for level in range(1, levels):
        aliases = ", ".join([f"*a{level - 1}"] * width)
        lines.append(f"a{level}: &a{level} [{aliases}]")
    return "\n".join(lines)


def merge_bomb(levels=40):
    lines = ["a0: &a0 {x: 1}"]
    lines += [f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}" for n in range(1, levels)]
    return "\n".join(lines)


YAMLS = {
    "alias bomb": (bomb(), "more than 10000 values"),
    "bomb of mappings": (bomb().replace("[", "{a: [").replace("]", "]}"), "more than 10000 values"),
    "bomb of merges": (merge_bomb(), "more than 10000 values"),
    "list in itself": ("a: &a [1, *a]", "an alias inside its own anchor"),
    "mapping in itself": ("dpo: &a\n  beta: *a", ":3: not YAML (an alias inside its own anchor)"),
    "key that is a list": ("? [a, b]\n: 1", "a key must be a word"),
    "key that is a mapping": ("{{a: 1}: 2}", "a key must be a word"),
    "key that is a number": ("1: 2", "a key must be a word"),
    "key that is a date": ("2024-01-01: 2", "2024-01-01: unknown key"),
    "key that is nothing": ("~: 2", "a key must be a word"),
    "sequence tagged as a key": ("? !!str [a]\n: 1", "not YAML"),
    "date": ("seed: 2024-01-01", "seed: expected an integer from 0"),
    "impossible date": ("seed: 2024-13-45", "seed: expected an integer from 0"),
    "tagged date": ("seed: !!timestamp 2024-13-45", "the tag 'tag:yaml.org,2002:timestamp'"),
    "tagged integer": ("seed: !!int x", "'x' does not fit the tag tag:yaml.org,2002:int"),
    "tagged nothing": ("seed: !!int ''", "does not fit the tag"),
    "tagged boolean": ("seed: !!bool maybe", "does not fit the tag"),
    "tagged mapping": ("dpo: !!map [a]", "not YAML"),
    "set": ("dpo: !!set {a}", "is not supported"),
    "code": ("dpo: !!python/object/apply:os.system ['touch evil']", "is not supported"),
    "long integer": (f"seed: {'9' * 500_000}", "a number of more than 100 digits"),
    "large integer": (f"runner_config: {{epochs: {10**90}}}", "expected an integer from 1 to"),
    "very large number": (f"lr_schedule: {{learning_rate: {'9' * 90}e999}}", "a finite number"),
    "infinite weight": ("dpo: {sft_weight: .inf}", "dpo.sft_weight: expected a finite number"),
    "no number": ("lr_schedule: {learning_rate: .nan}", "expected a finite number above 0"),
    "infinite list item": ("optimizer: {betas: [0.9, -.inf]}", "optimizer.betas: expected a list"),
    "deep lists": ("dpo: " + "[" * 100_000, "more than 20 levels"),
    "deep mappings": ("dpo: " + "{a: " * 100_000, "more than 20 levels"),
    "deep lines": ("\n".join(" " * n + "a:" for n in range(1000)), "more than 20 levels"),
    "wide": ("dpo: [" + "1, " * 50_000 + "]", "more than 10000 values"),
    "large": ("# " + "x" * (2 << 20), "has more than 1 MB"),
    "NUL": ("seed: \0", "not YAML"),
    "many unknown keys": ("\n".join(f"seed{n}: 1" for n in range(4000)), "and more"),
    "long unknown key": (f"? {'k' * 200_000}\n: 1", "unknown key"),
    "long value": (f"dpo: {'v' * 200_000}", "dpo: expected a section, got 'vvv"),
    "section with an override": ("train_dataset: 3", "train_dataset: expected a section, got 3"),
    "folder in the prefix": (
        "callbacks: [{type: DPOCheckpointMonitor, prefix: ../../evil}]",
        "DPOCheckpointMonitor.prefix: expected a plain name",
    ),
    "absolute prefix": ("callbacks: [{type: DPOCheckpointMonitor, prefix: /evil}]", "plain name"),
    "hidden prefix": ("callbacks: [{type: DPOCheckpointMonitor, prefix: .x}]", "plain name"),
    "long prefix": (
        f"callbacks: [{{type: DPOCheckpointMonitor, prefix: {'x' * 250}}}]",
        "a plain name of at most 64",
    ),
    "folder in model_name": ("trainer: {model_name: ../evil}", "trainer.model_name: expected a"),
    "callback without a type": ("callbacks: [{}]", "entries of type DPOMonitor"),
    "callback whose type is a list": ("callbacks: [{type: [a]}]", "entries of type DPOMonitor"),
    "no callbacks": ("callbacks: []", "training needs an entry of type DPOMonitor"),
    "no DPOCheckpointMonitor": (
        "callbacks: [{type: DPOMonitor}]",
        "callbacks: training needs an entry of type DPOCheckpointMonitor",
    ),
    "DPOCheckpointMonitor without keys": (
        "callbacks: [{type: DPOMonitor}, {type: DPOCheckpointMonitor, prefix: x}]",
        "DPOCheckpointMonitor needs keep_checkpoint_max, save_checkpoint_steps",
    ),
    "DPOMonitor twice": (
        "callbacks: [{type: DPOMonitor}, {type: DPOMonitor}]",
        "2 entries of type DPOMonitor: keep one",
    ),
    "control characters in a path": (
        'output_dir: "\\e[31m"',
        "output_dir: expected a string without control",
    ),
    "surrogate in a path": ('output_dir: "\\ud800"', "output_dir: expected a string without"),
}


@pytest.mark.parametrize("case", YAMLS)
def test_yaml(tmp_path, monkeypatch, case):
    text, part = YAMLS[case]
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "hostile.yaml"
    path.write_text(text if case.startswith("key that is a mapping") else BASE + text)
    overrides = {"train_dataset.data_loader.dataset_dir": "x.mindrecord"}
    message = refused(config.load_settings, path, run_mode=schema.RUN_MODES, overrides=overrides)
    assert message.startswith(f"{path}:")
    assert part in message
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("name", ["x" * 250 + ".yaml", "x" * 5000, "a/" * 3000, "\0", "\ud800"])
def test_impossible_names(tmp_path, name):
    path = tmp_path / "hostile.yaml"
    escaped = name.replace("\0", "\\0").replace("\ud800", "\\ud800")
    path.write_text(f'base_config: "{escaped}"')
    assert "give the path of" in refused(config.read_yaml, path)
    assert "give the path of" in refused(config.read_yaml, name)


def test_ordinary_aliases_and_dates_are_taken(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        BASE + "output_dir: 2024-01-01\n"
        "eval_dataset: &data {data_loader: &loader {type: MindDataset, shuffle: False}}\n"
        "train_dataset: {data_loader: {<<: *loader, dataset_dir: x}}\n"
    )
    settings = config.load_settings(path, run_mode=schema.RUN_MODES)
    assert settings["output_dir"] == "2024-01-01"
    assert settings["train_dataset"]["data_loader"] == {
        "type": "MindDataset",
        "shuffle": False,
        "dataset_dir": "x",
    }


# the terminal


def test_errors_show_control_characters_of_values_and_names(tmp_path):
    evil = tmp_path / "\x1b[2J\x9b31m\r\n\u202eevil"
    evil.mkdir()
    (evil / "x.yaml").write_text('"\\e]0;title\\a": 1')
    for arguments in (["--config", evil / "x.yaml"], ["--config", evil], ["\x1b[31m"]):
        result = run_script(EXAMPLE / "run_dpo.py", *arguments)
        assert_one_error(result)
        assert result.stderr.strip("\n").isprintable()
    result = run_script(EXAMPLE / "run_dpo.py", "--config", evil / "x.yaml")
    assert r"\x1b[2J\x9b31m\r\n\u202eevil/x.yaml: " in result.stderr


@pytest.mark.parametrize(
    ("code", "part"),
    [
        ("open('x' * 300, 'w')", "File name too long"),
        ("raise MemoryError", "out of memory"),
        ("import numpy; numpy.empty(1 << 50)", "out of memory (Unable to allocate"),
        (
            "try:\n        raise MemoryError('of MindFormers')\n"
            "    except Exception as error:\n        raise TypeError('missing dtype')",
            "out of memory (of MindFormers)",
        ),
        (
            "raise RuntimeError('\\n----\\n- Memory pool: Memory isn\\'t enough\\n---- C++')",
            "out of memory (Memory pool: Memory isn't enough)",
        ),
        ("open('/dev/full', 'w', buffering=1).write('x' + chr(10))", "No space left on device"),
    ],
)
def test_what_the_system_refuses_is_one_line(tmp_path, code, part):
    script = tmp_path / "script.py"
    script.write_text(f"def main():\n    {code}\nfrom mindrlhf import cli\ncli.run_command(main)\n")
    result = subprocess.run(
        [sys.executable, script],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
    )
    assert_one_error(result, part)


def test_faults_of_the_program_keep_their_traceback():
    def missing():
        open("/nonexistent/file")

    with pytest.raises(FileNotFoundError):
        cli.run_command(missing)


# tokenizers


def tokenizer_lines(count=300):
    """A vocabulary with all bytes."""
    found = [bytes([value]) for value in range(256)]
    found += [b"%d." % number for number in range(count - 256)]
    return [b"%s %d" % (base64.b64encode(token), rank) for rank, token in enumerate(found)]


def test_tokenizers(tmp_path):
    path, good = tmp_path / "tokenizer.model", tokenizer_lines()
    cases = [
        (good[:100], "156 of the 256 bytes are not tokens"),
        ([*good, good[7].split()[0] + b" 300"], ":301: the token of line 8 again"),
        ([*good[:-1], good[-1] + b"0" * 9999], ":300: not a line"),
        ([*good, b""], ":301: not a line"),
        ([*good, b"\xff\xfe 300"], ":301: not a line"),
        ([b"x" * (65 << 20)], "has more than 64 MB"),
    ]
    for lines, part in cases:
        path.write_bytes(b"\n".join(lines) + b"\n")
        message = refused(Glm4Tokenizer, path)
        assert part in message
        assert "that came with the model" in message
    path.write_bytes(b"\n".join(good) + b"\n")
    assert Glm4Tokenizer(path).size > 300


@pytest.mark.parametrize("given", [[], ["--vocab_file", ""]])
def test_predict_without_a_tokenizer(given):
    import run_dpo

    arguments = ["--config", str(EXAMPLE / "predict_glm4_tiny.yaml"), "--predict_data", "Hello"]
    assert "no tokenizer given; --vocab_file" in refused(run_dpo.main, [*arguments, *given])


# checkpoints


def record(name, dims, content, kind=b"Float32"):
    """One record of a .ckpt."""

    def field(number, value):
        return bytes([number << 3 | 2]) + ckpt_records.encode(len(value)) + value

    shape = b"".join(b"\x08" + ckpt_records.encode(size) for size in dims)
    return field(1, field(1, name) + field(2, shape + field(2, kind) + field(3, content)))


def test_a_tensor_of_200_000_records(tmp_path):
    path = tmp_path / "x.ckpt"
    path.write_bytes(record(b"w", [200_000], b"abcd") * 200_000)
    (tensor,) = containers.open_tensors(path).values()
    assert tensor.array().view(np.uint8).tobytes() == b"abcd" * 200_000
    path.write_bytes(record(b"w", [1], b"") * 200_000 + record(b"w", [1], b"abcd"))
    (tensor,) = containers.open_tensors(path).values()
    assert len(tensor.spans) == 2


@pytest.mark.parametrize("size", [0, 1, 2**63])
def test_a_tensor_of_three_million_dimensions(tmp_path, size):
    path = tmp_path / "x.ckpt"
    path.write_bytes(record(b"w", itertools.repeat(size, 3_000_000), b"abcd"))
    assert "w has more than 32 dimensions" in refused(containers.open_tensors, path)


def test_a_safetensors_of_a_million_dimensions(tmp_path):
    path = tmp_path / "x.safetensors"
    shape = ",".join(["1"] * 1_000_000)
    header = f'{{"w": {{"dtype": "F32", "shape": [{shape}], "data_offsets": [0, 4]}}}}'.encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"abcd")
    assert "w has more than 32 dimensions" in refused(containers.open_tensors, path)


def test_200_000_tensors(tmp_path):
    path = tmp_path / "x.ckpt"
    path.write_bytes(b"".join(record(b"w%d" % number, [1], b"abcd") for number in range(200_000)))
    assert len(containers.open_tensors(path)) == 200_000


def test_tensors_of_32_dimensions_are_read(tmp_path):
    array = np.zeros([1] * 32, np.float32)
    for suffix in containers.SUFFIXES:
        path = tmp_path / f"x{suffix}"
        containers.write_tensors(path, [tensors.TensorItem.of_array("w", "F32", array)])
        assert containers.open_tensors(path)["w"].array().shape == array.shape


# pairs


def test_a_gz_of_one_endless_line(tmp_path, monkeypatch):
    """100 KB of .gz become 100 MB of spaces; reading stops at 64 MB."""
    path = tmp_path / "x.jsonl.gz"
    block = zlib.compressobj(wbits=31)
    with open(path, "wb") as file:
        for _ in range(100):
            file.write(block.compress(b" " * (1 << 20)))
        file.write(block.flush())
    message = refused(lambda: list(sources.read_file_rows(path)))
    assert message.endswith("x.jsonl.gz:1: has more than 64 MB; each line must be one JSON object")


def test_an_array_beyond_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "LARGEST_ARRAY", 100)
    path = tmp_path / "x.json"
    path.write_text("[" + " " * 99 + "]")
    assert "an array of more than" in refused(lambda: list(sources.read_file_rows(path)))
    path.write_text("[" + " " * 98 + "]")
    assert list(sources.read_file_rows(path)) == []


def test_what_commands_print_has_no_control_characters(capsys):
    cli.say("a\x1b[31m\nb\x07", "中文 ✓")
    assert capsys.readouterr().out == "a\\x1b[31m\nb\\x07\n中文 ✓\n"
