"""Preference files to pairs: what is read, what is left out, and what is set apart for evaluation."""
import hashlib
from dataclasses import dataclass, field

from mindrlhf.cli import UserError
from mindrlhf.data import formats, sources

DATASET_TYPES = (*formats.FIELDS, "auto")
BAD, IDENTICAL, DUPLICATE = "bad row", "identical answers", "pair that stands there already"
SURROGATES = "lone surrogates (no character; they became U+FFFD)"


@dataclass(frozen=True)
class Pair:
    """One prompt with a preferred and a rejected answer.

    Attributes:
        messages: ((role, text), ...), the conversation before the answer; roles are template.py's.
        chosen, rejected: the answers.
        number: of the row in the source, from 0, bad rows counted too.
        place: file:line.
    """
    messages: tuple
    chosen: str
    rejected: str
    number: int = field(default=0, compare=False)
    place: str = field(default="", compare=False)


@dataclass(frozen=True)
class PairSource:
    """What was read. read == len(pairs) + all the places in dropped.

    Attributes:
        files: list[Path].
        dataset_type: of the rows, never auto.
        read: number of rows.
        pairs: list[Pair] that go on.
        dropped: reason -> places of what does not go on.
        noted: peculiarity -> places of pairs that go on all the same.
        bad: "file:line: why" of each bad row.
    """
    files: list
    dataset_type: str
    read: int
    pairs: list
    dropped: dict
    noted: dict
    bad: list


def read_pairs(paths, dataset_type="auto", *, skip_bad=False, drop=()):
    """Read the pairs of files and folders.

    Args:
        paths: list of files and folders.
        dataset_type: one of DATASET_TYPES; auto is settled by the first row that tells.
        skip_bad: whether a row that is no pair is left out and listed; otherwise it is an error.
        drop: which of IDENTICAL and DUPLICATE do not go on.

    Returns:
        Source.

    Raises:
        UserError: naming file and line of the first bad row, or that there is no pair at all.
    """
    files = sources.find_files(paths)
    pairs, bad, dropped, noted, seen, number = [], [], {}, {}, set(), -1
    for number, (place, row, why) in enumerate(_rows(files)):
        try:
            if why:
                raise ValueError(why)
            if dataset_type == "auto":
                dataset_type = formats.detect_type(row)
            pair, changed = _mend(Pair(*formats.parse_row(row, dataset_type), number, place))
        except ValueError as error:
            bad.append(f"{place}: {error}")
            if not skip_bad:
                raise UserError(bad[0]) from None
            dropped.setdefault(BAD, []).append(place)
            continue
        found = {IDENTICAL: pair.chosen == pair.rejected, DUPLICATE: pair in seen, SURROGATES: changed}
        found = [name for name, there in found.items() if there]
        reason = next((name for name in found if name in drop), None)
        if reason:
            dropped.setdefault(reason, []).append(place)
            continue
        for name in found:
            noted.setdefault(name, []).append(place)
        seen.add(pair)
        pairs.append(pair)
    if not pairs:
        wanted = formats.describe_fields(formats.FIELDS if dataset_type == "auto" else [dataset_type])
        raise UserError(f"{', '.join(map(str, paths))}: holds no pairs (fields of {wanted}). " + "; ".join(
            [f"{len(places)} x {reason}" for reason, places in dropped.items()] + bad[:1]))
    return PairSource(files, dataset_type, number + 1, pairs, dropped, noted, bad)


def _rows(files):
    for file in files:
        for line, row, why in sources.read_json_rows(file):
            yield f"{file}:{line}", row, why


def _mend(pair):
    """(pair without lone surrogates, whether it had any): they have no UTF-8, and so no tokens."""
    def text(value):
        return value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")

    messages = tuple((role, text(value)) for role, value in pair.messages)
    mended = Pair(messages, text(pair.chosen), text(pair.rejected), pair.number, pair.place)
    return mended, mended != pair


def choose_held_out(pairs, ratio):
    """Which pairs make the evaluation set: whole prompts, picked by a hash, as many as make up the ratio.

    Prompts that differ in white space only count as one.

    Args:
        pairs: list[Pair].
        ratio: share of the pairs, from 0 to below 1.

    Returns:
        list[bool], one for each pair.

    Raises:
        UserError: all pairs have the same prompt.
    """
    if not ratio:
        return [False] * len(pairs)
    keys = [hashlib.sha256(repr([(role, text.split()) for role, text in pair.messages]).encode()).digest()
            for pair in pairs]
    counts = {}
    for key in keys:
        counts[key] = counts.get(key, 0) + 1
    if len(counts) < 2:
        raise UserError(f"--eval_ratio {ratio}: all {len(pairs)} pairs have the same prompt, which cannot be "
                        "on both sides; leave the option out")
    room, picked = round(ratio * len(pairs)), set()
    for key in sorted(counts):
        if counts[key] <= room and len(picked) + 1 < len(counts):
            picked.add(key)
            room -= counts[key]
    picked = picked or {min(counts, key=lambda key: (counts[key], key))}
    return [key in picked for key in keys]
