"""Settings of MindFormers' and MindRLHF's GLM-4 YAMLs that this project does not read itself.

schema.SCHEMA lists what is taken: used here or passed on to MindFormers. TABLE, VALUES and
CALLBACKS say what becomes of the rest: something else holds instead, which a command prints, or a
value is refused with the cure. A key in none of them is unknown, which is an error.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from mindrlhf.cli import shown
from mindrlhf.config.yaml_file import overlay
from mindrlhf.parallel import Settings
from mindrlhf.schema import Problem


class Rule(NamedTuple):
    """What becomes of a key.

    Attributes:
        instead: what holds instead; "" if the accepted value holds anyway.
        accepted: values that are taken; None: every value.
        cure: why another value is refused, and what to do.
    """
    instead: str
    accepted: tuple[Any, ...] | None = None
    cure: str = ""


class Replaced(NamedTuple):
    """A setting that was taken, but has no effect.

    Attributes:
        key: dotted; callbacks.TYPE.OPTION for an option of a callback.
        value: of the YAML.
        instead: what holds instead; "" if that is the same.
    """
    key: str
    value: Any
    instead: str


class Translation(NamedTuple):
    """A YAML in the project's keys.

    Attributes:
        settings: without the keys of TABLE.
        replaced: what was taken out of them.
        problems: values that are refused.
    """
    settings: Settings
    replaced: list[Replaced]
    problems: list[Problem]


def _each(rule: Rule, words: str, *prefixes: str) -> dict[str, Rule]:
    """A rule for several keys: each word behind each prefix."""
    return {prefix + word: rule for prefix in prefixes or ("",) for word in words.split()}


def _only(value: Any, cure: str, *more: Any) -> Rule:
    """A value that holds anyway; another one is refused."""
    return Rule("", (value, *more), cure)


IS_GLM4 = "GLM-4 has no other, and its weights need it; remove the key"
NO_EXPERTS = "GLM-4 has no experts; set it to 1"
DATA = Rule("the project reads its .mindrecord itself: runner_config.batch_size and epochs hold, "
            "and the last, partial batch is trained")
TOKENIZER = Rule("ChatGLM4Tokenizer's own special tokens and the project's chat template")
EVALUATION = Rule("--eval_dataset and EvalMonitor; without training: run_dpo.py --config "
                  "score_glm4_9b.yaml --score_data FILE")
AUTOTUNE = Rule("data are read without autotuning")
LOSS_SCALE = Rule("DPOTrainOneStepCell, which needs no loss scale and skips a step that is not "
                  "finite")
LOSS = ("dpo.beta and dpo.sft_weight (MindRLHF's loss is alpha x DPO + beta x SFT, with mean "
        "log-probs per token, and its beta also scales the rewards)")
LAYOUT = "GLM-4's weights have one layout; set it to False"

TABLE: dict[str, Rule] = {
    # a run
    "use_parallel": Rule("the number of workers that the launcher starts, parallel_mode and "
                         "parallel_config", (True, False), "give True or False"),
    "only_save_strategy": Rule("every parallel run saves its strategy", (False,),
                               "it would end before training; set it to False, and see "
                               "python -m mindrlhf.plan for what a run needs"),
    "micro_batch_interleave_num": _only(1, "a batch is not split; set it to 1 and see "
                                        "runner_config.gradient_accumulation_steps"),
    "src_strategy_path_or_dir": Rule("src_strategy, or --src_strategy"),
    "remote_save_url": Rule("results stay in output_dir"),
    **_each(EVALUATION, "do_eval eval_epoch_interval eval_step_interval metric eval_callbacks"),
    "eval_only": _only(False, "run_dpo.py --config score_glm4_9b.yaml --score_data FILE computes "
                       "the metrics of an evaluation without training; set it to False"),
    **_each(AUTOTUNE, "auto_tune filepath_prefix autotune_per_step"),
    "context.device_id": Rule("the launcher gives each worker its card"),
    # the model
    **_each(_only(True, IS_GLM4), "rmsnorm post_layer_norm add_qkv_bias multi_query_attention "
            "apply_query_key_layer_scaling attention_softmax_in_fp32", "model.model_config."),
    **_each(_only(False, IS_GLM4), "apply_residual_connection_post_layernorm add_bias_linear "
            "fp32_residual_connection", "model.model_config."),
    **_each(_only(False, LAYOUT), "qkv_concat mlp_concat", "model.model_config."),
    "model.model_config.quantization_bit": _only(0, "quantized weights cannot be trained; set it "
                                                 "to 0"),
    "model.model_config.pre_seq_len": _only(None, "prefix tuning is not offered; remove it and see "
                                            "`lora`", "None", 0),
    "model.model_config.prefix_projection": _only(False, "prefix tuning is not offered; set it to "
                                                  "False and see `lora`"),
    "model.model_config.bias_dropout_fusion": Rule("no dropout: there is nothing to fuse"),
    **_each(Rule("use_flash_attention"), "use_prompt_flash_attention use_incre_flash_attention",
            "model.model_config."),
    "model.model_config.use_llama_rope": Rule("MindFormers 1.3's rotary embedding of GLM-4"),
    "model.model_config.offset": Rule("one pipeline stage with all layers"),
    "model.model_config.checkpoint_name_or_path": Rule("--load_checkpoint"),
    **_each(Rule("the stop tokens and the padding of the tokenizer"), "eos_token_id pad_token_id "
            "bos_token_id gmask_token_id", "model.model_config."),
    **_each(Rule(LOSS), "alpha beta", "model.model_config."),
    "model.model_config.auto_map": TOKENIZER,
    # the data
    **_each(TOKENIZER, "return_tensors type", "processor."),
    **_each(TOKENIZER, "bos_token eos_token end_token mask_token gmask_token pad_token unk_token "
            "chat_template clean_up_tokenization_spaces do_lower_case padding_side remove_space "
            "additional_special_tokens model_max_length", "processor.tokenizer."),
    **_each(DATA, "input_columns output_columns num_parallel_workers python_multiprocessing "
            "drop_remainder batch_size repeat numa_enable prefetch_size", "train_dataset.",
            "train_dataset_task.dataset_config.", "eval_dataset.",
            "eval_dataset_task.dataset_config."),
    "train_dataset_task.type": DATA,
    **_each(DATA, "type dataset_dir shuffle", "train_dataset_task.dataset_config.data_loader."),
    "eval_dataset_task.type": EVALUATION,
    **_each(EVALUATION, "max_source_length max_target_length ignore_pad_token_for_loss seed "
            "data_loader.phase data_loader.version data_loader.origin_columns", "eval_dataset.",
            "eval_dataset_task.dataset_config."),
    **_each(EVALUATION, "type vocab_file clean_up_tokenization_spaces do_lower_case eos_token "
            "pad_token model_max_length padding_side remove_space additional_special_tokens",
            "eval_dataset.tokenizer.", "eval_dataset_task.dataset_config.tokenizer."),
    **_each(EVALUATION, "type dataset_dir shuffle",
            "eval_dataset_task.dataset_config.data_loader."),
    # the step
    "runner_wrapper.scale_sense": LOSS_SCALE,
    "runner_wrapper.local_norm": Rule("grad_norm of metrics.jsonl, the norm over all cards"),
    "runner_wrapper.use_clip_grad": _only(True, "gradients are always clipped; set it to True, and "
                                          "runner_wrapper.max_grad_norm as large as you like"),
    "optimizer.learning_rate": Rule("lr_schedule.learning_rate"),
    # the plan
    "parallel.strategy_ckpt_config.save_file": Rule("output_dir/strategy"),
    "parallel.parallel_optimizer_config.optimizer_weight_shard_size": _only(
        -1, "weights and optimizer state are sharded over all groups of cards; remove the key"),
    "parallel.gradients_mean": Rule("what parallel_mode needs: True with 0, False with 1"),
    "parallel_config.pipeline_stage": _only(1, "pipeline parallelism is not offered; set it to 1, "
                                            "and shard over data_parallel and model_parallel"),
    "parallel_config.micro_batch_num": Rule("one pipeline stage: no micro-batches"),
    "parallel_config.context_parallel": _only(1, "sequences are not sharded; set it to 1"),
    "parallel_config.expert_parallel": _only(1, NO_EXPERTS),
    **_each(_only(1, NO_EXPERTS), "expert_num num_experts_chosen", "moe_config."),
    **_each(Rule("GLM-4 has no experts"), "capacity_factor aux_loss_factor", "moe_config."),
}


class Value(NamedTuple):
    """A value that is replaced, of a key that schema.SCHEMA knows.

    Attributes:
        key: dotted.
        applies: whether it is replaced. Takes the value, the settings and the command's run modes.
        value: that holds instead.
        instead: the same in words.
    """
    key: str
    applies: Callable[[Any, Settings, tuple[str, ...]], bool]
    value: Any
    instead: str


VALUES = (
    Value("run_mode", lambda value, _, modes: value == "train" and "preprocess" in modes,
          "preprocess", "preprocess: this command does not train"),
    Value("model.arch.type", lambda value, settings, _: (
        value == "ChatGLM2ForConditionalGeneration" and settings.get("run_mode") != "predict"),
        "Glm4DPO", "Glm4DPO, the same network with the DPO loss"),
    Value("runner_wrapper.type", lambda value, *_: value == "MFTrainOneStepCell",
          "DPOTrainOneStepCell", LOSS_SCALE.instead),
    Value("runner_config.sink_size", lambda value, *_: type(value) is int and value > 1, 1,
          "1: every step is checked"),
    Value("eval_dataset.data_loader", lambda value, *_: (
        isinstance(value, dict) and value.get("type", "MindDataset") != "MindDataset"),
        {"type": "MindDataset"}, EVALUATION.instead),
    Value("parallel.parallel_mode", lambda value, settings, _: (
        value != 0 and settings.get("use_parallel") is False), 0,
        "0: use_parallel is False, so each worker computes alone or data-parallel"),
    Value("parallel_config", lambda _, settings, __: settings.get("use_parallel") is False, {},
          "use_parallel is False, so there is no plan"))


class Stand(NamedTuple):
    """The callback that takes the place of one of MindFormers'.

    Attributes:
        type: of the callback; "" for none.
        kept: options that it takes over, and the values of those that are not given.
        dropped: options that have no effect.
        instead: what holds instead.
    """
    type: str
    kept: Mapping[str, Any]
    dropped: tuple[str, ...]
    instead: str


CALLBACKS = {
    "MFLossMonitor": Stand("DPOMonitor", {"per_print_times": 1}, (
        "learning_rate", "micro_batch_num", "micro_batch_interleave_num", "origin_epochs",
        "dataset_size", "initial_epoch", "initial_step", "global_batch_size",
        "gradient_accumulation_steps"), "DPOMonitor"),
    "CheckpointMonitor": Stand("DPOCheckpointMonitor", {
        "prefix": "glm4_dpo", "save_checkpoint_steps": 200, "keep_checkpoint_max": 2}, (
        "directory", "save_checkpoint_seconds", "keep_checkpoint_per_n_minutes", "integrated_save",
        "async_save", "save_network_params", "save_trainable_params", "exception_save",
        "global_batch_size"),
        "DPOCheckpointMonitor: each card saves its shard, and its states are complete or absent"),
    "EvalCallBack": Stand("", {}, ("step_interval", "epoch_interval"), EVALUATION.instead),
    "ObsMonitor": Stand("", {}, (
        "src_dir", "target_dir", "step_upload_frequence", "epoch_upload_frequence", "keep_last"),
        TABLE["remote_save_url"].instead)}


def translate(settings: Settings, modes: tuple[str, ...]) -> Translation:
    """Replace what TABLE, VALUES and CALLBACKS list.

    Args:
        settings: merged, without checks; they stay as they are.
        modes: run modes of the command.
    """
    result = Translation(overlay(settings, {}), [], [])
    for each in VALUES:
        *parents, last = each.key.split(".")
        section: Any = result.settings
        for part in parents:
            section = section.get(part) if isinstance(section, dict) else None
        if isinstance(section, dict) and last in section:
            value = section[last]
            if each.applies(value, settings, modes) and value != each.value:
                section[last] = each.value
                result.replaced.append(Replaced(each.key, value, each.instead))
    strategy = settings.get("src_strategy_path_or_dir")
    if strategy and isinstance(strategy, str):
        result.settings.setdefault("src_strategy", strategy)
    _take_out(result.settings, "", result)
    _replace_callbacks(result, settings.get("eval_step_interval"))
    return result


def _take_out(section: Settings, prefix: str, result: Translation) -> None:
    """Take the keys of TABLE out of a section, and sections that are empty then."""
    for key, value in list(section.items()):
        name = f"{prefix}{key}"
        if rule := TABLE.get(name):
            del section[key]
            if rule.accepted is None or _is_among(value, rule.accepted):
                result.replaced.append(Replaced(name, value, rule.instead))
            else:
                result.problems.append(Problem(name, f"{shown(value)} is not supported: "
                                                     f"{rule.cure}"))
        elif isinstance(value, dict) and value:
            _take_out(value, f"{name}.", result)
            if not value:
                del section[key]


def _is_among(value: Any, accepted: tuple[Any, ...]) -> bool:
    """Whether a value is one of some; 1 is not True."""
    return any(value == each and type(value) is type(each) for each in accepted)


def _replace_callbacks(result: Translation, interval: Any) -> None:
    """Replace MindFormers' callbacks.

    Args:
        result: changed in place.
        interval: MindFormers' eval_step_interval, which an EvalMonitor takes over.
    """
    entries = result.settings.get("callbacks")
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        return
    given = [str(entry.get("type")) for entry in entries]
    kept: list[Settings] = []
    for name, entry in zip(given, entries):
        if name not in CALLBACKS:
            kept.append(entry)
            continue
        stand = CALLBACKS[name]
        options = {key: value for key, value in entry.items() if key != "type"}
        result.replaced.append(Replaced(f"callbacks.{name}", options, stand.instead))
        options = {key: value for key, value in options.items() if key not in stand.dropped}
        if set(options) - set(stand.kept):  # the schema reports the option that nobody knows
            kept.append({**options, "type": stand.type or name})
        elif stand.type and stand.type not in given:
            kept.append({"type": stand.type, **stand.kept, **options})
    if set(given) & set(CALLBACKS) and type(interval) is int and "EvalMonitor" not in given:
        kept.append({"type": "EvalMonitor", "eval_step_interval": interval})
    result.settings["callbacks"] = kept


def summarize(replaced: list[Replaced]) -> list[str]:
    """One line for each thing that holds instead: the keys, and what it is."""
    groups: dict[str, list[str]] = {}
    for each in replaced:
        if each.instead:
            groups.setdefault(each.instead, []).append(each.key)
    return [f"  {_shorten(keys)} -> {instead}" for instead, keys in groups.items()]


def _shorten(keys: list[str]) -> str:
    """Keys for a line: the first three, and the number of the others."""
    more = len(keys) - 3
    return ", ".join(keys[:3]) + (f" and {more} more" if more > 0 else "")
