"""A rehearsal of a training YAML on CPU processes: shrink it, compare two runs, explain a failure.

scripts/rehearse.sh runs the commands in between.
"""
from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from mindrlhf import cli, config
from mindrlhf.arithmetic import ceil_div
from mindrlhf.checkpoints import containers, strict
from mindrlhf.parallel import Plan
from mindrlhf.recompute import recomputed_layers

REWARDS = ("rewards/chosen", "rewards/rejected")
METRICS = ("loss", *REWARDS, "grad_norm")
# largest difference that passes: relative for losses and gradient norms, relative to the largest
# reward for rewards, to the change by training for weights. float32 gives 1e-5. bfloat16 on an NPU
# moves an answer's log-prob by up to 2 nats (mindrlhf/check.py), its reward by beta times that; not
# tried on an NPU
TOLERANCE = {
    "CPU": {"loss": 1e-4, "grad_norm": 1e-4, "rewards/chosen": 1e-4, "rewards/rejected": 1e-4,
            "weights": 1e-2},
    "Ascend": {"loss": 0.1, "grad_norm": 0.2, "rewards/chosen": 0.5, "rewards/rejected": 0.5,
               "weights": 1.0}}
STEPS = 6  # optimizer steps of a run
# Settings that differ from the user's YAMLs. Sizes: they fit on a CPU, and a run takes minutes
SIZES = {"model.model_config.num_layers": 2, "model.model_config.hidden_size": 128,
         "model.model_config.ffn_hidden_size": 256, "model.model_config.seq_length": 128}
HEAD = "model.model_config.kv_channels"
# the smallest that flash attention takes: in the CPU's stand-in, and by MindFormers' page for NPUs
HEADS = {"CPU": 16, "Ascend": 64}
VOCABULARY = 528  # padded_vocab_size, at least
# types: MindSpore has no bfloat16 kernels for a CPU
TYPES = {"context.device_target": "CPU", "model.model_config.compute_dtype": "float32",
         "model.model_config.param_init_type": "float32", "dpo.reference_tolerance": 1e-3}
# a short run, with a learning rate that changes a random model enough to compare
RUN = {"runner_config.max_steps": STEPS, "runner_config.epochs": STEPS,
       "lr_schedule.learning_rate": 1e-3}
# the run in one process: no plan, no flash attention, no sink mode
ALONE = {"parallel.parallel_mode": 0, "parallel.enable_parallel_optimizer": False,
         "parallel.full_batch": False, "parallel_config.data_parallel": 1,
         "parallel_config.model_parallel": 1, "runner_config.sink_mode": False,
         "model.model_config.use_flash_attention": False, "context.jit_config": {}}
# prediction without a key-value cache
WITHOUT_CACHE = {"model.model_config.use_past": False, "model.model_config.is_dynamic": False,
                 "model.model_config.use_flash_attention": False, "context.jit_config": {}}
KEPT = ("num_attention_heads", "multi_query_group_num", "layernorm_epsilon", "rope_ratio")
# how a Python process reports an error; MindSpore puts a box of dashes around some
ERRORS = (r"^error: (.*)", r"^\w*Error: (.+)", r"^\w*Error:\s+(?:-+\n- .*\n-+\n)?(.*)")
WORKER_ENDED = r"^(worker \d+ ended with .*?);"  # the launcher's words


@dataclass(frozen=True)
class Rehearsal:
    """What is rehearsed.

    Attributes:
        path: of the user's training YAML.
        settings: of that YAML.
        cards: number of cards of the plan.
        device: "CPU" or "Ascend".
    """
    path: str
    settings: dict[str, Any]
    cards: int
    device: str

    @property
    def vocabulary(self) -> int:
        """padded_vocab_size, which all cards must be able to share."""
        return ceil_div(VOCABULARY, self.cards) * self.cards


class WeightDifference(NamedTuple):
    """The weight that differs most between two checkpoints, or why they cannot be compared."""
    name: str
    value: float


class Comparison(NamedTuple):
    """A run on many cards against one in a single process: lines to print, and what is wrong."""
    lines: list[str]
    problems: list[str]


def plan_problems(settings: dict[str, Any], cards: int) -> list[str]:
    """What makes the plan of a YAML illegal on so many cards."""
    model, plan = settings["model"]["model_config"], Plan.of(settings)
    parts = {"hidden_size": plan.model, "ffn_hidden_size": plan.model,
             "num_attention_heads": plan.model, "padded_vocab_size": plan.vocabulary_shards}
    problems = [f"{name} is {model[name]}, which {count} card(s) cannot share evenly"
                for name, count in parts.items() if model[name] % count]
    if plan.cards != cards:
        problems.append(f"data_parallel {plan.data} x model_parallel {plan.model} = {plan.cards} "
                        f"cards, not {cards}")
    return problems


def open_rehearsal(path: str, cards: int, device: str) -> Rehearsal:
    """Read the YAML to rehearse.

    Args:
        path: YAML of run_mode finetune.
        cards: number of cards.
        device: "CPU" or "Ascend".

    Raises:
        UserError: the YAML has no parallel plan.
    """
    settings = config.load_settings(path, run_mode="finetune")
    if not Plan.of(settings).is_sharded:
        raise cli.UserError(f"{path}: has parallel.parallel_mode 0, so there is no plan to "
                            "rehearse; set it to 1")
    return Rehearsal(path, settings, cards, device)


def write_settings(rehearsal: Rehearsal, process: str, predict: str, folder: str | Path) -> str:
    """Write the YAMLs of a rehearsal.

    many.yaml has the plan, one.yaml the same training in one process; process.yaml preprocesses;
    predict.yaml predicts, and plain.yaml predicts without a key-value cache.

    Args:
        rehearsal: what is rehearsed.
        process: the user's YAML of run_mode preprocess.
        predict: the user's YAML of run_mode predict.
        folder: where the YAMLs go.

    Returns:
        two lines about the rehearsal, for the screen.
    """
    settings, plan = rehearsal.settings, Plan.of(rehearsal.settings)
    chunk = settings["dpo"].get("logps_chunk_size")
    callbacks = [
        {**entry, "save_checkpoint_steps": 2} if "save_checkpoint_steps" in entry else entry
        for entry in settings["callbacks"]]
    some = 0 < recomputed_layers(settings) < settings["model"]["model_config"]["num_layers"]
    many = config.with_changes(_shrink(rehearsal, settings), {
        **RUN, "callbacks": callbacks,
        **({"recompute_config.recompute": 1} if some else {}),  # one of the two layers
        "dpo.logps_chunk_size": chunk and SIZES["model.model_config.seq_length"] * plan.data})
    rows = settings["runner_config"]["batch_size"] * plan.data
    kept = {f"model.model_config.{name}": settings["model"]["model_config"][name] for name in KEPT}
    processing = _shrink(rehearsal, config.load_settings(process, run_mode="preprocess"))
    predicting = config.with_changes(
        _shrink(rehearsal, config.load_settings(predict, run_mode="predict")),
        {**kept, "model.model_config.max_decode_length": 16})
    made = {"many": many,
            "one": config.with_changes(many, {**ALONE, "runner_config.batch_size": rows}),
            "process": config.with_changes(processing, kept), "predict": predicting,
            "plain": config.with_changes(predicting, WITHOUT_CACHE)}
    for name, content in made.items():
        (Path(folder) / f"{name}.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return describe_rehearsal(rehearsal, many)


def _shrink(rehearsal: Rehearsal, settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of a YAML with small sizes and, on a CPU, in float32; the rest is unchanged."""
    on_npu = {"context.max_device_memory": "4GB"}
    return config.with_changes(settings, {
        **SIZES, HEAD: HEADS[rehearsal.device],
        **(TYPES if rehearsal.device == "CPU" else on_npu),
        "model.model_config.padded_vocab_size": rehearsal.vocabulary})


def describe_rehearsal(rehearsal: Rehearsal, many: dict[str, Any]) -> str:
    """Two lines: what is rehearsed, and which settings differ from the YAML.

    Args:
        rehearsal: what is rehearsed.
        many: settings of the run on many cards.
    """
    settings = rehearsal.settings
    plan, model = Plan.of(settings), settings["model"]["model_config"]
    where = "CPU processes" if rehearsal.device == "CPU" else rehearsal.device
    before, after = dict(config.leaves(settings)), dict(config.leaves(many))
    values = [(key.split(".")[-1], before.get(key, "unset"), after.get(key, "unset"))
              for key in dict.fromkeys((*before, *after))]
    changes = ", ".join(f"{name} {old} -> {new}" for name, old, new in values if old != new)
    return (f"{rehearsal.path} on {rehearsal.cards} {where}: data_parallel {plan.data} x "
            f"model_parallel {plan.model}, optimizer sharding {plan.shards_optimizer}, "
            f"{model['num_attention_heads']} heads, {model['multi_query_group_num']} groups, "
            f"flash attention {model.get('use_flash_attention', False)}, "
            f"sink mode {settings['runner_config'].get('sink_mode', False)}, "
            f"LoRA {'lora' in settings}\ndifferent from the YAML: {changes}")


def training_steps(run: str | Path) -> list[dict[str, Any]]:
    """Metrics of each training step of a run."""
    lines = (Path(run) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["split"] == "train"]


def metric_differences(one: Sequence[Mapping[str, Any]],
                       many: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Largest relative difference of each metric over the steps of two runs.

    Rewards, which start at 0, are relative to the largest reward in the first run.
    """
    def over_steps(run: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
        return np.array([step[name] for step in run])

    result = {}
    largest = np.abs([over_steps(one, name) for name in REWARDS]).max()
    for name in METRICS:
        left, right = over_steps(one, name), over_steps(many, name)
        scale = largest if name in REWARDS else np.abs(left)
        same_steps = len(left) == len(right)
        result[name] = float((np.abs(left - right) / scale).max()) if same_steps else float("inf")
    return result


def weight_difference(one: Path, many: Path, before: Path) -> WeightDifference:
    """The weight that differs most after two trainings.

    Args:
        one: a checkpoint.
        many: another one.
        before: the checkpoint that both trainings started from.

    Returns:
        its name, and the norm of the difference over the norm of the change by training.
    """
    first, second, start = (containers.open_tensors(path) for path in (one, many, before))
    if problem := strict.describe_difference(
            {name: tensor.shape for name, tensor in first.items()},
            {name: tensor.shape for name, tensor in second.items()}):
        return WeightDifference(problem, float("inf"))

    def relative(name: str) -> float:
        begin, left, right = (stored[name].float32() for stored in (start, first, second))
        change = float(np.linalg.norm(left - begin))
        return float(np.linalg.norm(right - left)) / max(change, 1e-12)

    return max((WeightDifference(name, relative(name)) for name in first),
               key=lambda difference: difference.value)


def compare_runs(folder: str | Path, cards: int, device: str) -> Comparison:
    """Compare the run on many cards with that in one process.

    Args:
        folder: of the rehearsal.
        cards: number of cards.
        device: "CPU" or "Ascend".
    """
    folder, allowed = Path(folder), TOLERANCE[device]
    one, many = training_steps(folder / "one"), training_steps(folder / "many")
    if len(one) != STEPS or len(many) != STEPS:
        return Comparison([], [f"one process made {len(one)} steps, {cards} cards {len(many)}; "
                               f"{STEPS} were expected, see {folder}"])
    lines = [f"{f'over {STEPS} steps':<18}{'one process':>16}{f'{cards} cards':>16}"
             "   largest relative difference"]
    problems = []
    for metric, value in metric_differences(one, many).items():
        wrong = not value <= allowed[metric]  # NaN is wrong
        lines.append(f"  {metric:<16}{one[-1][metric]:>16.6f}{many[-1][metric]:>16.6f}   "
                     f"{value:.1e}{'  WRONG' if wrong else ''}")
        if wrong:
            problems.append(f"{metric} differs by {value:.1e} (allowed: {allowed[metric]:.0e})")
    name, weights = weight_difference(
        folder / "one/merged/merged.ckpt", folder / "many/merged/merged.ckpt", folder / "tiny.ckpt")
    lines.append(f"  merged weights: largest difference {weights:.1e} of the change by training, "
                 f"in {name}")
    if not weights <= allowed["weights"]:
        problems.append(f"merged weights differ by {weights:.1e} of their change, in {name}")
    different = different_answers(folder)
    lines.append("  answers before and after training, as in the predict YAML and without a cache: "
                 f"{'  '.join(different) + '  WRONG' if different else 'the same'}")
    problems += [f"the answer {answer} differs: see {folder}/answer_*" for answer in different]
    return Comparison(lines, problems)


def different_answers(folder: Path) -> list[str]:
    """Names of the answers that differ from the one that they must equal.

    Files are answer_NAME and answer_NAME_VARIANT; all variants must equal answer_NAME.
    """
    answers = {path.name.removeprefix("answer_"): path.read_text(encoding="utf-8")
               for path in sorted(folder.glob("answer_*"))}
    return [name for name, text in answers.items() if text != answers[name.split("_")[0]]]


def explain_failure(output: str | Path, log: str | Path) -> str:
    """Why a command failed, in a sentence or two.

    Args:
        output: file with its output.
        log: folder with the logs of its workers, if it had any.
    """
    output = Path(output)
    texts = [path.read_text(encoding="utf-8", errors="replace")
             for path in (output, *sorted(Path(log).glob("worker_*.log")))]
    for text in texts:
        for pattern in ERRORS:
            if match := re.search(pattern, text, re.MULTILINE):
                return (f"{output.stem} failed: {match[1].strip()}\n"
                        f"  full output: {output}, {log}/")
    ended = re.search(WORKER_ENDED, texts[0], re.MULTILINE)
    return (f"{output.stem} failed: {ended[1] if ended else 'its output names no error'}; "
            f"see {output} and {log}/")
