"""Scored parts to the training file and, if pairs are held out, the evaluation file beside it."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mindrlhf import cli
from mindrlhf.data import mindrecord, packing
from mindrlhf.data.parts import Parts, Scored
from mindrlhf.data.preference import Pair, PairSource

TOO_LONG = "longer than a row"
LISTED = 1000  # places that the sidecar lists for each reason


class DataFile(NamedTuple):
    """A file that was written.

    Attributes:
        path: of the .mindrecord.
        pairs: number of pairs.
        rows: number of rows.
        pairs_per_row: the most pairs in a row.
    """
    path: Path
    pairs: int
    rows: int
    pairs_per_row: int


@dataclass(frozen=True)
class MergeReport:
    """What became of the pairs: read == pairs of all files + the number of places in dropped.

    Attributes:
        files: the training file and, if pairs are held out, the evaluation file.
        read: rows of the source.
        dropped: reason -> places.
        noted: peculiarity -> places of written pairs.
        bad: "file:line: why" of each bad row.
        scored: the pairs of all files.
        seq_len: positions of a row.
    """
    files: list[DataFile]
    read: int
    dropped: dict[str, list[str]]
    noted: dict[str, list[str]]
    bad: list[str]
    scored: Scored
    seq_len: int


def eval_path(destination: str | Path) -> Path:
    """Path of the evaluation file: data.mindrecord -> data_eval.mindrecord."""
    path = Path(destination)
    return path.with_name(f"{path.stem}_eval{path.suffix}")


def merge_parts(parts: Parts, source: PairSource, held_out: Sequence[bool], *,
                destination: str | Path, seq_len: int, packed: bool, pad_id: int,
                sidecar: dict[str, Any]) -> MergeReport:
    """Write the final files. Tokens are read from the parts row by row, never all at once.

    Args:
        parts: all of them done.
        source: the pairs.
        held_out: for each of source.pairs, whether it belongs to the evaluation set.
        destination: path of the training file.
        seq_len: positions of a row.
        packed: whether a row holds as many pairs as fit, or one.
        pad_id: id of the padding token.
        sidecar: how the data were made.

    Raises:
        UserError: no pair fits into a row, or a file cannot be written.
    """
    scored = parts.read()
    dropped, noted = _collect_places(scored, source)
    expected = source.read - sum(map(len, dropped.values()))
    if expected != len(scored.pairs):
        raise RuntimeError(f"{len(scored.pairs)} pairs scored, {expected} expected: a pair is lost")
    is_held_out = np.array(held_out)[scored.pairs]
    targets = [(Path(destination), np.flatnonzero(~is_held_out))]
    if any(held_out):
        targets.append((eval_path(destination), np.flatnonzero(is_held_out)))
    report = MergeReport([], source.read, dropped, noted, source.bad, scored, seq_len)
    for path, members in targets:
        if not len(members):
            parts.remove()  # only a run with other options can succeed, and it cannot use them
            raise cli.UserError(f"{path}: no pair for it fits into {seq_len} tokens; raise "
                                "--seq_len")
        rows = _plan_rows(scored, members, seq_len, packed)
        width = max(map(len, rows))
        made = _make_rows(scored, source.pairs, rows, seq_len=seq_len, width=width, pad_id=pad_id)
        mindrecord.write_rows(path, made, seq_len=seq_len, width=width,
                              sidecar={**_file_counts(report, members, rows), **sidecar})
        report.files.append(DataFile(path, len(members), len(rows), width))
    return report


def _file_counts(report: MergeReport, members: np.ndarray, rows: Sequence[Sequence[int]]
           ) -> dict[str, Any]:
    """What the sidecar of one file says about its rows and pairs.

    Args:
        report: of the merge.
        members: int (N,), indices into `scored` of the file's pairs.
        rows: the same, by row.
    """
    scored = report.scored
    return {
        "rows": len(rows), "pairs_per_row": max(map(len, rows)),
        "pairs": {
            "read": report.read, "written": len(members),
            "in the other file": len(scored.pairs) - len(members),
            "dropped": {reason: len(places) for reason, places in report.dropped.items()},
            "prompts shortened": int((scored.cut[members] > 0).sum())},
        "bad_rows": report.bad,
        "tokens": int(scored.sides[members].sum()),
        "places": {name: places[:LISTED]
                   for name, places in {**report.dropped, **report.noted}.items()}}


def _collect_places(scored: Scored, source: PairSource
                    ) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """(dropped, noted): those of the source and those of the reference pass."""
    def places(numbers: np.ndarray) -> list[str]:
        return [source.pairs[number].place for number in numbers.tolist()]

    dropped, noted = dict(source.dropped), dict(source.noted)
    if len(scored.dropped):
        dropped[TOO_LONG] = places(scored.dropped)
    if scored.cut.any():
        noted["prompts shortened to fit"] = places(scored.pairs[scored.cut > 0])
    return dropped, noted


def _plan_rows(scored: Scored, members: np.ndarray, seq_len: int, packed: bool) -> list[list[int]]:
    """Indices into `scored` of each row's pairs; members: int (N,), indices of the file's pairs."""
    if not packed:
        return members[:, None].tolist()
    rows = packing.pack_pairs(scored.sides[members], seq_len)
    return [members[row].tolist() for row in rows]


def _make_rows(scored: Scored, pairs: Sequence[Pair], rows: Sequence[Sequence[int]],
               **sizes: int) -> Iterator[dict[str, np.ndarray]]:
    """Make the rows of a file one by one.

    Args:
        scored: the scored pairs.
        pairs: of the source.
        rows: indices into `scored` of each row's pairs.
        sizes: seq_len, width and pad_id of mindrecord.make_row().
    """
    bar = cli.progress_bar(len(rows), "write", "row")
    for row in rows:
        numbers = [pairs[number].number for number in scored.pairs[row].tolist()]
        members = [scored.tokens(number) for number in row]
        yield mindrecord.make_row(members, scored.logps[row], numbers, **sizes)
        bar.update()
    bar.close()
