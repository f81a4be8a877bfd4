"""MindFormers' and MindRLHF's own YAMLs: each key is taken, replaced or refused."""

import csv
import json
import re
from collections import defaultdict

import pytest
import yaml
from conftest import EXAMPLE, ROOT, arguments, records, run_script

from mindrlhf import config, schema
from mindrlhf.cli import UserError
from mindrlhf.config import __main__ as show
from mindrlhf.config import ecosystem, yaml_file

TABLE = ROOT / "tests/golden/ecosystem_keys.tsv"
# what a CPU and a small model need of any YAML
SMALL = """
base_config: {base}
context: {{device_target: CPU, jit_config: {{jit_level: O0}}, max_device_memory: 8GB}}
model: {{model_config: {{num_layers: 3, hidden_size: 96, ffn_hidden_size: 160, seq_length: 384,
  num_attention_heads: 6, multi_query_group_num: 2, kv_channels: 16, padded_vocab_size: 330,
  layernorm_epsilon: 1.5625e-07, rope_ratio: 500, rotary_dtype: float32, use_flash_attention: False,
  compute_dtype: float32, param_init_type: float32, use_past: False, is_dynamic: False}}}}
"""
ONE_PROCESS = """
parallel: {parallel_mode: 0}
parallel_config: {data_parallel: 1, model_parallel: 1, pipeline_stage: 1}
recompute_config: {recompute: False}
"""
# YAML -> what it needs besides, to run here in one process
OVERLAYS = {
    "MindFormers 1.3/finetune": ONE_PROCESS + "runner_config: {sink_mode: False, epochs: 2}",
    "MindFormers 1.3/predict": "seed: 1",
    "MindRLHF 2024-12/process": ONE_PROCESS,
    "MindRLHF 2024-12/finetune": ONE_PROCESS + "runner_config: {sink_mode: False}",
    "MindRLHF 2024-12/predict": "seed: 1",
}


def put(settings, key, value):
    *parents, last = key.split(".")
    for part in parents:
        settings = settings.setdefault(part, {})
    settings[last] = value


def yamls():
    """source/file -> settings, rebuilt from the table of their keys."""
    found = defaultdict(dict)
    with open(TABLE, encoding="utf-8", newline="") as file:
        for source, name, key, value in csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE):
            if source != "source":
                put(found[f"{source}/{name}"], key, json.loads(value))
    return found


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """source/file -> an overlay on that YAML, for the golden case."""
    folder = tmp_path_factory.mktemp("ecosystem")
    result = {}
    for name, settings in yamls().items():
        path = folder / f"{name.replace('/', '_').replace(' ', '_')}.yaml"
        path.write_text(yaml.safe_dump(settings, allow_unicode=True))
        result[name] = path.with_name(f"my_{path.name}")
        result[name].write_text(SMALL.format(base=path.name) + OVERLAYS[name])
    return result


def leaf_keys(settings, prefix=""):
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            yield from leaf_keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def is_known(key):
    """Whether the schema or the table has a key, or a section that it is in."""
    part = schema.SCHEMA
    for word in key.split("."):
        part = part.get(word) if isinstance(part, dict) else None
    parents = [key.rsplit(".", count)[0] for count in range(key.count(".") + 1)]
    return part is not None or any(name in ecosystem.TABLE for name in (key, *parents))


def test_each_of_the_keys_is_handled():
    keys = {key for settings in yamls().values() for key in leaf_keys(settings)}
    assert len(keys) > 230
    assert [key for key in sorted(keys) if not is_known(key)] == []


@pytest.mark.parametrize("name", OVERLAYS)
def test_each_yaml_needs_an_overlay_of_a_few_lines_only(files, name):
    settings = config.load_settings(files[name], run_mode=("finetune", "predict", "preprocess"))
    assert len(OVERLAYS[name].strip().splitlines()) <= 4
    assert settings["dpo"]["beta"] == 0.1
    if name.endswith("finetune"):
        types = [entry["type"] for entry in settings["callbacks"]]
        assert types == ["DPOMonitor", "DPOCheckpointMonitor", "EvalMonitor"]


def test_mindformers_own_finetune_yaml_trains(files, golden, tmp_path):
    path = files["MindFormers 1.3/finetune"]
    result = run_script(EXAMPLE / "run_dpo.py", *arguments(golden, path, tmp_path))
    assert result.returncode == 0, result.stderr
    assert len(records(tmp_path)) == 6
    assert "DPOTrainOneStepCell, which needs no loss scale" in result.stdout
    assert "optimizer.learning_rate -> lr_schedule.learning_rate" in result.stdout
    assert (tmp_path / "checkpoint_network/rank_0/glm4-network.ckpt").exists()


def test_mindrlhfs_own_yamls_preprocess_and_train(files, golden, tmp_path, capsys):
    """They say run_mode train for preprocessing, and train with FP32StateAdamWeightDecay."""
    import dpo_preprocess_glm4_parallel as preprocess

    data = tmp_path / "dpo.mindrecord"
    where = ["--src", golden.pairs, "--dst", data, "--tokenizer", golden.tokenizer]
    path = files["MindRLHF 2024-12/process"]
    preprocess.main(
        [*map(str, where), "--config", str(path), "--load_checkpoint", str(golden.checkpoint)]
    )
    assert "run_mode -> preprocess: this command does not train" in capsys.readouterr().out
    path = files["MindRLHF 2024-12/finetune"]
    result = run_script(
        EXAMPLE / "run_dpo.py", *arguments(golden, path, tmp_path / "out", data=data)
    )
    assert result.returncode == 0, result.stderr
    assert "alpha, model.model_config.beta -> dpo.beta and dpo.sft_weight" in result.stdout
    assert records(tmp_path / "out")[-1]["rewards/margins"] > 0
    wanted = [line["learning_rate"] for line in records(tmp_path / "out")]
    assert wanted[0] == pytest.approx(1e-5, rel=1e-3)


def test_mindformers_own_predict_yaml_predicts(files, golden, expected):
    from mindrlhf.models.glm4.tokenizer import Glm4Tokenizer

    text = json.loads(golden.pairs.read_text().splitlines()[0])["prompt"]
    result = run_script(
        EXAMPLE / "run_dpo.py",
        *("--config", files["MindFormers 1.3/predict"], "--load_checkpoint", golden.checkpoint),
        *("--vocab_file", golden.tokenizer, "--predict_data", text),
    )
    assert result.returncode == 0, result.stderr
    assert "use_parallel is False" in result.stderr  # stdout is the answer
    wanted = Glm4Tokenizer(golden.tokenizer).decode(expected["pairs"][0]["greedy_16"][:12]).strip()
    assert result.stdout.startswith(wanted)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("parallel_config: {pipeline_stage: 4}", "pipeline_stage: 4 is not supported: pipeline"),
        ("model: {model_config: {post_layer_norm: False}}", "post_layer_norm: False is not"),
        ("model: {model_config: {rmsnorm: 1}}", "rmsnorm: 1 is not supported: GLM-4 has no other"),
        ("model: {model_config: {quantization_bit: 8}}", "quantized weights cannot be trained"),
        ("model: {model_config: {pre_seq_len: 128}}", "prefix tuning is not offered"),
        ("model: {model_config: {qkv_concat: True}}", "GLM-4's weights have one layout"),
        ("runner_wrapper: {use_clip_grad: False}", "gradients are always clipped"),
        ("micro_batch_interleave_num: 2", "gradient_accumulation_steps"),
        ("moe_config: {expert_num: 8}", "GLM-4 has no experts"),
        ("only_save_strategy: True", "it would end before training"),
        ("parallel_config: {context_parallel: 2}", "sequences are not sharded"),
        (
            "callbacks: [{type: CheckpointMonitor, enc_key: x}]",
            "DPOCheckpointMonitor.enc_key: unknown key",
        ),
        ("train_dataset_task: {dataset_config: {repeet: 2}}", "unknown key; did you mean"),
    ],
)
def test_what_cannot_be_is_refused_with_the_cure(tmp_path, text, part):
    path = tmp_path / "mine.yaml"
    path.write_text(f"base_config: {EXAMPLE / 'finetune_glm4_tiny.yaml'}\n{text}")
    with pytest.raises(UserError) as error:
        config.load_settings(path, run_mode="finetune")
    assert part in str(error.value)


def test_callbacks_are_taken_over_with_their_options(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        f"base_config: {EXAMPLE / 'finetune_glm4_tiny.yaml'}\neval_step_interval: 7\n"
        "callbacks:\n- {type: MFLossMonitor, per_print_times: 3}\n- {type: ObsMonitor}\n"
        "- {type: CheckpointMonitor, prefix: p, save_checkpoint_steps: 5, async_save: True}\n"
    )
    settings = config.load_settings(path, run_mode="finetune")
    assert config.callback_options(settings) == {
        "DPOMonitor": {"per_print_times": 3},
        "DPOCheckpointMonitor": {
            "prefix": "p",
            "save_checkpoint_steps": 5,
            "keep_checkpoint_max": 2,
        },
        "EvalMonitor": {"eval_step_interval": 7},
    }


def test_null_removes_an_inherited_key(tmp_path):
    path = tmp_path / "mine.yaml"
    text = "lr_schedule: {warmup_ratio: null, warmup_steps: 3}\ndpo: {sft_weight: null}\n"
    path.write_text(f"base_config: {EXAMPLE / 'finetune_glm4_tiny.yaml'}\n{text}")
    settings = config.load_settings(path, run_mode="finetune")
    assert "warmup_ratio" not in settings["lr_schedule"]
    assert settings["dpo"]["sft_weight"] == schema.DEFAULTS["dpo.sft_weight"]


def test_options_of_the_command_line_hold_over_what_is_replaced(files):
    settings = config.load_settings(
        files["MindRLHF 2024-12/finetune"],
        run_mode="finetune",
        overrides={"eval_dataset.data_loader.dataset_dir": "held_out.mindrecord"},
    )
    wanted = {"type": "MindDataset", "dataset_dir": "held_out.mindrecord"}
    assert settings["eval_dataset"]["data_loader"] == wanted


def test_show_tells_where_each_setting_is_from(files, capsys):
    path = files["MindRLHF 2024-12/finetune"]
    show.main(["show", str(path)])
    out = capsys.readouterr().out
    lines = {line.split()[0]: " ".join(line.split()) for line in out.splitlines() if line.strip()}
    number = path.read_text().splitlines().index("runner_config: {sink_mode: False}") + 1
    assert lines["runner_config.sink_mode"] == (
        f"runner_config.sink_mode False {path.name}:{number} passed on"
    )
    base = path.with_name(path.name.removeprefix("my_"))
    number = base.read_text().splitlines().index("seed: 0") + 1
    assert lines["seed"] == f"seed 0 {base.name}:{number} passed on"
    assert lines["dpo.beta"] == "dpo.beta 0.1 default used here"
    assert lines["model.model_config.alpha"].endswith(ecosystem.LOSS)
    assert lines["runner_wrapper.local_norm"].startswith("runner_wrapper.local_norm True")
    assert re.search(r"^metric +\{'type': 'PerplexityMetric'\} +\S+yaml:\d+ ", out, re.M)


def test_origins_of_what_an_overlay_replaces_are_the_overlays(tmp_path):
    (tmp_path / "base.yaml").write_text("a:\n  b: 1\n  c: &list [1]\nd: {e: 1}\nf: *list\n")
    path = tmp_path / "mine.yaml"
    path.write_text("base_config: base.yaml\na: {b: 2}\nd: 3\n")
    document = yaml_file.read_document(path)
    assert document.settings == {"a": {"b": 2, "c": [1]}, "d": 3, "f": [1]}
    base = tmp_path / "base.yaml"
    assert document.origins == {
        "a.b": f"{path}:2",
        "a.c": f"{base}:3",
        "d": f"{path}:3",
        "f": f"{base}:5",
    }


def test_our_own_yamls_replace_nothing():
    for path in EXAMPLE.glob("*_glm4_*.yaml"):
        assert config.resolve(path, run_mode=schema.RUN_MODES).replaced == []


def test_the_package_has_the_yaml_that_the_table_describes():
    """Where MindFormers is installed with its configs, the table has all their keys."""
    import mindformers

    folder = ROOT.joinpath(mindformers.__file__).parent.parent / "configs/glm4"
    path = folder / "finetune_glm4_9b.yaml"
    if not path.exists():
        pytest.skip("MindFormers is installed without its configs")
    known = set(leaf_keys(yamls()["MindFormers 1.3/finetune"]))
    assert set(leaf_keys(config.read_yaml(path))) == known
