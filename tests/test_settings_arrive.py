"""Settings that are passed on reach MindFormers and MindSpore, and do there what they say."""

import importlib

import mindspore as ms
import pytest
from conftest import EXAMPLE, arguments, load_model, records, run_script, write_overlay

from mindrlhf import config, runtime
from mindrlhf.checkpoints import containers
from mindrlhf.cli import UserError


def load(tmp_path, text, base="finetune_glm4_tiny.yaml"):
    path = tmp_path / "mine.yaml"
    path.write_text(f"base_config: {EXAMPLE / base}\n{text}")
    return config.load_settings(path, run_mode=("finetune", "predict"))


CONTEXT = """
context:
  jit_config: {jit_level: O0}
  enable_graph_kernel: False
  graph_kernel_flags: --opt_level=1
  ascend_config: {precision_mode: must_keep_origin_dtype, jit_compile: False}
  deterministic: 'OFF'
  op_timeout: 900
  runtime_num_threads: 30
  save_graphs: 0
  max_call_depth: 2000
"""
PARALLEL = """
parallel:
  parallel_mode: 1
  full_batch: True
  parallel_optimizer_config: {gradient_accumulation_shard: False, parallel_optimizer_threshold: 32}
  strategy_ckpt_config: {save_file: ./elsewhere.ckpt, only_trainable_params: False}
parallel_config: {data_parallel: 1, model_parallel: 1}
"""


def test_context_and_parallel_reach_mindspore(tmp_path, monkeypatch):
    """MindFormers' build_context passes them to MindSpore; the cluster is not there."""
    build_context = importlib.import_module("mindformers.core.context.build_context")
    seen = {}
    for name in ("set_ms_context", "set_ms_auto_parallel_context"):
        monkeypatch.setattr(
            build_context._Context, name, lambda _, **given: seen.update(given), raising=True
        )
    for name, value in (("init", None), ("get_rank", 0), ("get_group_size", 1)):
        monkeypatch.setattr(build_context, name, lambda value=value: value)
    monkeypatch.setattr(build_context, "check_in_dynamic_cluster", lambda: True)
    settings = load(tmp_path, CONTEXT + PARALLEL + f"output_dir: {tmp_path}")
    runtime.start_device(config.to_mindformers(settings), parallel=True)
    for section in ("context", "parallel"):
        for key, value in settings[section].items():
            if key not in ("mode", "parallel_mode"):  # 0 and 1 become MindSpore's names
                assert seen[key] == value, key
    assert "save_file" not in seen["strategy_ckpt_config"]
    assert str(tmp_path / "strategy") in seen["strategy_ckpt_save_file"]
    monkeypatch.undo()
    ms.reset_auto_parallel_context()


def test_mindspore_takes_the_parallel_settings(tmp_path):
    from mindspore.parallel._auto_parallel_context import auto_parallel_context

    parallel = load(tmp_path, PARALLEL)["parallel"]
    names = ("parallel_optimizer_config", "strategy_ckpt_config")
    ms.set_auto_parallel_context(**{name: parallel[name] for name in names})
    assert auto_parallel_context().get_parallel_optimizer_threshold() == 32
    ms.reset_auto_parallel_context()


PATTERNS = [r"mlp\.activation_func\.mul", r"self_attention\.dense"]


@pytest.mark.parametrize(
    ("recompute", "select", "expected"),
    [
        (False, PATTERNS, [(False, True)] * 3),
        ([1], PATTERNS, [(True, False), (False, True), (False, True)]),
        (2, False, [(True, False), (True, False), (False, False)]),
        (False, {PATTERNS[1]: 1}, [(False, True), (False, False), (False, False)]),
    ],
)
def test_recompute_lists_mark_layers_and_operators(golden, recompute, select, expected):
    model = load_model(
        golden,
        "finetune",
        {
            "model.model_config.use_flash_attention": True,
            "recompute_config.recompute": recompute,
            "recompute_config.select_recompute": select,
        },
    )
    layers = model.transformer.encoder.layers
    found = [
        (layer._has_config_recompute, layer.self_attention.dense._has_config_recompute)
        for layer in layers
    ]
    whole = [marked for marked, _ in found]
    assert whole == [marked for marked, _ in expected]
    assert [not outer and inner for outer, inner in found] == [inner for _, inner in expected]


SCHEDULES = {  # type and keys -> learning rates of steps 0, 2, 6 and 10 of 10
    "type: ConstantWarmUpLR, warmup_steps: 4": [0, 0.5, 1, 1],
    "type: LinearWithWarmUpLR, warmup_steps: 2": [0, 1, 0.5, 0],
    "type: CosineWithWarmUpLR, warmup_epochs: 0.2, lr_end: 0.0": [0, 1, None, 0],
    "type: cosine, warmup_steps: 4, warmup_lr_init: 0.5": [0.5, 0.75, None, 0],
    "type: CosineWithRestartsAndWarmUpLR, warmup_steps: 2, num_cycles: 2.0": [0, 1, None, None],
    "type: PolynomialWithWarmUpLR, warmup_steps: 2, power: 2.0, lr_end: 0.0": [0, 1, 0.25, 0],
    "type: CosineAnnealingLR, base_lr: 1.0, t_max: 10, eta_min: 0.0": [1, None, None, 0],
    "type: CosineAnnealingWarmRestarts, base_lr: 1.0, t_0: 5, t_mult: 1": [1, None, None, 1],
    "type: LinearWithWarmUpLR, warmup_steps: 2, total_steps: 18": [0, 1, 0.75, 0.5],
}


@pytest.mark.parametrize("text", SCHEDULES)
def test_schedules_of_mindformers_have_their_shape(tmp_path, text):
    """As MindFormers' Trainer builds them for a run of 10 steps."""
    from mindformers.trainer.base_trainer import BaseTrainer

    settings = load(tmp_path, f"lr_schedule: {{warmup_ratio: 0.0, {text}, learning_rate: 1.0}}\n")
    trainer = BaseTrainer(task="text_generation")
    trainer.config = config.to_mindformers(settings)
    given = trainer.config.lr_schedule.total_steps
    trainer.config.lr_schedule.total_steps = 10 if given in (None, -1) else given
    trainer.get_train_data_size = lambda: 10
    schedule = trainer.create_lr_scheduler()
    for step, rate in zip((0, 2, 6, 10), SCHEDULES[text]):
        value = float(schedule(ms.Tensor([step], ms.int32)).asnumpy().reshape(-1)[0])
        assert rate is None or value == pytest.approx(rate, abs=1e-6), step


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("lr_schedule: {type: CosineAnnealingLR}", "CosineAnnealingLR needs base_lr and t_max"),
        ("lr_schedule: {warmup_steps: 9}", "warmup_ratio and warmup_steps exclude each other"),
        ("lr_schedule: {type: polynomial, lr_end: 1.0}", "needs an lr_end below learning_rate"),
        ("profile: True\nprofile_start_step: 9\nprofile_stop_step: 3", "stop_step 3 is before"),
        ("profile_communication: True\ninit_start_profile: False", "needs init_start_profile"),
        ("recompute_config: {select_recompute: [1, 2]}", "select_recompute: expected True, False"),
        ("context: {ascend_config: {jit_compil: 1}}", "did you mean jit_compile?"),
        ("lr_schedule: {total_steps: 0}", "total_steps: expected a number of steps, or -1"),
    ],
)
def test_settings_that_mindformers_would_fail_on_are_named(tmp_path, text, part):
    with pytest.raises(UserError) as error:
        load(tmp_path, text)
    assert part in str(error.value)


def test_adams_constants_reach_each_optimizer(tmp_path):
    both = {"FP32StateAdamWeightDecay": "betas: [0.8, 0.7]", "AdamW": "beta1: 0.8, beta2: 0.7"}
    found = {}
    for name, text in both.items():
        settings = load(tmp_path, f"optimizer: {{type: {name}, {text}}}")
        found[name] = config.to_mindformers(settings).optimizer
    assert (found["FP32StateAdamWeightDecay"].beta1, found["AdamW"].betas) == (0.8, [0.8, 0.7])
    assert "betas" not in found["FP32StateAdamWeightDecay"]


MORE = """
profile: True
profile_start_step: 2
profile_stop_step: 3
init_start_profile: False
optimizer: {type: FP32StateAdamWeightDecay}
lr_schedule: {type: LinearWithWarmUpLR, learning_rate: 1.0e-3, warmup_ratio: 0.0, warmup_steps: 2,
  total_steps: 10}
runner_config: {epochs: 2, batch_size: 1}
callbacks:
  - {type: DPOMonitor}
  - {type: DPOCheckpointMonitor, prefix: p, save_checkpoint_steps: 9, keep_checkpoint_max: 1}
  - {type: SummaryMonitor, collect_freq: 2}
"""


def test_a_run_with_profiler_summary_schedule_and_fp32_states(golden, tmp_path):
    """6 steps: the rate rises for 2 steps, then falls to 0 over the 8 left of 10."""
    path = write_overlay(tmp_path / "mine.yaml", "finetune", MORE)
    result = run_script(EXAMPLE / "run_dpo.py", *arguments(golden, path, tmp_path / "out"))
    assert result.returncode == 0, result.stderr
    rates = [record["learning_rate"] for record in records(tmp_path / "out")]
    assert rates == pytest.approx([0, 5e-4, 1e-3, 8.75e-4, 7.5e-4, 6.25e-4], rel=1e-4)
    assert list((tmp_path / "out/profile/rank_0").rglob("trace_view.json"))
    summary = tmp_path / "out/summary/rank_0"
    assert [path for path in summary.iterdir() if path.stat().st_size > 100]
    assert not list(summary.rglob("*.ckpt"))  # MindSpore's default saves weights at each step
    (saved,) = (tmp_path / "out/checkpoint/rank_0").glob("*.ckpt")
    moments = {
        name: tensor.dtype
        for name, tensor in containers.open_tensors(saved).items()
        if "adam_" in name
    }
    assert moments
    assert set(moments.values()) == {"F32"}


GENERATION = {
    "do_sample": True,
    "top_k": 7,
    "top_p": 0.5,
    "temperature": 0.25,
    "repetition_penalty": 1.5,
    "min_length": 3,
    "min_new_tokens": 2,
    "max_new_tokens": 9,
    "renormalize_logits": True,
}


def test_generation_keys_reach_text_generation(golden):
    from mindformers.generation import GenerationConfig

    changes = {f"model.model_config.{key}": value for key, value in GENERATION.items()}
    model = load_model(golden, "predict", {**changes, "model.model_config.seq_length": 64})
    found = vars(GenerationConfig.from_model_config(model.config))
    assert {key: found[key] for key in GENERATION} == GENERATION


@pytest.mark.parametrize(
    ("limits", "most", "room"),
    [
        ({}, 512, 320),
        ({"max_decode_length": 128}, 128, 320),
        ({"max_decode_length": 128, "max_new_tokens": 9}, 9, 320),
        ({"max_length": 50}, 512, 50),
    ],
)
def test_every_limit_of_an_answer_holds(limits, most, room):
    from mindrlhf.inference import engine, sampling

    settings = {"model": {"model_config": {"seq_length": 320, **limits}}, "seed": 1}
    assert sampling.sampling_of(settings, {}).max_new_tokens == most
    assert engine.room_of(settings) == room
