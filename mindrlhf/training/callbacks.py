"""What is watched, checked and written down while training runs."""
import json
import time
from pathlib import Path

from mindformers.tools.register import MindFormerModuleType, MindFormerRegister
from mindspore.train.callback import Callback

from mindrlhf import cli
from mindrlhf.training import metrics
from mindrlhf.training.evaluate import evaluate


def read_outputs(outputs, sft_weight):
    """What DPOTrainOneStepCell returned -> metrics."""
    _, overflow, _, learning_rate, norm, sums = outputs
    return {**metrics.means(sums.asnumpy().tolist(), sft_weight=sft_weight), "learning_rate": float(learning_rate),
            "grad_norm": float(norm), "overflow": bool(overflow)}


@MindFormerRegister.register(MindFormerModuleType.CALLBACK)
class DPOMonitor(Callback):
    """Metrics of each step, on the console and in metrics.jsonl, and the check that policy and reference agree.

    Args:
        per_print_times: steps from one console line to the next; metrics.jsonl has every step.
    The rest is set by run_dpo.py:
        path: metrics.jsonl.
        sft_weight: of the loss.
        tolerance: nats an answer that policy and reference may differ by at the first step; None: not checked.
        total_steps: of the run.
        first_step: number of the step before the first: 0, or that of the checkpoint a run goes on from.
    """

    def __init__(self, per_print_times=1, *, path, sft_weight, tolerance, total_steps, first_step):
        super().__init__()
        self.every, self.path, self.sft_weight, self.tolerance = per_print_times, Path(path), sft_weight, tolerance
        self.total, self.step = total_steps, first_step
        self.first = self.step + 1
        self.file = None

    def on_train_begin(self, run_context):
        """Open metrics.jsonl (anew, or to go on) and the progress bar."""
        if cli.rank() == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not self.step:
                self.path.unlink(missing_ok=True)
            self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115  closed at the end
        self.bar = cli.progress(self.total, "train", "step", initial=self.step)

    def on_train_step_begin(self, run_context):
        """Start the clock."""
        self.started = time.perf_counter()

    def on_train_step_end(self, run_context):
        """Check, print and write down one step.

        Raises:
            UserError: at the first step, policy and reference differ.
        """
        self.step += 1
        step = read_outputs(run_context.original_args().net_outputs, self.sft_weight)
        seconds = time.perf_counter() - self.started
        step |= {"seconds": seconds, "pairs_per_second": step["pairs"] / seconds, "tokens_per_second": step["tokens"] / seconds}
        if self.step == self.first:
            self.check_reference(step)
        if self.file:
            print(json.dumps({"step": self.step - 1, "split": "train", **step}), file=self.file, flush=True)
        if self.step == self.first or self.step % self.every == 0 or self.step == self.total:
            self.bar.clear()
            cli.say(f"step {self.step}/{self.total}  {line(step)}  lr {step['learning_rate']:.2e}  "
                    f"grad {step['grad_norm']:.3g}{'  OVERFLOW, step skipped' if step['overflow'] else ''}  "
                    f"{step['pairs_per_second']:.1f} pairs/s")
        self.bar.update()

    def check_reference(self, step):
        """Raise UserError where log-probs at the first step are not those of the preprocessing."""
        if self.tolerance is None or step["logratio_size"] <= self.tolerance:
            return
        raise cli.UserError(
            f"policy and reference differ by {step['logratio_size']:.4g} nats an answer at the first step (allowed: "
            f"{self.tolerance}), loss {step['dpo_loss']:.4f} instead of 0.6931: the data were made with other weights, "
            "tokenizer or settings. Preprocess again with this checkpoint and YAML; dpo.check_reference False in the "
            "YAML trains all the same")

    def on_train_end(self, run_context):
        """Close what is open."""
        self.bar.close()
        if self.file:
            self.file.close()


class EvalMonitor(Callback):
    """Metrics of held-out pairs, before and after training, on the console and in metrics.jsonl.

    Args:
        network: Glm4DPO.
        dataset: as dataset.open_dataset gives it.
        sft_weight: of the loss.
        path: metrics.jsonl.
    """

    def __init__(self, network, dataset, sft_weight, path):
        super().__init__()
        self.network, self.dataset, self.sft_weight, self.path = network, dataset, sft_weight, Path(path)

    def on_train_begin(self, run_context):
        """Measure before."""
        self.measure("before training")

    def on_train_end(self, run_context):
        """Measure after."""
        self.measure("after training")

    def measure(self, when):
        """Evaluate, print, and add a line to metrics.jsonl."""
        values = evaluate(self.network, self.dataset, sft_weight=self.sft_weight)
        cli.say(f"held-out, {when}: {line(values)}")
        if cli.rank() == 0:
            with open(self.path, "a", encoding="utf-8") as file:
                print(json.dumps({"when": when, "split": "eval", **values}), file=file)


def line(values):
    """Metrics as one readable piece of a line."""
    sft = f", sft {values['sft_loss']:.3f}" if values["loss"] != values["dpo_loss"] else ""
    return (f"loss {values['loss']:.4f} (dpo {values['dpo_loss']:.4f}{sft})  accuracy {values['accuracy']:.3f}  "
            f"margin {values['margin']:+.3f}")
