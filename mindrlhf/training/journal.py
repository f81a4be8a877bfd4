"""What a run measures, written down: metrics.jsonl, TensorBoard events, curves.png."""
import json
import math
from pathlib import Path

from mindrlhf.files import atomic_file

CURVES = (("loss", ("loss", "dpo_loss")), ("reward accuracy", ("accuracy",)), ("reward margin", ("margin",)),
          ("rewards", ("chosen_reward", "rejected_reward")),
          ("log-prob per token", ("chosen_logps_per_token", "rejected_logps_per_token")),
          ("gradient norm", ("grad_norm",)))


def read_records(path, *, before=math.inf):
    """Records of a metrics.jsonl up to a step; a last line that a kill cut short is passed over."""
    records = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            break
        if record["step"] <= before:
            records.append(record)
    return records


class Journal:
    """Writes the records of a run. Only rank 0 has one.

    Args:
        folder: output_dir.
        first_step: steps behind the checkpoint that the run goes on from, 0 for a new run. Records of later steps,
            from a run that was killed, are taken out: this run makes them again.
    """

    def __init__(self, folder, first_step):
        from tensorboardX import SummaryWriter
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / "metrics.jsonl"
        self.records = read_records(self.path, before=first_step) if first_step and self.path.exists() else []
        with atomic_file(self.path) as file:
            for record in self.records:
                file.write(_line(record).encode())
        self.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115  closed by close()
        self.events = SummaryWriter(str(self.folder / "tensorboard"), purge_step=first_step + 1 if first_step else None)

    def add(self, split, step, values):
        """Write one record: split is train or eval, step the number of steps done."""
        record = {"split": split, "step": step, **values}
        self.records.append(record)
        self.file.write(_line(record))
        self.file.flush()
        for name, value in values.items():
            if isinstance(value, (int, float)) and math.isfinite(value):
                self.events.add_scalar(f"{split}/{name}", value, step)

    def draw(self):
        """Draw curves.png from all records."""
        import matplotlib
        matplotlib.use("Agg")
        from matplotlib import pyplot
        figure, axes = pyplot.subplots(2, 3, figsize=(13, 7), constrained_layout=True)
        for axis, (title, names) in zip(axes.flat, CURVES):
            for number, name in enumerate(names):
                for split, style in (("train", "-"), ("eval", "o--")):
                    points = [(r["step"], r[name]) for r in self.records if r["split"] == split and name in r]
                    if points:
                        axis.plot(*zip(*points), style, color=f"C{number}", linewidth=1, markersize=4,
                                  label=f"{name}, {'held-out' if split == 'eval' else 'training'}")
            axis.set_title(title)
            axis.set_xlabel("step")
            axis.grid(alpha=0.3)
            if axis.lines:
                axis.legend(fontsize=8)
        with atomic_file(self.folder / "curves.png") as file:
            figure.savefig(file, format="png", dpi=110)
        pyplot.close(figure)

    def close(self):
        """Write out what is left."""
        self.file.close()
        self.events.close()


def _line(record):
    """A record as JSON; numbers that JSON has not, NaN and inf, become null."""
    clean = {name: None if isinstance(value, float) and not math.isfinite(value) else value
             for name, value in record.items()}
    return json.dumps(clean) + "\n"
