"""For the benchmarks: what a process of its own takes, and what `cp` takes."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run(code, *arguments):
    """(seconds, bytes of peak memory) that a process prints as its last words.

    Args:
        code: Python that the process runs; it gets ROOT and the arguments.
    """
    command = [sys.executable, "-c", code, str(ROOT), *map(str, arguments)]
    done = subprocess.run(
        command, check=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    seconds, peak = done.stdout.split()
    return float(seconds), int(peak)


def copy(source, target):
    """Seconds that `cp -r` takes. The copy is deleted."""
    start = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    seconds = time.perf_counter() - start
    remove(target)
    return seconds


def remove(path):
    """Delete a file or a folder, if it is there."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def cpu_model() -> str:
    """The CPU's name and its number of cores, for figures that depend on them."""
    names = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return f"{len(names)} x {names[0]}" if names else platform.processor()
