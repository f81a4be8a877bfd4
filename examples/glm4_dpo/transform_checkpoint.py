"""Runs the project's transform_checkpoint.py, so that its commands work in this folder too."""
from __future__ import annotations

import runpy
from pathlib import Path

if __name__ == "__main__":
    path = Path(__file__).resolve().parents[2] / "transform_checkpoint.py"
    runpy.run_path(str(path), run_name="__main__")
