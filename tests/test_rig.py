"""Parallel plans, run for real on CPU processes (scripts/rig), against one process."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import mindspore
import pytest
import yaml
from conftest import EXAMPLE, ROOT

from mindrlhf import config as yaml_config
from mindrlhf import rehearsal as rehearse
from mindrlhf import schema
from mindrlhf.data import mindrecord
from mindrlhf.inference import score_record

if shutil.which("g++") is None:
    pytest.skip(
        "no g++, with which the rig for parallel plans on the CPU is built", allow_module_level=True
    )
if not mindspore.__version__.startswith("2.7."):
    pytest.skip(
        "the rig for parallel plans on the CPU fits MindSpore 2.7 only", allow_module_level=True
    )

ENVIRONMENT = {
    **os.environ,
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "PYTHON": sys.executable,
}
CONFIG = EXAMPLE / "finetune_glm4_9b.yaml"


def run(*command, environment=None):
    """Output of a command that must succeed."""
    result = subprocess.run(
        [*map(str, command)],
        capture_output=True,
        text=True,
        timeout=900,
        env={**ENVIRONMENT, **(environment or {})},
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    """(folder, screen) of a rehearsal of the 9B YAML: 4 x 2 with optimizer sharding, and one
    process without flash attention and sink mode.
    """
    folder = tmp_path_factory.mktemp("rehearsal")
    return folder, run("bash", ROOT / "scripts/rehearse.sh", CONFIG, 8, folder)


@pytest.fixture(scope="module")
def launch(rehearsal):
    """Function that runs one of the example's scripts on the processes of a plan, with the
    rehearsal's files.
    """
    build = run("bash", ROOT / "scripts/rig/build.sh").strip()
    folder = rehearsal[0]

    def on_plan(name, script, base, changes, options, workers=8, environment=None):
        config = folder / f"{name}.yaml"
        config.write_text(yaml.safe_dump({"base_config": base, **changes}))
        command = (
            f"{ROOT}/scripts/rig/on_cpu.py {build} {EXAMPLE}/{script} --config {config} {options}"
        )
        return run(
            "bash",
            ROOT / "scripts/msrun_launcher.sh",
            command,
            workers,
            0,
            folder / f"log_{name}",
            "True",
            600,
            environment={"LD_PRELOAD": f"{build}/librig_hook.so", **(environment or {})},
        )

    return on_plan


def training(folder, name):
    return (
        f"--train_dataset {folder}/train.mindrecord --vocab_file {folder}/hf/tokenizer.model "
        f"--load_checkpoint {folder}/tiny.ckpt --auto_trans_ckpt True --output_dir {folder}/{name}"
    )


def assert_as_one_process(folder, name):
    one = rehearse.training_steps(folder / "one")
    assert len(one) == rehearse.STEPS
    for metric, value in rehearse.metric_differences(
        one, rehearse.training_steps(folder / name)
    ).items():
        assert value <= 1e-4, metric


def test_the_9b_yaml_agrees_with_one_process_to_the_end(rehearsal):
    folder, screen = rehearsal
    assert "8 cards compute what one process computes" in screen
    assert (
        "data_parallel 4 x model_parallel 2, optimizer sharding True, 32 heads, 2 groups, "
        "flash attention True, sink mode True, LoRA False"
    ) in screen
    assert "stopped by SIGTERM after step" in screen
    assert "resuming from many/checkpoint/rank_0" in screen
    assert_as_one_process(folder, "many")
    strategies = sorted(path.name for path in (folder / "many/strategy").iterdir())
    assert strategies == [f"ckpt_strategy_rank_{rank}.ckpt" for rank in range(8)]


def test_the_rehearsal_changes_only_what_it_says(rehearsal):
    """Sizes, types, device, length and learning rate; all else of the three YAMLs is the user's."""
    said = {
        *rehearse.SIZES,
        rehearse.HEAD,
        *rehearse.TYPES,
        *rehearse.RUN,
        "model.model_config.padded_vocab_size",
        "dpo.logps_chunk_size",
        "callbacks",
        "recompute_config.recompute",  # the same share of the layers
        "model.model_config.max_decode_length",
    }
    for name, base in (("many", "finetune"), ("process", "process"), ("predict", "predict")):
        settings = yaml_config.load_settings(
            EXAMPLE / f"{base}_glm4_9b.yaml", run_mode=schema.RUN_MODES
        )
        found = yaml.safe_load((rehearsal[0] / f"{name}.yaml").read_text())
        changed = {
            key
            for key in {*flat(settings), *flat(found)}
            if yaml_config.get_setting(settings, key) != yaml_config.get_setting(found, key)
        }
        assert changed <= said
        if name == "many":
            shown = {key.split(".")[-1] for key in changed - {"callbacks"}}
            assert all(f" {key} " in rehearsal[1] for key in (*shown, "save_checkpoint_steps"))
            assert not re.search(r" (\S+) -> \1[,\n]", rehearsal[1])
    assert [{**entry, "save_checkpoint_steps": 0} for entry in many_callbacks(rehearsal[0])] == [
        {**entry, "save_checkpoint_steps": 0}
        for entry in yaml_config.load_settings(CONFIG, run_mode="finetune")["callbacks"]
    ]


def flat(settings, prefix=""):
    """Dotted keys of all settings."""
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def many_callbacks(folder):
    return yaml.safe_load((folder / "many.yaml").read_text())["callbacks"]


def test_every_key_of_the_9b_yamls_stands_in_the_rigs_table():
    table = (ROOT / "scripts/rig/README.md").read_text()
    for name in ("finetune_glm4_9b", "finetune_glm4_9b_lora", "process_glm4_9b", "predict_glm4_9b"):
        settings = yaml_config.load_settings(EXAMPLE / f"{name}.yaml", run_mode=schema.RUN_MODES)
        entries = [
            f"callbacks.{entry['type']}.{key}"
            for entry in settings.pop("callbacks", [])
            for key in entry
            if key != "type"
        ]
        missing = [key for key in [*flat(settings), *entries] if f"`{key}`" not in table]
        assert not missing


def test_lora_in_a_plan_agrees_with_one_process_to_the_end(tmp_path):
    """Adapters start equal, resume from their cards' parts, are merged, and are read as shards by
    predict. Two processes.
    """
    config = tmp_path / "lora.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "base_config": str(EXAMPLE / "finetune_glm4_9b_lora.yaml"),
                "parallel_config": {"data_parallel": 1, "model_parallel": 2},
                "runner_config": {"batch_size": 2},
            }
        )
    )
    screen = run("bash", ROOT / "scripts/rehearse.sh", config, 2, tmp_path / "lora")
    assert "2 cards compute what one process computes" in screen
    assert (tmp_path / "lora/answer_after_adapters").read_text() == (
        tmp_path / "lora/answer_after"
    ).read_text()


@pytest.fixture(scope="module")
def accumulated(rehearsal, launch):
    """1 x 2: two parts of two rows where one process has four rows; held-out pairs."""
    folder = rehearsal[0]
    changes = {
        "parallel_config": {"data_parallel": 1, "model_parallel": 2},
        "runner_config": {"batch_size": 2, "gradient_accumulation_steps": 2},
    }
    options = f"{training(folder, 'parts')} --eval_dataset {folder}/train.mindrecord"
    launch("parts", "run_dpo.py", "many.yaml", changes, options, workers=2)
    return folder


def test_accumulation_in_a_plan_gives_the_same_numbers(accumulated):
    assert_as_one_process(accumulated, "parts")


def test_evaluation_in_a_plan_sees_every_pair(accumulated):
    """Before training, policy and reference agree: the loss is ln 2."""
    lines = (accumulated / "parts/metrics.jsonl").read_text().splitlines()
    before, after = [record for record in map(json.loads, lines) if record["split"] == "eval"]
    assert before["pairs"] == after["pairs"] == 112
    assert before["loss"] == pytest.approx(0.693147, abs=1e-5)
    assert after["loss"] < before["loss"]


def test_a_score_on_a_plan_is_the_evaluation_of_training(accumulated, launch):
    """Of the trained shards, by two processes that share each row."""
    folder, run_dir = accumulated, accumulated / "parts"
    launch(
        "score",
        "run_dpo.py",
        "process.yaml",
        {
            "run_mode": "score",
            "src_strategy": f"{run_dir}/strategy",
            "parallel": {"parallel_mode": 1, "full_batch": True},
            "parallel_config": {"data_parallel": 1, "model_parallel": 2},
            "output_dir": f"{folder}/score",
        },
        f"--score_data {folder}/train.mindrecord --vocab_file {folder}/hf/tokenizer.model "
        f"--load_checkpoint {run_dir}/checkpoint_network --auto_trans_ckpt True "
        f"--output {folder}/score",
        workers=2,
    )
    evaluation = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    found = score_record.load(folder / "score")
    assert evaluation["split"] == "eval"
    assert found.metrics["pairs"] == evaluation["pairs"] == 112
    assert abs(evaluation["rewards/margins"]) > 1e-3
    for name in ("loss", "rewards/margins", "rewards/accuracies"):
        assert found.metrics[name] == pytest.approx(evaluation[name], abs=1e-4), name


PLAIN = {
    "model": {"model_config": {"use_flash_attention": False}}
}  # 2 key-value heads cannot be split over more cards


def logits(folder, vocabulary):
    """Shapes, as strings, of the tensors in rank 0's compiled graphs that have several dimensions
    and whose last one is `vocabulary`.
    """
    graphs = "".join(path.read_text() for path in folder.rglob("*validate*.ir"))
    return set(re.findall(rf"Tensor\[\w+\], \((\d+(?:, \d+)*, {vocabulary})\)", graphs))


def test_no_card_ever_holds_logits_of_the_whole_vocabulary(rehearsal, launch):
    """2 x 2, no optimizer sharding. No other size of the model is 528; chunks of 256 positions."""
    folder, cards, whole = rehearsal[0], 4, rehearse.VOCABULARY
    changes = {
        "parallel_config": {"data_parallel": 2, "model_parallel": 2},
        "runner_config": {"batch_size": 2},
        "parallel": {"enable_parallel_optimizer": False},
        "dpo": {"logps_chunk_size": 256},
        **PLAIN,
    }
    launch(
        "spread",
        "run_dpo.py",
        "many.yaml",
        changes,
        training(folder, "spread"),
        workers=4,
        environment=save_graphs(folder, "spread"),
    )
    assert_as_one_process(folder, "spread")
    graph = folder / "graphs_spread" / "rank_0"
    assert f"256, {whole // cards}" in logits(graph, whole // cards)
    assert not logits(graph, whole)


def test_the_same_search_finds_them_in_one_process(rehearsal):
    folder, whole = rehearsal[0], rehearse.VOCABULARY
    config = folder / "plain.yaml"
    config.write_text(yaml.safe_dump({"base_config": "one.yaml", "dpo": {"logps_chunk_size": 0}}))
    run(
        sys.executable,
        EXAMPLE / "run_dpo.py",
        "--config",
        config,
        *training(folder, "plain").split(),
        environment=save_graphs(folder, "plain"),
    )
    assert f"512, {whole}" in logits(folder / "graphs_plain", whole)  # 4 rows of 128


def save_graphs(folder, name):
    return {"MS_DEV_SAVE_GRAPHS": "1", "MS_DEV_SAVE_GRAPHS_PATH": f"{folder}/graphs_{name}"}


def test_preprocessing_on_a_plan_gives_the_same_log_probs(rehearsal, launch):
    folder = rehearsal[0]
    launch(
        "scored",
        "dpo_preprocess_glm4_parallel.py",
        "process.yaml",
        {
            "parallel": {"parallel_mode": 1, "full_batch": True},
            "parallel_config": {"data_parallel": 1, "model_parallel": 2},
            "output_dir": f"{folder}/scored",
        },
        f"--src {folder}/train.jsonl --dst {folder}/scored.mindrecord "
        f"--tokenizer {folder}/hf/tokenizer.model --load_checkpoint {folder}/tiny.ckpt",
        workers=2,
    )
    expected, found = (
        mindrecord.read_rows(folder / f"{name}.mindrecord") for name in ("train", "scored")
    )
    for one, other in zip(expected, found, strict=True):
        assert other["reference_logps"] == pytest.approx(one["reference_logps"], abs=1e-3)
        assert other["pair_ids"].tolist() == one["pair_ids"].tolist()


@pytest.mark.parametrize(
    ("arguments", "status", "part"),
    [
        ((CONFIG,), 2, "usage:"),
        ((CONFIG, "1"), 2, "above 1"),
        (("none.yaml", "8"), 2, "none.yaml: no such file"),
        ((EXAMPLE / "finetune_glm4_tiny.yaml", "2"), 2, "no plan to rehearse"),
        ((CONFIG, "6"), 1, "= 8 cards, not 6"),
    ],
)
def test_what_cannot_be_rehearsed_is_said(arguments, status, part, tmp_path):
    result = subprocess.run(
        ["bash", ROOT / "scripts/rehearse.sh", *arguments, *[tmp_path] * (len(arguments) == 2)],
        capture_output=True,
        text=True,
        timeout=60,
        env=ENVIRONMENT,
        cwd=tmp_path,
    )
    assert result.returncode == status
    assert part in result.stdout + result.stderr


def test_a_rehearsal_deletes_no_file_of_the_user(tmp_path):
    path, notes = tmp_path / "my.yaml", tmp_path / "notes.txt"
    path.write_text(f"base_config: {CONFIG}\n")
    notes.write_text("mine")
    for config, part in ((path, f"{path}: lies in FOLDER"), (CONFIG, "holds files that are no")):
        result = subprocess.run(
            ["bash", ROOT / "scripts/rehearse.sh", config, "8", "."],
            capture_output=True,
            text=True,
            timeout=60,
            env=ENVIRONMENT,
            cwd=tmp_path,
        )
        assert result.returncode == 2
        assert part in result.stderr
    assert notes.read_text() == "mine"
    assert path.exists()


def test_a_number_that_the_cards_cannot_share_is_named(tmp_path):
    """13696 = 2^7 x 107: neither it nor the 32 heads can be split over three cards."""
    settings = yaml_config.load_settings(
        CONFIG, run_mode="finetune", overrides={"parallel_config.data_parallel": 1}
    )
    settings["parallel_config"]["model_parallel"] = 3
    problems = " ".join(rehearse.plan_problems(settings, 3))
    assert "ffn_hidden_size is 13696" in problems
    assert "num_attention_heads is 32" in problems
