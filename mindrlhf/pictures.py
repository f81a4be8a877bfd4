"""Pictures as PNG files, drawn by matplotlib where it is installed."""
from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from mindrlhf.files import atomic_file


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


def save_figure(figure: Any, path: str | Path) -> None:
    """Write a figure as a PNG file, 110 dots per inch, atomically."""
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=110)
