"""Saving training states and weights while training runs, and stopping at SIGTERM."""
from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import nn
from mindspore.train.callback import Callback

from mindrlhf import cli, runtime
from mindrlhf.checkpoints import containers
from mindrlhf.checkpoints.runs import STEP
from mindrlhf.files import existing_parent, staging_folder
from mindrlhf.json_files import write_json
from mindrlhf.models.glm4.lora import adapter_metadata
from mindrlhf.models.glm4.weight_names import is_base_weight
from mindrlhf.training import state
from mindrlhf.training.callbacks import Progress
from mindrlhf.training.identity import TENSOR, Identity, identity_in
from mindrlhf.training.journal import Journal


class DPOCheckpointMonitor(Callback):
    """Saves training states periodically, at the end and at SIGTERM, and the weights at the end.

    A state gets its name when it is complete. Free space is checked first: a full disk costs only
    the state that does not fit, never an earlier one.

    Args:
        progress: of the run.
        journal: on rank 0, else None. Its curves are drawn with each state.
        network: whose weights are saved.
        output_dir: parent of checkpoint/, checkpoint_network/ and checkpoint_best/.
        prefix: of the file names.
        save_checkpoint_steps: steps between two states.
        keep_checkpoint_max: number of this run's states to keep; its older ones are deleted.
        run: its identity goes into each state.
        lora: the section of the YAML, or None. With it, adapters are saved without the frozen
            weights.
    """

    def __init__(self, progress: Progress, journal: Journal | None, network: nn.Cell, *,
                 output_dir: str | Path, prefix: str, save_checkpoint_steps: int,
                 keep_checkpoint_max: int, run: Identity,
                 lora: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.progress, self.journal, self.network = progress, journal, network
        self.output, self.prefix = Path(output_dir), prefix
        self.every, self.keep = save_checkpoint_steps, keep_checkpoint_max
        self.run = run
        self.name_filter = (lambda name: not is_base_weight(name)) if lora else None
        self.metadata = adapter_metadata(lora) if lora else {}
        self.stop_file, self.created = self.output / ".stop", time.time()
        self.unsaved: dict[Path, str] = {}  # folder -> why the latest save there failed

    def on_train_begin(self, run_context: Any) -> None:
        """Check the free space, and listen for SIGTERM.

        Raises:
            UserError: a state does not fit on the disk.
        """
        cell = run_context.original_args().network  # train_network is wrapped in sink mode
        self.size = self._size(cell)
        if (free := self._free()) < self.size:
            raise cli.UserError(
                f"{self.output}: a training state takes {cli.size_text(self.size)}, "
                f"{cli.size_text(free)} are free; make room, or give another --output_dir")
        self.terminated = False
        self.former = signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, *_: Any) -> None:
        self.terminated = True

    def on_train_step_end(self, run_context: Any) -> None:
        """Save if it is due.

        Raises:
            SystemExit: with status 143, after SIGTERM, once the state is saved.
        """
        step, last = self.progress.step, self.progress.step == self.progress.total
        stop = self._stop_now(step)
        due = last or stop or step % self.every == 0
        if last:  # before the state, because a run whose last state exists counts as complete
            self.save_weights("checkpoint_network", f"{self.prefix}-network.ckpt")
        if last and self.journal:
            self.journal.draw()
        if due:
            self.save_state(run_context.original_args())
        if due and self.journal and not last:
            self.journal.draw()
        if stop and not last:
            cli.say(f"stopped by SIGTERM after step {step}; --resume auto continues from there")
            runtime.end_worker(143)
            raise SystemExit(143)

    def _stop_now(self, step: int) -> bool:
        """Whether to stop after this step; all workers stop after the same one.

        Workers are at most one step apart. So the first that receives SIGTERM chooses its step plus
        two, and writes it to a file that every worker reads.
        """
        if cli.workers() == 1:
            return self.terminated
        if self.terminated and not self._stop_step():
            with contextlib.suppress(FileExistsError):  # another worker was first
                mode = "w" if self._is_stale() else "x"
                with open(self.stop_file, mode, encoding="utf-8") as file:
                    file.write(str(step + 2))
        return self._stop_step() == step

    def _is_stale(self) -> bool:
        """Whether the stop file is that of an earlier run."""
        return self.stop_file.exists() and self.stop_file.stat().st_mtime < self.created

    def _stop_step(self) -> int | None:
        """The step in the stop file, or None."""
        try:
            return None if self._is_stale() else int(self.stop_file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def save_state(self, parameters: Any) -> None:
        """Write a state, and delete this run's oldest ones.

        Args:
            parameters: MindSpore's record of the run, original_args() of a run context.
        """
        name = state.state_name(self.prefix, self.progress.step)
        cell = parameters.network
        extra = {"step_num": self.progress.step, "epoch_num": parameters.cur_epoch_num,
                 "loss_scale": 1.0, "global_step": cell.optimizer.global_step,
                 TENSOR: ms.Tensor(np.frombuffer(self.run.to_bytes(), np.uint8)), **self.metadata}
        self._delete_oldest()  # by now, all ranks have the earlier ones
        if self._save(cell, state.state_folder(self.output), name, extra):
            self._delete_oldest()

    def _delete_oldest(self) -> None:
        """Delete this run's oldest states. What stays has a step that all ranks have saved, so that
        a rank without room, or a kill between two ranks, costs no other rank its states.
        """
        own = {step: path for step, path in state.saved_states(self.output).items()
               if self._is_own(path)}
        ranks = state.states_of_ranks(self.output)
        complete = max((step for step in own if all(step in each for each in ranks)), default=0)
        for step in list(own)[:-self.keep]:
            if step < complete:
                own[step].unlink()

    def _is_own(self, path: Path) -> bool:
        """Whether this run saved a state."""
        with contextlib.suppress(cli.UserError):  # damaged
            saved = identity_in(containers.open_tensors(path), path)
            return saved is not None and saved.id == self.run.id
        return False

    def save_weights(self, place: str, name: str) -> None:
        """Write the weights alone, and their step beside them, which merging checks on all ranks.

        Args:
            place: folder in output_dir.
            name: of the file.
        """
        folder = self.output / place / f"rank_{cli.rank()}"
        if self._save(self.network, folder, name, self.metadata):
            write_json(folder / STEP, {"step": self.progress.step, "run": self.run.id},
                       sealed=True)

    def _save(self, cell: nn.Cell, folder: Path, name: str, extra: dict[str, Any]) -> bool:
        """Save a cell's parameters; they get their name when complete. Return whether it worked."""
        path = folder / name
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if self._free() < self._size(cell):
                raise OSError("no space left on the disk")
            with staging_folder(path) as staging, _mindspore_silent():
                ms.save_checkpoint(cell, str(staging / name), integrated_save=False,
                                   append_dict=extra, choice_func=self.name_filter, crc_check=True)
                os.replace(staging / name, path)
        except (OSError, RuntimeError, cli.UserError) as error:
            # staging_folder turns an OSError into a UserError
            cause = error.__context__ if isinstance(error, cli.UserError) else error
            why = str(cause or error).splitlines()[0]
            self.unsaved[folder] = f"{path}: was not saved ({why}); earlier ones stay"
            print(f"warning: {self.unsaved[folder]}", flush=True)
            return False
        self.unsaved.pop(folder, None)
        return True

    def _size(self, cell: nn.Cell) -> int:
        """Bytes of the parameters that are saved."""
        return sum(parameter.nbytes for parameter in cell.get_parameters()
                   if self.name_filter is None or self.name_filter(parameter.name))

    def _free(self) -> int:
        """Free bytes on the disk of the states."""
        return shutil.disk_usage(existing_parent(self.output / "checkpoint")).free

    def on_train_end(self, run_context: Any) -> None:
        """Restore the handler of SIGTERM.

        Raises:
            UserError: the last file could not be saved.
        """
        signal.signal(signal.SIGTERM, self.former)
        states = state.state_folder(self.output)
        if states in self.unsaved:
            raise cli.UserError(f"{self.unsaved[states]}. Make room and resume from an earlier "
                                "state")
        for problem in self.unsaved.values():
            raise cli.UserError(f"{problem}. Make room; the last state holds the same weights: "
                                f"transform_checkpoint.py takes {states.parent}")


@contextlib.contextmanager
def _mindspore_silent() -> Iterator[None]:
    """Suppress MindSpore's own lines about a file that it cannot write."""
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def check_optimizer_state(optimizer: nn.Optimizer, path: str | Path) -> None:
    """Raise UserError if a state lacks an optimizer parameter: MindSpore would silently zero it."""
    stored = containers.open_tensors(path)
    missing = [p.name for p in optimizer.get_parameters() if p.name not in stored]
    if missing:
        raise cli.UserError(f"{path}: lacks {missing[0]} and {len(missing) - 1} more parameter(s) "
                            "of the optimizer; resume with the optimizer and LoRA settings that "
                            "saved it")
