"""The record of a run on disk: metrics.jsonl, TensorBoard events, curves.png."""
from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mindrlhf.cli import UserError
from mindrlhf.files import atomic_file
from mindrlhf.pictures import new_figure, save_figure


class Curve(NamedTuple):
    """A panel of curves.png.

    Attributes:
        title: of the panel.
        unit: of its values; "" for plain numbers.
        metrics: in the panel.
        mark: value and label of a horizontal line.
        limits: smallest and largest value; None: as the values need.
    """
    title: str
    unit: str
    metrics: tuple[str, ...]
    mark: tuple[float, str] | None = None
    limits: tuple[float, float] | None = None


CURVES = (
    Curve("loss", "nats per pair", ("loss", "dpo_loss"), mark=(math.log(2), "ln 2")),
    Curve("reward accuracy", "share of pairs", ("rewards/accuracies",), limits=(0, 1)),
    Curve("reward margin", "beta x nats", ("rewards/margins",)),
    Curve("rewards", "beta x nats", ("rewards/chosen", "rewards/rejected")),
    Curve("log-prob per token", "nats", ("logps/chosen_per_token", "logps/rejected_per_token")),
    Curve("gradient norm", "before clipping", ("grad_norm",)),
    Curve("learning rate", "", ("learning_rate",)))
STYLES = {"train": "-", "eval": "o--"}  # split -> how matplotlib draws it


def read_records(path: str | Path, *, before: float = math.inf) -> list[dict[str, Any]]:
    """Records of a metrics.jsonl up to step `before`. A last line that a kill cut is skipped.

    Raises:
        UserError: another line is not a record of a run.
    """
    records = []
    lines = Path(path).read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line.decode())
            if not (isinstance(record["step"], int) and isinstance(record["split"], str)):
                raise ValueError
        except (ValueError, TypeError, KeyError, RecursionError):
            if number == len(lines):
                break
            raise UserError(f"{path}:{number}: not a record of a run; remove this line, or move "
                            "the file away") from None
        if record["step"] <= before:
            records.append(record)
    return records


class Journal:
    """Writes the records of a run. Only rank 0 has one.

    Args:
        folder: output_dir of the run.
        first_step: steps behind the state that the run resumes from, 0 for a new run. Records of
            later steps, left by a run that was killed, are removed: this run repeats these steps.
    """

    def __init__(self, folder: str | Path, first_step: int) -> None:
        from tensorboardX import SummaryWriter
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / "metrics.jsonl"
        resumes = first_step and self.path.exists()
        self.records = read_records(self.path, before=first_step) if resumes else []
        with atomic_file(self.path) as file:
            for record in self.records:
                file.write(_to_json(record).encode())
        self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115  closed by close()
        self.events = SummaryWriter(str(self.folder / "tensorboard"),
                                    purge_step=first_step + 1 if first_step else None)

    def add(self, split: str, step: int, values: Mapping[str, Any]) -> None:
        """Write one record.

        Args:
            split: "train" or "eval".
            step: optimizer steps done.
            values: metric -> value.
        """
        record = {"split": split, "step": step, **values}
        self.records.append(record)
        self.file.write(_to_json(record))
        self.file.flush()
        for name, value in values.items():
            if isinstance(value, (int, float)) and math.isfinite(value):
                self.events.add_scalar(f"{split}/{name}", value, step)

    def last(self, name: str, default: Any) -> Any:
        """A training metric of the last step that was recorded; a default if there is none."""
        values = (record[name] for record in reversed(self.records)
                  if record["split"] == "train" and name in record)
        return next(values, default)

    def draw(self) -> None:
        """Draw curves.png from all records. Training goes on without it, if it must."""
        figure = self.plot_curves()
        if figure is None:
            return
        try:
            save_figure(figure, self.folder / "curves.png")
        except UserError as error:
            print(f"warning: {error}", flush=True)

    def plot_curves(self) -> Any:
        """A matplotlib figure with a panel for each of CURVES; None without matplotlib."""
        figure = new_figure(17, 7)
        if figure is None:
            return None
        from matplotlib.ticker import MaxNLocator
        axes = figure.subplots(2, 4)
        for axis, curve in zip(axes.flat, CURVES):
            for number, name in enumerate(curve.metrics):
                self._plot(axis, name, color=f"C{number}")
            if curve.mark:
                height, label = curve.mark
                axis.axhline(height, color="grey", linestyle=":", linewidth=1, label=label)
            if curve.limits:
                axis.set_ylim(*curve.limits)
            axis.set_title(curve.title)
            axis.set_xlabel("step")
            axis.set_ylabel(curve.unit)
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.grid(alpha=0.3)
            if axis.lines:
                axis.legend(fontsize=8)
        for axis in axes.flat[len(CURVES):]:
            axis.set_visible(False)
        return figure

    def _plot(self, axis: Any, name: str, color: str) -> None:
        """Draw one metric, of both splits. Points at the edge of a panel stay whole."""
        for split, style in STYLES.items():
            points = [(record["step"], record[name]) for record in self.records
                      if record["split"] == split and name in record]
            if points:
                label = f"{name}, {'held-out' if split == 'eval' else 'training'}"
                axis.plot(*zip(*points), style, color=color, linewidth=1, markersize=4,
                          clip_on=False, label=label)

    def close(self) -> None:
        """Flush and close the files."""
        self.file.close()
        self.events.close()


def _to_json(record: Mapping[str, Any]) -> str:
    """A record as a line of JSON. NaN and infinity, which JSON lacks, become null."""
    clean = {name: None if isinstance(value, float) and not math.isfinite(value) else value
             for name, value in record.items()}
    return json.dumps(clean) + "\n"
