"""Every key of the YAMLs, and what it may hold."""
from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any, NamedTuple

RUN_MODES = ("preprocess", "finetune", "predict")


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
        options = {key: item for key, item in entry.items() if key != "type"}
        for problem in find_problems(options, _CALLBACKS[entry["type"]], f"{entry['type']}."):
            return f"entries without problems: {problem}"
    return None


# Every key that somebody reads. MindFormers reads all but `dpo`; what it would read but GLM-4 fixes is not offered.
SCHEMA = {
    "seed": _whole(0, 2**32 - 1), "run_mode": _one_of(*RUN_MODES), "output_dir": _text, "load_checkpoint": _text,
    "src_strategy": _text, "auto_trans_ckpt": _boolean,
    "resume_training": lambda value: None if value is False else _text(value),
    "context": {"mode": _one_of(0), "device_target": _one_of("Ascend", "CPU"), "max_device_memory": _text,
                "max_call_depth": _whole(1), "memory_optimize_level": _one_of("O0", "O1"),
                "jit_config": {"jit_level": _one_of("O0", "O1", "O2"), "infer_boost": _one_of("on", "off")},
                "save_graphs": _boolean, "save_graphs_path": _text},
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
    "runner_config": {"epochs": _whole(1), "batch_size": _whole(1), "sink_mode": _boolean, "sink_size": _one_of(1),
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


class Problem(NamedTuple):
    """What is wrong with a key.

    Attributes:
        key: dotted.
        text: what is wrong, and the cure.
        is_unknown: the key itself is unknown; otherwise its value is of a wrong kind.
    """
    key: str
    text: str
    is_unknown: bool = False

    def __str__(self) -> str:
        return f"{self.key}: {self.text}"


def find_problems(settings: dict[str, Any], schema: dict[str, Any] = SCHEMA, prefix: str = "") -> Iterator[Problem]:
    """Compare the settings of a YAML, or of a section of it, with a schema.

    Args:
        settings: to compare.
        schema: key -> function as above, or the schema of a section.
        prefix: of the keys in problems: "" or "section.".
    """
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if key not in schema:
            close = difflib.get_close_matches(str(key), schema, 1)
            hint = HINTS.get(key) or (f"did you mean {close[0]}?" if close else f"known here: {', '.join(schema)}")
            yield Problem(name, f"unknown key; {hint}", is_unknown=True)
        elif not isinstance(schema[key], dict):
            if expected := schema[key](value):
                yield Problem(name, f"{expected} expected, got {value!r}")
        elif isinstance(value, dict):
            yield from find_problems(value, schema[key], f"{name}.")
        else:
            yield Problem(name, f"a section expected, got {value!r}")
