"""Settings that are valid one by one but contradict each other, in groups by subject.

Each function takes the settings as config.load_settings returns them and yields one sentence for
each contradiction: what is wrong and how to fix it.
"""
from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

from mindrlhf.parallel import Plan, Settings

LORA_KEYS = {"rank", "alpha", "dropout", "target_modules"}
SAVING_KEYS = {"type", "prefix", "save_checkpoint_steps", "keep_checkpoint_max"}
WARM_UP = ("warmup_ratio", "warmup_steps", "warmup_epochs")  # give one of them
# keys that a schedule cannot do without; others need learning_rate
NEEDED_BY = {
    "CosineAnnealingLR": ("base_lr", "t_max"), "cosine_annealing": ("base_lr", "t_max"),
    "CosineAnnealingWarmRestarts": ("base_lr", "t_0"),
    "cosine_annealing_warm_restarts": ("base_lr", "t_0")}
HALF_PRECISION = ("use_flash_attention and use_past need compute_dtype bfloat16 or float16 on an "
                  "NPU: its operators do not support float32")


def lora_contradictions(settings: Settings) -> Iterator[str]:
    """LoRA adapters."""
    if "lora" not in settings:
        return
    if set(settings["lora"]) != LORA_KEYS:
        yield "lora needs rank, alpha, dropout and target_modules"
    if not settings["lora"].get("target_modules"):
        yield "lora.target_modules needs at least one of qkv, dense, mlp"
    if settings["run_mode"] != "finetune":
        yield "lora is for run_mode finetune: predict and score take --adapter_checkpoint"


def device_contradictions(settings: Settings) -> Iterator[str]:
    """Precisions that the device's operators support."""
    model = settings["model"]["model_config"]
    is_cpu = settings["context"]["device_target"] == "CPU"
    if is_cpu and "bfloat16" in (model.get("compute_dtype"), model.get("param_init_type")):
        yield "bfloat16 needs an NPU: set compute_dtype and param_init_type to float32 for the CPU"
    needs_half = model.get("use_flash_attention") or model.get("use_past")
    if not is_cpu and model.get("compute_dtype") == "float32" and needs_half:
        yield HALF_PRECISION


def attention_contradictions(settings: Settings) -> Iterator[str]:
    """Sizes of attention heads, and the requirements of flash attention."""
    model = settings["model"]["model_config"]
    if model.get("num_attention_heads", 1) % model.get("multi_query_group_num", 1):
        yield "num_attention_heads must be a multiple of multi_query_group_num"
    if not model.get("use_flash_attention"):
        return
    head = model.get("kv_channels", 16)
    if model["seq_length"] % 16:
        yield "flash attention needs a seq_length that is a multiple of 16"
    if head % 16 or head > 512:
        yield "flash attention needs kv_channels, the head size, to be a multiple of 16 up to 512"


def plan_contradictions(settings: Settings) -> Iterator[str]:
    """Sizes that the parallel plan cannot split."""
    model, plan = settings["model"]["model_config"], Plan.of(settings)
    parts = settings.get("parallel_config", {}).get("model_parallel", 1)
    if model.get("num_attention_heads", 1) % parts:
        yield "num_attention_heads must be a multiple of model_parallel"
    if model.get("use_flash_attention") and model.get("multi_query_group_num", 1) % parts:
        yield ("multi_query_group_num must be a multiple of model_parallel, because flash "
               "attention cannot split a key-value head")
    for size in ("hidden_size", "ffn_hidden_size"):
        if model.get(size, 0) % parts:
            yield f"{size} must be a multiple of model_parallel"
    if model.get("padded_vocab_size", 0) % plan.vocabulary_shards:
        yield "padded_vocab_size must be a multiple of data_parallel * model_parallel"
    if not plan.is_sharded and parts > 1:
        yield "model_parallel needs parallel.parallel_mode 1"


def mode_contradictions(settings: Settings) -> Iterator[str]:
    """Requirements of each run_mode, and of the key-value cache of prediction."""
    mode, model = settings["run_mode"], settings["model"]["model_config"]
    arch = "ChatGLM2ForConditionalGeneration" if mode == "predict" else "Glm4DPO"
    if settings["model"]["arch"]["type"] != arch:
        yield f"run_mode {mode} needs model.arch.type {arch}"
    if mode != "predict" and model.get("use_past"):
        yield "use_past is for run_mode predict"
    jit_level = settings["context"].get("jit_config", {}).get("jit_level", "O0")
    if model.get("use_past") and jit_level != "O0":
        yield ("use_past needs context.jit_config.jit_level O0: PagedAttention has no kernel for "
               "another level")
    if model.get("is_dynamic") and not model.get("use_past"):
        yield "is_dynamic needs use_past"


def callback_contradictions(settings: Settings) -> Iterator[str]:
    """The callbacks that training needs, each of them once and with its keys."""
    if settings["run_mode"] != "finetune":
        return
    entries = settings.get("callbacks") or []
    types = [entry["type"] for entry in entries]
    for name in ("DPOMonitor", "DPOCheckpointMonitor"):
        if name not in types:
            yield f"training needs an entry of type {name}"
    for name in sorted(set(types)):
        if types.count(name) > 1:
            yield f"{types.count(name)} entries of type {name}: keep one"
    for entry in entries:
        if entry["type"] == "DPOCheckpointMonitor" and set(entry) != SAVING_KEYS:
            yield f"DPOCheckpointMonitor needs {', '.join(sorted(SAVING_KEYS - set(entry)))}"


def loss_contradictions(settings: Settings) -> Iterator[str]:
    """Options that a DPO loss does not support."""
    dpo = settings["dpo"]
    loss_type = dpo.get("loss_type")
    if dpo.get("label_smoothing") and loss_type in ("hinge", "ipo"):
        yield f"dpo.label_smoothing has no effect on loss_type {loss_type}: set it to 0.0"
    if dpo.get("average_log_prob") and loss_type == "ipo":
        yield "dpo.loss_type ipo averages log-probs already: set average_log_prob to False"


def schedule_contradictions(settings: Settings) -> Iterator[str]:
    """What MindFormers' learning-rate schedules require."""
    if settings["run_mode"] != "finetune":
        return
    schedule = settings.get("lr_schedule") or {}
    name = schedule.get("type", "")
    needed = NEEDED_BY.get(name, ("learning_rate",))
    if missing := [key for key in needed if key not in schedule]:
        yield f"{name or 'the schedule'} needs {' and '.join(missing)}"
    warm_up = [key for key in WARM_UP if schedule.get(key)]
    if len(warm_up) > 1:
        yield f"{' and '.join(warm_up)} exclude each other: set one to 0"
    falls = schedule.get("lr_end", 1e-7) < schedule.get("learning_rate", 1.0)
    if name in ("PolynomialWithWarmUpLR", "polynomial") and not falls:
        yield f"{name} needs an lr_end below learning_rate"


def profile_contradictions(settings: Settings) -> Iterator[str]:
    """What MindFormers' profiler requires."""
    first, last = settings.get("profile_start_step", 1), settings.get("profile_stop_step", 10)
    if settings.get("profile") and last < first:
        yield f"profile_stop_step {last} is before profile_start_step {first}"
    if settings.get("profile_communication") and not settings.get("init_start_profile", True):
        yield "profile_communication needs init_start_profile True"


class Group(NamedTuple):
    """A check, and the sections of the YAML that it reads."""
    check: Callable[[Settings], Iterator[str]]
    sections: tuple[str, ...]


GROUPS = {
    "lora": Group(lora_contradictions, ("lora", "run_mode")),
    "device": Group(device_contradictions, ("context", "model")),
    "attention": Group(attention_contradictions, ("model",)),
    "plan": Group(plan_contradictions, ("model", "parallel", "parallel_config")),
    "run_mode": Group(mode_contradictions, ("run_mode", "model", "context")),
    "callbacks": Group(callback_contradictions, ("callbacks", "run_mode")),
    "lr_schedule": Group(schedule_contradictions, ("lr_schedule", "run_mode")),
    "profile": Group(profile_contradictions, (
        "profile", "profile_start_step", "profile_stop_step", "profile_communication")),
    "dpo": Group(loss_contradictions, ("dpo",))}


def find_contradictions(settings: Settings, unreadable: Collection[str] = ()) -> list[str]:
    """Find every contradiction.

    Args:
        settings: of a YAML, with all required keys.
        unreadable: sections with values of a wrong type; groups that read one are skipped.

    Returns:
        one line for each group: its subject and its contradictions.
    """
    found = []
    for subject, group in GROUPS.items():
        if not set(group.sections) & set(unreadable):
            sentences = list(group.check(settings))
            found += [f"{subject}: {'; '.join(sentences)}"] if sentences else []
    return found
