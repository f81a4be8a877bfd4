"""Callbacks that check, measure and report training steps."""
from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from mindspore.train.callback import Callback

from mindrlhf import cli, metrics, runtime
from mindrlhf.records import StepOutput
from mindrlhf.training.journal import Journal

# metric -> 1 if higher is better, -1 if lower is
BEST = {"loss": -1, "dpo_loss": -1, "rewards/accuracies": 1, "rewards/margins": 1}
DEAD_STEPS = 3  # in a row, after which ruined weights are reported
EXPLODED = 100  # times the loss of the first step
SEPARATED = 1e-3  # a loss below this has a gradient of almost 0 by right


class Progress:
    """The steps of a run, done and planned. All callbacks share it.

    Attributes:
        first: optimizer steps behind the state that the run resumed from, 0 for a new run.
        step: optimizer steps done, those of earlier runs included.
        total: steps at the end of the run.
        tokens: trained on so far, prompts included.
    """

    def __init__(self, *, first: int, total: int, epoch_steps: int = 1, tokens: int = 0) -> None:
        self.first = self.step = first
        self.total, self.epoch_steps, self.tokens = total, epoch_steps, tokens

    def measure(self) -> dict[str, float]:
        """How far the run is, as metrics that TRL logs too."""
        return {"epoch": self.step / self.epoch_steps, "num_tokens": self.tokens}


class DPOMonitor(Callback):
    """Counts, measures and reports each step, and stops a run whose numbers are wrong.

    It checks that policy and reference agree at the first step, and that losses and gradients are
    finite.

    Args:
        progress: counted up here, so this callback comes first.
        journal: on rank 0, else None.
        sft_weight: weight of the SFT term in the loss.
        tolerance: nats per answer by which policy and reference may differ at the first step; None
            skips the check.
        operations: of the model for a position, without recomputation.
        cards: that share the work.
        peak_tflops: peak of a card, in 1e12 operations a second, for MFU; None leaves MFU out.
        per_print_times: steps between two console lines.
        max_bad_steps: consecutive steps without a finite loss or gradient that stop the run.
    """

    def __init__(self, progress: Progress, journal: Journal | None, *, sft_weight: float,
                 tolerance: float | None, operations: float, cards: int,
                 peak_tflops: float | None = None, per_print_times: int = 1,
                 max_bad_steps: int = 3) -> None:
        super().__init__()
        self.progress, self.journal = progress, journal
        self.sft_weight, self.tolerance = sft_weight, tolerance
        self.operations, self.peak = operations, cards * (peak_tflops or 0) * 1e12
        self.every, self.max_bad_steps = per_print_times, max_bad_steps
        self.bad_steps = self.bad_in_a_row = self.dead_in_a_row = 0
        self.first_loss: float | None = None

    def on_train_begin(self, run_context: Any) -> None:
        """Start the progress bar."""
        total, done = self.progress.total, self.progress.step
        self.bar = cli.progress_bar(total, "train", "step", initial=done)

    def on_train_step_begin(self, run_context: Any) -> None:
        """Start the clock."""
        self.started = time.perf_counter()

    def on_train_step_end(self, run_context: Any) -> None:
        """Check, record and print one step.

        Raises:
            UserError: policy and reference differ at the first step, or max_bad_steps is reached.
        """
        outputs = StepOutput(*run_context.original_args().net_outputs)
        self.progress.step += 1
        values = self.measure(outputs)
        self.progress.tokens += values["tokens"]
        values |= self.progress.measure()
        if self.progress.step == 1:
            self.check_reference(values)
        if self.journal:
            self.journal.add("train", self.progress.step, values)
        self.show(values)
        self.warn_of_dead_weights(values)
        if self.bad_in_a_row >= self.max_bad_steps:
            raise cli.UserError(
                self.fault(values, outputs.pair_ids.asnumpy(), outputs.faulty.asnumpy()))

    def measure(self, outputs: StepOutput) -> dict[str, Any]:
        """Metrics of a step, its speed and memory, and the count of bad steps."""
        values: dict[str, Any] = metrics.compute_metrics(
            outputs.sums.asnumpy().tolist(), sft_weight=self.sft_weight)
        seconds = time.perf_counter() - self.started
        bad = bool(outputs.overflow) or not math.isfinite(values["loss"])
        self.bad_steps += bad
        self.bad_in_a_row = self.bad_in_a_row + 1 if bad else 0
        computed = values["tokens"] / (1 - values["padding"])
        speed = {"pairs_per_second": values["pairs"] / seconds,
                 "tokens_per_second": values["tokens"] / seconds,
                 "computed_tokens_per_second": computed / seconds}
        if self.peak:
            speed["mfu"] = computed * self.operations / seconds / self.peak
        return values | speed | {
            "learning_rate": float(outputs.learning_rate), "grad_norm": float(outputs.grad_norm),
            "overflow": bad, "overflow_steps": self.bad_steps, "seconds": seconds,
            "memory_gb": runtime.peak_memory() / 1e9}

    def show(self, values: dict[str, Any]) -> None:
        """Print the console line if one is due, and advance the bar."""
        step, total = self.progress.step, self.progress.total
        first = step == self.progress.first + 1
        if first or step % self.every == 0 or step == total or values["overflow"]:
            self.bar.clear()
            mfu = f"MFU {values['mfu']:.1%}  " if "mfu" in values else ""
            skipped = (f"  OVERFLOW, step skipped ({self.bad_steps} so far)" if values["overflow"]
                       else "")
            cli.say(f"step {step}/{total}  {line(values)}  lr {values['learning_rate']:.2e}  "
                    f"grad {values['grad_norm']:.3g}{skipped}  "
                    f"{values['pairs_per_second']:.1f} pairs/s  "
                    f"{values['tokens_per_second']:.0f} tokens/s  "
                    f"{values['padding']:.0%} padding  {mfu}{values['memory_gb']:.1f} GB")
        self.bar.update()

    def warn_of_dead_weights(self, values: dict[str, Any]) -> None:
        """Say it once when steps were so large that the weights no longer learn."""
        loss = values["loss"]
        if self.first_loss is None:
            self.first_loss = max(loss, math.log(2))
        exploded = loss > EXPLODED * self.first_loss
        dead = exploded or (values["grad_norm"] == 0 and loss > SEPARATED)
        self.dead_in_a_row = self.dead_in_a_row + 1 if dead else 0
        if self.dead_in_a_row == DEAD_STEPS:
            what = (f"the loss is {loss:.3g}, {self.first_loss:.3g} at the first step" if exploded
                    else f"the gradient is 0 and the loss stays {loss:.3g}")
            cli.say(f"warning: step {self.progress.step}: for {DEAD_STEPS} steps, {what}: the "
                    "weights are ruined. Lower lr_schedule.learning_rate and train again")

    def check_reference(self, values: dict[str, Any]) -> None:
        """Raise UserError if log-probs at the first step differ from those of the preprocessing."""
        if self.tolerance is None or values["logratio_size"] <= self.tolerance:
            return
        raise cli.UserError(
            f"policy and reference differ by {values['logratio_size']:.4g} nats per answer at the "
            f"first step (allowed: {self.tolerance}): the data were made with other weights, "
            "another tokenizer or other settings. Preprocess again with this checkpoint and YAML, "
            "or set dpo.check_reference False in the YAML to train anyway")

    def fault(self, values: dict[str, Any], pair_ids: np.ndarray, faulty: np.ndarray) -> str:
        """The error message for steps that are not finite. It names the pairs that caused them.

        Args:
            values: metrics of the last step.
            pair_ids: int32 (rows, P), the pairs of the batch; -1 where there is none.
            faulty: int32 (rows of this worker, P), the pairs whose loss is not finite, else -1.
        """
        if culprits := sorted(faulty[faulty >= 0].tolist()):
            cause = (f"the loss of pair(s) {', '.join(map(str, culprits[:10]))} (counted from 0 in "
                     "the source) is not finite")
        elif math.isfinite(values["loss"]):
            batch = sorted(pair_ids[pair_ids >= 0].tolist())
            cause = (f"the gradients of a batch with pairs {', '.join(map(str, batch[:10]))}... "
                     "are not finite")
        else:
            cause = "a pair of another worker has a loss that is not finite; see that worker's log"
        return (f"step {self.progress.step}: {cause}, for {self.bad_in_a_row} step(s) in a row; "
                "these steps changed no weights. Lower learning_rate, or inspect these pairs")

    def on_train_end(self, run_context: Any) -> None:
        """Close the bar."""
        self.bar.close()


class EvalMonitor(Callback):
    """Evaluates held-out pairs: before training, every eval_step_interval steps, and at the end.

    Args:
        progress: of the run.
        journal: on rank 0, else None.
        evaluate: returns metrics, the same on all ranks.
        eval_step_interval: steps between two evaluations; 0 evaluates before and after training
            only.
        best_metric: a key of BEST. The weights with its best value are kept.
        keep_best: saves the weights; None keeps none.
        best: best value so far, of a run that is resumed.
    """

    def __init__(self, progress: Progress, journal: Journal | None,
                 evaluate: Callable[[], dict[str, float]], *, eval_step_interval: int = 0,
                 best_metric: str = "loss", keep_best: Callable[[], None] | None = None,
                 best: float | None = None) -> None:
        super().__init__()
        self.progress, self.journal, self.evaluate = progress, journal, evaluate
        self.every, self.metric = eval_step_interval, best_metric
        self.keep_best, self.best = keep_best, best

    def on_train_begin(self, run_context: Any) -> None:
        """Evaluate a new run before its first step; a resumed run has done so already."""
        if self.progress.step == 0:
            self.measure()

    def on_train_step_end(self, run_context: Any) -> None:
        """Evaluate if it is due."""
        step = self.progress.step
        if step == self.progress.total or (self.every and step % self.every == 0):
            self.measure()

    def measure(self) -> None:
        """Evaluate, print, record, and keep the weights if they are the best so far."""
        values = self.evaluate()
        cli.say(f"held-out, after step {self.progress.step}: {line(values)}")
        if self.journal:
            self.journal.add("eval", self.progress.step, values | self.progress.measure())
        value = values[self.metric]
        if self.progress.step == 0 or not self.keep_best or not math.isfinite(value):
            return
        if self.best is None or BEST[self.metric] * (value - self.best) > 0:
            self.best = value
            self.keep_best()


def line(values: dict[str, Any]) -> str:
    """The main metrics as part of a console line."""
    sft = f", sft {values['sft_loss']:.3f}" if values["loss"] != values["dpo_loss"] else ""
    return (f"loss {values['loss']:.4f} (dpo {values['dpo_loss']:.4f}{sft})  "
            f"accuracy {values['rewards/accuracies']:.3f}  margin {values['rewards/margins']:+.3f}")
