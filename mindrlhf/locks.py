"""Locks: one run at a time writes an output. A second one is refused, and told which the first is.

The lock of an output is a hidden file that names its owner. The owner holds it with flock, which
the kernel releases when the process ends, whatever ends it; so what a killed run leaves is taken
over. Where a file system has no flock, the process in the file decides: the lock is stale if that
process has ended, began at another time, or ran before the machine was started.
"""
from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

from mindrlhf import cli
from mindrlhf.cli import UserError

LAUNCH = "MINDRLHF_LAUNCH"  # set by msrun_launcher.sh, alike for all workers of a launch
PATIENCE = 600  # seconds that a worker waits for the lock of rank 0
NAMED = 2  # seconds that a run waits for the name of the one that has just taken the lock
NO_FLOCK = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
NOT_WRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS}  # nothing can be written there, either


@dataclass(frozen=True)
class Owner:
    """The process that holds a lock: the content of the file.

    Attributes:
        host: name of its machine.
        pid: its number.
        start: when it began, in clock ticks since the machine was started; "" if unknown.
        boot: id of the machine's latest start; "" if unknown.
        since: local time of the lock.
        launch: of its workers.
    """
    host: str
    pid: int
    start: str
    boot: str
    since: str
    launch: str

    @classmethod
    def current(cls) -> Owner:
        """This process."""
        return cls(socket.gethostname(), os.getpid(), _start_of(os.getpid()), _boot(),
                   time.strftime("%Y-%m-%d %H:%M:%S"), launch_id())

    def is_alive(self) -> bool | None:
        """Whether the process still runs; None if that cannot be seen from this machine."""
        if self.boot != _boot():
            return False if self.host == socket.gethostname() else None
        return bool(self.start) and _start_of(self.pid) == self.start

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


def _start_of(pid: int) -> str:
    """When a process began, in clock ticks; "" if there is none, or no /proc."""
    with contextlib.suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return "" if fields[0] == "Z" else fields[19]
    return ""


def _boot() -> str:
    """Id of the machine's latest start; "" if unknown."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def launch_id() -> str:
    """What the workers of one launch share, and no others that run at the same time."""
    scheduler = os.environ.get("MS_SCHED_HOST"), os.environ.get("MS_SCHED_PORT")
    return os.environ.get(LAUNCH) or (":".join(map(str, scheduler)) if all(scheduler)
                                      else f"{socket.gethostname()} {os.getpid()}")


def lock_path(output: str | Path, *, is_folder: bool = False) -> Path:
    """Path of the lock of an output.

    Args:
        output: a file, or a folder that appears when it is complete: the lock lies beside it.
        is_folder: the output is a folder that runs add files to: the lock lies in it.
    """
    path = Path(os.path.abspath(output))
    return path / ".lock" if is_folder else path.with_name(f".{path.name}.lock")


@contextlib.contextmanager
def hold(output: str | Path, *, is_folder: bool = False) -> Iterator[None]:
    """`with hold(path)`: no other run writes this output. The workers of a launch share the lock of
    its rank 0.

    Args:
        output, is_folder: as in lock_path().

    Raises:
        UserError: another run holds the lock.
    """
    path = lock_path(output, is_folder=is_folder)
    if cli.rank() or os.environ.get("MS_ROLE") == "MS_SCHED":
        _require_own_launch(output, path)
        yield
        return
    made: list[Path] = []
    try:
        made += [folder for folder in path.parents if not folder.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = _acquire(output, path)
    except OSError as error:
        if error.errno not in NOT_WRITABLE:
            raise UserError(f"{output}: cannot be written ({error.strerror}); choose another "
                            "path") from None
        lock = None
    try:
        yield
    finally:
        if lock is not None:
            with contextlib.suppress(OSError):
                path.unlink()
            os.close(lock)
        with contextlib.suppress(OSError):  # a folder that is not empty
            for folder in made:
                folder.rmdir()


def wait_for_rank_0(output: str | Path, patience: float = PATIENCE) -> None:
    """Let a worker of a launch write only once rank 0 holds the lock.

    Args:
        output: as in lock_path().
        patience: seconds to wait, at most.

    Raises:
        UserError: another run holds the lock, or rank 0 has not taken it in time.
    """
    path, deadline = lock_path(output), time.monotonic() + patience
    while cli.rank() and LAUNCH in os.environ:
        _require_own_launch(output, path)
        owner = _read_owner(path)
        if owner and owner.launch == launch_id():
            return
        if time.monotonic() > deadline:
            raise UserError(f"{output}: worker 0 has not begun to write it within {patience:g} s; "
                            "see the end of worker_0.log, and start again")
        time.sleep(0.05)


def _require_own_launch(output: str | Path, path: Path) -> None:
    """Raise UserError if a live process of another launch holds a lock."""
    owner = _read_owner(path)
    if owner and owner.launch != launch_id() and owner.is_alive():
        _refuse(output, owner)


def _refuse(output: str | Path, owner: Owner | None, more: str = "") -> NoReturn:
    who = owner or "its lock names no process"
    raise UserError(f"{output}: another run is writing it ({who}); wait until it has ended, or "
                    f"give this run another path{more}")


def _acquire(output: str | Path, path: Path) -> int:
    """Take a lock; return its open file.

    Raises:
        UserError: another run holds it, or the file is no lock.
    """
    deadline = time.monotonic() + NAMED
    while True:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        try:
            locked = _lock_file(output, path, lock)
            with contextlib.suppress(FileNotFoundError):  # its last owner has just removed it
                if locked and os.path.samestat(os.fstat(lock), os.stat(path)):
                    with contextlib.suppress(OSError):  # a full disk: locked, without a name in it
                        os.ftruncate(lock, 0)
                        os.pwrite(lock, json.dumps(asdict(Owner.current())).encode(), 0)
                    return lock
            if not locked and time.monotonic() > deadline:
                _refuse(output, None)
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)
        time.sleep(0.01)


def _lock_file(output: str | Path, path: Path, lock: int) -> bool:
    """Lock an open file, or raise UserError; False if another run holds it, unnamed as yet."""
    held, owner = False, None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        held, owner = True, _read_owner(path)
    except OSError as error:
        if error.errno not in NO_FLOCK:
            raise
        owner = _read_owner(path)
    if owner and owner.is_alive() is not False:
        more = "" if held or owner.is_alive() else f"; if it has ended, remove {path}"
        _refuse(output, owner, more)
    if not held and os.fstat(lock).st_size and _read_owner(path) is None:
        raise UserError(f"{path}: exists and is not the lock of a run; move it away")
    return not held


def _read_owner(path: Path) -> Owner | None:
    """The owner that a lock names; None if it names none."""
    try:
        with open(path, "rb") as file:
            content = Owner(**json.loads(file.read(4096)))
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    good = (all(isinstance(value, str) for name, value in asdict(content).items() if name != "pid")
            and isinstance(content.pid, int) and 0 < content.pid < 1 << 32)
    return content if good else None
