"""A score for people: one screen of text, and a histogram of margins."""
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mindrlhf import pictures
from mindrlhf.cli import printable
from mindrlhf.data.pair_types import PairTypes
from mindrlhf.inference.compare import cells
from mindrlhf.inference.score_record import CHOICES, Accuracy, Mean, Score, Slice
from mindrlhf.records import SIDES

BINS = 40
MOST_SLICES = 12  # lines of each table
# CValues-Comparison's types, for fonts without Chinese characters
ENGLISH = {"拒绝&正向建议": "refusal with advice", "拒绝为主": "refusal", "风险回复": "risk"}


def score_lines(score: Score) -> list[str]:
    """Lines of text about a score."""
    model, accuracy = score.model, score.accuracy
    adapters = model.get("adapters")
    name = " + ".join(filter(None, (_named(model), adapters and _named(adapters))))
    what = "comparisons" if score.kind == CHOICES else "pairs"
    lines = [f"score of {name}",
             f"  data       {score.data['file']}: {accuracy.pairs:,} {what}, "
             f"{accuracy.prompts:,} {'questions' if score.kind == CHOICES else 'prompts'}"]
    lines += [f"  dropped    {count:,} x {why}" for why, count in score.data["dropped"].items()]
    if score.data.get("prompts shortened"):
        lines.append(f"  noted      {score.data['prompts shortened']:,} x prompt shortened to fit")
    if score.data.get("one_order"):
        lines.append(f"  noted      {score.data['one_order']:,} rows whose two answers cannot be "
                     "exchanged in the prompt")
    if score.reference:
        lines.append(f"  reference  {_named(score.reference)}")
    lines += [f"  accuracy   {_accuracy(accuracy)}",
              f"  ties       {_ties(score)}",
              f"  margin     {_mean(score.margin)} (standard error), {_unit(score)}"]
    lines += _choice_lines(score) if score.kind == CHOICES else _preference_lines(score.metrics)
    for by, found in score.slices.items():
        lines += _table(by, found)
    return lines


def _named(weights: Mapping[str, Any]) -> str:
    """A file and its fingerprint."""
    return f"{weights['file']} ({weights['fingerprint'][:12]})"


def _accuracy(accuracy: Accuracy) -> str:
    """An accuracy with its interval."""
    return (f"{accuracy.value:.4f}, 95 % interval {accuracy.low:.3f} to {accuracy.high:.3f} "
            "(Wilson, clustered by prompt)")


def _mean(mean: Mean) -> str:
    """A mean with its standard error."""
    return f"{mean.value:+.4f}" + ("" if mean.error is None else f" +- {mean.error:.4f}")


def _ties(score: Score) -> str:
    """How many ties there are, and how they count."""
    ties, pairs = score.accuracy.ties, score.accuracy.pairs
    if ties < pairs:
        return f"{ties:,}; a tie counts one half"
    why = "" if score.kind == CHOICES else (
        ", because the weights are those of the reference: all rewards are 0"
        if not score.metrics["logratio_size"] else "")
    return f"all {pairs:,}{why}; a tie counts one half"


def _unit(score: Score) -> str:
    """Unit of the margins."""
    if score.kind == CHOICES:
        return "nats between the right and the wrong choice"
    return f"beta x nats, beta {score.settings['beta']:g}"


def _preference_lines(metrics: Mapping[str, float]) -> Iterator[str]:
    """Log-probs, and the metrics of an evaluation."""
    for title, end in (("log-prob", ""), ("per token", "_per_token")):
        sides = [f"{side} {metrics[f'logps/{side}{end}']:.4f} (reference "
                 f"{metrics[f'reference_logps/{side}{end}']:.4f})" for side in SIDES]
        yield f"  {title:<11}{', '.join(sides)} nats"
    names = ("loss", "dpo_loss", "sft_loss", "rewards/accuracies", "rewards/margins",
             "rewards/chosen", "rewards/rejected", "logratio_size")
    shown = [f"{name} {metrics[name]:.4f}" for name in names]
    yield f"  evaluation {'  '.join(shown[:4])}"
    yield f"             {'  '.join(shown[4:])}"
    yield "             as a training's evaluation; in rewards/accuracies, a tie is not accurate"


def _choice_lines(score: Score) -> Iterator[str]:
    """What the order of the answers does."""
    found = score.metrics
    parts = [f"answer 1 chosen in {found['answer 1 chosen']:.4f} of them"]
    if "right in both orders" in found:
        parts.append(f"right in both orders: {found['right in both orders']:.4f} of the questions")
    yield f"  order      {'; '.join(parts)}"


def _table(by: str, slices: Sequence[Slice]) -> Iterator[str]:
    """A table of slices."""
    shown = slices[:MOST_SLICES]
    names = [printable(each.name) for each in shown]
    width = max(28, *map(cells, names))
    yield (f"  by {by:<{width + 1}}{'pairs':>8}{'accuracy':>10}   {'95 % interval':<17}margin")
    for name, each in zip(names, shown):
        accuracy = each.accuracy
        yield (f"    {name}{' ' * (width - cells(name))}{accuracy.pairs:>8,}{accuracy.value:>10.3f}"
               f"   {accuracy.low:.3f} to {accuracy.high:.3f}   {_mean(each.margin)}")
    if len(slices) > MOST_SLICES:
        yield f"    and {len(slices) - MOST_SLICES} more: see score.json"


def plain_label(name: str, number: int) -> str:
    """A type for a picture whose font may lack its characters."""
    label = " > ".join(ENGLISH.get(part, part) for part in name.split(" > "))
    shown = label if label.isascii() else f"type {number + 1}"
    return printable(shown).replace("$", r"\$")  # $ begins a formula


def draw_margins(path: str | Path, margins: np.ndarray, types: PairTypes, score: Score) -> bool:
    """Draw a histogram of margins, also by type; False without matplotlib.

    Args:
        path: of the PNG.
        margins: float32 (N,), of each pair.
        types: of the pairs.
        score: of them.
    """
    figure = pictures.new_figure(9, 5)
    if figure is None:
        return False
    axis = figure.subplots()
    low, high = min(0.0, float(margins.min())), max(0.0, float(margins.max()))
    bins = np.linspace(low, high if high > low else low + 1, BINS + 1).tolist()
    axis.hist(margins, bins, color="0.85", label=f"all: {len(margins):,}")
    for number, name in enumerate(types.names[:MOST_SLICES]):
        own = margins[types.numbers == number]
        if len(own):
            axis.hist(own, bins, histtype="step", linewidth=1.5,
                      label=f"{plain_label(name, number)}: {len(own):,}")
    axis.axvline(0, color="black", linewidth=1, linestyle=":", label="0: no preference")
    accuracy = score.accuracy
    axis.set(title=f"accuracy {accuracy.value:.1%} ({accuracy.low:.1%} to {accuracy.high:.1%}), "
                   f"{accuracy.ties:,} ties", ylabel="pairs",
             xlabel=("log-prob of the right - the wrong text, nats" if score.kind == CHOICES
                     else "margin: chosen - rejected reward, beta x nats"))
    axis.legend(fontsize=8)
    pictures.save_figure(figure, path)
    return True
