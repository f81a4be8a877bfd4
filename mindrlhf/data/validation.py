"""What must hold for every row of a training file, checked without the code that made the row."""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from mindrlhf.models.glm4 import template
from mindrlhf.records import COLUMNS, SIDES


class Segment(NamedTuple):
    """The positions begin to end - 1 of a row, which hold one sequence."""
    begin: int
    end: int


def segments(row: Mapping[str, np.ndarray], side: str) -> list[Segment]:
    """The segment of each pair on one side of a row, in order."""
    ids = row[f"{side}_segment_ids"]
    borders = np.flatnonzero(np.diff(ids, prepend=0, append=0)).tolist()
    return [Segment(begin, end) for begin, end in zip(borders, borders[1:]) if ids[begin]]


def check_shapes(row: Mapping[str, np.ndarray], sidecar: Mapping[str, Any]) -> list[str]:
    """Problems of a row's columns: those that are missing, or have another dtype or shape."""
    sizes = {"seq_len": (sidecar["seq_len"],), "pairs": (sidecar["pairs_per_row"],)}
    problems = []
    for name, (dtype, size) in COLUMNS.items():
        if name not in row:
            problems.append(f"no column {name}")
        elif row[name].dtype != dtype or row[name].shape != sizes[size]:
            found = f"{row[name].dtype} {row[name].shape}"
            problems.append(f"{name} is {found}, not {dtype} {sizes[size]}")
    return problems


def check_row(row: Mapping[str, np.ndarray], sidecar: Mapping[str, Any],
              special: Mapping[str, int]) -> list[str]:
    """Find the problems of one row.

    Args:
        row: its columns, as from mindrecord.make_row().
        sidecar: of the file.
        special: special token -> id.

    Returns:
        The problems; empty if the row is valid.
    """
    problems = check_shapes(row, sidecar)
    if problems:
        return problems
    pairs = int((row["pair_ids"] >= 0).sum())
    if not pairs or (row["pair_ids"][pairs:] != -1).any():
        problems.append("pair_ids are not the numbers of one or more pairs, then -1")
    prompts: list[list[int] | None] = []
    for side in SIDES:
        found, side_prompts = _check_side(row, side, pairs, special)
        problems += found
        prompts += side_prompts
    if not problems and prompts[:pairs] != prompts[pairs:]:
        problems.append("a pair has two prompts")
    return problems


def _check_side(row: Mapping[str, np.ndarray], side: str, pairs: int, special: Mapping[str, int]
                ) -> tuple[list[str], list[list[int] | None]]:
    """Problems of one side of a row that has some pairs, and the prompt of each pair."""
    segment_ids = row[f"{side}_segment_ids"]
    found = segments(row, side)
    sizes = [segment.end - segment.begin for segment in found]
    expected = np.repeat([*range(1, len(found) + 1), 0], [*sizes, len(segment_ids) - sum(sizes)])
    if len(found) != pairs or (segment_ids != expected).any():
        return [f"{side}: segment ids are not 1 to {pairs}, then 0"], []
    problems = []
    if row[f"{side}_loss_mask"][segment_ids == 0].any():
        problems.append(f"{side}: padding is scored")
    logps = row[f"{side}_ref_logps"]
    if not np.isfinite(logps).all() or (logps > 0).any():
        problems.append(f"{side}: a log-prob is not finite, or above 0")
    if logps[pairs:].any():
        problems.append(f"{side}: a log-prob where there is no pair")
    prompts = []
    for number, (begin, end) in enumerate(found):
        columns = {name: row[f"{side}_{name}"][begin:end]
                   for name in ("input_ids", "labels", "loss_mask")}
        pair_problems, prompt = _check_sequence(columns, special)
        problems += [f"{side} of pair {number}: {problem}" for problem in pair_problems]
        prompts.append(prompt)
    return problems, prompts


def _check_sequence(columns: Mapping[str, np.ndarray], special: Mapping[str, int]
                    ) -> tuple[list[str], list[int] | None]:
    """Problems of one sequence, and the token ids of its prompt, None if it cannot be found.

    Args:
        columns: input_ids, labels and loss_mask of its segment.
        special: special token -> id.
    """
    ids, labels, mask = columns["input_ids"], columns["labels"], columns["loss_mask"]
    scored = np.flatnonzero(mask)
    if not np.isin(mask, (0, 1)).all() or len(scored) < 2:
        return ["the loss mask is not 0 and 1, or scores fewer than two tokens"], None
    first = int(scored[0])  # position of the last prompt token
    problems = []
    if (labels[:-1] != ids[1:]).any():
        problems.append("labels are not the next tokens")
    if not np.array_equal(scored, np.arange(first, len(ids) - 1)):
        problems.append("the scored tokens are not one answer up to its end")
    if ids[-1] != special[template.END_OF_TURN]:
        problems.append(f"does not end with {template.END_OF_TURN}")
    if ids[first] != special["<|assistant|>"]:
        problems.append("the prompt does not end with <|assistant|>")
    if ids[:2].tolist() != [special[tag] for tag in template.PREFIX]:
        problems.append(f"does not begin with {' '.join(template.PREFIX)}")
    if np.isin(ids[first + 1:-1], list(special.values())).any():
        problems.append("a special token inside the answer")
    return problems, ids[:first + 1].tolist()
