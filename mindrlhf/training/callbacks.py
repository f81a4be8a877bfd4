"""What is watched, checked, measured and saved while training runs."""
import math
import os
import shutil
import signal
import time
from pathlib import Path

import mindspore as ms
from mindspore.train.callback import Callback

from mindrlhf import backend, cli
from mindrlhf.files import write_json
from mindrlhf.models.glm4.lora import is_base, remarks
from mindrlhf.ranks import STEP
from mindrlhf.training import metrics, state

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
        self.bar = cli.progress(self.progress.total, "train", "step", initial=self.progress.step)

    def on_train_step_begin(self, run_context):
        """Start the clock."""
        self.started = time.perf_counter()

    def on_train_step_end(self, run_context):
        """Check, print and write down one step.

        Raises:
            UserError: policy and reference differ at the first step, or too many steps were not finite.
        """
        _, overflow, _, learning_rate, norm, sums, pair_ids, finite = run_context.original_args().net_outputs
        values = metrics.means(sums.asnumpy().tolist(), sft_weight=self.sft_weight)
        seconds = time.perf_counter() - self.started
        self.progress.step += 1
        bad = bool(overflow) or not math.isfinite(values["loss"])
        self.bad_steps += bad
        self.bad_in_a_row = self.bad_in_a_row + 1 if bad else 0
        values |= {"learning_rate": float(learning_rate), "grad_norm": float(norm), "overflow": bad,
                   "overflow_steps": self.bad_steps, "seconds": seconds, "pairs_per_second": values["pairs"] / seconds,
                   "tokens_per_second": values["tokens"] / seconds, "memory_gb": backend.peak_memory() / 1e9}
        if self.progress.step == 1:
            self.check_reference(values)
        if self.journal:
            self.journal.add("train", self.progress.step, values)
        self.show(values)
        if self.bad_in_a_row >= self.max_bad_steps:
            raise cli.UserError(self.fault(values, pair_ids.asnumpy(), finite.asnumpy()))

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

    def fault(self, values, pair_ids, finite):
        """What to say of steps that were not finite: the pairs of this worker that caused it, or that were there."""
        faulty = sorted(pair_ids[(pair_ids >= 0) & ~finite].tolist())
        if faulty:
            who = f"the loss of pair(s) {', '.join(map(str, faulty[:10]))} (numbers in the source, from 0) is not finite"
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


class DPOCheckpointMonitor(Callback):
    """Saves training states by steps, at the end and at SIGTERM, and the weights at the end.

    A state takes its name when it is whole. Room is looked for first: a full disk costs the state that does not fit,
    not the ones that are there.

    Args:
        progress: Progress.
        journal: Journal on rank 0, else None; its curves are drawn with each state.
        network: whose weights are saved for use.
        output_dir: checkpoint/, checkpoint_network/ and checkpoint_best/ come there.
        prefix: of the file names.
        save_checkpoint_steps: from one state to the next.
        keep_checkpoint_max: states that stay; the oldest go.
        lora: the section of the YAML, or None. With it, adapters are saved and the frozen weights are not.
    """

    def __init__(self, progress, journal, network, *, output_dir, prefix, save_checkpoint_steps, keep_checkpoint_max,
                 lora=None):
        super().__init__()
        self.progress, self.journal, self.network, self.output = progress, journal, network, Path(output_dir)
        self.prefix, self.every, self.keep = prefix, save_checkpoint_steps, keep_checkpoint_max
        self.name_filter = (lambda name: not is_base(name)) if lora else None
        self.remarks = remarks(lora) if lora else {}
        self.stop_file, self.born = self.output / ".stop", time.time()
        self.lost = None

    def on_train_begin(self, run_context):
        """Look for room, and listen for SIGTERM."""
        cell = run_context.original_args().train_network
        self.size = sum(parameter.nbytes for parameter in self._chosen(cell))
        if (free := self._free()) < self.size:
            raise cli.UserError(f"{self.output}: a training state takes {self.size / 1e9:.2f} GB, {free / 1e9:.2f} GB are "
                                "free; make room, or give another --output_dir")
        self.terminated = False
        self.former = signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, *_):
        self.terminated = True

    def on_train_step_end(self, run_context):
        """Save where it is due.

        Raises:
            SystemExit: with status 143, after SIGTERM, when the state is saved.
        """
        step, last = self.progress.step, self.progress.step == self.progress.total
        stop = self._stop_now(step)
        if last or stop or step % self.every == 0:
            self.save_state(run_context.original_args())
        if last:
            self.save_weights("checkpoint_network", f"{self.prefix}-network.ckpt")
        if self.journal and (last or stop or step % self.every == 0):
            self.journal.draw()
        if stop and not last:
            cli.say(f"stopped by SIGTERM after step {step}; --resume auto goes on from there")
            backend.finish(143)
            raise SystemExit(143)

    def _stop_now(self, step):
        """Whether to stop after this step: all workers at the same one. They are at most one step apart, so the first
        that is told to stop names the step after the next, in a file that all see."""
        if cli.workers() == 1:
            return self.terminated
        if self.terminated and not self._stop_step():
            try:
                with open(self.stop_file, "x" if not self._stale() else "w") as file:
                    file.write(str(step + 2))
            except FileExistsError:
                pass
        return self._stop_step() == step

    def _stale(self):
        return self.stop_file.exists() and self.stop_file.stat().st_mtime < self.born

    def _stop_step(self):
        try:
            return None if self._stale() else int(self.stop_file.read_text())
        except (OSError, ValueError):
            return None

    def save_state(self, parameters):
        """Write a state, then let the oldest go.

        Args:
            parameters: what MindSpore tells callbacks of the run.
        """
        name = state.file_name(self.prefix, self.progress.step)
        cell = parameters.train_network
        about = {"step_num": self.progress.step, "epoch_num": parameters.cur_epoch_num, "loss_scale": 1.0,
                   "global_step": cell.optimizer.global_step, **self.remarks}
        if self._save(cell, state.folder(self.output), name, about):
            for path in list(state.saved(self.output).values())[:-self.keep]:
                path.unlink()

    def save_weights(self, place, name):
        """Write the weights alone, for use, and their step beside them: ranks of different steps do not merge."""
        folder = self.output / place / f"rank_{cli.rank()}"
        if self._save(self.network, folder, name, self.remarks):
            write_json(folder / STEP, {"step": self.progress.step})

    def _save(self, cell, folder, name, about):
        workshop = folder / ".writing"
        try:
            workshop.mkdir(parents=True, exist_ok=True)
            if self._free() < sum(parameter.nbytes for parameter in self._chosen(cell)):
                raise OSError("no space left on the disk")
            ms.save_checkpoint(cell, str(workshop / name), integrated_save=False, append_dict=about,
                               choice_func=self.name_filter, crc_check=True)
            os.replace(workshop / name, folder / name)
        except (OSError, RuntimeError) as error:
            self.lost = f"{folder / name}: was not saved ({str(error).splitlines()[0]}); earlier ones stay"
            print(f"warning: {self.lost}", flush=True)
            return False
        finally:
            shutil.rmtree(workshop, ignore_errors=True)
        self.lost = None
        return True

    def _chosen(self, cell):
        return [p for p in cell.get_parameters() if self.name_filter is None or self.name_filter(p.name)]

    def _free(self):
        folder = self.output
        while not folder.exists():
            folder = folder.parent
        return shutil.disk_usage(folder).free

    def on_train_end(self, run_context):
        """Give SIGTERM back; fail if the last state could not be saved."""
        signal.signal(signal.SIGTERM, self.former)
        if self.lost:
            raise cli.UserError(f"{self.lost}. Make room and resume from an earlier state")


def check_optimizer_state(optimizer, path):
    """Raise UserError where a state lacks something of the optimizer: MindSpore would start that from zero in silence."""
    from mindrlhf import checkpoint
    stored = checkpoint.read(path)
    missing = [p.name for p in optimizer.get_parameters() if p.name not in stored]
    if missing:
        raise cli.UserError(f"{path}: lacks {missing[0]} and {len(missing) - 1} more of the optimizer's; was it saved with "
                            "another optimizer or LoRA setting?")


def line(values):
    """Metrics as one readable piece of a line."""
    sft = f", sft {values['sft_loss']:.3f}" if values["loss"] != values["dpo_loss"] else ""
    return (f"loss {values['loss']:.4f} (dpo {values['dpo_loss']:.4f}{sft})  accuracy {values['accuracy']:.3f}  "
            f"margin {values['margin']:+.3f}")
