"""What all commands share: one-line errors, argument parsing, and output on rank 0 only."""
from __future__ import annotations

import argparse
import contextlib
import ctypes
import errno
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn


class UserError(Exception):
    """An error that the user can fix.

    The message is one line: the file or option, what is wrong with its value, and how to fix it.
    """


# of files and disks that a user can name or fill; other OSErrors are faults of the program
USERS_ERRNOS = {errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT,
                errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EFBIG, errno.EIO}
# what MindSpore says of memory of the host and of NPUs
NO_MEMORY = re.compile(r"memory isn't enough|memory not enough|out of memory|bad_alloc|"
                       "allocate memory failed", re.IGNORECASE)
CANN = ("acl", "hccl", "opc_tool", "tbe", "te")  # packages of Ascend's toolkit
PACKAGES = {"yaml": "PyYAML"}  # module -> name of its package, where they differ


def printable(text: str) -> str:
    """Text with control characters as visible escapes, so that it cannot control the terminal."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def run_command(main: Callable[[], object]) -> None:
    """Call main(); an error that the user can fix ends the process with one line and status 2."""
    try:
        main()
    except UserError as error:
        end_with(str(error))
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr, flush=True)
        sys.exit(130)
    except BrokenPipeError:  # the reader of stdout has exited: `... | head`
        sys.exit(1)
    except OSError as error:
        if error.errno not in USERS_ERRNOS:
            raise
        place = f"{error.filename}: " if error.filename else ""
        end_with(f"{place}{error.strerror}; give another path, or make room on its disk")
    except ModuleNotFoundError as error:
        end_with(missing_package(error))
    except Exception as error:
        cause = out_of_memory(error)
        if cause is None:
            raise
        end_with(f"out of memory ({cause or 'of this process'}); lower seq_length, batch_size, "
                 "dpo.logps_chunk_size or the number of workers, recompute more layers, or shard "
                 "over more cards: python -m mindrlhf.plan CONFIG says what fits")


def missing_package(error: ModuleNotFoundError) -> str:
    """One line about a package that is not installed, or not in the active environment."""
    name = str(error.name).split(".")[0]
    if name == "mindrlhf":
        return f"{error.name}: is no module of this project; see the files in README.md"
    if name in ("mindspore", "mindformers"):
        cure = "activate the environment that has it, or install it as README.md says"
    elif name in CANN:
        cure = "source set_env.sh of CANN first"
    else:
        cure = ("activate the project's environment (source .venv/bin/activate), or install it "
                f"(pip install {PACKAGES.get(name, name)})")
    return f"the Python package {name} is missing in {sys.executable}; {cure}"


def report_missing_packages() -> None:
    """Make an import that fails while a command's modules load one line, too."""
    former = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        if isinstance(error, ModuleNotFoundError) and error.name:
            end_with(missing_package(error))
        former(kind, error, trace)

    sys.excepthook = hook


def out_of_memory(error: BaseException | None) -> str | None:
    """The first line of an error that memory ran out, or of one that led to this error, or None.

    MindFormers replaces a MemoryError by others; MindSpore raises a RuntimeError.
    """
    while error is not None:
        lines = str(error).strip().splitlines() or [""]
        if isinstance(error, MemoryError):
            return lines[0]
        if isinstance(error, RuntimeError):
            for line in lines:
                if NO_MEMORY.search(line):
                    return line.strip("- ")
        error = error.__cause__ or error.__context__
    return None


def end_with(message: str) -> NoReturn:
    """Print an error as one line on stderr, and end with status 2."""
    print(f"error: {printable(message)}", file=sys.stderr, flush=True)
    sys.exit(2)


class Parser(argparse.ArgumentParser):
    """An argument parser without abbreviations. Defaults are None, so that the YAML decides."""

    def __init__(self, description: str | None, example: str) -> None:
        spec = getattr(sys.modules["__main__"], "__spec__", None)
        module = spec.name.removesuffix(".__main__") if spec else ""
        prog = f"python -m {module}" if module.startswith("mindrlhf.") else None
        super().__init__(prog=prog, description=description, epilog="example:\n" + example,
                         allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message: str) -> NoReturn:
        """Raise UserError instead of printing the usage."""
        raise UserError(f"{message}; see {self.prog} --help")


def boolean(text: str) -> bool:
    """argparse type for True and False (argparse's bool("False") is True)."""
    values = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in values:
        raise argparse.ArgumentTypeError(f"expected True or False, got {text!r}")
    return values[text.lower()]


def positive(text: str) -> int:
    """argparse type for a positive integer."""
    if not text.isdecimal() or len(text) > 9 or int(text) == 0:
        raise argparse.ArgumentTypeError(
            f"expected a positive integer of at most 9 digits, got {shown(text)}")
    return int(text)


def share(text: str) -> float:
    """argparse type for a number of at least 0 and below 1."""
    try:
        if 0 <= float(text) < 1:
            return float(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"expected a number of at least 0 and below 1, got {text!r}")


def existing_file(path: str | Path, what: str) -> Path:
    """The path of a file that must exist and must not be empty.

    Raises:
        UserError: there is no such path, it is a folder, it is empty, or no path is possible there.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise UserError(f"{path}: is a folder; {what} must be a file")
        if not path.is_file():
            raise UserError(f"{path}: no such file; give the path of {what}")
        if path.stat().st_size == 0:
            raise UserError(f"{path}: is empty; give {what} with content")
    except OSError as error:  # a name of 300 characters, a folder that may not be entered
        raise UserError(f"{shown(str(path))}: {error.strerror}; give the path of "
                        f"{what}") from None
    return path


def shown(value: object) -> str:
    """repr of a value for an error, cut after 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def size_text(nbytes: float) -> str:
    """A number of bytes for people: GB from 0.01 GB on, MB from 0.1 MB on, else KB."""
    if nbytes >= 1e7:
        return f"{nbytes / 1e9:.2f} GB"
    return f"{nbytes / 1e6:.2f} MB" if nbytes >= 1e5 else f"{nbytes / 1e3:.2f} KB"


def rank() -> int:
    """Rank of this process among those that the launcher started (0 without a launcher)."""
    return int(os.environ.get("RANK_ID", 0))


def workers() -> int:
    """Number of processes that the launcher started (1 without a launcher)."""
    return int(os.environ.get("MS_WORKER_NUM", 1))


def command_line() -> str:
    """The command that started this process, as a user can paste it; the launcher's, if it did.

    Paths are as the user gave them.
    """
    launched = os.environ.get("MINDRLHF_COMMAND")  # words as bash quotes them
    if launched is None:
        return shlex.join(["python", *sys.argv])
    # bash quotes a control character as $'...', which shlex does not read
    return launched if "$'" in launched else shlex.join(shlex.split(launched))


def say(*lines: str) -> None:
    """Print on rank 0, with control characters as visible escapes."""
    if rank() == 0:
        for line in "\n".join(lines).split("\n"):
            print(printable(line), flush=True)


@contextlib.contextmanager
def quiet_stdout() -> Iterator[None]:
    """Redirect what libraries (C++ too) print to stderr, so that stdout has only the answer."""
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


def progress_bar(total: int | None, what: str, unit: str, **options: Any) -> Any:
    """Make a tqdm bar that is shown on rank 0 of a run that someone watches.

    stderr must be a terminal. If the launcher writes it to a log file first, it sets
    MINDRLHF_TERMINAL.

    Args:
        total: number of units; None if unknown.
        what: description in front of the bar.
        unit: name of the unit.
        options: of tqdm.

    Returns:
        the bar.
    """
    from tqdm import tqdm
    watched = sys.stderr.isatty() or os.environ.get("MINDRLHF_TERMINAL")
    hidden = rank() != 0 or not watched
    return tqdm(total=total, desc=what, unit=unit, disable=hidden, **options)


report_missing_packages()
