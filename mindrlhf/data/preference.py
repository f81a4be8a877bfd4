"""Files to preference pairs: which rows are read, which are dropped, and which are held out."""
from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mindrlhf.cli import UserError
from mindrlhf.data import formats, pair_types, sources
from mindrlhf.data.messages import Messages
from mindrlhf.data.sources import JsonRow

DATASET_TYPES = (*formats.FORMATS, "auto")
BAD, IDENTICAL, DUPLICATE = "bad row", "identical answers", "pair that stands there already"
EMPTY_PROMPT = "empty prompt"
SURROGATES = "lone surrogates (no character; they became U+FFFD)"


@dataclass(frozen=True)
class Pair:
    """One prompt with a preferred and a rejected answer.

    Attributes:
        messages: the conversation before the answer.
        chosen, rejected: the answers.
        number: row number in the source, from 0, bad rows included.
        place: file:line.
        type: number of the name in PairSource.types, or pair_types.NONE.
    """
    messages: Messages
    chosen: str
    rejected: str
    number: int = field(default=0, compare=False)
    place: str = field(default="", compare=False)
    type: int = field(default=pair_types.NONE, compare=False)


@dataclass(frozen=True)
class PairSource:
    """The pairs of some files. read == len(pairs) + the number of places in dropped.

    Attributes:
        files: in the order read.
        dataset_type: of the rows, never auto.
        read: number of rows.
        pairs: the pairs that are kept.
        dropped: reason -> places of the rows that are not kept.
        noted: peculiarity -> places of pairs that are kept.
        bad: "file:line: why" of each bad row.
        ignored: field that the type does not use -> number of rows with content in it.
        types: names of the types of pairs, see pair_types.
    """
    files: list[Path]
    dataset_type: str
    read: int
    pairs: list[Pair]
    dropped: dict[str, list[str]]
    noted: dict[str, list[str]]
    bad: list[str]
    ignored: dict[str, int]
    types: list[str] = field(default_factory=list)


def read_pairs(paths: Sequence[str | Path], dataset_type: str = "auto", *, skip_bad: bool = False,
               drop: Collection[str] = ()) -> PairSource:
    """Read the pairs of files and folders.

    Args:
        paths: files and folders.
        dataset_type: one of DATASET_TYPES; auto takes the type of the first row that has one.
        skip_bad: whether a bad row is dropped and listed; otherwise it is an error.
        drop: IDENTICAL, DUPLICATE or both, to drop such pairs.

    Raises:
        UserError: a row is bad, with its file and line, or there are no pairs at all.
    """
    files = sources.find_files(paths)
    pairs: list[Pair] = []
    bad: list[str] = []
    dropped: dict[str, list[str]] = {}
    noted: dict[str, list[str]] = {}
    ignored: Counter[str] = Counter()
    seen: set[Pair] = set()
    known: dict[Any, Any] = {}
    types: dict[str, int] = {}
    read = 0
    for read, (place, row) in enumerate(_rows_with_places(files), 1):
        try:
            if row.problem:
                raise ValueError(row.problem)
            if dataset_type == "auto":
                dataset_type = formats.detect_type(row.value)
            content = formats.parse_row(row.value, dataset_type)
            parsed = Pair(*content, number=read - 1, place=place, type=pair_types.number_type(
                row.value, formats.FORMATS[dataset_type].known, types))
        except ValueError as error:
            bad.append(f"{place}: {error}")
            if not skip_bad:
                raise UserError(bad[0]) from None
            dropped.setdefault(BAD, []).append(place)
            continue
        ignored.update(formats.ignored_fields(row.value, dataset_type))
        pair = _clean(parsed, known)
        findings = {IDENTICAL: pair.chosen == pair.rejected, DUPLICATE: pair in seen,
                    SURROGATES: pair != parsed, EMPTY_PROMPT: not pair.messages[-1][1].strip()}
        found = [name for name, is_found in findings.items() if is_found]
        reason = next((name for name in found if name in drop), None)
        if reason:
            dropped.setdefault(reason, []).append(place)
            continue
        for name in found:
            noted.setdefault(name, []).append(place)
        seen.add(pair)
        pairs.append(pair)
    if not pairs:
        raise UserError(_no_pairs(paths, dataset_type, dropped, bad))
    return PairSource(files, dataset_type, read, pairs, dropped, noted, bad, dict(ignored),
                      list(types))


def _no_pairs(paths: Sequence[str | Path], dataset_type: str, dropped: dict[str, list[str]],
              bad: list[str]) -> str:
    """Message for files without pairs: what was expected, and what was dropped instead."""
    kinds = formats.FORMATS if dataset_type == "auto" else [dataset_type]
    reasons = [f"{len(places)} x {reason}" for reason, places in dropped.items()]
    return (f"{', '.join(map(str, paths))}: holds no pairs (expected fields: "
            f"{formats.describe_fields(kinds)}). " + "; ".join(reasons + bad[:1]))


def _rows_with_places(files: Sequence[Path]) -> Iterator[tuple[str, JsonRow]]:
    """(file:line, row) of each row."""
    for file in files:
        for row in sources.read_file_rows(file):
            yield f"{file}:{row.line}", row


def _clean(pair: Pair, known: dict[Any, Any]) -> Pair:
    """A pair without lone surrogates, which have no UTF-8 and cannot be tokenized: they become
    U+FFFD. Prompts and answers that several pairs have in common are in memory once.

    Args:
        pair: as parsed.
        known: prompts and answers of the pairs so far.
    """
    def text(value: str) -> str:
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")

    def once(value: Any) -> Any:
        return known.setdefault(value, value)

    messages = tuple((role, text(value)) for role, value in pair.messages)
    return replace(pair, messages=once(messages), chosen=once(text(pair.chosen)),
                   rejected=once(text(pair.rejected)))


def choose_held_out(pairs: Sequence[Pair], ratio: float) -> list[bool]:
    """Choose the evaluation set: prompts in order of their hashes, until the ratio is reached.

    All pairs of a prompt are in the same set. Prompts that differ only in white space are the same.

    Args:
        pairs: all pairs.
        ratio: share of the pairs to hold out, from 0 to below 1.

    Returns:
        For each pair, whether it is held out.

    Raises:
        UserError: all pairs have the same prompt.
    """
    if not ratio:
        return [False] * len(pairs)
    keys = [_prompt_hash(pair) for pair in pairs]
    counts = Counter(keys)
    if len(counts) < 2:
        raise UserError(f"--eval_ratio {ratio}: all {len(pairs)} pairs have the same prompt, which "
                        "cannot be in both sets; omit the option")
    room = round(ratio * len(pairs))
    chosen: set[bytes] = set()
    for key in sorted(counts):
        if counts[key] <= room and len(chosen) + 1 < len(counts):
            chosen.add(key)
            room -= counts[key]
    if not chosen:
        chosen = {min(counts, key=lambda key: (counts[key], key))}
    return [key in chosen for key in keys]


def _prompt_hash(pair: Pair) -> bytes:
    """SHA-256 of the messages, white space apart."""
    words = [(role, text.split()) for role, text in pair.messages]
    return hashlib.sha256(repr(words).encode()).digest()
