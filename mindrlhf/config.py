"""YAML settings: load, inherit, override, and report every problem in one error."""
from __future__ import annotations

import contextlib
import re
from collections.abc import Hashable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import yaml

from mindrlhf.cli import UserError, existing_file, shown
from mindrlhf.contradictions import find_contradictions
from mindrlhf.parallel import Plan, Settings
from mindrlhf.recompute import recompute_for_mindformers
from mindrlhf.schema import REQUIRED, find_problems


class Loader(yaml.SafeLoader):
    """yaml.SafeLoader for settings: plain keys and values, limited in number and depth.

    It reads 5e-7 as a number, which YAML 1.1 reads as a string, and dates as strings. It refuses a
    key that appears twice. Aliases count as many values as they stand for.
    """

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.depth = 0
        self.counts: dict[int, int] = {}  # id of a complete node -> number of its values

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        """Read a node, or raise MarkedYAMLError if it is too large, too deep or contains itself."""
        mark = self.peek_event().start_mark
        self.depth += 1
        if self.depth > DEEPEST:
            raise yaml.MarkedYAMLError(problem=f"more than {DEEPEST} levels", problem_mark=mark)
        is_alias = self.check_event(yaml.AliasEvent)
        node: Any = super().compose_node(parent, index)
        self.depth -= 1
        if not is_alias:
            parts = node.value if isinstance(node, yaml.CollectionNode) else ()
            if isinstance(node, yaml.MappingNode):
                parts = [part for pair in parts for part in pair]
            self.counts[id(node)] = 1 + sum(self.counts[id(part)] for part in parts)
        elif id(node) not in self.counts:
            raise yaml.MarkedYAMLError(problem="an alias inside its own anchor", problem_mark=mark)
        if self.counts[id(node)] > MOST_VALUES:
            raise yaml.MarkedYAMLError(problem=f"more than {MOST_VALUES} values, those of aliases "
                                       "included", problem_mark=mark)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Build a value, or raise MarkedYAMLError if its text does not fit its type."""
        if node.tag not in PLAIN_TAGS:
            problem = f"the tag {shown(node.tag)} is not supported"
        elif node.tag.endswith((":int", ":float")) and len(node.value) > LONGEST_NUMBER:
            problem = f"a number of more than {LONGEST_NUMBER} digits"
        else:
            with contextlib.suppress(ValueError, KeyError, IndexError, TypeError, OverflowError):
                return super().construct_object(node, deep)
            problem = f"{shown(node.value)} does not fit the tag {node.tag}"
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Build a dict, or raise MarkedYAMLError if a key appears twice or is not a word."""
        if not isinstance(node, yaml.MappingNode):
            raise yaml.MarkedYAMLError(problem="keys and values expected",
                                       problem_mark=node.start_mark)
        seen = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            if key_node.tag != "tag:yaml.org,2002:str":
                raise yaml.MarkedYAMLError(problem="a key must be a word",
                                           problem_mark=key_node.start_mark)
            key = self.construct_object(key_node)
            if key in seen:
                raise yaml.MarkedYAMLError(problem=f"{shown(key)} appears twice",
                                           problem_mark=key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


# limits of a YAML; ours have about 100 values in 4 levels
LARGEST_YAML, MOST_VALUES, DEEPEST, LONGEST_NUMBER = 1 << 20, 10_000, 20, 100
MOST_PROBLEMS = 20  # that an error lists
PLAIN_TAGS = {f"tag:yaml.org,2002:{name}"
              for name in ("null", "bool", "int", "float", "str", "seq", "map")}
Loader.yaml_implicit_resolvers = {  # all but dates
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()}
Loader.add_implicit_resolver("tag:yaml.org,2002:float",
                             re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789"))


def load_settings(path: str | Path, *, run_mode: str | tuple[str, ...],
                  overrides: Mapping[str, Any] | None = None) -> Settings:
    """Load a YAML file: the settings of its base_config, then its own, then the command line's.

    Args:
        path: the YAML; its `base_config` is relative to it.
        run_mode: modes of the calling command; a YAML of another mode is refused.
        overrides: dotted key -> value; None keeps the value of the YAML.

    Returns:
        the merged settings.

    Raises:
        UserError: one line that lists every unknown key, invalid value and contradiction.
    """
    given = {key: value for key, value in (overrides or {}).items() if value is not None}
    settings = with_changes(read_yaml(path), given)
    wrong = list(islice(find_problems(settings), MOST_PROBLEMS + 1))
    problems = [str(problem) for problem in wrong[:MOST_PROBLEMS]]
    problems += ["and more"] if len(wrong) > MOST_PROBLEMS else []
    missing = [f"{key} is missing" for key in REQUIRED if get_setting(settings, key) is None]
    if not missing and len(wrong) <= MOST_PROBLEMS:
        unreadable = {problem.key.split(".")[0] for problem in wrong if not problem.is_unknown}
        problems += find_contradictions(settings, unreadable)
        modes = run_mode if isinstance(run_mode, tuple) else (run_mode,)
        if settings["run_mode"] not in modes:
            problems.append(f"run_mode is {settings['run_mode']}, but this command needs "
                            f"{' or '.join(modes)}: give another --config")
    if problems or missing:
        raise UserError(f"{path}: {'; '.join([*problems, *missing])}")
    return settings


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


def read_yaml(path: str | Path, chain: tuple[Path, ...] = ()) -> Settings:
    """Read a YAML and its base_config; keys and values are not checked.

    Args:
        path: the YAML.
        chain: the files whose base_config led here.

    Raises:
        UserError: a file is missing or not YAML, or a base_config leads back to itself.
    """
    path = Path(path)
    existing_file(path, f"the base_config of {chain[-1]}" if chain else "the YAML of --config")
    if path.resolve() in [link.resolve() for link in chain]:
        raise UserError(f"{path}: its base_config leads back to it; remove one base_config")
    if path.stat().st_size > LARGEST_YAML:
        raise UserError(f"{path}: has more than {LARGEST_YAML >> 20} MB; give a YAML of settings")
    try:
        own = yaml.load(path.read_text(encoding="utf-8"), Loader)  # noqa: S506  a SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else path
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{place}: not YAML ({problem})") from None
    if not isinstance(own, dict):
        raise UserError(f"{path}: expected keys and values, got {type(own).__name__}")
    base = own.pop("base_config", None)
    if base is None:
        return own
    if not isinstance(base, str):
        raise UserError(f"{path}: base_config is {shown(base)}; give the name of one YAML file")
    return overlay(read_yaml(path.parent / base, (*chain, path)), own)


def overlay(base: Settings, own: Settings) -> Settings:
    """Merge dicts into a new one: own wins, nested dicts are merged, lists are replaced."""
    merged = {key: overlay(value, {}) if isinstance(value, dict) else value
              for key, value in base.items()}
    for key, value in own.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = overlay(base[key], value) if both else value
    return merged


def callback_options(settings: Settings) -> dict[str, dict[str, Any]]:
    """The options of the YAML's callbacks: type -> option -> value."""
    return {entry["type"]: {key: value for key, value in entry.items() if key != "type"}
            for entry in settings.get("callbacks", [])}


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


def require_weights(settings: Settings) -> None:
    """Raise UserError if no weights are given, or shards without --auto_trans_ckpt."""
    path = settings.get("load_checkpoint")
    if not path:
        raise UserError("no weights given; --load_checkpoint takes the checkpoint that "
                        "convert_weight.py wrote")
    if Path(path).is_dir() and not settings.get("auto_trans_ckpt"):
        raise UserError(f"{path}: is a folder; shards of several cards, rank_0, rank_1, ..., need "
                        "--auto_trans_ckpt True and --src_strategy, the output/strategy of their "
                        "run")


def to_mindformers(settings: Settings) -> Any:
    """Convert settings to a MindFormerConfig, with the keys that MindFormers requires."""
    from mindformers.tools.register import MindFormerConfig
    required: Settings = {
        "micro_batch_interleave_num": 1, "moe_config": {}, "train_dataset_task": {},
        "train_dataset": {}, "model": {"model_config": {"checkpoint_name_or_path": ""}}}
    # without parallel_config, MindFormers ignores recompute_config
    if "parallel_config" in settings or "recompute_config" in settings:
        required["parallel_config"] = {"pipeline_stage": 1, "micro_batch_num": 1}
    merged = overlay(settings, required)
    # the project handles these itself
    for key in ("eval_dataset", "load_checkpoint", "src_strategy", "resume_training"):
        merged.pop(key, None)
    merged["callbacks"] = []
    if "recompute" in merged.get("recompute_config", {}):
        value = merged["recompute_config"]["recompute"]
        merged["recompute_config"]["recompute"] = recompute_for_mindformers(value)
    merged["runner_config"].setdefault("sink_size", 1)  # MindFormers' own default is none
    if "runner_wrapper" in merged:
        # MindFormers accumulates gradients only in semi-auto parallel mode; the project's training
        # step does in every mode
        steps = merged["runner_config"].pop("gradient_accumulation_steps", 1)
        merged["runner_wrapper"]["accumulation"] = steps
    return MindFormerConfig(**merged)
