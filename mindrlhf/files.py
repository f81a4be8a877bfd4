"""Files: atomic ones, which get their name only when they are complete; free space; hashes."""
from __future__ import annotations

import glob
import os
import resource
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Generic, TypeVar

import xxhash

from mindrlhf.cli import UserError, size_text

Opened = TypeVar("Opened")
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
