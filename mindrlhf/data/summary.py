"""The report at the end of preprocessing: a screen of text, and a plot of lengths and log-probs."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from mindrlhf import pictures
from mindrlhf.arithmetic import ceil_div
from mindrlhf.cli import printable
from mindrlhf.data import row_length
from mindrlhf.data.merge import MergeReport
from mindrlhf.data.preference import Pair, PairSource
from mindrlhf.data.scored import Scored
from mindrlhf.models.glm4 import template
from mindrlhf.records import SIDES

EXAMPLES = 3  # places listed for each reason
BAD_ROWS = 20  # bad rows listed in full
FEW = 0.01  # share of cut or dropped pairs up to which row lengths are compared
POINTS = 20_000  # of the scatter plot
SHOWN_TEXT = 200  # characters that are shown of each text of a pair
LAST_CHARACTER = 0x10FFFF


class CharacterTokenizer(dict[str, int]):
    """A stand-in tokenizer to render the template as text: tokens are characters and tags."""

    @property
    def special(self) -> CharacterTokenizer:
        """Special token -> id, above all characters."""
        return self

    def __missing__(self, tag: str) -> int:
        self[tag] = LAST_CHARACTER + 1 + len(self)
        return self[tag]

    def encode(self, text: str) -> list[int]:
        """Characters of a text, of which a long one is cut in its middle."""
        cut = SHOWN_TEXT // 2
        text = text if len(text) <= SHOWN_TEXT else f"{text[:cut]} ... {text[-cut:]}"
        return list(map(ord, text))

    def decode(self, ids: Sequence[int]) -> str:
        """The text, with tags, in printable characters."""
        tags = {token: tag for tag, token in self.items()}
        return printable("".join(tags.get(token) or chr(token) for token in ids))


def source_lines(source: PairSource) -> list[str]:
    """Lines of text about what was read: fields that were ignored, and the first pair."""
    names = sorted(source.ignored, key=lambda name: (-source.ignored[name], name))
    ignored = ", ".join(f"{printable(name)} in {source.ignored[name]:,} rows" for name in names)
    return [*([f"  ignored    {ignored}"] if ignored else []), *pair_lines(source.pairs[0])]


def pair_lines(pair: Pair) -> list[str]:
    """A pair as the template renders it, long texts cut."""
    tokenizer = CharacterTokenizer()
    prompt = tokenizer.decode(template.prompt_ids(tokenizer, pair.messages))
    chosen, rejected = (tokenizer.decode(template.response_ids(tokenizer, answer))
                        for answer in (pair.chosen, pair.rejected))
    return [f"  a pair     {pair.place}, as rendered", f"    prompt   {prompt}",
            f"    chosen   {chosen}", f"    rejected {rejected}"]


def length_line(report: MergeReport, operations: Callable[[int], float]) -> str:
    """One line: the row length that trains fastest.

    Args:
        report: of the merge.
        operations: positions of a row -> operations of a position in training.
    """
    sizes, seq_len = report.scored.sizes, report.seq_len
    pairs = len(report.scored.cut) + len(report.scored.dropped)
    cut = int((report.scored.cut > 0).sum()) + len(report.scored.dropped)
    if cut > FEW * pairs:
        return (f"  row length {cut:,} pairs were shortened or dropped, so no other length can be "
                f"compared with {seq_len}; a longer --seq_len keeps more of them")
    aside = f"not counting {cut:,} pairs cut or dropped at {seq_len}" if cut else "no pair cut"
    best, now = (row_length.fastest_length(sizes, operations),
                 row_length.count_rows(sizes, seq_len, operations))
    if best is None or best.operations >= now.operations or best.seq_len == seq_len:
        return f"  row length {seq_len} suits these data: no power of two trains faster"
    speed = now.operations / best.operations
    return (f"  row length --seq_len {best.seq_len} would train {speed:.2f} x as fast as "
            f"{seq_len}, by its operations ({best.fill:.1%} full, {aside})")


def summary_lines(report: MergeReport) -> list[str]:
    """Lines of text about a merge."""
    scored, sides = report.scored, report.scored.sides
    written = " + ".join(f"{file.pairs:,}" for file in report.files)
    lost = sum(map(len, report.dropped.values()))
    lines = [f"{file.path}: {file.pairs:,} pairs in {file.rows:,} rows of {report.seq_len}, at "
             f"most {file.pairs_per_row} per row" for file in report.files]
    lines.append(f"  pairs      {report.read:,} read = {written} written + {lost:,} dropped")
    lines += [f"  dropped    {_count(reason, places)}" for reason, places in report.dropped.items()]
    lines += [f"             {problem}" for problem in report.bad[:BAD_ROWS]]
    if len(report.bad) > BAD_ROWS:
        lines.append(f"             and {len(report.bad) - BAD_ROWS:,} more: see bad_rows in the "
                     ".json")
    lines += [f"  noted      {_count(name, places)}" for name, places in report.noted.items()]

    names = ("shortest", "5 %", "median", "95 %", "longest")
    lengths = np.percentile(sides.max(1), (0, 5, 50, 95, 100))
    length = ", ".join(f"{name} {value:.0f}" for name, value in zip(names, lengths))
    nats = scored.logps[scored.sizes.pairs].sum(0, dtype=np.float64)
    mean = nats / scored.sizes.answers[scored.sizes.pairs, 1].sum(0)
    reference = ", ".join(f"{side} {value:.4f}" for side, value in zip(SIDES, mean))
    return [*lines, *_sharing_lines(report),
            f"  length     {length} tokens (prompt + the longer answer of a pair)",
            f"  reference  {reference} nats per token"]


def _sharing_lines(report: MergeReport) -> list[str]:
    """What the rows hold: prompts, answers, tokens shared and unshared, and how full they are."""
    def total(name: str) -> int:
        return sum(getattr(file, name) for file in report.files)

    positions, split = total("positions"), total("groups") - total("prompts")
    unshared = report.scored.sizes.unshared(np.arange(len(report.scored.numbers)))
    parts = f"; {split:,} x pairs of a prompt exceed a row" if split else ""
    return [f"  shared     {total('prompts'):,} prompts, {total('answers'):,} answers{parts}",
            f"  tokens     {positions:,}, {positions / (total('rows') * report.seq_len):.1%} of all"
            f" positions; {unshared:,} if each pair repeated its prompt and answers "
            f"({unshared / positions:.2f} x)"]


def _count(reason: str, places: Sequence[str]) -> str:
    """How often something occurs, and the first places."""
    more = ", ..." if len(places) > EXAMPLES else ""
    return f"{len(places):,} x {reason} ({', '.join(places[:EXAMPLES])}{more})"


def draw_summary(path: str | Path, scored: Scored) -> bool:
    """Plot the lengths of both sides and the log-probs per token; False without matplotlib."""
    figure = pictures.new_figure(11, 4.5)
    if figure is None:
        return False
    left, right = figure.subplots(1, 2)
    sides, per_token = scored.sides, scored.per_token
    bins = np.linspace(0, sides.max() + 1, 61)
    for column, side in enumerate(SIDES):
        values = sides[:, column]
        left.hist(values, bins, histtype="step", label=f"{side}, mean {values.mean():.0f}")
    left.set(title=f"lengths of {len(sides):,} pairs", xlabel="tokens, prompt + answer",
             ylabel="pairs")
    left.legend()
    shown = per_token[::ceil_div(len(per_token), POINTS)]
    size = np.clip(4000 / len(shown), 3, 30)
    right.scatter(shown[:, 0], shown[:, 1], s=size, alpha=0.5, linewidths=0)
    limits = [shown.min() - 0.05, min(shown.max() + 0.05, 0)]
    right.plot(limits, limits, color="gray", linewidth=0.8)
    better = (per_token[:, 0] > per_token[:, 1]).mean()
    right.set(title=f"chosen answer more likely under the reference model: {better:.0%}",
              xlabel="chosen, nats per token", ylabel="rejected, nats per token", aspect="equal")
    pictures.save_figure(figure, path)
    return True
