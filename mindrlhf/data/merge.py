"""Scored parts to the training file and, where pairs were set apart, the evaluation file beside it."""
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mindrlhf import cli
from mindrlhf.data import mindrecord, packing
from mindrlhf.data.parts import Scored

TOO_LONG = "longer than a row"
LISTED = 1000  # places of one kind that the sidecar lists


@dataclass(frozen=True)
class MergeReport:
    """What came of the pairs: read == those of the files + all the places in dropped.

    Attributes:
        files: list of (path, pairs, rows, most pairs of a row).
        read: rows of the source.
        dropped: reason -> places.
        noted: peculiarity of written pairs -> places.
        bad: "file:line: why" of each bad row.
        scored: Scored.
        seq_len: positions of a row.
    """
    files: list
    read: int
    dropped: dict
    noted: dict
    bad: list
    scored: Scored
    seq_len: int


def eval_path(destination):
    """Where the evaluation set goes: data.mindrecord -> data_eval.mindrecord."""
    path = Path(destination)
    return path.with_name(f"{path.stem}_eval{path.suffix}")


def merge_parts(parts, source, held_out, *, destination, seq_len, packed, pad_id, sidecar):
    """Write the final files. Only lengths and log-probs are in memory; tokens come from the parts row by row.

    Args:
        parts: Parts, all done.
        source: preference.Source.
        held_out: bool for each of source.pairs, whether it belongs to the evaluation set.
        destination: path of the training file.
        seq_len: positions of a row.
        packed: whether a row holds as many pairs as fit, or one.
        pad_id: id of the padding token.
        sidecar: dict, what made the data.

    Returns:
        Report.

    Raises:
        UserError: no pair fits into a row, or a file cannot be written.
    """
    scored = parts.read()

    def places(pairs):
        return [source.pairs[number].place for number in pairs.tolist()]

    dropped, noted = dict(source.dropped), dict(source.noted)
    if len(scored.dropped):
        dropped[TOO_LONG] = places(scored.dropped)
    if scored.cut.any():
        noted["prompts shortened to fit"] = places(scored.pairs[scored.cut > 0])
    apart = np.array(held_out)[scored.pairs]
    targets = [(Path(destination), np.flatnonzero(~apart))]
    if any(held_out):
        targets.append((eval_path(destination), np.flatnonzero(apart)))
    total = source.read - sum(map(len, dropped.values()))
    if total != len(scored.pairs):
        raise RuntimeError(f"{len(scored.pairs)} pairs scored, {total} expected: a pair got lost")
    files = []
    for path, members in targets:
        if not len(members):
            parts.remove()  # they are of no use: only other options help
            raise cli.UserError(f"{path}: no pair for it fits into {seq_len} tokens; raise --seq_len")
        rows = packing.pack_pairs(scored.sides[members], seq_len) if packed else np.arange(len(members))[:, None]
        rows = [members[row].tolist() for row in rows]
        width = max(map(len, rows))
        counts = {"read": source.read, "written": len(members), "in the other file": total - len(members),
                  "dropped": {reason: len(at) for reason, at in dropped.items()},
                  "prompts shortened": int((scored.cut[members] > 0).sum())}
        about = {"rows": len(rows), "pairs_per_row": width, "pairs": counts, "bad_rows": source.bad,
                 "tokens": int(scored.sides[members].sum()),
                 "places": {reason: at[:LISTED] for reason, at in {**dropped, **noted}.items()}}
        mindrecord.write_rows(path, _rows(scored, source.pairs, rows, seq_len=seq_len, width=width, pad_id=pad_id),
                         seq_len=seq_len, width=width, sidecar={**about, **sidecar})
        files.append((path, len(members), len(rows), width))
    return MergeReport(files, source.read, dropped, noted, source.bad, scored, seq_len)


def _rows(scored, pairs, rows, **sizes):
    """Rows of numbers of scored pairs to rows of a file, made one at a time."""
    bar = cli.progress_bar(len(rows), "write", "row")
    for row in rows:
        numbers = [pairs[number].number for number in scored.pairs[row].tolist()]
        members = [scored.tokens(number) for number in row]
        yield mindrecord.make_row(members, scored.logps[row], numbers, **sizes)
        bar.update()
    bar.close()
