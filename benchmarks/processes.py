"""What the benchmarks share: the path to mindrlhf, measurements in new processes, and tables.

Each benchmark imports this module before mindrlhf, so that a clone works without PYTHONPATH.
"""

from __future__ import annotations

import argparse
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def run(code: str, *arguments: object) -> tuple[float, int]:
    """Run Python code in a new process; it prints seconds and its peak memory in bytes.

    Args:
        code: the program; its sys.argv[1] is ROOT, then come the arguments.
        arguments: passed on as text.

    Returns:
        (seconds, bytes).
    """
    command = [sys.executable, "-c", code, str(ROOT), *map(str, arguments)]
    done = subprocess.run(command, text=True, capture_output=True)
    if done.returncode:
        sys.exit(done.stderr)
    seconds, peak = done.stdout.split()
    return float(seconds), int(peak)


def in_folder(description: str | None, compare: Callable[[Path], None]) -> None:
    """Read --folder, and call compare with an empty folder in it, which is deleted at the end.

    Args:
        description: for --help, of the benchmark.
        compare: the benchmark.
    """
    parse = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parse.add_argument(
        "--folder",
        default=tempfile.gettempdir(),
        help="where the files go; they are deleted at the end (default: %(default)s)",
    )
    with tempfile.TemporaryDirectory(dir=parse.parse_args().folder) as name:
        compare(Path(name))


def copy(source: Path, target: Path) -> float:
    """Seconds that `cp -r` takes. The copy is deleted."""
    start = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    seconds = time.perf_counter() - start
    remove(target)
    return seconds


def remove(path: Path) -> None:
    """Delete a file or a folder if it exists."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def cpu_model() -> str:
    """The CPU's name and its number of cores, for figures that depend on them."""
    names = [
        line.split(":", 1)[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return f"{len(names)} x {names[0]}" if names else platform.processor()


def memory(key: str) -> int:
    """Bytes of an entry of /proc/self/status: VmRSS is resident now, VmHWM is its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def reset_peak() -> None:
    """Restart the measurement of VmHWM."""
    Path("/proc/self/clear_refs").write_text("5")


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table of text cells, aligned to the right."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    print(title)
    for row in [head, ["-" * width for width in widths], *rows]:
        print("  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths)))
