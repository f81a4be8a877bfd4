"""Outputs: which existing files a command may replace."""
from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from mindrlhf.cli import UserError


class Output(NamedTuple):
    """A file that a command is going to write.

    Attributes:
        path: of the file.
        what: its kind, for messages: "a checkpoint".
        is_kind: whether the file that has the path now is of this kind.
    """
    path: Path
    what: str
    is_kind: Callable[[Path], bool]


def require_no_loss(outputs: Iterable[Output], inputs: Iterable[str | Path | None]) -> None:
    """Check that a command writes over nothing that it reads, and over nothing of another kind.

    Args:
        outputs: the files to write.
        inputs: files and folders that the command reads; None and "" are skipped.

    Raises:
        UserError: an output exists and is an input, a file in an input folder or a link to one, or
            is of another kind.
    """
    existing = [output for output in outputs if os.path.lexists(output.path)]
    read = _identities(filter(None, inputs)) if existing else {}
    for path, what, is_kind in existing:
        if os.path.isdir(path):
            raise UserError(f"{path}: is a folder; give the name of a file")
        found = read.get(_identity(path))
        if found:
            raise UserError(f"{path}: is the same file as {found}, which this command reads; give "
                            "the output another name")
        # A broken link may be replaced, and another run may have removed the file meanwhile.
        if os.path.exists(path) and not is_kind(path) and os.path.exists(path):
            raise UserError(f"{path}: exists and is not {what}, so it is not replaced; move it "
                            "away, or give the output another name")


def require_overwrite(path: str | Path, overwrite: bool, is_same: Callable[[], bool]) -> None:
    """Check that an existing output may be replaced.

    Args:
        path: the file to write.
        overwrite: the option --overwrite.
        is_same: whether the existing file was made from the same inputs.

    Raises:
        UserError: it was made from other inputs, and --overwrite is not given.
    """
    if not overwrite and os.path.exists(path) and not is_same():
        raise UserError(f"{path}: exists, made from other inputs; replace it with --overwrite, or "
                        "give the output another name")


def _identity(path: str | Path) -> tuple[int, int] | None:
    """Device and number of the file that a path leads to; None if there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _identities(paths: Iterable[str | Path]) -> dict[tuple[int, int] | None, str]:
    """Identity -> path, of files and of all files in folders, links followed."""
    found: dict[tuple[int, int] | None, str] = {}
    left = [os.fspath(path) for path in paths]
    while left:
        path = left.pop()
        identity = _identity(path)
        if identity is None or identity in found:  # missing, or a folder that links to itself
            continue
        found[identity] = path
        if os.path.isdir(path):
            with contextlib.suppress(OSError):
                left += [entry.path for entry in os.scandir(path)]
    return found
