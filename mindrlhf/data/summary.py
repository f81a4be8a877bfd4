"""What preprocessing says at its end: one screen, and a picture of lengths and log-probs."""
import logging

import numpy as np

from mindrlhf.arithmetic import ceil_div
from mindrlhf.files import atomic_file
from mindrlhf.records import SIDES

EXAMPLES = 3  # places named of each kind
BAD_ROWS = 20  # bad rows listed in full
POINTS = 20_000  # of the scatter plot


def summary_lines(report):
    """Lines of text about a merge.Report."""
    scored, sides = report.scored, report.scored.sides
    longer, rows = sides.max(1), sum(rows for _, _, rows, _ in report.files)
    written = " + ".join(f"{pairs:,}" for _, pairs, _, _ in report.files)
    lost = sum(map(len, report.dropped.values()))
    percentiles = [f"{name} {value:.0f}" for name, value in zip(
        ("shortest", "5 %", "median", "95 %", "longest"), np.percentile(longer, (0, 5, 50, 95, 100)))]
    mean = scored.logps.sum(0, dtype=np.float64) / scored.lengths[:, 1:].sum(0)
    lines = [f"{path}: {pairs:,} pairs in {rows:,} rows of {report.seq_len}, at most {width} a row"
             for path, pairs, rows, width in report.files]
    lines.append(f"  pairs      {report.read:,} read = {written} written + {lost:,} dropped")
    lines += [f"  dropped    {_places(reason, places)}" for reason, places in report.dropped.items()]
    lines += [f"             {problem}" for problem in report.bad[:BAD_ROWS]]
    if len(report.bad) > BAD_ROWS:
        lines.append(f"             and {len(report.bad) - BAD_ROWS:,} more: see bad_rows in the .json")
    lines += [f"  noted      {_places(what, places)}" for what, places in report.noted.items()]
    filled = sides.sum(0) / (rows * report.seq_len)
    lines += [f"  tokens     {sides.sum():,} real, {filled.mean():.1%} of all positions; the side with more "
              f"is {filled.max():.1%} full",
              f"  length     {', '.join(percentiles)} tokens (the longer side of a pair)",
              "  reference  " + ", ".join(f"{side} {value:.4f}" for side, value in zip(SIDES, mean))
              + " nats a token"]
    return lines


def _places(what, places):
    more = ", ..." if len(places) > EXAMPLES else ""
    return f"{len(places):,} x {what} ({', '.join(places[:EXAMPLES])}{more})"


def draw_summary(path, scored):
    """Draw lengths of answers' sides and log-probs per token.

    Args:
        path: of the PNG.
        scored: parts.Scored.

    Returns:
        bool, False where matplotlib is not installed.
    """
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    sides, per_token = scored.sides, scored.logps / scored.lengths[:, 1:]
    bins = np.linspace(0, sides.max() + 1, 61)
    for column, side in enumerate(SIDES):
        values = sides[:, column]
        left.hist(values, bins, histtype="step", label=f"{side}, mean {values.mean():.0f}")
    left.set(title=f"lengths of {len(sides):,} pairs", xlabel="tokens, prompt + answer", ylabel="pairs")
    left.legend()
    shown = per_token[::ceil_div(len(per_token), POINTS)]
    right.scatter(shown[:, 0], shown[:, 1], s=np.clip(4000 / len(shown), 3, 30), alpha=0.5, linewidths=0)
    limits = [shown.min() - 0.05, min(shown.max() + 0.05, 0)]
    right.plot(limits, limits, color="gray", linewidth=0.8)
    better = (per_token[:, 0] > per_token[:, 1]).mean()
    right.set(title=f"the reference model finds the chosen answer likelier: {better:.0%}",
              xlabel="chosen, nats a token", ylabel="rejected, nats a token", aspect="equal")
    with atomic_file(path) as file:
        figure.savefig(file, format="png", dpi=110)
    return True
