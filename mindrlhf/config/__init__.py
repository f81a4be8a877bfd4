"""YAML settings: load, inherit, override, and report every problem in one error.

`python -m mindrlhf.config show CONFIG` prints the result.
"""
from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from mindrlhf import cli
from mindrlhf.cli import UserError
from mindrlhf.config import ecosystem
from mindrlhf.config.yaml_file import overlay, read_document, read_yaml  # noqa: F401  read_yaml
from mindrlhf.contradictions import find_contradictions
from mindrlhf.parallel import Plan, Settings
from mindrlhf.recompute import recompute_for_mindformers
from mindrlhf.schema import DEFAULTS, REQUIRED, find_problems

MOST_PROBLEMS = 20  # that an error lists
# keys that MindFormers is not given, because the project handles them itself
HANDLED_HERE = ("eval_dataset", "load_checkpoint", "src_strategy", "resume_training")
OWN_SECTIONS = ("dpo", "lora")  # that only the project reads
# that MindFormers builds: type -> options that differ from its defaults. MindSpore's summary would
# save all weights at each of the first 19 steps, and fails on the graph of a data set
MINDFORMERS_CALLBACKS: dict[str, Settings] = {
    "ProfileMonitor": {},
    "SummaryMonitor": {"collect_specified_data": {"collect_landscape": None,
                                                  "collect_dataset_graph": False}}}


class Resolved(NamedTuple):
    """The settings of a YAML, and where they are from.

    Attributes:
        settings: merged, complete and checked.
        origins: dotted key -> "file:line".
        replaced: what of the YAML does not hold, and what does instead.
    """
    settings: Settings
    origins: dict[str, str]
    replaced: list[ecosystem.Replaced]


def load_settings(path: str | Path, *, run_mode: str | tuple[str, ...],
                  overrides: Mapping[str, Any] | None = None) -> Settings:
    """Load a YAML file: the settings of its base_config, then its own, then the command line's.

    Rank 0 prints what of a YAML of MindFormers or MindRLHF does not hold, and what does instead.

    Args:
        path: the YAML; its `base_config` is relative to it.
        run_mode: modes of the calling command; a YAML of another mode is refused.
        overrides: dotted key -> value; None keeps the value of the YAML.

    Returns:
        the merged settings.

    Raises:
        UserError: one line that lists every unknown key, invalid value and contradiction.
    """
    resolved = resolve(path, run_mode=run_mode, overrides=overrides)
    settings, lines = resolved.settings, ecosystem.summarize(resolved.replaced)
    if lines:
        lines.insert(0, f"{path}: settings that something else replaces (all: python -m "
                        f"mindrlhf.config show {path}):")
    if given := settings.get("load_checkpoint"):
        settings["load_checkpoint"] = find_checkpoint(given)
        lines += _explain_checkpoint(given, settings)
    if lines and cli.rank() == 0:
        # the stdout of predict is the answer
        stream = sys.stderr if settings["run_mode"] == "predict" else sys.stdout
        print(*lines, sep="\n", file=stream, flush=True)
    return settings


def resolve(path: str | Path, *, run_mode: str | tuple[str, ...],
            overrides: Mapping[str, Any] | None = None) -> Resolved:
    """Load a YAML file as load_settings() does, and tell where each setting is from."""
    given = {key: value for key, value in (overrides or {}).items() if value is not None}
    modes = run_mode if isinstance(run_mode, tuple) else (run_mode,)
    document = read_document(path)
    translated = ecosystem.translate(without_nulls(document.settings), modes)
    settings = with_changes(with_defaults(translated.settings), given)
    found = find_problems(settings, others=ecosystem.TABLE)
    wrong = [*translated.problems, *islice(found, MOST_PROBLEMS + 1)]
    problems = [str(problem) for problem in wrong[:MOST_PROBLEMS]]
    problems += ["and more"] if len(wrong) > MOST_PROBLEMS else []
    missing = [f"{key} is missing" for key in REQUIRED if get_setting(settings, key) is None]
    if not missing and len(wrong) <= MOST_PROBLEMS:
        unreadable = {problem.key.split(".")[0] for problem in wrong if not problem.is_unknown}
        problems += find_contradictions(settings, unreadable)
        if settings["run_mode"] not in modes:
            problems.append(f"run_mode is {settings['run_mode']}, but this command needs "
                            f"{' or '.join(modes)}: give another --config")
    if problems or missing:
        raise UserError(f"{path}: {'; '.join([*problems, *missing])}")
    return Resolved(settings, document.origins, translated.replaced)


def without_nulls(settings: Settings) -> Settings:
    """A copy without keys whose value is null, which removes an inherited key."""
    return {key: without_nulls(value) if isinstance(value, dict) else value
            for key, value in settings.items() if value is not None}


def with_defaults(settings: Settings) -> Settings:
    """A copy with schema.DEFAULTS where a key is missing."""
    return with_changes(settings, {
        key: value for key, value in DEFAULTS.items()
        if get_setting(settings, key) is None
        and isinstance(settings.get(key.split(".")[0], {}), dict)})


def get_setting(settings: Settings, key: str, default: Any = None) -> Any:
    """Value of a dotted key.

    Args:
        settings: of a YAML.
        key: "section.key".
        default: returned if the key is missing.
    """
    value: Any = settings
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            return default
        value = value[part]
    return value


def with_changes(settings: Settings, changes: Mapping[str, Any]) -> Settings:
    """A copy of settings with changes: dotted key -> value."""
    changed = overlay(settings, {})
    for key, value in changes.items():
        *parents, last = key.split(".")
        section = changed
        for part in parents:
            section = section.setdefault(part, {})
            if not isinstance(section, dict):  # find_problems reports it
                break
        else:
            section[last] = value
    return changed


def callback_options(settings: Settings) -> dict[str, dict[str, Any]]:
    """The options of the YAML's callbacks: type -> option -> value."""
    return {entry["type"]: {key: value for key, value in entry.items() if key != "type"}
            for entry in settings.get("callbacks", [])}


def leaves(settings: Settings, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values; an option of a callback is callbacks.TYPE.OPTION."""
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        elif key == "callbacks" and isinstance(value, list):
            for entry in value:
                options = {name: each for name, each in entry.items() if name != "type"}
                yield from leaves({entry["type"]: options}, "callbacks.")
        else:
            yield f"{prefix}{key}", value


def require_workers(settings: Settings, workers: int) -> None:
    """Raise UserError if the parallel plan does not fit the number of workers.

    Args:
        settings: as load_settings() returns them.
        workers: number of processes that the launcher started.
    """
    plan = Plan.of(settings, workers)
    if workers != plan.cards:
        raise UserError(f"parallel_config has data_parallel * model_parallel = {plan.cards}, but "
                        f"{workers} worker(s) run; start {plan.cards}, or change parallel_config")


def require_full_batch(settings: Settings, purpose: str, place: str | Path = "") -> None:
    """Raise UserError if a parallel plan would give each card a part of the batch.

    Args:
        settings: as load_settings() returns them.
        purpose: what the run is for, after "to".
        place: the YAML, for the message.
    """
    if Plan.of(settings).is_sharded and not settings["parallel"].get("full_batch"):
        raise UserError(f"{place and f'{place}: '}parallel.full_batch must be True to {purpose} "
                        "with a parallel plan, because every card gets the full batch")


def find_checkpoint(path: str) -> str:
    """The checkpoint that --load_checkpoint means: itself, or the merged file in a folder.

    Raises:
        UserError: it is a folder of another kind; the message names the command or the file.
    """
    folder = Path(path)
    if not path or not folder.is_dir() or any(folder.glob("rank_[0-9]*")):
        return path
    if (folder / "adapter_config.json").is_file():
        raise UserError(f"{path}: holds adapters of PEFT, which are not read; merge them with "
                        "PEFT, then convert the merged model with convert_weight.py")
    if (folder / "config.json").is_file():
        raise UserError(f"{path}: is a Hugging Face folder; convert it first: python "
                        f"convert_weight.py --model glm-n --input_path {path} --output_path "
                        "glm4_9b.ckpt")
    if (folder / "checkpoint_network").is_dir():
        raise UserError(f"{path}: is the output of a run; give {folder / 'checkpoint_network'}, or "
                        "merge that with transform_checkpoint.py")
    files = sorted(file for file in folder.iterdir() if file.suffix in (".ckpt", ".safetensors"))
    if len(files) == 1:
        return str(files[0])
    listed = ", ".join(file.name for file in files[:5]) or "neither a checkpoint nor rank_0, ..."
    raise UserError(f"{path}: is a folder that holds {listed}; give a file, such as merged.ckpt of "
                    "transform_checkpoint.py, or output/checkpoint_network of a run")


def _explain_checkpoint(given: str, settings: Settings) -> list[str]:
    """What is read where the command line may mean something else: at most one line each."""
    path, lines = settings["load_checkpoint"], []
    if path != given:
        lines.append(f"{given}: is a folder; reading {path}")
    is_cut = Path(path).is_file() and Plan.of(settings).is_sharded
    if is_cut and not settings.get("auto_trans_ckpt"):
        lines.append(f"auto_trans_ckpt False: {path} is one file, so each card reads its own part "
                     "of it all the same; the option is for folders of shards")
    return lines


def require_weights(settings: Settings) -> None:
    """Raise UserError if no weights are given, or shards without --auto_trans_ckpt."""
    path = settings.get("load_checkpoint")
    if not path:
        raise UserError("no weights given; --load_checkpoint takes the checkpoint that "
                        "convert_weight.py wrote")
    if Path(path).is_dir() and not settings.get("auto_trans_ckpt"):
        raise UserError(f"{path}: is a folder; shards of several cards, rank_0, rank_1, ..., need "
                        "--auto_trans_ckpt True and --src_strategy, the output/strategy of their "
                        "run; LoRA adapters belong to --adapter_checkpoint")


def to_mindformers(settings: Settings) -> Any:
    """Convert settings to a MindFormerConfig, with the keys that MindFormers requires."""
    from mindformers.tools.register import MindFormerConfig
    required: Settings = {
        "micro_batch_interleave_num": 1, "moe_config": {}, "train_dataset_task": {},
        "train_dataset": {}, "model": {"model_config": {"checkpoint_name_or_path": ""}}}
    # without parallel_config, MindFormers ignores recompute_config
    if "parallel_config" in settings or "recompute_config" in settings:
        required["parallel_config"] = {"pipeline_stage": 1, "micro_batch_num": 1}
    # MindFormers changes lists in place
    merged = copy.deepcopy(overlay(settings, required))
    for key in HANDLED_HERE:
        merged.pop(key, None)
    merged["callbacks"] = [overlay(MINDFORMERS_CALLBACKS[entry["type"]], entry)
                           for entry in merged.get("callbacks", [])
                           if entry["type"] in MINDFORMERS_CALLBACKS]
    if merged.get("profile"):
        merged = overlay(PROFILE, merged)
    again = merged.get("recompute_config", {})
    for key in {"recompute", "select_recompute", "select_comm_recompute"} & set(again):
        again[key] = recompute_for_mindformers(again[key])
    _fit_optimizer(merged)
    # runtime.SumOverWorkers.factor counts on it; otherwise gradients would have another scale
    plan = Plan.of(settings)
    merged["parallel"]["gradients_mean"] = not plan.is_sharded
    merged["parallel"]["enable_parallel_optimizer"] = plan.shards_optimizer  # never in mode 0
    merged["runner_config"].setdefault("sink_size", 1)  # MindFormers' own default is none
    if "runner_wrapper" in merged:
        # MindFormers accumulates gradients only in semi-auto parallel mode; the project's training
        # step does in every mode
        steps = merged["runner_config"].pop("gradient_accumulation_steps", 1)
        merged["runner_wrapper"]["accumulation"] = steps
    return MindFormerConfig(**merged)


# MindFormers' Trainer requires all of them
PROFILE = {"profile_start_step": 1, "profile_stop_step": 10, "init_start_profile": True,
           "profile_communication": False, "profile_memory": True}


def _fit_optimizer(merged: Settings) -> None:
    """Spell Adam's constants and the warm-up as their classes take them, in place."""
    optimizer, schedule = merged.get("optimizer", {}), merged.get("lr_schedule", {})
    for name in {"beta1", "beta2", "eps", "weight_decay"} & set(optimizer):
        optimizer[name] = float(optimizer[name])  # they refuse 0 and 1
    if "betas" in optimizer:
        optimizer["betas"] = [float(value) for value in optimizer["betas"]]
    if optimizer.get("type") == "FP32StateAdamWeightDecay" and "betas" in optimizer:
        for name, value in zip(("beta1", "beta2"), optimizer.pop("betas")):
            optimizer.setdefault(name, value)
    elif optimizer.get("type") == "AdamW" and {"beta1", "beta2"} & set(optimizer):
        first, second = optimizer.pop("betas", (0.9, 0.999))
        optimizer["betas"] = [optimizer.pop("beta1", first), optimizer.pop("beta2", second)]
    if schedule.get("warmup_steps") or schedule.get("warmup_epochs"):
        schedule.pop("warmup_ratio", None)  # 0 would take precedence
