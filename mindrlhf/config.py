"""YAML settings: load, inherit, override, and report every problem in one error."""
import difflib
import re
from pathlib import Path

import yaml

from mindrlhf.cli import UserError, existing_file

RUN_MODES = ("preprocess", "finetune", "predict")


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


# What a key may hold: a function from the value to None, or to what was expected instead.

def _boolean(value):
    return None if isinstance(value, bool) else "True or False"


def _text(value):
    return None if isinstance(value, str) else "a string"


def _whole(low, high=None):
    def check(value):
        good = type(value) is int and value >= low and (high is None or value <= high)
        return None if good else f"a whole number from {low}" + ("" if high is None else f" to {high}")
    return check


def _number(low, high=None, *, above=False):
    def check(value):
        good = type(value) in (int, float) and (value > low if above else value >= low) and (high is None or value < high)
        return None if good else f"a number {'above' if above else 'from'} {low}" + ("" if high is None else f", below {high}")
    return check


def _one_of(*choices):
    return lambda value: None if value in choices and type(value) in map(type, choices) else (
        "one of " + ", ".join(map(str, choices)))


def _list_of(check, length=None):
    def whole(value):
        good = isinstance(value, list) and (length is None or len(value) == length) and not any(map(check, value))
        return None if good else "a list" + (f" of {length}" if length else "") + f", each {check('?') or 'fitting'}"
    return whole


_DATASET = {"data_loader": {"type": _one_of("MindDataset"), "dataset_dir": _text, "shuffle": _boolean}}
_CALLBACKS = {
    "DPOMonitor": {"per_print_times": _whole(1), "max_bad_steps": _whole(1)},
    "EvalMonitor": {"eval_step_interval": _whole(0), "best_metric": _one_of("loss", "dpo_loss", "accuracy", "margin")},
    "DPOCheckpointMonitor": {"prefix": _text, "save_checkpoint_steps": _whole(1), "keep_checkpoint_max": _whole(1)}}


def _callbacks(value):
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        return "a list of entries with a type"
    for entry in value:
        if entry.get("type") not in _CALLBACKS:
            return f"entries of type {' or '.join(_CALLBACKS)}, not {entry.get('type')}"
        problems = []
        _check({key: item for key, item in entry.items() if key != "type"}, _CALLBACKS[entry["type"]],
               f"{entry['type']}.", problems)
        if problems:
            return f"entries without problems: {problems[0]}"
    return None


# Every key that somebody reads. MindFormers reads all but `dpo`; what it would read but GLM-4 fixes is not offered.
SCHEMA = {
    "seed": _whole(0, 2**32 - 1), "run_mode": _one_of(*RUN_MODES), "output_dir": _text, "load_checkpoint": _text,
    "src_strategy": _text, "auto_trans_ckpt": _boolean,
    "resume_training": lambda value: None if value is False else _text(value),
    "context": {"mode": _one_of(0), "device_target": _one_of("Ascend", "CPU"), "max_device_memory": _text,
                "max_call_depth": _whole(1), "memory_optimize_level": _one_of("O0", "O1"),
                "jit_config": {"jit_level": _one_of("O0", "O1", "O2")}, "save_graphs": _boolean, "save_graphs_path": _text},
    "model": {
        "model_config": {
            "type": _one_of("ChatGLM2Config"), "batch_size": _whole(1), "num_layers": _whole(1),
            "padded_vocab_size": _whole(1), "hidden_size": _whole(1), "ffn_hidden_size": _whole(1),
            "kv_channels": _whole(1), "num_attention_heads": _whole(1), "multi_query_group_num": _whole(1),
            "seq_length": _whole(2), "hidden_dropout": _one_of(0.0), "attention_dropout": _one_of(0.0),
            "layernorm_epsilon": _number(0, above=True), "rope_ratio": _number(0, above=True),
            "param_init_type": _one_of("float32", "float16", "bfloat16"),
            "compute_dtype": _one_of("float32", "float16", "bfloat16"), "layernorm_compute_type": _one_of("float32"),
            "rotary_dtype": _one_of("float32"), "use_past": _boolean, "is_dynamic": _boolean,
            "use_flash_attention": _boolean, "block_size": _whole(1), "num_blocks": _whole(1),
            "max_decode_length": _whole(1), "do_sample": _boolean, "top_k": _whole(0), "top_p": _number(0, above=True),
            "temperature": _number(0, above=True), "repetition_penalty": _number(0, above=True)},
        "arch": {"type": _one_of("Glm4DPO", "ChatGLM2ForConditionalGeneration")}},
    "trainer": {"type": _one_of("CausalLanguageModelingTrainer"), "model_name": _text},
    "processor": {"tokenizer": {"type": _one_of("ChatGLM4Tokenizer"), "vocab_file": _text}},
    "dpo": {"beta": _number(0, above=True), "loss_type": _one_of("sigmoid", "robust", "hinge", "ipo"),
            "label_smoothing": _number(0, 0.5), "sft_weight": _number(0), "average_log_prob": _boolean,
            "logps_chunk_size": _whole(0), "check_reference": _boolean, "reference_tolerance": _number(0, above=True)},
    "lora": {"rank": _whole(1), "alpha": _number(0, above=True), "dropout": _number(0, 1),
             "target_modules": _list_of(_one_of("qkv", "dense", "mlp"))},
    "train_dataset": _DATASET, "eval_dataset": _DATASET,
    "runner_config": {"epochs": _whole(1), "batch_size": _whole(1), "sink_mode": _boolean, "sink_size": _whole(1),
                      "max_steps": _whole(0), "gradient_accumulation_steps": _whole(1)},
    "runner_wrapper": {"type": _one_of("DPOTrainOneStepCell"), "max_grad_norm": _number(0, above=True)},
    "optimizer": {"type": _one_of("AdamW", "FP32StateAdamWeightDecay"), "betas": _list_of(_number(0, 1), 2),
                  "beta1": _number(0, 1), "beta2": _number(0, 1), "eps": _number(0, above=True),
                  "weight_decay": _number(0)},
    "lr_schedule": {"type": _one_of("CosineWithWarmUpLR", "ConstantWarmUpLR"), "learning_rate": _number(0, above=True),
                    "lr_end": _number(0), "warmup_ratio": _number(0, 1)},
    "parallel": {"parallel_mode": _one_of(0, 1), "gradients_mean": _boolean, "full_batch": _boolean,
                 "enable_parallel_optimizer": _boolean, "loss_repeated_mean": _boolean,
                 "search_mode": _one_of("sharding_propagation"), "enable_alltoall": _boolean},
    "parallel_config": {"data_parallel": _whole(1), "model_parallel": _whole(1), "vocab_emb_dp": _boolean,
                        "use_seq_parallel": _boolean, "gradient_aggregation_group": _whole(1)},
    "recompute_config": {"recompute": _boolean, "select_recompute": _boolean, "mp_comm_recompute": _boolean,
                         "parallel_optimizer_comm_recompute": _boolean, "recompute_slice_activation": _boolean},
    "callbacks": _callbacks,
}
HINTS = {"use_parallel": "it follows from the number of workers that the launcher starts",
         "only_save_strategy": "every parallel run saves its strategy"}
REQUIRED = ("seed", "run_mode", "output_dir", "context.device_target", "model.model_config.seq_length", "model.arch.type",
            "dpo.beta", "runner_config.batch_size", "parallel.parallel_mode", "processor.tokenizer.type")


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
    settings = read(path)
    for key, value in (overrides or {}).items():
        if value is not None:
            _set(settings, key, value)
    problems = []
    _check(settings, SCHEMA, "", problems)
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


def _set(settings, key, value):
    *parents, last = key.split(".")
    for part in parents:
        settings = settings.setdefault(part, {})
    settings[last] = value


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


def _check(settings, schema, prefix, problems):
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if key not in schema:
            close = difflib.get_close_matches(str(key), schema, 1)
            hint = HINTS.get(key) or (f"did you mean {close[0]}?" if close else f"known here: {', '.join(schema)}")
            problems.append(f"{name}: unknown key; {hint}")
        elif isinstance(schema[key], dict):
            if isinstance(value, dict):
                _check(value, schema[key], f"{name}.", problems)
            else:
                problems.append(f"{name}: a section expected, got {value!r}")
        elif expected := schema[key](value):
            problems.append(f"{name}: {expected} expected, got {value!r}")


def contradictions(settings):
    """Settings that cannot hold together, as a list of sentences."""
    mode, model, dpo = settings["run_mode"], settings["model"]["model_config"], settings["dpo"]
    plan, parallel = settings.get("parallel_config", {}), settings["parallel"]
    shards = plan.get("data_parallel", 1) * plan.get("model_parallel", 1)
    semi, cpu = parallel["parallel_mode"] == 1, settings["context"]["device_target"] == "CPU"
    arch = settings["model"]["arch"]["type"]
    lora = settings.get("lora", {})
    rules = [
        ("lora" in settings and set(lora) != {"rank", "alpha", "dropout", "target_modules"},
         "lora needs rank, alpha, dropout and target_modules"),
        ("lora" in settings and not lora.get("target_modules"), "lora.target_modules names none of qkv, dense, mlp"),
        ("lora" in settings and mode != "finetune", "lora is for run_mode finetune: predict takes --adapter_checkpoint"),
        (cpu and model.get("use_flash_attention"), "use_flash_attention needs an NPU: set it to False for the CPU"),
        (cpu and model.get("use_past"), "use_past needs an NPU: set it to False for the CPU"),
        (cpu and "bfloat16" in (model.get("compute_dtype"), model.get("param_init_type")),
         "bfloat16 needs an NPU: set compute_dtype and param_init_type to float32 for the CPU"),
        (cpu and get(settings, "runner_config.sink_mode"),
         "runner_config.sink_mode counts steps wrongly on the CPU: set it to False"),
        (model.get("use_flash_attention") and model["seq_length"] % 16, "flash attention needs a seq_length that 16 divides"),
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
    if settings["parallel"]["parallel_mode"] == 1 and workers != needed:
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
    if "runner_wrapper" in merged:  # MindFormers accumulates in semi-auto parallel mode only, our step everywhere
        steps = merged["runner_config"].pop("gradient_accumulation_steps", 1)
        merged["runner_wrapper"]["accumulation"] = steps
    return MindFormerConfig(**merged)
