"""Become a worker that ends with its launcher, whatever ends the launcher: kill -9 too.

    launcher_worker.py LAUNCHER_PID PROGRAM ARGUMENT ...

The kernel of Linux kills the process when the launcher has ended. Killing is safe: every file gets
its name only when it is complete. On other systems only the launcher's own signals end a worker.
"""
from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h; execve keeps the setting

if __name__ == "__main__":
    launcher, program = int(sys.argv[1]), sys.argv[2]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL))
    if os.getppid() != launcher:  # it ended before this
        sys.exit(137)
    os.execvp(program, sys.argv[2:])  # noqa: S606  the launcher's own command
