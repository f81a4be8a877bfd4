"""What is watched, checked and measured while training runs."""
import math
import time

from mindspore.train.callback import Callback

from mindrlhf import cli, runtime
from mindrlhf.records import StepOutput
from mindrlhf.training import metrics

BEST = {"loss": -1, "dpo_loss": -1, "accuracy": 1, "margin": 1}  # metric -> direction in which it is better


class Progress:
    """The number of steps done and to do, shared by the callbacks of a run.

    Attributes:
        step: optimizer steps done, over all runs that led here.
        total: steps at the end.
    """

    def __init__(self, *, first, total):
        self.first = self.step = first
        self.total = total


class DPOMonitor(Callback):
    """Metrics of each step, the check that policy and reference agree, and the guard against numbers that are none.

    Args:
        progress: Progress; this callback, the first, counts.
        journal: Journal on rank 0, else None.
        sft_weight: of the loss.
        tolerance: nats an answer that policy and reference may differ by at the first step; None: not checked.
        per_print_times: steps from one console line to the next.
        max_bad_steps: steps one after another that may have a loss or gradients that are not finite.
    """

    def __init__(self, progress, journal, *, sft_weight, tolerance, per_print_times=1, max_bad_steps=3):
        super().__init__()
        self.progress, self.journal, self.sft_weight, self.tolerance = progress, journal, sft_weight, tolerance
        self.every, self.max_bad_steps = per_print_times, max_bad_steps
        self.bad_steps = self.bad_in_a_row = 0

    def on_train_begin(self, run_context):
        """Start the bar."""
        self.bar = cli.progress_bar(self.progress.total, "train", "step", initial=self.progress.step)

    def on_train_step_begin(self, run_context):
        """Start the clock."""
        self.started = time.perf_counter()

    def on_train_step_end(self, run_context):
        """Check, print and write down one step.

        Raises:
            UserError: policy and reference differ at the first step, or too many steps were not finite.
        """
        outputs = StepOutput(*run_context.original_args().net_outputs)
        values = metrics.compute_metrics(outputs.sums.asnumpy().tolist(), sft_weight=self.sft_weight)
        seconds = time.perf_counter() - self.started
        self.progress.step += 1
        bad = bool(outputs.overflow) or not math.isfinite(values["loss"])
        self.bad_steps += bad
        self.bad_in_a_row = self.bad_in_a_row + 1 if bad else 0
        values |= {"learning_rate": float(outputs.learning_rate), "grad_norm": float(outputs.grad_norm), "overflow": bad,
                   "overflow_steps": self.bad_steps, "seconds": seconds, "pairs_per_second": values["pairs"] / seconds,
                   "tokens_per_second": values["tokens"] / seconds, "memory_gb": runtime.peak_memory() / 1e9}
        if self.progress.step == 1:
            self.check_reference(values)
        if self.journal:
            self.journal.add("train", self.progress.step, values)
        self.show(values)
        if self.bad_in_a_row >= self.max_bad_steps:
            raise cli.UserError(self.fault(values, outputs.pair_ids.asnumpy(), outputs.faulty.asnumpy()))

    def show(self, values):
        """Print the console line where it is due."""
        step, total = self.progress.step, self.progress.total
        if step == self.progress.first + 1 or step % self.every == 0 or step == total or values["overflow"]:
            self.bar.clear()
            skipped = f"  OVERFLOW, step skipped ({self.bad_steps} so far)" if values["overflow"] else ""
            cli.say(f"step {step}/{total}  {line(values)}  lr {values['learning_rate']:.2e}  "
                    f"grad {values['grad_norm']:.3g}{skipped}  {values['pairs_per_second']:.1f} pairs/s  "
                    f"{values['tokens_per_second']:.0f} tokens/s  {values['memory_gb']:.1f} GB")
        self.bar.update()

    def check_reference(self, values):
        """Raise UserError where log-probs at the first step are not those of the preprocessing."""
        if self.tolerance is None or values["logratio_size"] <= self.tolerance:
            return
        raise cli.UserError(
            f"policy and reference differ by {values['logratio_size']:.4g} nats an answer at the first step (allowed: "
            f"{self.tolerance}), loss {values['dpo_loss']:.4f} instead of 0.6931: the data were made with other weights, "
            "tokenizer or settings. Preprocess again with this checkpoint and YAML; dpo.check_reference False in the "
            "YAML trains all the same")

    def fault(self, values, pair_ids, faulty):
        """What to say of steps that were not finite: the pairs of this worker that caused it, or that were there."""
        if culprits := sorted(faulty[faulty >= 0].tolist()):
            who = f"the loss of pair(s) {', '.join(map(str, culprits[:10]))} (numbers in the source, from 0) is not finite"
        elif math.isfinite(values["loss"]):
            there = sorted(pair_ids[pair_ids >= 0].tolist())
            who = f"the gradients of a batch with pairs {', '.join(map(str, there[:10]))}... are not finite"
        else:
            who = "a pair of another worker has a loss that is not finite; see its log"
        return (f"step {self.progress.step}: {who}, for {self.bad_in_a_row} step(s) in a row; lower learning_rate, or look "
                "at these pairs. No weight was changed by these steps")

    def on_train_end(self, run_context):
        """Close the bar."""
        self.bar.close()


class EvalMonitor(Callback):
    """Metrics of held-out pairs: before training, every some steps, and after.

    Args:
        progress: Progress.
        journal: Journal on rank 0, else None.
        evaluate: function without arguments that returns metrics, the same on all ranks.
        eval_step_interval: steps from one evaluation to the next; 0: only before and after.
        best_metric: a key of BEST; the weights of the evaluation where it is best are kept.
        keep_best: function that saves the weights.
        best: the best value so far, of a run that is resumed.
    """

    def __init__(self, progress, journal, evaluate, *, eval_step_interval=0, best_metric="loss", keep_best=None, best=None):
        super().__init__()
        self.progress, self.journal, self.evaluate = progress, journal, evaluate
        self.every, self.metric, self.keep_best, self.best = eval_step_interval, best_metric, keep_best, best

    def on_train_begin(self, run_context):
        """Measure before; a resumed run has that already."""
        if self.progress.step == 0:
            self.measure()

    def on_train_step_end(self, run_context):
        """Measure where it is due."""
        step = self.progress.step
        if step == self.progress.total or (self.every and step % self.every == 0):
            self.measure()

    def measure(self):
        """Evaluate, print, write down, and keep the weights if they are the best so far."""
        values = self.evaluate()
        cli.say(f"held-out, after step {self.progress.step}: {line(values)}")
        if self.journal:
            self.journal.add("eval", self.progress.step, values)
        if self.progress.step == 0 or not self.keep_best:
            return
        if self.best is None or BEST[self.metric] * (values[self.metric] - self.best) > 0:
            self.best = values[self.metric]
            self.keep_best()


def line(values):
    """Metrics as one readable piece of a line."""
    sft = f", sft {values['sft_loss']:.3f}" if values["loss"] != values["dpo_loss"] else ""
    return (f"loss {values['loss']:.4f} (dpo {values['dpo_loss']:.4f}{sft})  accuracy {values['accuracy']:.3f}  "
            f"margin {values['margin']:+.3f}")
