"""What must hold for every row of a training file, checked without the code that made the row."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mindrlhf.data.mindrecord import column_sizes
from mindrlhf.models.glm4 import template
from mindrlhf.records import COLUMNS


class RowAnswer(NamedTuple):
    """An answer as a row holds it.

    Attributes:
        group: index of its group in the row.
        prompt: token ids.
        response: token ids that are scored, the stop token included.
    """
    group: int
    prompt: list[int]
    response: list[int]


def read_answers(row: Mapping[str, np.ndarray]) -> list[RowAnswer]:
    """The answers of a row, in order; the inverse of features.row_inputs()."""
    ids, answer_ids, group_ids = row["input_ids"], row["answer_ids"], row["group_ids"]
    answers = []
    for number in range(1, answer_ids.max(initial=0) + 1):
        own = np.flatnonzero(answer_ids == number)
        if not len(own):
            continue
        group = int(group_ids[own[0]])
        context = ids[(group_ids == group) & (answer_ids == 0)]
        answers.append(RowAnswer(group - 1, [*context.tolist(), int(ids[own[0]])],
                              row["labels"][own].tolist()))
    return answers


def check_shapes(row: Mapping[str, np.ndarray], sidecar: Mapping[str, Any]) -> list[str]:
    """Problems of a row's columns: those that are missing, or have another dtype or shape."""
    sizes = column_sizes(sidecar)
    problems = []
    for name, column in COLUMNS.items():
        shape = (sizes[column.size],)
        if name not in row:
            problems.append(f"no column {name}")
        elif row[name].dtype != column.dtype or row[name].shape != shape:
            found = f"{row[name].dtype} {row[name].shape}"
            problems.append(f"{name} is {found}, not {column.dtype} {shape}")
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
    problems = check_shapes(row, sidecar) or _check_ids(row)
    if problems:
        return problems
    answers = read_answers(row)
    for number, answer in enumerate(answers):
        problems += [f"answer {number}: {problem}" for problem in _check_answer(answer, special)]
    return problems + _check_layout(row) + _check_pairs(row, answers)


def _check_ids(row: Mapping[str, np.ndarray]) -> list[str]:
    """Problems of group and answer ids, without which the row cannot be read."""
    groups, answers = row["group_ids"], row["answer_ids"]
    used = int((groups > 0).sum())
    steps = np.diff(groups[:used], prepend=0)
    if not used or groups[used:].any() or not np.isin(steps, (0, 1)).all() or steps[0] != 1:
        return ["group ids are not 1, 2, ..., then 0"]
    if answers[used:].any():
        return ["padding is scored"]
    runs = answers[np.flatnonzero(np.diff(answers, prepend=-1))]
    numbered = runs[runs > 0]
    if not np.array_equal(numbered, np.arange(1, len(numbered) + 1)):
        return ["answer ids are not 1, 2, ..., each in one place"]
    first = np.flatnonzero(steps)
    if answers[first].any():
        return ["a group does not begin with its prompt"]
    ends = np.append(first[1:], used) - 1
    if not answers[ends].all():
        return ["a group does not end with an answer"]
    return []


def _check_layout(row: Mapping[str, np.ndarray]) -> list[str]:
    """Problems of input ids, labels and positions between the tokens of each group."""
    problems = []
    ids, labels, answers = row["input_ids"], row["labels"], row["answer_ids"]
    for group in range(1, row["group_ids"].max() + 1):
        own = row["group_ids"] == group
        context = int((own & (answers == 0)).sum())
        expected = [*range(context)]
        firsts = set()
        for answer in np.unique(answers[own & (answers > 0)]):
            places = np.flatnonzero(answers == answer)
            expected += range(context, context + len(places))
            firsts.add(int(ids[places[0]]))
            if (labels[places[:-1]] != ids[places[1:]]).any():
                problems.append(f"answer {answer - 1}: labels are not the next tokens")
        if row["positions"][own].tolist() != expected:
            problems.append(f"group {group - 1}: positions do not continue those of the prompt")
        if len(firsts) > 1:
            problems.append(f"group {group - 1}: its answers have two prompts")
    return problems


def _check_answer(answer: RowAnswer, special: Mapping[str, int]) -> list[str]:
    """Problems of the tokens of one answer; special: special token -> id."""
    problems = []
    if len(answer.response) < 2:
        problems.append("scores fewer than two tokens")
    if answer.response[-1] != special[template.END_OF_TURN]:
        problems.append(f"does not end with {template.END_OF_TURN}")
    if answer.prompt[-1] != special["<|assistant|>"]:
        problems.append("the prompt does not end with <|assistant|>")
    if answer.prompt[:2] != [special[tag] for tag in template.PREFIX]:
        problems.append(f"does not begin with {' '.join(template.PREFIX)}")
    if np.isin(answer.response[:-1], list(special.values())).any():
        problems.append("a special token inside the answer")
    return problems


def _check_pairs(row: Mapping[str, np.ndarray], answers: Sequence[RowAnswer]) -> list[str]:
    """Problems of the columns of answers and pairs."""
    problems = []
    pairs = int((row["pair_ids"] >= 0).sum())
    if not pairs or (row["pair_ids"][pairs:] != -1).any():
        problems.append("pair_ids are not the numbers of one or more pairs, then -1")
    for side in ("chosen", "rejected"):
        if ((row[side][:pairs] < 0) | (row[side][:pairs] >= len(answers))).any():
            return [*problems, f"{side}: a pair refers to an answer that the row does not have"]
        if (row[side][pairs:] != -1).any():
            problems.append(f"{side}: an answer where there is no pair")
    for pair, (chosen, rejected) in enumerate(zip(row["chosen"][:pairs], row["rejected"][:pairs])):
        if answers[chosen].group != answers[rejected].group:
            problems.append(f"pair {pair} has two prompts")
    if not set(range(len(answers))) <= {*row["chosen"].tolist(), *row["rejected"].tolist()}:
        problems.append("an answer belongs to no pair")
    tokens = [len(answer.response) for answer in answers]
    if row["answer_tokens"].tolist() != tokens + [0] * (len(row["answer_tokens"]) - len(tokens)):
        problems.append("answer_tokens are not the numbers of scored tokens")
    logps = row["reference_logps"]
    if not np.isfinite(logps).all() or (logps > 0).any():
        problems.append("a log-prob is not finite, or above 0")
    if logps[len(answers):].any():
        problems.append("a log-prob where there is no answer")
    return problems
