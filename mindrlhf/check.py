"""Does this machine compute GLM-4 and its DPO loss as PyTorch does? Run it first on new NPUs.

A tiny GLM-4 with recorded answers (tests/golden/case_2) goes through the code and the settings that a 9B model goes
through; only the sizes are its own. Each line says how far off the machine is and how much is allowed. Then two workers
rehearse the commands: a parallel plan in sink mode, a stop and a resume, a merge, prediction with a KV cache.
Exit status: 0 if all passes, 1 if something fails, 2 if the check cannot run.
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
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mindrlhf import cli, config
from mindrlhf.data import mindrecord, preference
from mindrlhf.data.features import TokenPair, tokenize_pair
from mindrlhf.data.packing import pack_pairs
from mindrlhf.models.glm4 import sidecar
from mindrlhf.records import COLUMNS, INPUTS, SIDES, StepOutput

EXAMPLE = """  python -m mindrlhf.check                        # on two NPUs, some minutes
  python -m mindrlhf.check --workers 1            # on one: without the commands of a plan
  python -m mindrlhf.check --device_target CPU    # anywhere, in float32, through stand-ins for the NPU's operators"""
ROOT = Path(__file__).resolve().parents[1]
TEXTS = ROOT / "tests" / "golden" / "case_1"  # pairs, their token ids, the tokenizer
CASE = ROOT / "tests" / "golden" / "case_2"  # weights with heads of 128, and PyTorch's answers
SEQ_LEN = 320  # positions of a row; flash attention wants a multiple of 16
CHUNK = 128  # positions whose logits exist at once: several chunks a row
LEAK = 1e-3  # nats that a log-prob may move when something changes that it must not see: rightly 0
LN_2 = math.log(2)


@dataclass(frozen=True)
class Precision:
    """A way of computing, and what it may be off by.

    Attributes:
        name: on the screen.
        yaml: what the YAMLs of its settings are called, after process_ and finetune_.
        logps: nats, for the sum of an answer's log-probs.
        loss: nats, for the DPO loss of all pairs.
        norm: share, for the norm of the gradient.
        changes: settings that are other than in the YAMLs, dotted key -> value.
    """
    name: str
    yaml: str
    logps: float
    loss: float
    norm: float
    changes: dict = field(default_factory=dict)


ONE_CARD = {"parallel.full_batch": False, "parallel.enable_parallel_optimizer": False,
            "parallel_config.data_parallel": 1, "parallel_config.model_parallel": 1, "dpo.logps_chunk_size": CHUNK}
IN_FLOAT32 = {f"model.model_config.{name}": "float32" for name in ("compute_dtype", "param_init_type")}
# float32 on a CPU is off by 1.7e-4 nats, 3e-6 in the loss, 3e-6 of the norm. An NPU adds up in another order and has an
# exp of its own: it is allowed ten times as much. float16 is off by 0.08 nats (answers have 84 to 899), 0.0008 and
# 0.04 %; bfloat16 keeps 3 bits less, so 8 times that: 0.7 nats (imitated: 0.25), 0.006 and 0.3 %. Allowed is twice that
# or more; see benchmarks/bfloat16_check.py.
PRECISIONS = {"CPU": (Precision("float32, in the CPU's own cells", "glm4_tiny.yaml", logps=3e-4, loss=1e-4, norm=1e-4),
                Precision("float32 and flash attention, in the cells of an NPU", "glm4_9b.yaml", logps=3e-4, loss=1e-4, norm=1e-4,
                    changes={**ONE_CARD, **IN_FLOAT32})),
        "Ascend": (Precision("float32", "glm4_tiny.yaml", logps=3e-3, loss=1e-3, norm=1e-3),
                   Precision("bfloat16 and flash attention, as in the YAMLs of GLM-4-9B", "glm4_9b.yaml",
                       logps=2.0, loss=0.05, norm=0.05, changes=ONE_CARD))}
LORA = {"rank": 4, "alpha": 8.0, "dropout": 0.0, "target_modules": ["qkv", "dense", "mlp"]}
PLAN = """base_config: {base}
parallel_config: {{data_parallel: 1, model_parallel: 2}}
runner_config: {{batch_size: 2}}
"""


class Checklist:
    """Lines on the screen, and whether all of them passed."""

    def __init__(self):
        self.passed = True

    def line(self, good, what, found):
        self.passed &= bool(good)
        cli.say(f"  {'pass' if good else 'FAIL'}  {what:<52}{found}")

    def off(self, what, error, allowed, unit):
        """error and allowed: numbers, of one unit."""
        self.line(error <= allowed, what, f"off by {error:.2g} {unit} (allowed: {allowed:g})")  # NaN fails

    @contextlib.contextmanager
    def guard(self, what):
        """A step that breaks has failed; the others go on."""
        try:
            yield
        except Exception as error:  # whatever a device or a kernel may raise
            reason = (str(error).strip() or "-").splitlines()[0][:200]
            self.line(False, what, f"{type(error).__name__}: {reason}")


def golden_settings(way, mode, device, tokenizer, numbers):
    """Settings of a way's YAML for the golden model on one card. mode: preprocess or finetune."""
    path = ROOT / "examples" / "glm4_dpo" / f"{mode.replace('preprocess', 'process')}_{way.yaml}"
    memory = {"context.max_device_memory": "4GB"} if device == "Ascend" else {}
    return config.load_settings(path, run_mode=mode, overrides={
        **{f"model.model_config.{name}": getattr(numbers, name) for name in sidecar.IN_YAML}, **memory,
        "context.device_target": device, "model.model_config.seq_length": SEQ_LEN, "dpo.sft_weight": 0.0,
        "parallel.parallel_mode": 0, "processor.tokenizer.vocab_file": str(tokenizer.path), **way.changes})


def build_and_load(settings, weights, *, names=None):
    """The network of some settings, with its weights: those whose names the function `names` takes."""
    from mindrlhf import runtime
    from mindrlhf.models.glm4 import build, load
    run = config.to_mindformers(settings)
    runtime.start_device(run, parallel=False)
    network = build.build_network(run)
    load.load_weights(network, weights, names=names)
    return network


@dataclass(frozen=True)
class Recorded:
    """The pairs, and what PyTorch says of them.

    Attributes:
        texts: list[Pair].
        tokens: list[TokenPair].
        logps: nats, (N, 2): of the chosen and the rejected answers.
        references: nats, (N, 2): other log-probs, of a reference that the policy has left.
        loss: DPO loss of the policy with these references.
        norm: of its gradient.
    """
    texts: list
    tokens: list
    logps: np.ndarray
    references: np.ndarray
    loss: float
    norm: float


def recorded() -> Recorded:
    """What tests/golden holds."""
    texts = preference.read_pairs([TEXTS / "pairs.jsonl"], "cvalues").pairs
    pairs = json.loads((TEXTS / "expected.json").read_text())["pairs"]
    tokens = [TokenPair(pair["prompt_ids"], pair["chosen_ids"], pair["rejected_ids"]) for pair in pairs]
    answers = json.loads((CASE / "expected.json").read_text())
    logps, references = (np.array([answers[f"{side}_{what}"] for side in SIDES]).T for what in ("logps", "references"))
    return Recorded(texts, tokens, logps, references, answers["loss"], answers["grad_norm"])


def convert_golden(folder):
    """The golden weights as convert_weight.py makes them: (path, their Numbers)."""
    from mindrlhf.models.glm4 import convert
    path = Path(folder) / "golden.ckpt"
    convert.to_mindspore(str(CASE / "hf_glm"), str(path), dtype="fp32")
    return path, sidecar.read_config_of(path)[0]


def check_attention(report, scorer, tokens):
    """Change what the first half of the second pair's answer must not see, then what it must see."""
    import mindspore as ms
    row = mindrecord.make_row(tokens[:2], np.zeros((2, 2)), [0, 1], seq_len=SEQ_LEN, width=scorer.width,
                              pad_id=scorer.pad_id)
    columns = {name: np.stack([row[f"{side}_{name}"] for side in SIDES]) for name in INPUTS}
    first = len(tokens[0].prompt + tokens[0].chosen)
    answer = first + len(tokens[1].prompt)
    half = answer + len(tokens[1].chosen) // 2
    columns["loss_mask"][0, half:] = 0  # answers from here on are not scored

    def logp(changed):
        input_ids = columns["input_ids"].copy()
        input_ids[0, changed] = (input_ids[0, changed] + 1) % 256
        batch = [ms.Tensor(values) for values in {**columns, "input_ids": input_ids}.values()]
        return float(scorer.network(*batch).asnumpy()[0, 1])

    plain = logp(slice(0, 0))
    hidden = {"what comes later": slice(half, SEQ_LEN), "another pair of the row": slice(0, first)}
    for what, changed in hidden.items():
        report.off(f"attention does not see {what}", abs(logp(changed) - plain), LEAK, "nats")
    moved = abs(logp(slice(first, answer)) - plain)
    report.line(moved > 0.1, "attention sees the prompt", f"it moves the log-prob by {moved:.2g} nats")


def batch_of(tokens, references, pad_id):
    """Columns of all pairs, packed, and the weights of their losses."""
    import mindspore as ms
    sides = np.array([[len(pair.prompt + getattr(pair, side)) for side in SIDES] for pair in tokens])
    rows = pack_pairs(sides, SEQ_LEN)
    width = max(map(len, rows))
    made = [mindrecord.make_row([tokens[k] for k in row], references[row], row, seq_len=SEQ_LEN, width=width,
                                pad_id=pad_id) for row in rows]
    return [ms.Tensor(np.stack([row[name] for row in made])) for name in COLUMNS]


def trainer(network, rates):
    """Function from TokenPairs, their references and pad_id to (loss, norm of the gradient, whether it is finite)."""
    from mindspore import nn

    from mindrlhf.training.train_step import DPOTrainOneStepCell
    optimizer = nn.AdamWeightDecay(network.trainable_params(), learning_rate=rates)
    step = DPOTrainOneStepCell(network, optimizer).set_train()

    def train(tokens, references, pad_id):
        outputs = StepOutput(*step(*batch_of(tokens, references, pad_id)))
        return float(outputs.loss), float(outputs.grad_norm), not bool(outputs.overflow)

    return train


def check_training(report, way, network, expected, logps, pad_id):
    """Three steps: on the log-probs just found, on PyTorch's references, and on these after an update."""
    train = trainer(network, [0.0, 1e-3, 0.0])
    loss, size, finite = train(expected.tokens, logps, pad_id)
    report.off("a first step's loss is ln 2", abs(loss - LN_2), way.loss, "nats")
    report.line(finite and 0 < size < math.inf, "its gradients are numbers", f"norm {size:.4g}")
    loss, size, _ = train(expected.tokens, expected.references, pad_id)
    report.off("PyTorch's loss with other references", abs(loss - expected.loss), way.loss, "nats")
    report.off("PyTorch's norm of the gradient", abs(size / expected.norm - 1), way.norm, "of it")
    later = train(expected.tokens, expected.references, pad_id)[0]
    report.line(later < loss, "an update lowers the loss", f"{loss:.4f} -> {later:.4f}")


def check_lora(report, way, settings, weights, expected, logps, pad_id):
    """Two steps of adapters: they start at the reference, in the types that the YAML says, and learn."""
    from mindrlhf.models.glm4.weight_names import is_adapter
    network = build_and_load({**settings, "lora": LORA}, weights, names=lambda name: not is_adapter(name))
    types = {str(parameter.dtype) for parameter in network.trainable_params()}
    computed = {str(cell.dtype) for _, cell in network.cells_and_names() if hasattr(cell, "mindpet_delta_lora_a")}
    wanted = settings["model"]["model_config"]["compute_dtype"]
    report.line(types == {"Float32"} and {name.lower() for name in computed} == {wanted},
                "LoRA: adapters float32, products as in the YAML", f"{', '.join(types)}; {', '.join(computed)}")
    train = trainer(network, [1e-2, 0.0])
    loss, norm, finite = train(expected.tokens, logps, pad_id)
    report.off("LoRA: a first step's loss is ln 2", abs(loss - LN_2), way.loss, "nats")
    later = train(expected.tokens, logps, pad_id)[0]
    report.line(finite and norm > 0 and later < loss, "LoRA: an update lowers the loss", f"{loss:.4f} -> {later:.4f}")


def check_precision(report, way, device, weights, numbers, tokenizer):
    """All that depends on how is computed."""
    from mindrlhf.data.reference import Scorer
    expected = recorded()
    cli.say(f"{way.name}:")
    with report.guard("computes"):
        settings = golden_settings(way, "preprocess", device, tokenizer, numbers)
        scorer = Scorer(build_and_load(settings, weights), seq_len=SEQ_LEN, batch_size=1, pad_id=tokenizer.pad_id)
        logps = scorer(expected.tokens)
        error = np.abs(logps - expected.logps).max()
        report.off(f"PyTorch's log-probs of {logps.size} answers", error, way.logps, "nats")
        check_attention(report, scorer, expected.tokens)
        settings = golden_settings(way, "finetune", device, tokenizer, numbers)
        check_training(report, way, build_and_load(settings, weights), expected, logps, tokenizer.pad_id)
        check_lora(report, way, settings, weights, expected, logps, tokenizer.pad_id)


def check_commands(report, device, folder):
    """scripts/rehearse.sh with two workers: what the 9B YAML does, from preprocessing to prediction."""
    cli.say("the commands, with two workers (about two minutes on a CPU):")
    plan = Path(folder) / "plan.yaml"
    plan.write_text(PLAN.format(base=ROOT / "examples/glm4_dpo/finetune_glm4_9b.yaml"))
    result = subprocess.run(["bash", str(ROOT / "scripts/rehearse.sh"), str(plan), "2", str(Path(folder) / "rehearsal")],
                            capture_output=True, text=True, check=False,
                            env={**os.environ, "DEVICE": device, "PYTHON": sys.executable,
                                 "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"})
    lines = (result.stdout + result.stderr).strip().splitlines() or ["-"]
    good = result.returncode == 0
    report.line(good, "plan, sink mode, save, resume, merge, KV cache", lines[-1] if good else "; ".join(lines[-3:]))


def open_device(device):
    """Raise UserError where this MindSpore has not the device."""
    import mindspore as ms
    try:
        ms.set_context(device_target=device)
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0].split(". ")[0]
        raise cli.UserError(f"{device}: this MindSpore cannot use it ({reason}); install the vendor's for "
                            "your NPU, or give --device_target CPU") from None


def parser():
    parse = cli.Parser(__doc__, EXAMPLE)
    parse.add_argument("--device_target", default="Ascend", choices=("Ascend", "CPU"),
                       help="what to check (default: Ascend, the NPU DEVICE_ID, 0 unless set)")
    parse.add_argument("--workers", type=int, default=2, choices=(1, 2), help="2 (default): two workers rehearse the commands "
                       "in a parallel plan; 1: where there is one NPU, leave that out")
    return parse


def main(argv=None):
    arguments = parser().parse_args(argv)
    device = arguments.device_target
    if not CASE.is_dir():
        raise cli.UserError(f"{CASE}: no such folder; run the check from a clone of the project")
    from mindrlhf import runtime
    from mindrlhf.models.glm4.tokenizer import Glm4Tokenizer
    runtime.quiet_mindformers()
    open_device(device)
    began, report = time.monotonic(), Checklist()
    cli.say(f"{device}: {', '.join(f'{name} {number}' for name, number in runtime.versions().items())}")
    tokenizer, expected = Glm4Tokenizer(TEXTS / "tokenizer.model"), recorded()
    good = sum(tokenize_pair(tokenizer, text) == pair for text, pair in zip(expected.texts, expected.tokens))
    report.line(good == len(expected.texts), "tokens", f"{good} of {len(expected.texts)} pairs as recorded")
    with tempfile.TemporaryDirectory() as folder:
        weights, numbers = convert_golden(folder)
        for way in PRECISIONS[device]:
            check_precision(report, way, device, weights, numbers, tokenizer)
        if arguments.workers > 1:
            check_commands(report, device, folder)
    cli.say(f"{'PASS' if report.passed else 'FAIL'} after {time.monotonic() - began:.0f} s")
    if not report.passed:
        sys.exit(1)


if __name__ == "__main__":
    cli.run_command(main)
