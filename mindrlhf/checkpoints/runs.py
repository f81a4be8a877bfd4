"""The checkpoints that a run saved in rank_0, rank_1, ...: which steps are intact on every rank."""
from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from mindrlhf.checkpoints.containers import SUFFIXES, open_tensors, require_intact
from mindrlhf.cli import UserError
from mindrlhf.json_files import read_json

# beside weights without a training state: {"step": number of training steps}
STEP = "step.json"
StepFiles = Mapping[Optional[int], Path]  # of one rank: step, or None if unknown -> file


def rank_folders(folder: str | Path) -> list[Path]:
    """rank_0, rank_1, ... in a folder, in order.

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
        raise UserError(f"{folder}: contains no rank_0, rank_1, ...; give "
                        "output/checkpoint_network of a run")
    missing = sorted(set(range(max(ranks) + 1)) - set(ranks))
    if missing:
        raise UserError(f"{folder}: rank_{missing[0]} is missing; copy it from the machine that "
                        "trained it")
    return [ranks[number] for number in range(len(ranks))]


def _steps(folder: Path) -> dict[int | None, Path]:
    """The checkpoints in the folder of a rank: step, or None if unknown -> file."""
    found: dict[int | None, Path] = {}
    for path in sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES):
        step = _step_of(path)
        if step in found:
            what = "have no step number" if step is None else f"are both of step {step}"
            raise UserError(f"{path}: and {found[step].name} {what}; keep one of them")
        found[step] = path
    if not found:
        raise UserError(f"{folder}: contains no .ckpt or .safetensors; copy it from the machine "
                        "that trained it")
    return found


def _step_of(path: Path) -> int | None:
    """Training steps behind a checkpoint, from its training state or step.json; None if unknown."""
    match, step_file = re.search(r"-step_(\d+)$", path.stem), path.with_name(STEP)
    named = int(match[1]) if match else None
    try:
        tensors = open_tensors(path)
    except UserError:
        return named  # damaged; reported if this step is chosen
    if "step_num" not in tensors:
        return read_json(step_file).get("step") if named is None and step_file.is_file() else named
    step = int(tensors["step_num"].array().reshape(-1)[0])
    if named not in (None, step):
        raise UserError(f"{path}: contains step {step}; give the file its original name")
    return step


@dataclass(frozen=True)
class Step:
    """The checkpoints of all ranks at one training step.

    Attributes:
        files: the file of each rank, rank 0 first.
        number: training steps behind them; None if unknown.
    """
    files: list[Path]
    number: int | None


@dataclass(frozen=True)
class Candidate:
    """A step that may be complete: either the step, or what is wrong with it."""
    step: Step | None
    problem: UserError | None


def newest_first(ranks: Sequence[StepFiles], numbers: Iterable[int | None],
                 check: Callable[[Path], None]) -> Iterator[Candidate]:
    """Yield steps from the newest to the oldest; each is checked only when it is requested.

    Args:
        ranks: for each rank step -> file.
        numbers: the steps to check.
        check: raises UserError if a file is damaged.
    """
    def age(number: int | None) -> int:
        return -1 if number is None else number

    for number in sorted(numbers, key=age, reverse=True):
        try:
            files = [_file_of(states, number, ranks) for states in ranks]
            for path in files:
                check(path)
        except UserError as error:
            yield Candidate(None, error)
            continue
        yield Candidate(Step(files, number), None)


def _file_of(states: StepFiles, number: int | None, ranks: Sequence[StepFiles]) -> Path:
    """The file of a step on one rank."""
    if number not in states:
        folder = next(iter(states.values())).parent
        known = sorted(step for step in set().union(*ranks) if step)
        raise UserError(f"{folder}: has no checkpoint of step {number}; steps found: "
                        f"{', '.join(map(str, known)) or 'none'}")
    return states[number]


def find_step(folder: str | Path, number: int | None = None, *,
              report_skipped: Callable[[str], None] | None = None) -> Step:
    """Find one intact checkpoint file of each rank, all of the same step.

    Args:
        folder: contains rank_0, rank_1, ...
        number: the step; None: the newest one that is intact on every rank.
        report_skipped: called with one line for each newer step that is not intact; None: such a
            step is an error.

    Raises:
        UserError: no step, or not the requested one, is intact on every rank.
    """
    ranks = [_steps(each) for each in rank_folders(folder)]
    wanted = {number} if number is not None else set().union(*ranks)
    problems: list[UserError] = []
    for candidate in newest_first(ranks, wanted, require_intact):
        if candidate.step:
            if report_skipped:
                for problem in problems:
                    report_skipped(f"skipped: {problem}")
            return candidate.step
        if candidate.problem:
            problems.append(candidate.problem)
        if report_skipped is None:
            break
    raise problems[0]
