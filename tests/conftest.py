"""Shared by the tests: the golden case, its checkpoint and data, and one compiled model."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import hypothesis
import pytest

from mindrlhf.models.glm4 import build, load
from mindrlhf.models.glm4.tokenizer import Glm4Tokenizer

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "glm4_dpo"
RUN_DPO = EXAMPLE / "run_dpo.py"
GOLDEN = ROOT / "tests" / "golden" / "case_1"
SEQ_LEN = 384
sys.path[:0] = [str(ROOT), str(EXAMPLE)]
os.environ.setdefault("GLOG_v", "3")
# an example may take long beside other processes
hypothesis.settings.register_profile("gate", deadline=None)
hypothesis.settings.load_profile("gate")

# what an overlay changes to make the golden case's model of the tiny one
OVERLAY = """
base_config: {base}
model:
  model_config:
    num_layers: 3
    padded_vocab_size: 330
    hidden_size: 96
    ffn_hidden_size: 160
    num_attention_heads: 6
    seq_length: {seq_len}
{more}
"""

TRAINING = """
dpo: {{sft_weight: {sft_weight}, check_reference: {check}}}
runner_config: {{epochs: {epochs}, batch_size: {batch_size}}}
lr_schedule: {{learning_rate: 1e-3, warmup_ratio: 0.0}}
train_dataset: {{data_loader: {{shuffle: {shuffle}}}}}
callbacks:
  - {{type: DPOMonitor, per_print_times: 1}}
  - {{type: EvalMonitor, eval_step_interval: 0}}
  - {{type: DPOCheckpointMonitor, prefix: glm4_dpo, save_checkpoint_steps: 1,
      keep_checkpoint_max: 9}}
"""


def write_overlay(path, command, more="", seq_len=SEQ_LEN):
    """Write a YAML for the golden model over a *_glm4_tiny.yaml."""
    base = os.path.relpath(EXAMPLE / f"{command}_glm4_tiny.yaml", path.parent)
    path.write_text(OVERLAY.format(base=base, seq_len=seq_len, more=more))
    return path


def training_yaml(
    folder, name, *, sft_weight=0.0, check=True, epochs=2, batch_size=1, shuffle=True
):
    """Write a YAML that trains the golden model and saves a state after each step."""
    more = TRAINING.format(
        sft_weight=sft_weight, check=check, epochs=epochs, batch_size=batch_size, shuffle=shuffle
    )
    return write_overlay(folder / f"{name}.yaml", "finetune", more)


def arguments(golden, config, output, *, data=None, weights=None, more=()):
    """Options of run_dpo.py that train on the golden data."""
    return [
        "--config",
        config,
        "--train_dataset",
        data or golden.data,
        "--vocab_file",
        golden.tokenizer,
        "--load_checkpoint",
        weights or golden.checkpoint,
        "--auto_trans_ckpt",
        "False",
        "--output_dir",
        output,
        *more,
    ]


def records(output, split="train"):
    """The lines of a run's metrics.jsonl."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"] == split]


def run_script(script, *arguments, cwd=None):
    """Run a command as a user would; return the CompletedProcess with text output."""
    return subprocess.run(
        [sys.executable, str(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=300,
    )


def assert_one_error(result, *parts):
    """Assert that the process ended with status 2 and one line on stderr that has all the parts."""
    assert result.returncode == 2, result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    for part in parts:
        assert str(part) in lines[0]


@pytest.fixture(scope="session")
def expected():
    """PyTorch's answers on the golden case."""
    return json.loads((GOLDEN / "expected.json").read_text())


@pytest.fixture(scope="session")
def golden(tmp_path_factory):
    """The golden case, converted and preprocessed once: paths of its files and YAMLs."""
    import dpo_preprocess_glm4_parallel as preprocess

    import convert_weight

    folder = tmp_path_factory.mktemp("golden")
    files = SimpleNamespace(
        folder=folder,
        checkpoint=folder / "golden.ckpt",
        tokenizer=GOLDEN / "tokenizer.model",
        pairs=GOLDEN / "pairs.jsonl",
        data=folder / "golden.mindrecord",
        **{
            command: write_overlay(folder / f"{command}.yaml", command)
            for command in ("process", "finetune", "predict", "score")
        },
    )
    convert_weight.main(
        [
            "--model",
            "glm-n",
            "--input_path",
            f"{GOLDEN / 'hf_glm'}/",
            "--output_path",
            str(files.checkpoint),
            "--dtype",
            "fp32",
        ]
    )
    preprocess.main(
        [
            "--src",
            str(files.pairs),
            "--dst",
            str(files.data),
            "--config",
            str(files.process),
            "--tokenizer",
            str(files.tokenizer),
            "--load_checkpoint",
            str(files.checkpoint),
        ]
    )
    return files


@pytest.fixture(scope="session")
def unbroken(golden):
    """A run of 12 steps, a row each, in 4 epochs, with a state after each step: its folder and its
    YAML. Tests only read it.
    """
    run = SimpleNamespace(
        output=golden.folder / "unbroken",
        config=training_yaml(golden.folder, "unbroken", sft_weight=0.5, epochs=4),
    )
    result = run_script(RUN_DPO, *arguments(golden, run.config, run.output))
    assert result.returncode == 0, result.stderr
    return run


@pytest.fixture(scope="session")
def texts(golden, expected):
    """(prompt, PyTorch's answer) of the golden case."""
    tokenizer = Glm4Tokenizer(golden.tokenizer)
    rows = map(json.loads, golden.pairs.read_text().splitlines())
    return [
        (row["prompt"], tokenizer.decode(pair["greedy_16"]).strip())
        for row, pair in zip(rows, expected["pairs"])
    ]


def load_model(golden, command, more=None):
    """A network of the golden case with its weights, built as the commands build it."""
    from mindrlhf import config, runtime, schema

    settings = config.load_settings(
        getattr(golden, command), run_mode=schema.RUN_MODES, overrides=more
    )
    run = config.to_mindformers(settings)
    runtime.start_device(run, parallel=False)
    network = build.build_network(run)
    load.load_weights(network, golden.checkpoint)
    for name in (
        "RUN_MODE",
        "MS_ALLOC_CONF",
    ):  # what MindFormers leaves for a process that predicts; others inherit it
        os.environ.pop(name, None)
    return network
