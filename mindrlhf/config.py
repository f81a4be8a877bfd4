"""YAML settings: load, inherit, override, and report every problem in one error."""
import re
from pathlib import Path

import yaml

from mindrlhf.cli import UserError, existing_file
from mindrlhf.contradictions import find_contradictions
from mindrlhf.parallel import Plan
from mindrlhf.schema import REQUIRED, find_problems


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


def load_settings(path, *, run_mode, overrides=None):
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
    settings = with_changes(read_yaml(path), {key: value for key, value in (overrides or {}).items() if value is not None})
    wrong = list(find_problems(settings))
    problems = [str(problem) for problem in wrong]
    missing = [f"{key} is missing" for key in REQUIRED if get_setting(settings, key) is None]
    if not missing:
        unreadable = {problem.key.split(".")[0] for problem in wrong if not problem.is_unknown}
        problems += find_contradictions(settings, unreadable)
        modes = run_mode if isinstance(run_mode, tuple) else (run_mode,)
        if settings["run_mode"] not in modes:
            problems.append(f"run_mode is {settings['run_mode']}; this command needs {' or '.join(modes)}: give another "
                            "--config")
    if problems or missing:
        raise UserError(f"{path}: {'; '.join([*problems, *missing])}")
    return settings


def get_setting(settings, key, default=None):
    """Value of a dotted key."""
    for part in key.split("."):
        if not isinstance(settings, dict) or part not in settings:
            return default
        settings = settings[part]
    return settings


def with_changes(settings, changes):
    """A copy of settings with some changed: changes is a dict, dotted key -> value."""
    whole = overlay(settings, {})
    for key, value in changes.items():
        *parents, last = key.split(".")
        section = whole
        for part in parents:
            section = section.setdefault(part, {})
        section[last] = value
    return whole


def read_yaml(path, chain=()):
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
    return overlay(read_yaml(path.parent / base, (*chain, path)), own)


def overlay(base, own):
    """Dict with the keys of both; own wins, dicts are merged, lists are replaced. Neither is changed."""
    merged = {key: overlay(value, {}) if isinstance(value, dict) else value for key, value in base.items()}
    for key, value in own.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = overlay(base[key], value) if both else value
    return merged


def require_workers(settings, workers):
    """Raise UserError where a parallel plan does not fit the number of workers.

    Args:
        settings: as load() returns them.
        workers: how many processes the launcher started.
    """
    plan = Plan.of(settings, workers)
    if workers != plan.cards:
        raise UserError(f"parallel_config has data_parallel * model_parallel = {plan.cards}, but {workers} worker(s) run; "
                        "give the launcher that number, or change parallel_config")


def require_weights(settings):
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
    merged = overlay(settings, insisted)
    for key in ("eval_dataset", "load_checkpoint", "src_strategy", "resume_training"):  # run_dpo.py does these itself
        merged.pop(key, None)
    merged["callbacks"] = []
    merged["runner_config"].setdefault("sink_size", 1)  # MindFormers' own default is none
    if "runner_wrapper" in merged:  # MindFormers accumulates in semi-auto parallel mode only, our step everywhere
        steps = merged["runner_config"].pop("gradient_accumulation_steps", 1)
        merged["runner_wrapper"]["accumulation"] = steps
    return MindFormerConfig(**merged)
