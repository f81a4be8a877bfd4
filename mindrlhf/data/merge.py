"""Scored parts to the training file and, if pairs are held out, the evaluation file beside it."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mindrlhf import cli
from mindrlhf.data import groups, mindrecord, packing, pair_types
from mindrlhf.data.features import TokenGroup
from mindrlhf.data.groups import Limits, PairGroup
from mindrlhf.data.parts import Parts
from mindrlhf.data.preference import Pair, PairSource
from mindrlhf.data.scored import Scored

TOO_LONG = "longer than a row"
LISTED = 1000  # places that the sidecar lists for each reason


class DataFile(NamedTuple):
    """A file that was written.

    Attributes:
        path: of the .mindrecord.
        pairs, rows: how many.
        answers_per_row, pairs_per_row: the most in a row.
        groups: how many; more than prompts where a prompt's pairs did not fit into one row.
        prompts, answers: how many distinct ones, answers of different prompts apart.
        positions: that are not padding.
    """
    path: Path
    pairs: int
    rows: int
    answers_per_row: int
    pairs_per_row: int
    groups: int
    prompts: int
    answers: int
    positions: int


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
                destination: str | Path, seq_len: int, packed: bool, share: bool, pad_id: int,
                sidecar: dict[str, Any]) -> MergeReport:
    """Write the final files. Tokens are read from the parts row by row, never all at once.

    Args:
        parts: all of them done.
        source: the pairs.
        held_out: for each of source.pairs, whether it belongs to the evaluation set.
        destination: path of the training file.
        seq_len: positions of a row.
        packed: whether a row holds as many groups as fit, or one.
        share: whether pairs with the same prompt share it.
        pad_id: id of the padding token.
        sidecar: how the data were made.

    Raises:
        UserError: no pair fits into a row, or a file cannot be written.
    """
    scored = parts.read(share)
    dropped, noted = _collect_places(scored, source)
    expected = source.read - sum(map(len, dropped.values()))
    if expected != len(scored.numbers):
        raise RuntimeError(f"{len(scored.numbers)} pairs scored, {expected} expected: a pair is "
                           "lost")
    # prompts that truncation has made equal follow the first of them
    is_held_out = np.array(held_out)[scored.numbers][scored.first_of_prompt]
    targets = [(Path(destination), np.flatnonzero(~is_held_out))]
    if any(held_out):
        targets.append((eval_path(destination), np.flatnonzero(is_held_out)))
    report = MergeReport([], source.read, dropped, noted, source.bad, scored, seq_len)
    for path, members in targets:
        if not len(members):
            parts.remove()  # only a run with other options can succeed, and it cannot use them
            raise cli.UserError(f"{path}: no pair for it fits into {seq_len} tokens; raise "
                                "--seq_len")
        rows = _plan_rows(scored, members.tolist(), groups.row_limits(seq_len), packed)
        file = _describe_file(path, scored, rows)
        report.files.append(file)
        numbers = np.array([pair.type for pair in source.pairs], np.uint8)[scored.numbers[members]]
        types = pair_types.encode_types(pair_types.PairTypes(source.types, numbers))
        about = {**_file_counts(report, file, members), **types, **sidecar}
        made = (mindrecord.make_row([_read_group(scored, source.pairs, group) for group in row],
                                    pad_id=pad_id, **mindrecord.column_sizes(about))
                for row in cli.progress_bar(len(rows), "write", "row", iterable=rows))
        mindrecord.write_rows(path, made, about)
    return report


def _describe_file(path: Path, scored: Scored, rows: Sequence[Sequence[PairGroup]]) -> DataFile:
    """Count what a file of these rows holds."""
    every = [group for row in rows for group in row]
    return DataFile(
        path, pairs=sum(len(group.pairs) for group in every), rows=len(rows),
        answers_per_row=max(sum(len(group.answers) for group in row) for row in rows),
        pairs_per_row=max(sum(len(group.pairs) for group in row) for row in rows),
        groups=len(every), prompts=len({group.prompt for group in every}),
        answers=len({answer for group in every for answer in group.answers}),
        positions=int(groups.group_sizes(scored.sizes, every)[:, 0].sum()))


def _file_counts(report: MergeReport, file: DataFile, members: np.ndarray) -> dict[str, Any]:
    """What the sidecar of one file says about its rows and pairs.

    Args:
        report: of the merge.
        file: that is written.
        members: int (N,), indices into `scored` of the file's pairs.
    """
    scored = report.scored
    return {
        "rows": file.rows, "pairs_per_row": file.pairs_per_row,
        "answers_per_row": file.answers_per_row,
        "pairs": {
            "read": report.read, "written": len(members),
            "in the other file": len(scored.numbers) - len(members),
            "dropped": {reason: len(places) for reason, places in report.dropped.items()},
            "prompts shortened": int((scored.cut[members] > 0).sum())},
        "prompts": file.prompts, "answers": file.answers,
        "bad_rows": report.bad,
        "tokens": file.positions,
        "tokens_unshared": scored.sizes.unshared(members),
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
        noted["prompts shortened to fit"] = places(scored.numbers[scored.cut > 0])
    return dropped, noted


def _plan_rows(scored: Scored, members: Sequence[int], limits: Limits,
               packed: bool) -> list[list[PairGroup]]:
    """The groups of each row.

    Args:
        scored: the pairs.
        members: indices into `scored` of the file's pairs.
        limits: of a row.
        packed: whether a row holds as many groups as fit, or one.
    """
    made = groups.make_groups(scored.sizes, members, limits)
    rows = packing.pack_groups(groups.group_sizes(scored.sizes, made), limits, packed=packed)
    return [[made[number] for number in row] for row in rows]


def _read_group(scored: Scored, pairs: Sequence[Pair], group: PairGroup) -> TokenGroup:
    """Read the tokens of a group; its answers are numbered anew."""
    members = {pair: scored.sizes.pairs[pair].tolist() for pair in group.pairs}
    numbers = {pair: pairs[scored.numbers[pair]].number for pair in group.pairs}
    return TokenGroup(scored.prompt(group.prompt), list(map(scored.answer, group.answers)),
                      group.compare(members, numbers), scored.logps[group.answers].tolist())
