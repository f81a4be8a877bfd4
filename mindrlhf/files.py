"""Atomic files, which get their name only when they are complete; which files may be replaced;
strict JSON.
"""
from __future__ import annotations

import contextlib
import glob
import json
import os
import resource
import shutil
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Generic, NamedTuple, TypeVar

import xxhash

from mindrlhf.cli import UserError, size_text

Opened = TypeVar("Opened")
SEAL = "seal"  # key of a JSON file whose value is the hash of all others
BLOCK = 4 << 20  # bytes that are hashed at once; they fit into a processor's cache


def existing_parent(path: str | Path) -> Path:
    """The nearest folder above a path that exists."""
    return next(parent for parent in Path(path).absolute().parents if parent.exists())


def require_space(path: str | Path, nbytes: int) -> None:
    """Raise UserError if the disk of a path has less than nbytes free."""
    free = shutil.disk_usage(existing_parent(path)).free
    if free < nbytes:
        raise UserError(f"{path}: {size_text(nbytes)} needed, {size_text(free)} free; choose "
                        "another disk")


def require_file_size(path: str | Path, nbytes: int) -> None:
    """Raise UserError if the shell's limit (ulimit -f) allows no file of nbytes."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if limit not in (resource.RLIM_INFINITY, -1) and limit < nbytes:
        raise UserError(f"{path}: {size_text(nbytes)} needed, but this shell allows files of "
                        f"{size_text(limit)} (ulimit -f); raise the limit")


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
        if os.path.exists(path) and not is_kind(path):  # a broken link may be replaced
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


def read_head(path: str | Path) -> bytes:
    """The first 512 bytes of a file, in which formats name themselves; b"" if it is unreadable."""
    try:
        with open(path, "rb") as file:
            return file.read(512)
    except OSError:
        return b""


def hash_file(path: str | Path, algorithm: Callable[[], Any] = xxhash.xxh3_128) -> str:
    """Hash of a file's content, in hex digits. The file is never in memory as a whole.

    Args:
        path: of the file.
        algorithm: of the hash: XXH3 (128 bits) or one of hashlib's.

    Raises:
        UserError: the file cannot be read.
    """
    content, block = algorithm(), memoryview(bytearray(BLOCK))
    try:
        with open(path, "rb", buffering=0) as file:
            while size := file.readinto(block):
                content.update(block[:size])
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); copy it again") from None
    return content.hexdigest()


def _temporary(path: Path) -> Path:
    """A name beside the final one that contains host and process.

    Temporaries of this path that dead processes of this machine left are removed.
    """
    stem = f".{path.name}.{socket.gethostname()}."
    for left in path.parent.glob(glob.escape(stem) + "*.tmp"):
        number = left.name[len(stem):-len(".tmp")]
        is_dead = number.isdecimal() and not Path(f"/proc/{number}").exists()
        if is_dead and Path("/proc/self").exists():
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
    return path.with_name(f"{stem}{os.getpid()}.tmp")


class _Atomic(Generic[Opened]):
    """A context manager around a temporary that takes its final name only if the block succeeds."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(os.path.abspath(path))
        self.shown = path

    def __enter__(self) -> Opened:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.temporary = _temporary(self.path)
            return self.open()
        except OSError as error:
            raise UserError(f"{self.shown}: cannot be written ({error.strerror}); choose another "
                            "path") from None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        try:
            self.close()
            if kind is None:
                os.replace(self.temporary, self.path)
                return
        except OSError as failure:
            error = failure
        self.remove()
        if isinstance(error, OSError):
            raise UserError(f"{self.shown}: cannot be written ({error.strerror}); partial output "
                            "was removed") from None

    def open(self) -> Opened:
        """Create the temporary."""
        raise NotImplementedError

    def close(self) -> None:
        """Close the temporary."""
        raise NotImplementedError

    def remove(self) -> None:
        """Delete the temporary."""
        raise NotImplementedError


class atomic_file(_Atomic[BinaryIO]):
    """`with atomic_file(path) as file`: a binary file."""

    def open(self) -> BinaryIO:
        """The file to write to."""
        self.file = open(self.temporary, "wb")  # noqa: SIM115  closed in close()
        return self.file

    def close(self) -> None:
        """Close the file."""
        self.file.close()

    def remove(self) -> None:
        """Delete the temporary file."""
        self.temporary.unlink(missing_ok=True)


class atomic_folder(_Atomic[Path]):
    """`with atomic_folder(path) as folder`: a new folder; an existing one must be empty."""

    def open(self) -> Path:
        """The folder to write into."""
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise UserError(f"{self.shown}: exists; remove it, or give the name of a new folder")
        self.temporary.mkdir()
        return self.temporary

    def close(self) -> None:
        """A folder needs no closing."""

    def remove(self) -> None:
        """Delete the temporary folder."""
        shutil.rmtree(self.temporary, ignore_errors=True)


@contextmanager
def staging_folder(path: str | Path) -> Iterator[Path]:
    """`with staging_folder(path) as folder`: a temporary folder on the disk of a path.

    Files are made there and moved to the path when they are complete.
    """
    try:
        folder = _temporary(existing_parent(path) / Path(path).name)
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); partial output "
                        "was removed") from None


def write_json(path: str | Path, content: dict[str, Any], *, sealed: bool = False) -> None:
    """Write a JSON file, atomically.

    Args:
        path: of the file.
        content: of the file.
        sealed: add a hash of the content, which read_json compares.
    """
    if sealed:
        content = {**content, SEAL: _seal_of(content)}
    with atomic_file(path) as file:
        file.write(json.dumps(content, ensure_ascii=False, indent=1).encode() + b"\n")


def _seal_of(content: dict[str, Any]) -> str:
    """XXH3 (128 bits) of JSON values, 32 hex digits."""
    as_read = json.loads(json.dumps(content))  # tuples are lists, keys are strings
    return xxhash.xxh3_128_hexdigest(json.dumps(as_read, sort_keys=True).encode())


def read_json(path: str | Path) -> dict[str, Any]:
    """Read the object in a JSON file, without the seal.

    Raises:
        UserError: it is not a JSON object, a key appears twice, or the seal does not fit.
    """
    content = read_unsealed(path)
    remove_seal(path, content)
    return content


def read_unsealed(path: str | Path) -> dict[str, Any]:
    """Read the object in a JSON file with its seal, which is not compared.

    Raises:
        UserError: it is not a JSON object, or a key appears twice.
    """
    def require_unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = {}
        for key, value in pairs:
            if key in content:
                raise ValueError(f"{key!r} appears twice")
            content[key] = value
        return content

    try:
        text = Path(path).read_text(encoding="utf-8")
        content = json.loads(text, object_pairs_hook=require_unique_keys)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}); download or write it again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(content).__name__}; download "
                        "it again")
    return content


def remove_seal(path: str | Path, content: dict[str, Any]) -> None:
    """Remove the seal from the content of a JSON file, if it has one.

    Raises:
        UserError: the seal does not fit the content.
    """
    seal = content.pop(SEAL, None)
    if seal is not None and seal != _seal_of(content):
        raise UserError(f"{path}: was changed or damaged after it was written; copy it again, or, "
                        f"if you changed it on purpose, remove its {SEAL!r}")
