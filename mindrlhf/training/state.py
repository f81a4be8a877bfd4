"""Training states on disk: weights, optimizer and step of a rank, to resume a run exactly."""
from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindrlhf import cli
from mindrlhf.checkpoints import containers
from mindrlhf.checkpoints.containers import open_tensors, require_intact
from mindrlhf.checkpoints.runs import newest_first
from mindrlhf.cli import UserError

if TYPE_CHECKING:
    from mindspore import nn

NAME = re.compile(r"-step_(\d{8})\.ckpt$")


def state_folder(output_dir: str | Path, rank: int | None = None) -> Path:
    """Where a rank (default: this one) keeps its states."""
    return Path(output_dir) / "checkpoint" / f"rank_{cli.rank() if rank is None else rank}"


def state_name(prefix: str, step: int) -> str:
    """File name of a state. step counts from the beginning of training, across resumed runs."""
    return f"{prefix}-step_{step:08d}.ckpt"


def step_in_name(path: str | Path) -> int | None:
    """Number of steps in a state's name; None for any other file."""
    match = NAME.search(Path(path).name)
    return int(match[1]) if match else None


def saved_states(output_dir: str | Path, rank: int | None = None) -> dict[int, Path]:
    """States of a rank (default: this one), oldest first: step -> path."""
    steps = {path: step_in_name(path) for path in state_folder(output_dir, rank).glob("*.ckpt")}
    return dict(sorted((step, path) for path, step in steps.items() if step is not None))


def states_of_ranks(output_dir: str | Path) -> list[dict[int, Path]]:
    """States of each rank of this launch, as saved_states() gives them."""
    return [saved_states(output_dir, rank) for rank in range(cli.workers())]


def require_intact_state(path: str | Path) -> None:
    """Raise UserError unless a state is intact: structure, step and checksum."""
    step = steps_done(path)
    if step_in_name(path) not in (None, step):
        raise UserError(f"{path}: holds step {step}, unlike its name; rename it back")
    require_intact(path, needs_checksum=True)


def choose_state(output_dir: str | Path, resume: str | Path) -> Path | None:
    """The state to resume from.

    Args:
        output_dir: of the run.
        resume: "auto", or the path of a state of rank 0.

    Returns:
        path of a rank's state (own_state gives this rank's), or None if "auto" finds none.

    Raises:
        UserError: the named state is missing, or output_dir holds this rank's states of later
            steps.
    """
    if resume == "auto":
        return _newest_intact(output_dir)
    path = cli.existing_file(resume, "a state to resume from (output/checkpoint/rank_0/...)")
    later = [step for step in saved_states(output_dir) if step > steps_done(path)]
    if later:
        raise UserError(f"{state_folder(output_dir)}: has states of later steps "
                        f"({', '.join(map(str, later))}), which this run would repeat; move them "
                        "away, or give another --output_dir")
    return path


def own_state(path: Path) -> Path:
    """This rank's state, given a rank's.

    Raises:
        UserError: it is missing or damaged.
    """
    if path.parent.name.startswith("rank_"):  # each rank has its own
        rank = cli.rank()
        path = cli.existing_file(path.parent.with_name(f"rank_{rank}") / path.name,
                                 f"the state of rank {rank}")
    require_intact_state(path)
    return path


def _newest_intact(output_dir: str | Path) -> Path | None:
    """A rank's state of the newest step that is intact on every rank.

    Returns:
        its path; None if there is no state, or a kill has cut short the saving of the first one.

    Raises:
        UserError: there are states, but no step that all ranks have.
    """
    found = states_of_ranks(output_dir)
    # ranks without any: the run had another number of workers, which its identity tells
    ranks: list[Mapping[Any, Path]] = [states for states in found if states]
    steps = set().union(*found)
    if len(steps) == 1 and len(ranks) < len(found):
        cli.say(f"skipped: step {min(steps)}, which not all workers had saved")
        return None
    common = set.intersection(*map(set, ranks)) if ranks else set()
    for candidate in newest_first(ranks, common, require_intact_state):
        if candidate.step and candidate.step.number is not None:
            return candidate.step.files[0]
        cli.say(f"skipped: {candidate.problem}")
    if steps:
        raise UserError(f"{state_folder(output_dir).parent}: no step has an intact state of each "
                        f"of {cli.workers()} workers; begin again with --overwrite instead of "
                        "--resume, or give another --output_dir")
    return None


def steps_done(path: str | Path) -> int:
    """Number of training steps behind a state.

    Raises:
        UserError: the file holds no step, so it is no training state.
    """
    tensors = open_tensors(path)
    if "step_num" not in tensors:
        raise UserError(f"{path}: is no training state; give a file of output/checkpoint/rank_*")
    return int(tensors["step_num"].array())


def set_aside_later(output_dir: str | Path, step: int) -> None:
    """Rename states after `step`, which are damaged or lack another rank's, to *.ckpt.unusable."""
    for later, path in saved_states(output_dir).items():
        if later > step:
            path.rename(path.with_suffix(".ckpt.unusable"))


def load_own_part(path: str | Path, network: nn.Cell, optimizer: nn.Cell, *,
                  names: Callable[[str], bool] | None = None) -> None:
    """Load this rank's part of a sharded state, before the parallel plan is compiled.

    Args:
        path: state of this rank, saved by the same plan.
        network: with unsharded parameters.
        optimizer: with unsharded parameters.
        names: whether a parameter of this name is in the state; None: all are.

    Raises:
        UserError: a parameter is missing, or its shape cannot be a part of the parameter.
    """
    from mindrlhf.checkpoints.slices import OwnPart
    stored = containers.open_tensors(path)
    parameters = {parameter.name: parameter for cell in (network, optimizer)
                  for parameter in cell.get_parameters() if names is None or names(parameter.name)}
    for name, parameter in parameters.items():
        tensor, full = stored.get(name), parameter.shape
        if tensor is None or not _is_part(tensor.shape, full):
            problem = "no" if tensor is None else "another shape of"
            raise UserError(f"{path}: has {problem} {name}; resume with the YAML and the number of "
                            "workers that saved it")
        values = tensor.array() if tensor.dtype.startswith("I") else tensor.float32()
        parameter.set_data(OwnPart(values, full, parameter.dtype))


def _is_part(part: tuple[int, ...], full: tuple[int, ...]) -> bool:
    """Whether equal parts of one shape make up another."""
    return len(part) == len(full) and not any(size % share for size, share in zip(full, part))
