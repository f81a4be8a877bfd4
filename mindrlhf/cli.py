"""What the commands share: errors of one line, arguments, output on rank 0 only."""
from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path


class UserError(Exception):
    """Something that the user can mend. The message names the file, the place and the cure."""


def run_command(main):
    """Call main(); a UserError ends the process with one line on stderr and status 2."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except BrokenPipeError:  # the reader of our output went away: `... | head`
        sys.exit(1)


class Parser(argparse.ArgumentParser):
    """An argument parser without abbreviations. Defaults are None, so that the YAML decides."""

    def __init__(self, description, example):
        super().__init__(description=description, epilog="example:\n" + example, allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        raise UserError(f"{message}; see {self.prog} --help")


def boolean(text):
    """argparse type for True and False (argparse's bool("False") is True)."""
    values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"expected True or False, got {text!r}")
    return values[text.lower()]


def positive(text):
    """argparse type for a whole number above zero."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


def share(text: str) -> float:
    """argparse type for a number from 0 to below 1."""
    try:
        if 0 <= float(text) < 1:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"expected a number from 0 to below 1, got {text!r}")


def existing_file(path, what):
    """Path of a file that must be there and hold something.

    Raises:
        UserError: there is no such path, it is a folder, or it is empty.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: is a folder; {what} must be a file")
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the path of {what}")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: is empty; {what} must hold something")
    return path


def rank():
    """Number of this process among those that the launcher started (0 without a launcher)."""
    return int(os.environ.get("RANK_ID", 0))


def workers():
    """How many processes the launcher started (1 without a launcher)."""
    return int(os.environ.get("MS_WORKER_NUM", 1))


def say(*lines):
    """Print on rank 0."""
    if rank() == 0:
        print(*lines, sep="\n", flush=True)


@contextlib.contextmanager
def quiet_stdout() -> Iterator[None]:
    """Send what libraries write to stdout, C++ included, to stderr, so that stdout holds the answer alone."""
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        ctypes.CDLL(None).fflush(None)
        os.dup2(stdout, 1)
        os.close(stdout)


def progress_bar(total, what, unit, **options):
    """A tqdm bar on rank 0 of a run that someone watches; the launcher says so where a log file lies between."""
    from tqdm import tqdm
    watched = sys.stderr.isatty() or os.environ.get("MINDRLHF_TERMINAL")
    return tqdm(total=total, desc=what, unit=unit, disable=rank() != 0 or not watched, **options)
