"""Every key of the YAMLs, and the values that it accepts."""
from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple, Optional, Union

from mindrlhf.cli import shown

LARGEST_INTEGER = 2**31 - 1  # MindSpore keeps sizes and counts of steps in 32 bits
RUN_MODES = ("preprocess", "finetune", "predict", "score")

# What is expected instead of a value; None if the value is valid.
Check = Callable[[Any], Optional[str]]
Schema = dict[str, Union[Check, "Schema"]]  # key -> its check, or the schema of a section


def _boolean(value: Any) -> str | None:
    return None if isinstance(value, bool) else "True or False"


def _text(value: Any) -> str | None:
    if not isinstance(value, str):
        return "a string"
    # control characters, and surrogates, which no file name can have
    bad = any(ord(char) < 32 or 127 <= ord(char) < 160 or 0xD800 <= ord(char) < 0xE000
              for char in value)
    return "a string without control characters" if bad else None


def _name(value: Any) -> str | None:
    """Accept what is part of a file's name: it must not lead out of its folder."""
    good = isinstance(value, str) and re.fullmatch(r"\w[\w.-]*", value)
    return None if good and len(value.encode()) <= 64 else (
        "a plain name of at most 64 letters, digits, _, . and -, without a folder")


def _resumption(value: Any) -> str | None:
    good = value is False or (isinstance(value, str) and _text(value) is None)
    return None if good else "False, auto, or the path of a state"


def _integer(low: int, high: int | None = None) -> Check:
    """Accept integers from low to high; without high, to LARGEST_INTEGER."""
    limits = f"of at least {low}" if high is None else f"from {low} to {high}"
    expected = f"an integer {limits}"

    def check(value: Any) -> str | None:
        if high is None and type(value) is int and value > LARGEST_INTEGER:
            return f"an integer from {low} to {LARGEST_INTEGER}"
        good = type(value) is int and value >= low and (high is None or value <= high)
        return None if good else expected
    return check


def _number(low: float, high: float | None = None, *, above: bool = False) -> Check:
    """Accept finite numbers from low (with above: greater than low) to less than high."""
    expected = f"a number {'above' if above else 'of at least'} {low}"
    expected += "" if high is None else f" and below {high}"

    def check(value: Any) -> str | None:
        if type(value) in (int, float) and not abs(value) <= sys.float_info.max:  # NaN too
            return expected.replace("a number", "a finite number")
        good = (type(value) in (int, float) and (value > low if above else value >= low)
                and (high is None or value < high))
        return None if good else expected
    return check


def _steps_or_all(value: Any) -> str | None:
    good = type(value) is int and (value == -1 or 1 <= value <= LARGEST_INTEGER)
    return None if good else "a number of steps, or -1 for those of the run"


def _one_of(*choices: Any) -> Check:
    """Accept the choices; 1 is not True."""
    expected = "one of " + ", ".join(map(str, choices))

    def check(value: Any) -> str | None:
        return None if value in choices and type(value) in map(type, choices) else expected
    return check


def _list_of(check: Check, length: int | None = None) -> Check:
    """Accept lists whose items pass a check."""
    expected = "a list" + (f" of {length}" if length else "") + f", each {check('?') or 'valid'}"

    def check_list(value: Any) -> str | None:
        good = (isinstance(value, list) and (length is None or len(value) == length)
                and not any(map(check, value)))
        return None if good else expected
    return check_list


def _section(value: Any) -> str | None:
    """Accept a section whose keys MindSpore checks."""
    return None if isinstance(value, dict) else "a section"


def _operators(value: Any) -> str | None:
    """Accept what MindFormers takes for the recomputation of single operators."""
    if isinstance(value, dict) and all(isinstance(name, str) for name in value):
        counts = list(value.values())
    elif isinstance(value, list) and value and all(isinstance(name, str) for name in value):
        counts = []
    else:
        counts = [value]
    good = all(isinstance(count, bool) or _layer_count(count) is None for count in counts)
    return None if good else (r"True, False, a list of patterns such as mlp\.activation_func\.mul, "
                              "or patterns with a number of layers each")


def _layer_count(value: Any) -> str | None:
    """Accept what MindFormers takes for recomputation, and a plain number of layers."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    good = isinstance(value, bool) or (type(value) is int and value >= 0)
    return None if good else ("True, False, a number of layers from 0, or a list of one number, "
                              "because there is one pipeline stage")


_DATASET: Schema = {
    "data_loader": {"type": _one_of("MindDataset"), "dataset_dir": _text, "shuffle": _boolean}}
_CALLBACKS: dict[str, Schema] = {
    "DPOMonitor": {"per_print_times": _integer(1), "max_bad_steps": _integer(1),
                   "peak_tflops": _number(0, above=True)},
    "EvalMonitor": {"eval_step_interval": _integer(0),
                    "best_metric": _one_of(
                        "loss", "dpo_loss", "rewards/accuracies", "rewards/margins")},
    "DPOCheckpointMonitor": {"prefix": _name, "save_checkpoint_steps": _integer(1),
                             "keep_checkpoint_max": _integer(1)},
    # of MindFormers
    "ProfileMonitor": {"start_step": _integer(1), "stop_step": _integer(1), "output_path": _text,
                       "start_profile": _boolean, "profile_communication": _boolean,
                       "profile_memory": _boolean},
    "SummaryMonitor": {"summary_dir": _text, "collect_freq": _integer(1),
                       "collect_specified_data": _section, "keep_default_action": _boolean,
                       "custom_lineage_data": _section, "collect_tensor_freq": _integer(1),
                       "max_file_size": _integer(1), "export_options": _section}}
# of MindFormers, and its short names for them
LR_SCHEDULES = (
    "ConstantWarmUpLR", "LinearWithWarmUpLR", "CosineWithWarmUpLR",
    "CosineWithRestartsAndWarmUpLR", "PolynomialWithWarmUpLR", "CosineAnnealingLR",
    "CosineAnnealingWarmRestarts", "constant_with_warmup", "linear", "cosine",
    "cosine_with_restarts", "polynomial", "cosine_annealing", "cosine_annealing_warm_restarts")


def _callbacks(value: Any) -> str | None:
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        return "a list of entries with a type"
    for entry in value:
        if not isinstance(entry.get("type"), str) or entry["type"] not in _CALLBACKS:
            return f"entries of type {' or '.join(_CALLBACKS)}, not {shown(entry.get('type'))}"
        options = {key: item for key, item in entry.items() if key != "type"}
        for problem in find_problems(options, _CALLBACKS[entry["type"]], f"{entry['type']}."):
            return f"entries without problems: {problem}"
    return None


# Every key that is read; MindFormers reads all but `dpo`. Its keys whose value GLM-4 fixes are not
# accepted.
SCHEMA: Schema = {
    "seed": _integer(0, 2**32 - 1), "run_mode": _one_of(*RUN_MODES), "output_dir": _text,
    "load_checkpoint": _text, "src_strategy": _text, "auto_trans_ckpt": _boolean,
    "resume_training": _resumption,
    "profile": _boolean, "profile_start_step": _integer(1), "profile_stop_step": _integer(1),
    "init_start_profile": _boolean, "profile_communication": _boolean, "profile_memory": _boolean,
    "profile_output": _text,
    "context": {
        "mode": _one_of(0), "device_target": _one_of("Ascend", "CPU"), "max_device_memory": _text,
        "max_call_depth": _integer(1), "memory_optimize_level": _one_of("O0", "O1"),
        "jit_config": {"jit_level": _one_of("O0", "O1", "O2"), "infer_boost": _one_of("on", "off")},
        "ascend_config": {
            "precision_mode": _text, "jit_compile": _boolean, "atomic_clean_policy": _one_of(0, 1),
            "matmul_allow_hf32": _boolean, "conv_allow_hf32": _boolean,
            "exception_dump": _one_of("0", "1", "2"), "op_precision_mode": _text,
            "op_debug_option": _text, "ge_options": _section, "parallel_speed_up_json_path": _text,
            "host_scheduling_max_threshold": _integer(0), "topo_order": _section},
        "enable_graph_kernel": _boolean, "graph_kernel_flags": _text,
        "deterministic": _one_of("ON", "OFF"), "enable_compile_cache": _boolean,
        "compile_cache_path": _text, "op_timeout": _integer(0), "mempool_block_size": _text,
        "memory_offload": _one_of("ON", "OFF"), "runtime_num_threads": _integer(0),
        "inter_op_parallel_num": _integer(0), "print_file_path": _text,
        "save_graphs": _one_of(False, True, 0, 1, 2, 3), "save_graphs_path": _text},
    "model": {
        "model_config": {
            "type": _one_of("ChatGLM2Config"), "batch_size": _integer(1), "num_layers": _integer(1),
            "padded_vocab_size": _integer(1), "hidden_size": _integer(1),
            "ffn_hidden_size": _integer(1), "kv_channels": _integer(1),
            "num_attention_heads": _integer(1), "multi_query_group_num": _integer(1),
            "seq_length": _integer(2), "hidden_dropout": _one_of(0.0),
            "attention_dropout": _one_of(0.0), "layernorm_epsilon": _number(0, above=True),
            "rope_ratio": _number(0, above=True),
            "param_init_type": _one_of("float32", "float16", "bfloat16"),
            "compute_dtype": _one_of("float32", "float16", "bfloat16"),
            "layernorm_compute_type": _one_of("float32"), "rotary_dtype": _one_of("float32"),
            "use_past": _boolean, "is_dynamic": _boolean, "use_flash_attention": _boolean,
            "block_size": _integer(1), "num_blocks": _integer(1), "max_decode_length": _integer(1),
            "do_sample": _boolean, "top_k": _integer(0), "top_p": _number(0, above=True),
            "temperature": _number(0, above=True), "repetition_penalty": _number(0, above=True),
            "max_length": _integer(1), "max_new_tokens": _integer(1), "min_length": _integer(0),
            "min_new_tokens": _integer(1), "renormalize_logits": _boolean},
        "arch": {"type": _one_of("Glm4DPO", "ChatGLM2ForConditionalGeneration")}},
    "trainer": {"type": _one_of("CausalLanguageModelingTrainer"), "model_name": _name},
    "processor": {"tokenizer": {"type": _one_of("ChatGLM4Tokenizer"), "vocab_file": _text}},
    "dpo": {
        "beta": _number(0, above=True), "loss_type": _one_of("sigmoid", "robust", "hinge", "ipo"),
        "label_smoothing": _number(0, 0.5), "sft_weight": _number(0), "average_log_prob": _boolean,
        "logps_chunk_size": _integer(0), "check_reference": _boolean,
        "reference_tolerance": _number(0, above=True)},
    "lora": {
        "rank": _integer(1), "alpha": _number(0, above=True), "dropout": _number(0, 1),
        "target_modules": _list_of(_one_of("qkv", "dense", "mlp"))},
    "train_dataset": _DATASET, "eval_dataset": _DATASET,
    "runner_config": {
        "epochs": _integer(1), "batch_size": _integer(1), "sink_mode": _boolean,
        "sink_size": _one_of(1), "max_steps": _integer(0),
        "gradient_accumulation_steps": _integer(1)},
    "runner_wrapper": {
        "type": _one_of("DPOTrainOneStepCell"), "max_grad_norm": _number(0, above=True)},
    "optimizer": {
        "type": _one_of("AdamW", "FP32StateAdamWeightDecay"),
        "betas": _list_of(_number(0, 1, above=True), 2), "beta1": _number(0, 1, above=True),
        "beta2": _number(0, 1, above=True), "eps": _number(0, above=True),
        "weight_decay": _number(0)},
    "lr_schedule": {
        "type": _one_of(*LR_SCHEDULES), "learning_rate": _number(0, above=True),
        "lr_end": _number(0), "warmup_ratio": _number(0, 1), "warmup_steps": _integer(0),
        "warmup_epochs": _number(0), "warmup_lr_init": _number(0), "total_steps": _steps_or_all,
        "decay_steps": _integer(1), "num_cycles": _number(0, above=True),
        "power": _number(0, above=True), "base_lr": _number(0, above=True), "t_max": _integer(1),
        "t_0": _integer(1), "t_mult": _integer(1), "eta_min": _number(0)},
    "parallel": {
        "parallel_mode": _one_of(0, 1), "full_batch": _boolean,
        "enable_parallel_optimizer": _boolean, "loss_repeated_mean": _boolean,
        "search_mode": _one_of("sharding_propagation"), "enable_alltoall": _boolean,
        "parallel_optimizer_config": {
            "gradient_accumulation_shard": _boolean, "parallel_optimizer_threshold": _integer(0)},
        "strategy_ckpt_config": {"load_file": _text, "only_trainable_params": _boolean}},
    "parallel_config": {
        "data_parallel": _integer(1), "model_parallel": _integer(1), "vocab_emb_dp": _boolean,
        "use_seq_parallel": _boolean, "gradient_aggregation_group": _integer(1)},
    "recompute_config": {
        "recompute": _layer_count, "select_recompute": _operators,
        "select_comm_recompute": _operators, "mp_comm_recompute": _boolean,
        "parallel_optimizer_comm_recompute": _boolean, "recompute_slice_activation": _boolean},
    "callbacks": _callbacks,
}
REQUIRED = (
    "seed", "run_mode", "output_dir", "context.device_target", "model.model_config.seq_length",
    "model.arch.type", "parallel.parallel_mode", "processor.tokenizer.type",
    "processor.tokenizer.vocab_file")
# of keys that a YAML may leave out; MindFormers' YAMLs have no section dpo
DEFAULTS = {
    "dpo.beta": 0.1, "dpo.loss_type": "sigmoid", "dpo.label_smoothing": 0.0, "dpo.sft_weight": 0.0,
    "dpo.average_log_prob": False, "dpo.logps_chunk_size": 1024, "dpo.check_reference": True,
    "dpo.reference_tolerance": 1.0, "runner_config.batch_size": 1}


class Problem(NamedTuple):
    """What is wrong with a key.

    Attributes:
        key: dotted.
        text: what is wrong and how to fix it.
        is_unknown: the key itself is unknown; otherwise its value is invalid.
    """
    key: str
    text: str
    is_unknown: bool = False

    def __str__(self) -> str:
        return f"{self.key}: {self.text}"


def find_problems(settings: dict[str, Any], schema: Schema = SCHEMA, prefix: str = "",
                  others: Collection[str] = ()) -> Iterator[Problem]:
    """Compare the settings of a YAML, or of a section, with a schema.

    Args:
        settings: key -> value, or the settings of a section.
        schema: key -> check, or the schema of a section.
        prefix: of the keys in problems: "" or "section.".
        others: more dotted keys that may be meant by an unknown one.

    Yields:
        a problem for each key that is unknown or has an invalid value.
    """
    for key, value in settings.items():
        name = f"{prefix}{key if len(str(key)) <= 80 else f'{key[:77]}...'}"
        expected = schema.get(key)
        if expected is None:
            hint = _hint(key, schema, prefix, others)
            yield Problem(name, f"unknown key; {hint}", is_unknown=True)
        elif not isinstance(expected, dict):
            if wanted := expected(value):
                yield Problem(name, f"expected {wanted}, got {shown(value)}")
        elif isinstance(value, dict):
            yield from find_problems(value, expected, f"{name}.", others)
        else:
            yield Problem(name, f"expected a section, got {shown(value)}")


def _hint(key: str, schema: Schema, prefix: str, others: Collection[str]) -> str:
    """What may be meant by an unknown key of a section."""
    beside = {name[len(prefix):].split(".")[0] for name in others if name.startswith(prefix)}
    close = difflib.get_close_matches(str(key)[:80], {**schema, **dict.fromkeys(beside)}, 1)
    return f"did you mean {close[0]}?" if close else f"known here: {', '.join(schema)}"
