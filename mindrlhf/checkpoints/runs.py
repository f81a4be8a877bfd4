"""The checkpoint files of several cards, rank_0, rank_1, ...: which of several steps is whole on all."""
from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mindrlhf.checkpoints.containers import SUFFIXES, open_tensors, require_intact
from mindrlhf.cli import UserError
from mindrlhf.files import read_json

STEP = "step.json"  # beside weights without a training state: {"step": number of steps behind them}


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
        tensors = open_tensors(path)
    except UserError:
        return named  # damaged, which is said if it is chosen
    if "step_num" not in tensors:
        return read_json(beside).get("step") if named is None and beside.is_file() else named
    step = int(tensors["step_num"].array().reshape(-1)[0])
    if named not in (None, step):
        raise UserError(f"{path}: holds step {step}; rename it back")
    return step


@dataclass(frozen=True)
class Step:
    """The checkpoints of all ranks at one training step.

    Attributes:
        files: path of each rank's file, rank 0 first.
        number: training steps behind them; None if the files do not say.
    """
    files: list[Path]
    number: int | None


@dataclass(frozen=True)
class Candidate:
    """A step that may be complete: its step, or what is wrong with it."""
    step: Step | None
    problem: UserError | None


def newest_first(ranks: Sequence[Mapping[int | None, Path]], numbers: Iterable[int | None],
                 check: Callable[[Path], None]) -> Iterator[Candidate]:
    """Steps from the newest to the oldest, each checked when it is asked for.

    Args:
        ranks: for each rank step number -> file.
        numbers: the steps to look at.
        check: raises UserError if a file is damaged.
    """
    for number in sorted(numbers, key=lambda number: -1 if number is None else number, reverse=True):
        try:
            files = [_file_of(states, number, ranks) for states in ranks]
            for path in files:
                check(path)
        except UserError as error:
            yield Candidate(None, error)
            continue
        yield Candidate(Step(files, number), None)


def _file_of(states: Mapping[int | None, Path], number: int | None, ranks: Sequence[Mapping[int | None, Path]]) -> Path:
    if number not in states:
        folder = next(iter(states.values())).parent
        known = sorted(step for step in set().union(*ranks) if step)
        raise UserError(f"{folder}: has no checkpoint of step {number}; steps found: "
                        f"{', '.join(map(str, known)) or 'none'}")
    return states[number]


def find_step(folder: str | Path, number: int | None = None, *,
              report_skipped: Callable[[str], None] | None = None) -> Step:
    """One intact checkpoint file of each rank, all of the same step.

    Args:
        folder: holds rank_0, rank_1, ...
        number: the step; None: the newest that is intact on every rank.
        report_skipped: called with a line about each newer step that is not; None: such a step is an error.

    Raises:
        UserError: no step is intact on all ranks, or not the one asked for.
    """
    ranks = [_steps(each) for each in rank_folders(folder)]
    wanted = {number} if number is not None else set().union(*ranks)
    problems = []
    for candidate in newest_first(ranks, wanted, require_intact):
        if candidate.step:
            for problem in problems:
                report_skipped(f"skipped: {problem}")
            return candidate.step
        problems.append(candidate.problem)
        if report_skipped is None:
            break
    raise problems[0]
