"""The checkpoint files of several cards, rank_0, rank_1, ...: which of several steps is whole on all."""
import re
from pathlib import Path

from mindrlhf.checkpoints.containers import SUFFIXES, check_whole, read
from mindrlhf.cli import UserError
from mindrlhf.files import read_json

STEP = "step.json"  # beside weights without a training state: {"step": number of steps behind them}
WEIGHTS = "transformer."  # every weight's name starts so; the rest of a state is the optimizer's


def weights_of(path):
    """The weights in a file, without the rest of a training state: dict, name -> StoredTensor."""
    tensors = {name: tensor for name, tensor in read(path).items() if name.startswith(WEIGHTS)}
    if not tensors:
        raise UserError(f"{path}: holds no weights of a GLM-4")
    return tensors


def rank_folders(folder):
    """rank_0, rank_1, ... in a folder: list of paths.

    Raises:
        UserError: there are none, or one is missing.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such file or folder; give a checkpoint, or "
                        "output/checkpoint_network of a run")
    ranks = {int(match[1]): path for path in folder.iterdir()
             if (match := re.fullmatch(r"rank_(\d+)", path.name))}
    if not ranks:
        raise UserError(f"{folder}: holds no rank_0, rank_1, ...; give output/checkpoint_network of a run")
    missing = sorted(set(range(max(ranks) + 1)) - set(ranks))
    if missing:
        raise UserError(f"{folder}: rank_{missing[0]} is missing; copy it from the machine that trained it")
    return [ranks[number] for number in range(len(ranks))]


def _steps(folder):
    """The checkpoints in a rank's folder: dict, number of steps, or None where nothing says it -> path."""
    found = {}
    for path in sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES):
        step = _step_of(path)
        if step in found:
            what = "say no step" if step is None else f"are both of step {step}"
            raise UserError(f"{path}: and {found[step].name} {what}; leave one of them")
        found[step] = path
    if not found:
        raise UserError(f"{folder}: holds no .ckpt or .safetensors; copy it from the machine that trained it")
    return found


def _step_of(path):
    """Number of steps behind a checkpoint: it stands in a state, and beside weights; else None."""
    match, beside = re.search(r"-step_(\d+)$", path.stem), path.with_name(STEP)
    named = int(match[1]) if match else None
    try:
        tensors = read(path)
    except UserError:
        return named  # damaged, which is said if it is chosen
    if "step_num" not in tensors:
        return read_json(beside).get("step") if named is None and beside.is_file() else named
    step = int(tensors["step_num"].array().reshape(-1)[0])
    if named not in (None, step):
        raise UserError(f"{path}: holds step {step}; rename it back")
    return step


def choose(folder, step=None, *, skipped=None):
    """One whole checkpoint file of each rank, all of the same step.

    Args:
        folder: holds rank_0, rank_1, ...
        step: which; None: the last that every rank has whole.
        skipped: called with a line about each later step that is not whole; None: such a step is an error.

    Returns:
        (list of paths, step or None where the files say none).

    Raises:
        UserError: no step is whole on all ranks, or not the one asked for.
    """
    folders = rank_folders(folder)
    found = [_steps(each) for each in folders]
    wanted = {step} if step is not None else set().union(*found)
    problems = []
    for number in sorted(wanted, key=lambda number: -1 if number is None else number, reverse=True):
        try:
            files = [_of_step(each, steps, number, found) for each, steps in zip(folders, found)]
            for path in files:
                check_whole(path)
        except UserError as error:
            problems.append(error)
            if skipped is None:
                break
            continue
        for problem in problems:
            skipped(f"skipped: {problem}")
        return files, number
    raise problems[0]


def _of_step(folder, steps, number, found):
    if number not in steps:
        there = ", ".join(str(each) for each in sorted(filter(None, set().union(*found)))) or "none"
        raise UserError(f"{folder}: has no checkpoint of step {number}; steps found: {there}")
    return steps[number]
