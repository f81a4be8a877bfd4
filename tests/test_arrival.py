"""What users type and have: folders as checkpoints, unquoted words, missing packages, prompts."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import EXAMPLE, GOLDEN, ROOT, assert_one_error, run_script

from mindrlhf import config
from mindrlhf.checkpoints import containers
from mindrlhf.checkpoints.tensors import TensorItem
from mindrlhf.cli import UserError
from mindrlhf.models.glm4 import hf, load, sidecar

# checkpoints


def folder_of(tmp_path, *names):
    for name in names:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    return str(tmp_path)


@pytest.mark.parametrize(
    ("names", "part"),
    [
        (
            ("config.json", "model.safetensors"),
            "is a Hugging Face folder; convert it first: python",
        ),
        (("adapter_config.json", "adapter_model.safetensors"), "holds adapters of PEFT"),
        (("checkpoint_network/rank_0/x.ckpt", "run.json"), "give {}/checkpoint_network, or merge"),
        (("a.ckpt", "b.ckpt"), "is a folder that holds a.ckpt, b.ckpt; give a file"),
        (("notes.txt",), "holds neither a checkpoint nor rank_0"),
    ],
)
def test_a_folder_of_another_kind_is_told_what_was_meant(tmp_path, names, part):
    path = folder_of(tmp_path, *names)
    with pytest.raises(UserError) as error:
        config.find_checkpoint(path)
    assert part.format(path) in str(error.value)
    assert str(error.value).startswith(path)


def test_the_folder_of_a_merged_file_and_shards_are_taken(tmp_path):
    merged = folder_of(tmp_path / "merged", "merged.ckpt", "merged.ckpt.json")
    assert config.find_checkpoint(merged) == str(tmp_path / "merged/merged.ckpt")
    shards = folder_of(tmp_path / "shards", "rank_0/x.ckpt")
    assert config.find_checkpoint(shards) == shards
    assert config.find_checkpoint("no/such.ckpt") == "no/such.ckpt"


def test_other_options_take_the_folder_of_a_merged_file_too(golden, tmp_path):
    """--src_checkpoint, --base_checkpoint and --adapter_checkpoint."""
    (tmp_path / "merged").mkdir()
    os.link(golden.checkpoint, tmp_path / "merged/merged.ckpt")
    opened = load.open_checkpoint(tmp_path / "merged")
    assert opened.files == [tmp_path / "merged/merged.ckpt"]
    with pytest.raises(UserError, match="is a Hugging Face folder; convert it first"):
        load.open_checkpoint(GOLDEN / "hf_glm")


def write_weights(path, *names):
    path.parent.mkdir(parents=True, exist_ok=True)
    zeros = np.zeros(2, np.float32)
    containers.write_tensors(path, [TensorItem.of_array(name, "F32", zeros) for name in names])
    return path


@pytest.mark.parametrize(
    ("name", "part"),
    [
        (
            "transformer.encoder.layers.0.mlp.dense_4h_to_h.mindpet_delta_lora_a",
            "holds LoRA adapters, not weights: predict with them as --adapter_checkpoint",
        ),
        ("model.embed_tokens.weight", "holds no GLM-4 with MindFormers' names"),
        ("transformer.embedding.word_embeddings.weight", "convert the Hugging Face folder"),
    ],
)
@pytest.mark.parametrize("place", ["x.ckpt", "x.safetensors", "rank_0/x.ckpt"])
def test_adapters_and_hugging_face_names_are_no_weights(golden, tmp_path, name, part, place):
    write_weights(tmp_path / place, name)
    given = tmp_path if place.startswith("rank_0") else tmp_path / place
    settings = config.load_settings(golden.finetune, run_mode="finetune")
    with pytest.raises(UserError) as error:
        sidecar.require_same_model(given, settings)
    assert part in str(error.value)


def test_auto_trans_ckpt_says_what_it_does(golden, tmp_path, capsys):
    path = tmp_path / "plan.yaml"
    plan = "parallel: {parallel_mode: 1}\nparallel_config: {data_parallel: 1, model_parallel: 2}\n"
    path.write_text(f"base_config: {golden.finetune}\n{plan}")
    for given, lines in ((False, 1), (True, 0)):
        config.load_settings(
            path,
            run_mode="finetune",
            overrides={"load_checkpoint": str(golden.checkpoint), "auto_trans_ckpt": given},
        )
        out = capsys.readouterr().out
        assert out.count("each card reads its own part of it all the same") == lines


# commands as they are typed


def test_unquoted_words_and_the_folder_of_the_merged_file(golden, tmp_path, expected):
    """As MindRLHF's tutorial types it: several words without quotes, merged_dir as checkpoint."""
    text = json.loads(golden.pairs.read_text().splitlines()[0])["prompt"]
    merged = tmp_path / "merged"
    merged.mkdir()
    for suffix in ("", ".json"):
        os.link(f"{golden.checkpoint}{suffix}", merged / f"merged.ckpt{suffix}")
    answers = []
    for words in ([f"{text} {text}"], [text, text]):
        result = run_script(
            EXAMPLE / "run_dpo.py",
            *("--config", golden.predict, "--load_checkpoint", merged, "--auto_trans_ckpt"),
            *("False", "--vocab_file", golden.tokenizer, "--predict_data", *words),
        )
        assert result.returncode == 0, result.stderr
        assert result.stderr == f"{merged}: is a folder; reading {merged}/merged.ckpt\n"
        answers.append(result.stdout)
    assert answers[0] == answers[1] != ""


@pytest.mark.parametrize("name", ["convert_weight", "transform_checkpoint"])
def test_commands_of_the_top_folder_run_in_the_example_folder(name):
    result = run_script(f"{name}.py", "--help", cwd=EXAMPLE)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"usage: {name}.py ")
    assert_one_error(run_script(f"{name}.py", "--nothing", cwd=EXAMPLE), "are required")


@pytest.mark.parametrize("document", ["README.md", "README_CN.md"])
def test_the_tutorial_says_where_the_launcher_is(document):
    assert "`../../../scripts/msrun_launcher.sh`" in (EXAMPLE / document).read_text()


# what is missing


def run_code(tmp_path, code, *options):
    script = tmp_path / "script.py"
    script.write_text(code)
    return subprocess.run(
        [sys.executable, *options, script],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT)},
    )


@pytest.mark.parametrize("command", ["convert_weight.py", "examples/glm4_dpo/run_dpo.py"])
def test_without_the_environment_each_command_says_so_in_one_line(command):
    """-S leaves out site-packages, as a Python without the packages does."""
    result = subprocess.run(
        [sys.executable, "-S", ROOT / command, "--help"], capture_output=True, text=True
    )
    assert_one_error(result, "the Python package", "source .venv/bin/activate")


@pytest.mark.parametrize(
    ("code", "part"),
    [
        ("import yaml_of_nobody", "the Python package yaml_of_nobody is missing"),
        ("import mindrlhf.nothing", "mindrlhf.nothing: is no module of this project"),
        ("import tbe", "source set_env.sh of CANN first"),
        (
            "raise RuntimeError('x\\n- Memory not enough:\\nDevice(id:0) memory isn\\'t enough and "
            "alloc failed, kernel name: MatMul')",
            "out of memory (Memory not enough:); lower seq_length",
        ),
        ("raise MemoryError('std::bad_alloc')", "out of memory (std::bad_alloc); lower"),
    ],
)
def test_missing_packages_and_memory_are_one_line(tmp_path, code, part):
    text = f"from mindrlhf import cli\ndef main():\n    {code}\ncli.run_command(main)\n"
    assert_one_error(run_code(tmp_path, text), part)


def test_other_errors_of_the_program_keep_their_traceback(tmp_path):
    text = "from mindrlhf import cli\ndef main():\n    raise RuntimeError('a fault')\n"
    result = run_code(tmp_path, text + "cli.run_command(main)\n")
    assert result.returncode == 1
    assert "Traceback" in result.stderr


@pytest.mark.parametrize("module", ["mindrlhf.config", "mindrlhf.plan", "mindrlhf.data.show"])
def test_modules_that_are_commands_name_themselves_so(module):
    result = subprocess.run(
        [sys.executable, "-m", module, "--help"], capture_output=True, text=True, cwd=ROOT
    )
    assert result.stdout.startswith(f"usage: python -m {module} ")


@pytest.mark.parametrize("script", ["msrun_launcher.sh", "rehearse.sh"])
@pytest.mark.parametrize("option", ["-h", "--help"])
def test_scripts_have_help_with_defaults_and_an_example(script, option):
    command = ["bash", str(ROOT / "scripts" / script), option]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    for part in ("usage: ", "(default: ", "example: bash "):
        assert part in result.stdout


# the tokenizer's files


@pytest.mark.parametrize("named", [None, "folder", "file"])
def test_the_way_back_takes_the_tokenizers_files_along(golden, tmp_path, capsys, named):
    import convert_weight

    source, other = tmp_path / "x.ckpt", tmp_path / "other"
    other.mkdir()
    for suffix in ("", ".json"):
        os.link(f"{golden.checkpoint}{suffix}", f"{source}{suffix}")
    place = other if named else tmp_path
    for name, text in (("tokenizer.model", golden.tokenizer.read_bytes()), ("notes.md", b"x")):
        (place / name).write_bytes(text)
    (place / "tokenizer_config.json").write_text("{}")
    more = {None: [], "folder": [str(other)], "file": [str(other / "tokenizer.model")]}[named]
    where = ["--input_path", str(source), "--output_path", str(tmp_path / "back")]
    options = ["--tokenizer", *more] if more else []
    convert_weight.main(["--model", "glm-n", "--reversed", *where, "--dtype", "fp32", *options])
    copied = ["tokenizer.model"] + (["tokenizer_config.json"] if named != "file" else [])
    assert f"with {', '.join(copied)} of {place}" in capsys.readouterr().out
    back = {path.name for path in (tmp_path / "back").iterdir()}
    assert back & {*hf.TOKENIZER, "notes.md"} == set(copied)
    assert (tmp_path / "back/tokenizer.model").read_bytes() == golden.tokenizer.read_bytes()


def test_a_tokenizer_that_is_not_there_is_an_error(golden, tmp_path):
    import convert_weight

    where = ["--input_path", str(golden.checkpoint), "--output_path", str(tmp_path / "back")]
    for path in (tmp_path, tmp_path / "none.model"):
        with pytest.raises(UserError, match="holds no tokenizer; give the model's"):
            convert_weight.main(
                ["--model", "glm-n", "--reversed", *where, "--tokenizer", str(path)]
            )
    with pytest.raises(UserError, match="--tokenizer and --card need --reversed"):
        convert_weight.main(["--model", "glm-n", *where, "--tokenizer", str(golden.tokenizer)])


# real prompts


@pytest.fixture(scope="module")
def prompts():
    """All prompts of the file: its last line, the 664th, has no line break."""
    text = (ROOT / "tests/golden/cvalues_prompts.jsonl").read_text(encoding="utf-8")
    found = [json.loads(line)["prompt"] for line in text.splitlines()]
    assert len(found) == 664
    return found


def test_real_prompts_pass_tokenizer_and_template_without_loss(prompts):
    from mindrlhf.models.glm4 import template
    from mindrlhf.models.glm4.tokenizer import Glm4Tokenizer

    tokenizer = Glm4Tokenizer(GOLDEN / "tokenizer.model")
    for text in prompts:
        assert tokenizer.decode(tokenizer.encode(text)) == text
        ids = template.prompt_ids(tokenizer, [("user", text)])
        shown = tokenizer.decode(ids, show_special=True)
        assert shown == f"[gMASK]<sop><|user|>\n{text}<|assistant|>"
        answer = tokenizer.decode(template.response_ids(tokenizer, text), show_special=True)
        assert answer == f"\n{text}<|user|>"


def test_real_prompts_pass_prediction_without_loss(prompts, golden):
    """As --predict_file reads them."""
    from mindrlhf.inference.prompts import read_prompts
    from mindrlhf.models.glm4 import template
    from mindrlhf.models.glm4.tokenizer import Glm4Tokenizer

    tokenizer = Glm4Tokenizer(golden.tokenizer)
    settings = config.load_settings(
        golden.predict, run_mode="predict", overrides={"model.model_config.seq_length": 4096}
    )
    found = read_prompts(ROOT / "tests/golden/cvalues_prompts.jsonl", tokenizer, settings)
    assert [prompt.messages for prompt in found] == [(("user", text),) for text in prompts]
    assert all(
        prompt.ids == template.prompt_ids(tokenizer, [("user", text)])
        for prompt, text in zip(found, prompts)
    )
