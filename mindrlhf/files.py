"""Files that appear under their name only when they are whole, and JSON that is what it says."""
import glob
import json
import os
import shutil
import socket
from contextlib import contextmanager
from pathlib import Path

from mindrlhf.cli import UserError


def existing_parent(path):
    """The nearest folder above a path that exists."""
    return next(parent for parent in Path(path).absolute().parents if parent.exists())


def require_space(path, nbytes):
    """Raise UserError where a disk has not the room for what is to be written.

    Args:
        path: where it goes.
        nbytes: how much, bytes.
    """
    free = shutil.disk_usage(existing_parent(path)).free
    if free < nbytes:
        raise UserError(f"{path}: {nbytes / 1e9:.2f} GB do not fit, {free / 1e9:.2f} GB are free; choose "
                        "another disk")


def _temporary(path):
    """A name beside the final one that says who writes it; what dead processes of this machine left goes."""
    stem = f".{path.name}.{socket.gethostname()}."
    for left in path.parent.glob(glob.escape(stem) + "*.tmp"):
        number = left.name[len(stem):-len(".tmp")]
        if number.isdecimal() and not Path(f"/proc/{number}").exists() and Path("/proc/self").exists():
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
    return path.with_name(f"{stem}{os.getpid()}.tmp")


class _Atomic:
    """Context manager around a temporary that takes its final name only when the block ends well."""

    def __init__(self, path):
        self.path = Path(os.path.abspath(path))
        self.shown = path

    def __enter__(self):
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.temporary = _temporary(self.path)
            return self.open()
        except OSError as error:
            raise UserError(f"{self.shown}: cannot be written ({error.strerror}); give another") from None

    def __exit__(self, kind, error, trace):
        try:
            self.close()
            if kind is None:
                os.replace(self.temporary, self.path)
                return
        except OSError as failure:
            error = failure
        self.remove()
        if isinstance(error, OSError):
            raise UserError(f"{self.shown}: cannot be written ({error.strerror}); nothing was left") from None


class atomic_file(_Atomic):
    """`with atomic_file(path) as file`: a binary file."""

    def open(self):
        """The file to write to."""
        self.file = open(self.temporary, "wb")  # noqa: SIM115  closed in close()
        return self.file

    def close(self):
        """End the file."""
        self.file.close()

    def remove(self):
        """Take back what was written."""
        self.temporary.unlink(missing_ok=True)


class atomic_folder(_Atomic):
    """`with atomic_folder(path) as folder`: a new folder; one that holds something is not touched."""

    def open(self):
        """The folder to write into."""
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise UserError(f"{self.shown}: exists; remove it, or give the name of a new folder")
        self.temporary.mkdir()
        return self.temporary

    def close(self):
        """Nothing is open."""

    def remove(self):
        """Take back what was written."""
        shutil.rmtree(self.temporary, ignore_errors=True)


@contextmanager
def staging_folder(path):
    """`with workshop(path) as folder`: on the disk of a path, for what is made before it takes that name."""
    try:
        folder = _temporary(existing_parent(path) / Path(path).name)
        folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); nothing was left") from None


def write_json(path, content):
    """Write a JSON file, atomically."""
    with atomic_file(path) as file:
        file.write(json.dumps(content, ensure_ascii=False, indent=1).encode() + b"\n")


def read_json(path):
    """The object in a JSON file, as a dict.

    Raises:
        UserError: it is no JSON object, or a key stands in it twice.
    """
    def once(pairs):
        content = {}
        for key, value in pairs:
            if key in content:
                raise ValueError(f"{key!r} stands twice")
            content[key] = value
        return content

    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error}); fetch or write it again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, no JSON object; fetch it again")
    return content
