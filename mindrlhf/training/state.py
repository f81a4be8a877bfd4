"""Training states on disk: weights, optimizer and step of one rank, from which a run goes on exactly."""
from __future__ import annotations

import re
from pathlib import Path

from mindrlhf import cli
from mindrlhf.checkpoints import containers
from mindrlhf.checkpoints.containers import open_tensors, require_intact
from mindrlhf.checkpoints.runs import newest_first
from mindrlhf.cli import UserError

NAME = re.compile(r"-step_(\d{8})\.ckpt$")


def state_folder(output_dir, rank=None):
    """Where a rank keeps its states."""
    return Path(output_dir) / "checkpoint" / f"rank_{cli.rank() if rank is None else rank}"


def state_name(prefix, step):
    """Name of a state: the true number of steps behind it, whatever was resumed on the way."""
    return f"{prefix}-step_{step:08d}.ckpt"


def step_in_name(path):
    """Number of steps in a state's name; None for another file."""
    match = NAME.search(Path(path).name)
    return int(match[1]) if match else None


def saved_states(output_dir, rank=None):
    """States of a rank, oldest first: dict, step -> path."""
    files = state_folder(output_dir, rank).glob("*.ckpt")
    return dict(sorted((step_in_name(path), path) for path in files if step_in_name(path) is not None))


def require_intact_state(path):
    """Raise UserError unless a state is whole: structure, step and, where it has one, checksum."""
    step = steps_done(path)
    if step_in_name(path) not in (None, step):
        raise UserError(f"{path}: holds step {step}; rename it back")
    require_intact(path)


def choose_state(output_dir, resume):
    """The state to go on from.

    Args:
        output_dir: of the run.
        resume: "auto", or the path of a state of rank 0.

    Returns:
        path of this rank's state, or None where `auto` found none.

    Raises:
        UserError: the named state is missing or damaged, or lies behind others of the same folder.
    """
    if resume == "auto":
        return _newest_intact(output_dir)
    path = cli.existing_file(resume, "a state to resume from (output/checkpoint/rank_0/...)")
    if path.parent.name == "rank_0":  # every rank has its own
        path = cli.existing_file(path.parent.with_name(f"rank_{cli.rank()}") / path.name, f"the state of rank {cli.rank()}")
    require_intact_state(path)
    later = [step for step in saved_states(output_dir) if step > steps_done(path)]
    if later:
        raise UserError(f"{state_folder(output_dir)}: has states of later steps ({', '.join(map(str, later))}), which this run "
                        "would make again; move them away, or give another --output_dir")
    return path


def _newest_intact(output_dir):
    """This rank's state of the newest step that is intact on every rank, or None."""
    ranks = [saved_states(output_dir, rank) for rank in range(cli.workers())]
    ranks = [states for states in ranks if states]  # on several machines a folder may hold this machine's only
    for candidate in newest_first(ranks, set.intersection(*map(set, ranks)) if ranks else (), require_intact_state):
        if candidate.step:
            return saved_states(output_dir)[candidate.step.number]
        cli.say(f"skipped: {candidate.problem}")
    return None


def steps_done(path):
    """Number of training steps behind a checkpoint that MindFormers' CheckpointMonitor wrote.

    Raises:
        UserError: the file says nothing of steps; it is no training state.
    """
    tensors = open_tensors(path)
    if "step_num" not in tensors:
        raise UserError(f"{path}: is no training state; resume_training needs a file of output/checkpoint/rank_*")
    return int(tensors["step_num"].array())


def set_aside_later(output_dir, step):
    """Rename states of later steps, which are damaged or lack another rank's: the run makes these steps again."""
    for later, path in saved_states(output_dir).items():
        if later > step:
            path.rename(path.with_suffix(".ckpt.unusable"))


def load_own_part(path, network, optimizer, *, names=None):
    """Load what this rank saved of a parallel plan, before the plan is compiled.

    Args:
        path: state of this rank; the plan is the one that saved it.
        network, optimizer: Cells with whole parameters.
        names: function from a name to whether it is in the state; None: all are.

    Raises:
        UserError: a parameter is missing, or its part cannot be one of this plan.
    """
    from mindrlhf.checkpoints.slices import OwnPart
    stored = containers.open_tensors(path)
    for parameter in {p.name: p for cell in (network, optimizer) for p in cell.get_parameters()
                      if names is None or names(p.name)}.values():
        tensor = stored.get(parameter.name)
        whole = parameter.shape
        if tensor is None or len(tensor.shape) != len(whole) or any(
                all_ % part for all_, part in zip(whole, tensor.shape)):
            raise UserError(f"{path}: has {'no ' if tensor is None else 'another shape of '}{parameter.name}; resume with "
                            "the YAML and the number of workers that saved it")
        values = tensor.array() if tensor.dtype.startswith("I") else tensor.float32()
        parameter.set_data(OwnPart(values, whole, parameter.dtype))
