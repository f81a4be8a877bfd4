"""What is saved while training runs, and how it stops."""
import os
import shutil
import signal
import time
from pathlib import Path

import mindspore as ms
from mindspore.train.callback import Callback

from mindrlhf import cli, runtime
from mindrlhf.checkpoints import containers
from mindrlhf.checkpoints.runs import STEP
from mindrlhf.files import existing_parent, write_json
from mindrlhf.models.glm4.lora import adapter_metadata
from mindrlhf.models.glm4.weight_names import is_base_weight
from mindrlhf.training import state


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
        self.name_filter = (lambda name: not is_base_weight(name)) if lora else None
        self.remarks = adapter_metadata(lora) if lora else {}
        self.stop_file, self.born = self.output / ".stop", time.time()
        self.lost = None

    def on_train_begin(self, run_context):
        """Look for room, and listen for SIGTERM."""
        cell = run_context.original_args().network  # train_network is wrapped in sink mode
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
            runtime.end_worker(143)
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
        name = state.state_name(self.prefix, self.progress.step)
        cell = parameters.network
        about = {"step_num": self.progress.step, "epoch_num": parameters.cur_epoch_num, "loss_scale": 1.0,
                 "global_step": cell.optimizer.global_step, **self.remarks}
        if self._save(cell, state.state_folder(self.output), name, about):
            for path in list(state.saved_states(self.output).values())[:-self.keep]:
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
        return shutil.disk_usage(existing_parent(self.output / "checkpoint")).free

    def on_train_end(self, run_context):
        """Give SIGTERM back; fail if the last state could not be saved."""
        signal.signal(signal.SIGTERM, self.former)
        if self.lost:
            raise cli.UserError(f"{self.lost}. Make room and resume from an earlier state")


def check_optimizer_state(optimizer, path):
    """Raise UserError where a state lacks something of the optimizer: MindSpore would start that from zero in silence."""
    stored = containers.open_tensors(path)
    missing = [p.name for p in optimizer.get_parameters() if p.name not in stored]
    if missing:
        raise cli.UserError(f"{path}: lacks {missing[0]} and {len(missing) - 1} more of the optimizer's; was it saved with "
                            "another optimizer or LoRA setting?")
