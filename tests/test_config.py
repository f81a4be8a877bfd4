import shutil

import pytest
from conftest import EXAMPLE

from mindrlhf import config, schema
from mindrlhf.cli import UserError

YAMLS = sorted(EXAMPLE.glob("*_glm4_*.yaml"))


def load(path, **options):
    return config.load_settings(path, run_mode=schema.RUN_MODES, **options)


def overlay(tmp_path, text, base="finetune_glm4_tiny.yaml"):
    path = tmp_path / "overlay.yaml"
    path.write_text(f"base_config: {EXAMPLE / base}\n{text}")
    return path


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.name)
def test_every_yaml_is_valid(path):
    assert load(path)["run_mode"] in schema.RUN_MODES


def test_both_sets_of_yaml_are_there():
    assert {path.name for path in YAMLS} >= {
        f"{command}_glm4_{size}.yaml"
        for command in ("process", "finetune", "predict", "score")
        for size in ("9b", "tiny")
    }


def test_9b_numbers_are_those_of_the_published_model():
    """config.json of glm-4-9b-chat: 40 layers, hidden 4096, ffn 13696, 32 heads, 2 groups, 151552
    ids, eps 1.5625e-07.
    """
    model = load(EXAMPLE / "finetune_glm4_9b.yaml")["model"]["model_config"]
    found = [
        model[key]
        for key in (
            "num_layers",
            "hidden_size",
            "ffn_hidden_size",
            "num_attention_heads",
            "kv_channels",
            "multi_query_group_num",
            "padded_vocab_size",
            "layernorm_epsilon",
            "rope_ratio",
        )
    ]
    assert found == [40, 4096, 13696, 32, 128, 2, 151552, 1.5625e-07, 500]


def test_overlay_in_another_folder_changes_single_keys(tmp_path):
    (tmp_path / "conf").mkdir()
    for path in EXAMPLE.glob("*.yaml"):
        shutil.copy(path, tmp_path / "conf")
    path = tmp_path / "mine.yaml"
    path.write_text("base_config: conf/finetune_glm4_9b.yaml\nlr_schedule: {learning_rate: 3e-7}\n")
    settings, base = load(path), load(EXAMPLE / "finetune_glm4_9b.yaml")
    assert settings["lr_schedule"]["learning_rate"] == 3e-7  # PyYAML alone would read a string
    base["lr_schedule"]["learning_rate"] = 3e-7
    assert settings == base


def test_overrides_win_and_none_leaves_the_yaml(tmp_path):
    path = overlay(tmp_path, "output_dir: here")
    assert load(path, overrides={"output_dir": None})["output_dir"] == "here"
    assert (
        load(path, overrides={"model.model_config.seq_length": 64})["model"]["model_config"][
            "seq_length"
        ]
        == 64
    )


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("optimiser: {}", ["optimiser: unknown key; did you mean optimizer?"]),
        ("optimizer: {learning_rte: 1}", ["optimizer.learning_rte: unknown key"]),
        (
            "model: {model_config: {num_layer: 2}}",
            ["model.model_config.num_layer: unknown key; did you mean num_layers?"],
        ),
        (
            "callbacks: [{type: DPOMonitor, every: 2}]",
            ["callbacks", "DPOMonitor.every: unknown key"],
        ),
        ("callbacks: [{type: Elsewhere}]", ["callbacks", "not 'Elsewhere'"]),
        ("dpo: {beta: 0}", ["dpo.beta: expected a number above 0, got 0"]),
        ("dpo: {beta: '0.1'}", ["dpo.beta: expected a number above 0, got '0.1'"]),
        (
            "dpo: {check_reference: 'False'}",
            ["dpo.check_reference: expected True or False, got 'False'"],
        ),
        (
            "runner_config: {batch_size: '4'}",
            ["runner_config.batch_size: expected an integer of at least 1, got '4'"],
        ),
        ("runner_config: {batch_size: True}", ["runner_config.batch_size"]),
        ("dpo: 3", ["dpo: expected a section, got 3"]),
        ("optimizer: {betas: [0.9]}", ["optimizer.betas: expected a list of 2"]),
        ("use_paralel: True", ["use_paralel: unknown key; did you mean use_parallel?"]),
        (
            "model: {model_config: {post_layer_nrm: True}}",
            ["model.model_config.post_layer_nrm: unknown key; did you mean post_layer_norm?"],
        ),
        ("resume_training: True", ["resume_training: expected False, auto, or the path"]),
        (
            "run_mode: training",
            ["run_mode: expected one of preprocess, finetune, predict, score, got 'training'"],
        ),
        (
            "dpo: {label_smoothing: 0.5}",
            ["dpo.label_smoothing: expected a number of at least 0 and below 0.5"],
        ),
    ],
)
def test_wrong_keys_and_values_are_named(tmp_path, text, parts):
    path = overlay(tmp_path, text)
    with pytest.raises(UserError) as error:
        load(path)
    for part in [str(path), *parts]:
        assert part in str(error.value)


def test_all_problems_come_at_once(tmp_path):
    with pytest.raises(UserError) as error:
        load(overlay(tmp_path, "sed: 1\ndpo: {beta: -1}\nlr_schedule: {lr: 2}"))
    assert all(part in str(error.value) for part in ("sed:", "dpo.beta:", "lr_schedule.lr:"))


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (
            "model: {model_config: {use_flash_attention: True, kv_channels: 24}}",
            "a multiple of 16 up to 512",
        ),
        (
            "model: {model_config: {use_flash_attention: True, seq_length: 40}}",
            "a seq_length that is a multiple of 16",
        ),
        (
            "context: {device_target: Ascend}\nmodel: {model_config: {use_flash_attention: True}}",
            "need compute_dtype bfloat16 or float16 on an NPU",
        ),
        (
            "context: {device_target: Ascend}\nmodel: {model_config: {use_past: True}}",
            "need compute_dtype bfloat16 or float16 on an NPU",
        ),
        ("model: {model_config: {compute_dtype: bfloat16}}", "bfloat16 needs an NPU"),
        (
            "model: {model_config: {multi_query_group_num: 3}}",
            "must be a multiple of multi_query_group_num",
        ),
        ("dpo: {loss_type: ipo, label_smoothing: 0.1}", "has no effect on loss_type ipo"),
        (
            "context: {jit_config: {jit_level: O1}}\nmodel: {model_config: {use_past: True}}",
            "needs context.jit_config.jit_level",
        ),
        ("run_mode: predict", "needs model.arch.type ChatGLM2ForConditionalGeneration"),
        ("parallel_config: {model_parallel: 2}", "model_parallel needs parallel.parallel_mode 1"),
    ],
)
def test_contradictions_are_named(tmp_path, text, part):
    with pytest.raises(UserError, match=part):
        load(overlay(tmp_path, text))


def test_contradictions_come_at_once(tmp_path):
    changes = "use_flash_attention: True, kv_channels: 8, compute_dtype: bfloat16"
    text = f"model: {{model_config: {{{changes}}}}}"
    with pytest.raises(UserError) as error:
        load(overlay(tmp_path, text))
    assert all(part in str(error.value) for part in ("kv_channels", "bfloat16"))


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("a: [1", "not YAML"),
        ("- 1", "expected keys and values"),
        ("a: 1\na: 2", ":2: not YAML ('a' appears twice)"),
        ("x: !!python/object/apply:os.getcwd []", "not YAML"),
        ("", "is empty"),
        ("base_config: overlay.yaml", "leads back to it"),
        ("base_config: none.yaml", "none.yaml: no such file"),
        ("base_config: 3", "base_config is 3"),
        ("seed: 1", "run_mode is missing"),
    ],
)
def test_broken_files_are_named(tmp_path, content, part):
    path = tmp_path / "overlay.yaml"
    path.write_text(content)
    with pytest.raises(UserError) as error:
        load(path)
    assert part in str(error.value)


def test_yaml_of_another_command_is_refused():
    with pytest.raises(UserError, match="run_mode is predict, but this command needs preprocess"):
        config.load_settings(EXAMPLE / "predict_glm4_tiny.yaml", run_mode="preprocess")


def test_plan_must_fit_the_number_of_workers():
    settings = load(EXAMPLE / "finetune_glm4_9b.yaml")  # data_parallel 4 x model_parallel 2
    config.require_workers(settings, 8)
    with pytest.raises(UserError, match="= 8, but 4 worker"):
        config.require_workers(settings, 4)
    config.require_workers(
        load(EXAMPLE / "finetune_glm4_tiny.yaml"), 3
    )  # data parallel: any number


def test_schema_offers_nothing_that_mindformers_does_not_take():
    """Each model key is an argument of ChatGLM2Config, or of text generation."""
    import inspect

    from mindformers import ChatGLM2Config
    from mindformers.generation import GenerationConfig

    known = {
        *inspect.signature(ChatGLM2Config.__init__).parameters,
        *vars(GenerationConfig()),
        "type",
    }
    assert set(schema.SCHEMA["model"]["model_config"]) - known == {
        "max_decode_length"
    }  # PretrainedConfig's


@pytest.mark.parametrize(
    ("name", "jit_config"),
    [
        ("process_glm4_9b", {"jit_level": "O1"}),
        ("finetune_glm4_9b", {"jit_level": "O1"}),
        ("finetune_glm4_9b_lora", {"jit_level": "O1"}),
        ("predict_glm4_9b", {"jit_level": "O0", "infer_boost": "on"}),
    ],
)
def test_the_9b_yamls_state_how_their_graphs_are_compiled(name, jit_config):
    """Unset, a 910B takes jit_level O0 and MindSpore a call depth of 1000."""
    context = load(EXAMPLE / f"{name}.yaml")["context"]
    assert context["jit_config"] == jit_config
    assert context["max_call_depth"] == 10000


def test_optimizers_get_numbers_as_they_take_them(tmp_path):
    """MindFormers' AdamW refuses the integer 0, and MindSpore a sharded optimizer in mode 0."""
    path = tmp_path / "x.yaml"
    base = EXAMPLE / "finetune_glm4_tiny.yaml"
    text = f"base_config: {base}\nparallel: {{enable_parallel_optimizer: True}}\n"
    path.write_text(text + "optimizer: {weight_decay: 0, eps: 1, betas: [0.9, 0.5]}\n")
    made = config.to_mindformers(config.load_settings(path, run_mode="finetune"))
    assert made.parallel.enable_parallel_optimizer is False
    numbers = [made.optimizer.weight_decay, made.optimizer.eps, *made.optimizer.betas]
    assert numbers == [0, 1, 0.9, 0.5]
    assert {type(number) for number in numbers} == {float}
    path.write_text(text + "optimizer: {betas: [0, 0.999]}\n")
    with pytest.raises(UserError, match=r"optimizer\.betas"):
        config.load_settings(path, run_mode="finetune")
    path.write_text(
        f"base_config: {EXAMPLE / 'finetune_glm4_9b.yaml'}\n"
        "parallel: {parallel_optimizer_config: {optimizer_weight_shard_size: 2}}\n"
    )
    with pytest.raises(UserError, match="optimizer_weight_shard_size: 2 is not supported"):
        config.load_settings(path, run_mode="finetune")


@pytest.mark.parametrize("given", ["True", "False", "null"])
@pytest.mark.parametrize(("name", "mean"), [("tiny", True), ("9b", False)])
def test_gradients_are_averaged_as_the_parallel_mode_needs(tmp_path, name, mean, given):
    """The training step multiplies the loss by a factor that holds for one value only."""
    path = tmp_path / "x.yaml"
    base = EXAMPLE / f"finetune_glm4_{name}.yaml"
    path.write_text(f"base_config: {base}\nparallel: {{gradients_mean: {given}}}\n")
    resolved = config.resolve(path, run_mode="finetune")
    assert config.to_mindformers(resolved.settings).parallel.gradients_mean is mean
    if given != "null":
        assert "parallel.gradients_mean" in [each.key for each in resolved.replaced]


def test_a_plan_is_the_same_before_and_after_mindformers_read_it():
    """MindFormers replaces parallel_mode 1 by the context's name for it."""
    from mindrlhf.parallel import Plan

    settings = config.load_settings(EXAMPLE / "finetune_glm4_9b.yaml", run_mode="finetune")
    plan = Plan.of(settings)
    assert (plan.data, plan.model, plan.vocabulary_shards) == (4, 2, 8)
    later = config.with_changes(settings, {"parallel.parallel_mode": "semi_auto_parallel"})
    assert Plan.of(later) == plan
