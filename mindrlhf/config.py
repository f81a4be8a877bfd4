"""YAML settings: load, inherit, override, and report every problem in one error."""
import re
from pathlib import Path

import yaml

from mindrlhf.cli import UserError, existing_file
from mindrlhf.schema import REQUIRED, SCHEMA, check


class Loader(yaml.SafeLoader):
    """yaml.SafeLoader that reads 5e-7 as a number (YAML 1.1 wants 5.0e-7) and refuses a key that stands twice."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node)
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"'{key}' stands twice", problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789"))


def load(path, *, run_mode, overrides=None):
    """Settings of a YAML file: those of its base_config, its own over them, then the command line's.

    Args:
        path: the YAML; `base_config` in it names another, relative to it.
        run_mode: what the calling command does; a YAML of another mode is refused.
        overrides: dict, dotted key -> value; None means: as in the YAML.

    Returns:
        dict of dicts.

    Raises:
        UserError: one line that lists every unknown key, wrong value and contradiction.
    """
    settings = changed(read(path), {key: value for key, value in (overrides or {}).items() if value is not None})
    problems = []
    check(settings, SCHEMA, "", problems)
    problems += [f"{key} is missing" for key in REQUIRED if get(settings, key) is None]
    if not problems:
        problems = contradictions(settings)
        if settings["run_mode"] not in (run_mode if isinstance(run_mode, tuple) else (run_mode,)):
            problems.append(f"run_mode is {settings['run_mode']}; this command needs "
                            f"{' or '.join(run_mode) if isinstance(run_mode, tuple) else run_mode}: give another --config")
    if problems:
        raise UserError(f"{path}: {'; '.join(problems)}")
    return settings


def get(settings, key, default=None):
    """Value of a dotted key."""
    for part in key.split("."):
        if not isinstance(settings, dict) or part not in settings:
            return default
        settings = settings[part]
    return settings


def changed(settings, changes):
    """A copy of settings with some changed: changes is a dict, dotted key -> value."""
    whole = merge(settings, {})
    for key, value in changes.items():
        *parents, last = key.split(".")
        section = whole
        for part in parents:
            section = section.setdefault(part, {})
        section[last] = value
    return whole


def sharded(settings):
    """Whether a parallel plan spreads one model over all cards, or each computes with its own."""
    return settings["parallel"]["parallel_mode"] == 1


def read(path, chain=()):
    """A YAML over its base_config, unchecked: dict of dicts. chain: the files that led here."""
    path = Path(path)
    existing_file(path, "the YAML of --config" if not chain else f"the base_config of {chain[-1]}")
    if path.resolve() in [link.resolve() for link in chain]:
        raise UserError(f"{path}: its base_config leads back to it; let one of them stand alone")
    try:
        own = yaml.load(path.read_text(encoding="utf-8"), Loader)  # noqa: S506  a SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else path
        raise UserError(f"{place}: not YAML ({getattr(error, 'problem', None) or error})") from None
    if not isinstance(own, dict):
        raise UserError(f"{path}: keys and values expected, got {type(own).__name__}")
    base = own.pop("base_config", None)
    if base is None:
        return own
    if not isinstance(base, str):
        raise UserError(f"{path}: base_config is {base!r}; the name of one YAML file expected")
    return merge(read(path.parent / base, (*chain, path)), own)


def merge(base, own):
    """Dict with the keys of both; own wins, dicts are merged, lists are replaced. Neither is changed."""
    merged = {key: merge(value, {}) if isinstance(value, dict) else value for key, value in base.items()}
    for key, value in own.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = merge(base[key], value) if both else value
    return merged


def contradictions(settings):
    """Settings that cannot hold together, as a list of sentences."""
    mode, model, dpo = settings["run_mode"], settings["model"]["model_config"], settings["dpo"]
    plan = settings.get("parallel_config", {})
    shards = plan.get("data_parallel", 1) * plan.get("model_parallel", 1)
    semi, cpu = sharded(settings), settings["context"]["device_target"] == "CPU"
    arch = settings["model"]["arch"]["type"]
    lora = settings.get("lora", {})
    rules = [
        ("lora" in settings and set(lora) != {"rank", "alpha", "dropout", "target_modules"},
         "lora needs rank, alpha, dropout and target_modules"),
        ("lora" in settings and not lora.get("target_modules"), "lora.target_modules names none of qkv, dense, mlp"),
        ("lora" in settings and mode != "finetune", "lora is for run_mode finetune: predict takes --adapter_checkpoint"),
        (cpu and "bfloat16" in (model.get("compute_dtype"), model.get("param_init_type")),
         "bfloat16 needs an NPU: set compute_dtype and param_init_type to float32 for the CPU"),
        (not cpu and model.get("compute_dtype") == "float32" and (model.get("use_flash_attention") or model.get("use_past")),
         "use_flash_attention and use_past need compute_dtype bfloat16 or float16 on an NPU: its operators take no float32"),
        (model.get("use_flash_attention") and model["seq_length"] % 16, "flash attention needs a seq_length that 16 divides"),
        (model.get("use_flash_attention") and (model.get("kv_channels", 16) % 16 or model.get("kv_channels", 16) > 512),
         "flash attention needs kv_channels, the size of a head, to be a multiple of 16 up to 512"),
        (model.get("num_attention_heads", 1) % model.get("multi_query_group_num", 1),
         "num_attention_heads is no multiple of multi_query_group_num"),
        (model.get("num_attention_heads", 1) % plan.get("model_parallel", 1),
         "model_parallel does not divide num_attention_heads"),
        (model.get("use_flash_attention") and model.get("multi_query_group_num", 1) % plan.get("model_parallel", 1),
         "model_parallel does not divide multi_query_group_num, and flash attention cannot split a key-value head"),
        (semi and not plan.get("vocab_emb_dp") and model.get("padded_vocab_size", 0) % shards,
         "padded_vocab_size is no multiple of data_parallel * model_parallel"),
        (not semi and plan.get("model_parallel", 1) > 1, "model_parallel needs parallel.parallel_mode 1"),
        (mode == "predict" and arch != "ChatGLM2ForConditionalGeneration",
         "run_mode predict needs model.arch.type ChatGLM2ForConditionalGeneration"),
        (mode != "predict" and arch != "Glm4DPO", f"run_mode {mode} needs model.arch.type Glm4DPO"),
        (mode != "predict" and model.get("use_past"), "use_past is for run_mode predict"),
        (model.get("use_past") and get(settings, "context.jit_config.jit_level", "O0") != "O0",
         "use_past needs context.jit_config.jit_level O0: PagedAttention has a kernel for it alone"),
        (model.get("is_dynamic") and not model.get("use_past"), "is_dynamic needs use_past"),
        (dpo.get("label_smoothing") and dpo.get("loss_type") in ("hinge", "ipo"),
         f"dpo.label_smoothing does nothing for loss_type {dpo.get('loss_type')}: set it to 0.0"),
        (dpo.get("average_log_prob") and dpo.get("loss_type") == "ipo",
         "dpo.loss_type ipo takes means already: set average_log_prob to False"),
    ]
    return [sentence for broken, sentence in rules if broken]


def check_workers(settings, workers):
    """Raise UserError where a parallel plan does not fit the number of workers.

    Args:
        settings: as load() returns them.
        workers: how many processes the launcher started.
    """
    plan = settings.get("parallel_config", {})
    needed = plan.get("data_parallel", 1) * plan.get("model_parallel", 1)
    if sharded(settings) and workers != needed:
        raise UserError(f"parallel_config has data_parallel * model_parallel = {needed}, but {workers} worker(s) run; "
                        "give the launcher that number, or change parallel_config")


def check_weights(settings):
    """Raise UserError where no weights are named, or shards of several cards are not to be shared out anew."""
    path = settings.get("load_checkpoint")
    if not path:
        raise UserError("no weights given; --load_checkpoint names the checkpoint that convert_weight.py made")
    if Path(path).is_dir() and not settings.get("auto_trans_ckpt"):
        raise UserError(f"{path}: is a folder; shards of several cards, rank_0, rank_1, ..., need --auto_trans_ckpt True and "
                        "--src_strategy, the output/strategy of their run")


def to_mindformers(settings):
    """Settings as MindFormers takes them: a MindFormerConfig, with the keys that it insists on."""
    from mindformers.tools.register import MindFormerConfig
    insisted = {"micro_batch_interleave_num": 1, "moe_config": {}, "train_dataset_task": {}, "train_dataset": {},
                "model": {"model_config": {"checkpoint_name_or_path": ""}}}
    if "parallel_config" in settings:
        insisted["parallel_config"] = {"pipeline_stage": 1, "micro_batch_num": 1}
    merged = merge(settings, insisted)
    for key in ("eval_dataset", "load_checkpoint", "src_strategy", "resume_training"):  # run_dpo.py does these itself
        merged.pop(key, None)
    merged["callbacks"] = []
    merged["runner_config"].setdefault("sink_size", 1)  # MindFormers' own default is none
    if "runner_wrapper" in merged:  # MindFormers accumulates in semi-auto parallel mode only, our step everywhere
        steps = merged["runner_config"].pop("gradient_accumulation_steps", 1)
        merged["runner_wrapper"]["accumulation"] = steps
    return MindFormerConfig(**merged)
