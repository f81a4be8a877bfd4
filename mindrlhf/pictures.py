"""Pictures as PNG files, drawn by matplotlib where it is installed."""
from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from mindrlhf.files import atomic_file, read_head
from mindrlhf.outputs import Output


def new_figure(width: float, height: float) -> Any:
    """An empty matplotlib Figure that needs no screen; None without matplotlib.

    Args:
        width, height: inches.
    """
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # of fonts without Chinese
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    return Figure(figsize=(width, height), layout="constrained")


def picture_output(path: str | Path) -> Output:
    """A picture that a command is going to write."""
    return Output(Path(path), "a PNG picture", lambda file: read_head(file).startswith(b"\x89PNG"))


def save_figure(figure: Any, path: str | Path) -> None:
    """Write a figure as a PNG file, 110 dots per inch, atomically."""
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=110)
