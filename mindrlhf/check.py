"""Does this machine compute GLM-4 and its DPO loss as PyTorch does? Run it first on new NPUs.

A tiny GLM-4 with recorded results (tests/golden/case_2) runs through the code and the settings of a
9B model; only the sizes differ. Each line says how far the machine is off and how much is allowed.
Then two workers rehearse the commands: a parallel plan in sink mode, a stop and a resume, a merge,
and prediction with a KV cache. Exit status: 0 if everything passes, 1 if something fails, 2 if the
check cannot run.
"""
from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mindrlhf import cli, config
from mindrlhf.data import mindrecord, preference
from mindrlhf.data.features import TokenGroup, TokenPair, row_inputs, tokenize_pair
from mindrlhf.models.glm4 import sidecar
from mindrlhf.models.glm4.model_config import ModelConfig
from mindrlhf.records import COLUMNS, INPUTS, SIDES, StepOutput

if TYPE_CHECKING:
    from mindspore import Tensor, nn

    from mindrlhf.data.reference import Scorer
    from mindrlhf.models.glm4.tokenizer import Glm4Tokenizer

EXAMPLE = """\
  python -m mindrlhf.check                      # on two NPUs, some minutes
  python -m mindrlhf.check --workers 1          # on one NPU: without the commands in a plan
  python -m mindrlhf.check --device_target CPU  # anywhere, in float32, with stand-in operators"""
ROOT = Path(__file__).resolve().parents[1]
TEXTS = ROOT / "tests" / "golden" / "case_1"  # pairs, their token ids, the tokenizer
CASE = ROOT / "tests" / "golden" / "case_2"  # weights with heads of 128, and PyTorch's results
SEQ_LEN = 320  # positions of a row; flash attention needs a multiple of 16
LEAK = 1e-3  # nats that a log-prob may move when masked tokens change; exact arithmetic gives 0
LN_2 = math.log(2)


@dataclass(frozen=True)
class Precision:
    """A set of numeric types and operators to check, and the errors that it is allowed."""
    name: str  # on the screen
    yaml: str  # name of the YAMLs with its settings, without process_ or finetune_
    logps: float  # nats, for the log-prob of an answer
    loss: float  # nats, for the DPO loss of all pairs
    norm: float  # relative, for the norm of the gradient
    changes: dict[str, Any] = field(default_factory=dict)  # dotted key -> value, over the YAML's


ONE_CARD = {"parallel.full_batch": False, "parallel.enable_parallel_optimizer": False,
            "parallel_config.data_parallel": 1, "parallel_config.model_parallel": 1,
            "dpo.logps_chunk_size": 128}  # several chunks a row
IN_FLOAT32 = {f"model.model_config.{name}": "float32"
              for name in ("compute_dtype", "param_init_type")}
# float32 on a CPU is off by 1.7e-4 nats, 3e-6 in the loss and 3e-6 of the norm. An NPU sums in
# another order and has its own exp: it is allowed ten times as much. float16 is off by 0.08 nats
# (answers have 84 to 899), 0.0008 and 0.04 %. bfloat16 has 3 bits less, so 8 times that: 0.7 nats
# (emulated: 0.25), 0.006 and 0.3 %. At least twice that is allowed; benchmarks/bfloat16_check.py.
PRECISIONS = {
    "CPU": (
        Precision("float32, the CPU's cells", "glm4_tiny.yaml", logps=3e-4, loss=1e-4, norm=1e-4),
        Precision("float32 and flash attention, the NPU's cells", "glm4_9b.yaml",
                  logps=3e-4, loss=1e-4, norm=1e-4, changes={**ONE_CARD, **IN_FLOAT32})),
    "Ascend": (
        Precision("float32", "glm4_tiny.yaml", logps=3e-3, loss=1e-3, norm=1e-3),
        Precision("bfloat16 and flash attention, as in the YAMLs of GLM-4-9B", "glm4_9b.yaml",
                  logps=2.0, loss=0.05, norm=0.05, changes=ONE_CARD))}
LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "target_modules": ["qkv", "dense", "mlp"]}
PLAN = ("base_config: {base}\nparallel_config: {{data_parallel: 1, model_parallel: 2}}\n"
        "runner_config: {{batch_size: 2}}\n")


class Checklist:
    """Prints a line for each check, and remembers whether all have passed."""

    def __init__(self) -> None:
        self.passed = True

    def line(self, good: Any, what: str, found: str) -> None:
        """Print one check: whether it passed, the claim that was checked, and what was found."""
        self.passed &= bool(good)
        cli.say(f"  {'pass' if good else 'FAIL'}  {what:<52}{found}")

    def off(self, what: str, error: float, allowed: float, unit: str) -> None:
        """Check that an error is at most what is allowed, both in the same unit. NaN fails."""
        self.line(error <= allowed, what, f"off by {error:.2g} {unit} (allowed: {allowed:g})")

    @contextlib.contextmanager
    def guard(self, what: str) -> Iterator[None]:
        """Turn an exception into a failed check, so that the others still run."""
        try:
            yield
        except Exception as error:  # whatever a device or a kernel may raise
            reason = (str(error).strip() or "-").splitlines()[0][:200]
            self.line(False, what, f"{type(error).__name__}: {reason}")


@dataclass(frozen=True)
class Golden:
    """A tiny GLM-4, N preference pairs, and PyTorch's results on them."""
    weights: Path  # a checkpoint, as convert_weight.py writes it
    sizes: ModelConfig
    tokenizer: Glm4Tokenizer
    texts: list[Any]  # the pairs
    tokens: list[TokenPair]  # their token ids
    logps: np.ndarray  # float64 (N, 2), nats: of the chosen and the rejected answers
    references: np.ndarray  # float64 (N, 2), nats: of another model, which serves as the reference
    loss: float  # DPO loss of the model with these references
    norm: float  # of its gradient


def open_golden(folder: str | Path) -> Golden:
    """Read tests/golden; the converted weights are written to a folder."""
    from mindrlhf.models.glm4 import convert
    from mindrlhf.models.glm4.tokenizer import Glm4Tokenizer
    weights = Path(folder) / "golden.ckpt"
    convert.to_mindspore(str(CASE / "hf_glm"), str(weights), dtype="fp32")
    texts = preference.read_pairs([TEXTS / "pairs.jsonl"], "cvalues").pairs
    pairs = json.loads((TEXTS / "expected.json").read_text())["pairs"]
    tokens = [TokenPair(pair["prompt_ids"], pair["chosen_ids"], pair["rejected_ids"])
              for pair in pairs]
    answers = json.loads((CASE / "expected.json").read_text())
    logps, references = (np.array([answers[f"{side}_{what}"] for side in SIDES]).T
                         for what in ("logps", "references"))
    return Golden(weights, sidecar.read_sidecar(sidecar.path_beside(weights)).config,
                  Glm4Tokenizer(TEXTS / "tokenizer.model"), texts, tokens, logps, references,
                  answers["loss"], answers["grad_norm"])


def golden_settings(precision: Precision, mode: str, device: str, golden: Golden) -> dict[str, Any]:
    """Settings of a precision's YAML for the golden model on one card.

    Args:
        precision: to check.
        mode: "preprocess" or "finetune".
        device: "CPU" or "Ascend".
        golden: the model.
    """
    name = f"{mode.replace('preprocess', 'process')}_{precision.yaml}"
    memory = {"context.max_device_memory": "4GB"} if device == "Ascend" else {}
    return config.load_settings(ROOT / "examples" / "glm4_dpo" / name, run_mode=mode, overrides={
        **{f"model.model_config.{key}": getattr(golden.sizes, key) for key in sidecar.IN_YAML},
        **memory, "context.device_target": device, "model.model_config.seq_length": SEQ_LEN,
        "dpo.sft_weight": 0.0, "parallel.parallel_mode": 0,
        "processor.tokenizer.vocab_file": str(golden.tokenizer.path), **precision.changes})


def build_and_load(settings: dict[str, Any], weights: Path, *,
                   names: Callable[[str], bool] | None = None) -> nn.Cell:
    """Build the network of some settings and load its weights.

    Args:
        settings: as config.load_settings returns them.
        weights: the checkpoint.
        names: whether a parameter of this name is in the checkpoint; None: all are.
    """
    from mindrlhf import runtime
    from mindrlhf.models.glm4 import build, load
    run_config = config.to_mindformers(settings)
    runtime.start_device(run_config, parallel=False)
    network = build.build_network(run_config)
    load.load_weights(network, weights, names=names)
    return network


def check_attention(report: Checklist, scorer: Scorer, tokens: Sequence[TokenPair]) -> None:
    """Change tokens that the second answer's first half must not see, then tokens that it must see.

    Args:
        report: of the check.
        scorer: computes log-probs.
        tokens: the pairs; the first two share a row, each a group of its own.
    """
    import mindspore as ms
    groups = [TokenGroup(pair.prompt, [pair.rejected, pair.chosen]) for pair in tokens[:2]]
    columns = row_inputs(groups, SEQ_LEN, scorer.pad_id)
    first = tokens[0].size
    other = first + len(tokens[1].prompt) - 1
    answer = other + len(tokens[1].rejected)
    half = answer + len(tokens[1].chosen) // 2
    columns["answer_ids"][half:][columns["answer_ids"][half:] == 4] = 5  # the half is answer 4

    def logp(changed: slice) -> float:
        """Log-prob of the half answer, after the tokens at some positions have changed."""
        input_ids = columns["input_ids"].copy()
        input_ids[changed] = (input_ids[changed] + 1) % 256
        batch = {**columns, "input_ids": input_ids}
        return float(scorer.network(*(ms.Tensor(batch[name][None]) for name in INPUTS))
                     .asnumpy()[0, 3])

    plain = logp(slice(0, 0))
    hidden = {"later tokens": slice(half, SEQ_LEN), "the other answer": slice(other, answer),
              "the other group in the row": slice(0, first)}
    for what, changed in hidden.items():
        report.off(f"attention does not see {what}", abs(logp(changed) - plain), LEAK, "nats")
    moved = abs(logp(slice(first, other)) - plain)
    report.line(moved > 0.1, "attention sees the prompt",
                f"a changed prompt moves the log-prob by {moved:.2g} nats")


def _make_batch(tokens: Sequence[TokenPair], references: np.ndarray, pad_id: int) -> list[Tensor]:
    """All pairs, packed, in columns as COLUMNS orders them. references: (N, 2), nats."""
    import mindspore as ms
    made = mindrecord.make_rows(tokens, references, seq_len=SEQ_LEN, pad_id=pad_id)
    return [ms.Tensor(np.stack([row[name] for row in made])) for name in COLUMNS]


class StepResult(NamedTuple):
    """Loss before the update, norm of its gradient, and whether both are finite."""
    loss: float
    norm: float
    finite: bool


def _make_trainer(network: nn.Cell, golden: Golden,
                  rates: list[float]) -> Callable[[np.ndarray], StepResult]:
    """A training step on the golden pairs, as a function of the reference's log-probs.

    rates: the learning rate of each step."""
    from mindspore import nn

    from mindrlhf.training.train_step import DPOTrainOneStepCell
    optimizer = nn.AdamWeightDecay(network.trainable_params(), learning_rate=rates)
    step = DPOTrainOneStepCell(network, optimizer).set_train()

    def train(references: np.ndarray) -> StepResult:
        batch = _make_batch(golden.tokens, references, golden.tokenizer.pad_id)
        outputs = StepOutput(*step(*batch))
        return StepResult(float(outputs.loss), float(outputs.grad_norm), not bool(outputs.overflow))

    return train


def check_training(report: Checklist, precision: Precision, network: nn.Cell, golden: Golden,
                   logps: np.ndarray) -> None:
    """Make three steps: on this machine's log-probs, on PyTorch's references, and after an update.

    Args:
        report: of the check.
        precision: with the errors that are allowed.
        network: Glm4DPO with the golden weights.
        golden: PyTorch's results.
        logps: (N, 2), nats: this machine's log-probs of the pairs.
    """
    train = _make_trainer(network, golden, [0.0, 1e-3, 0.0])
    first = train(logps)
    report.off("loss of the first step is ln 2", abs(first.loss - LN_2), precision.loss, "nats")
    finite = first.finite and 0 < first.norm < math.inf
    report.line(finite, "gradients of the first step are finite", f"norm {first.norm:.4g}")
    step = train(golden.references)
    error = abs(step.loss - golden.loss)
    report.off("loss with other references is PyTorch's", error, precision.loss, "nats")
    error = abs(step.norm / golden.norm - 1)
    report.off("gradient norm is PyTorch's", error, precision.norm, "relative")
    later = train(golden.references)
    report.line(later.loss < step.loss, "an update lowers the loss",
                f"{step.loss:.4f} -> {later.loss:.4f}")


def check_lora(report: Checklist, precision: Precision, settings: dict[str, Any], golden: Golden,
               logps: np.ndarray) -> None:
    """Make two steps of LoRA: adapters have the YAML's types, start at the reference, and learn.

    Args:
        report: of the check.
        precision: with the errors that are allowed.
        settings: of the golden model, of run_mode finetune.
        golden: the model.
        logps: (N, 2), nats: this machine's log-probs of the pairs.
    """
    from mindrlhf.models.glm4.weight_names import is_adapter
    network = build_and_load({**settings, "lora": LORA}, golden.weights,
                             names=lambda name: not is_adapter(name))
    types = {str(parameter.dtype).lower() for parameter in network.trainable_params()}
    computed = {str(cell.dtype).lower() for _, cell in network.cells_and_names()
                if hasattr(cell, "mindpet_delta_lora_a")}
    wanted = settings["model"]["model_config"]["compute_dtype"]
    report.line(types == {"float32"} and computed == {wanted},
                f"LoRA: adapters in float32, products in {wanted}",
                f"{', '.join(sorted(types))}; {', '.join(sorted(computed))}")
    train = _make_trainer(network, golden, [1e-2, 0.0])
    first = train(logps)
    error = abs(first.loss - LN_2)
    report.off("LoRA: loss of the first step is ln 2", error, precision.loss, "nats")
    later = train(logps)
    report.line(first.finite and first.norm > 0 and later.loss < first.loss,
                "LoRA: an update lowers the loss", f"{first.loss:.4f} -> {later.loss:.4f}")


def check_precision(report: Checklist, precision: Precision, device: str, golden: Golden) -> None:
    """Check everything that depends on numeric types and operators.

    Args:
        report: of the check.
        precision: to check.
        device: "CPU" or "Ascend".
        golden: the model, and PyTorch's results.
    """
    from mindrlhf.data.reference import Scorer
    cli.say(f"{precision.name}:")
    with report.guard("the model runs"):
        settings = golden_settings(precision, "preprocess", device, golden)
        scorer = Scorer(build_and_load(settings, golden.weights), seq_len=SEQ_LEN, batch_size=1,
                        pad_id=golden.tokenizer.pad_id)
        logps = scorer.score_pairs(golden.tokens)
        report.off(f"log-probs of {logps.size} answers are PyTorch's",
                   np.abs(logps - golden.logps).max(), precision.logps, "nats")
        check_attention(report, scorer, golden.tokens)
        settings = golden_settings(precision, "finetune", device, golden)
        network = build_and_load(settings, golden.weights)
        check_training(report, precision, network, golden, logps)
        check_lora(report, precision, settings, golden, logps)


def check_commands(report: Checklist, device: str, folder: str | Path) -> None:
    """Rehearse the 9B YAML with two workers, from preprocessing to prediction.

    Args:
        report: of the check.
        device: "CPU" or "Ascend".
        folder: for the files of the rehearsal.
    """
    cli.say("the commands, with two workers (about two minutes on a CPU):")
    plan = Path(folder) / "plan.yaml"
    plan.write_text(PLAN.format(base=ROOT / "examples/glm4_dpo/finetune_glm4_9b.yaml"))
    command = ["bash", str(ROOT / "scripts/rehearse.sh"), str(plan), "2",
               str(Path(folder) / "rehearsal")]
    env = {**os.environ, "DEVICE": device, "PYTHON": sys.executable,
           "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    lines = (result.stdout + result.stderr).strip().splitlines() or ["-"]
    good = result.returncode == 0
    report.line(good, "plan, sink mode, save, resume, merge, KV cache",
                lines[-1] if good else "; ".join(lines[-3:]))


def open_device(device: str) -> None:
    """Raise UserError if this MindSpore cannot use the device."""
    import mindspore as ms
    try:
        ms.set_context(device_target=device)
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0].split(". ")[0]
        raise cli.UserError(f"{device}: this MindSpore cannot use it ({reason}); install the "
                            "vendor's build for your NPU, or give --device_target CPU") from None


def parser() -> cli.Parser:
    """The command line."""
    parse = cli.Parser(__doc__, EXAMPLE)
    parse.add_argument("--device_target", default="Ascend", choices=("Ascend", "CPU"),
                       help="what to check (default: Ascend, NPU 0 or that of DEVICE_ID)")
    parse.add_argument("--workers", type=int, default=2, choices=(1, 2),
                       help="2 (default): two workers rehearse a parallel plan; 1: skip that")
    return parse


def main(argv: Sequence[str] | None = None) -> None:
    """Run all checks; exit status 1 if one fails."""
    arguments = parser().parse_args(argv)
    device = arguments.device_target
    if not CASE.is_dir():
        raise cli.UserError(f"{CASE}: no such folder; run the check from a clone of the project")
    from mindrlhf import runtime
    runtime.quiet_mindformers()
    open_device(device)
    began, report = time.monotonic(), Checklist()
    cli.say(f"{device}: {', '.join(f'{key} {value}' for key, value in runtime.versions().items())}")
    with tempfile.TemporaryDirectory() as folder:
        golden = open_golden(folder)
        same = [tokenize_pair(golden.tokenizer, text) == pair
                for text, pair in zip(golden.texts, golden.tokens)]
        report.line(all(same), "token ids are those recorded", f"{sum(same)} of {len(same)} pairs")
        for precision in PRECISIONS[device]:
            check_precision(report, precision, device, golden)
        if arguments.workers > 1:
            check_commands(report, device, folder)
    cli.say(f"{'PASS' if report.passed else 'FAIL'} after {time.monotonic() - began:.0f} s")
    if not report.passed:
        sys.exit(1)


if __name__ == "__main__":
    cli.run_command(main)
