"""What must hold for every row of a training file, read off its columns, without the code that made them."""
import numpy as np

from mindrlhf.models.glm4 import template
from mindrlhf.records import COLUMNS, SIDES


def segments(row, side):
    """(begin, end) of each pair on one side of a row, in order."""
    ids = row[f"{side}_segment_ids"]
    borders = np.flatnonzero(np.diff(ids, prepend=0, append=0)).tolist()
    return [(begin, end) for begin, end in zip(borders, borders[1:]) if ids[begin]]


def check_shapes(row, sidecar):
    """Problems of columns that are missing, or not of the sidecar's type and shape: list of str."""
    sizes = {"seq_len": (sidecar["seq_len"],), "pairs": (sidecar["pairs_per_row"],)}
    problems = []
    for name, (dtype, size) in COLUMNS.items():
        if name not in row:
            problems.append(f"no column {name}")
        elif row[name].dtype != dtype or row[name].shape != sizes[size]:
            problems.append(f"{name} is {row[name].dtype} {row[name].shape}, not {dtype} {sizes[size]}")
    return problems


def check_row(row, sidecar, special):
    """Problems of one row.

    Args:
        row: dict of arrays, as make_row() gave them.
        sidecar: what read_sidecar() gave.
        special: dict, special token -> id.

    Returns:
        list of str, empty where all is well.
    """
    problems = check_shapes(row, sidecar)
    if problems:
        return problems
    pairs = int((row["pair_ids"] >= 0).sum())
    if not pairs or (row["pair_ids"][pairs:] != -1).any():
        problems.append("pair_ids are not some pairs and then -1")
    prompts = []
    for side in SIDES:
        places = segments(row, side)
        sizes = [end - begin for begin, end in places]
        wanted = np.repeat([*range(1, len(places) + 1), 0], [*sizes, sidecar["seq_len"] - sum(sizes)])
        if len(places) != pairs or (row[f"{side}_segment_ids"] != wanted).any():
            problems.append(f"{side}: segment ids are not 1 to {pairs} and then 0")
            continue
        if row[f"{side}_loss_mask"][row[f"{side}_segment_ids"] == 0].any():
            problems.append(f"{side}: padding is scored")
        logps = row[f"{side}_ref_logps"]
        if not np.isfinite(logps).all() or (logps > 0).any():
            problems.append(f"{side}: a log-prob is not finite, or above 0")
        if logps[pairs:].any():
            problems.append(f"{side}: a log-prob where there is no pair")
        for number, (begin, end) in enumerate(places):
            found, prompt = _check_pair({name: row[f"{side}_{name}"][begin:end] for name in
                                         ("input_ids", "labels", "loss_mask")}, special)
            problems += [f"{side} of pair {number}: {problem}" for problem in found]
            prompts.append(prompt)
    if not problems and prompts[:pairs] != prompts[pairs:]:
        problems.append("a pair has two prompts")
    return problems


def _check_pair(columns, special):
    """(problems of one sequence, its prompt as a list of ids)."""
    ids, labels, mask = columns["input_ids"], columns["labels"], columns["loss_mask"]
    scored = np.flatnonzero(mask)
    if not np.isin(mask, (0, 1)).all() or len(scored) < 2:
        return ["the loss mask is not 0 and 1, or scores fewer than two tokens"], None
    first = int(scored[0])  # position of the last prompt token
    problems = []
    if (labels[:-1] != ids[1:]).any():
        problems.append("labels are not the next tokens")
    if not np.array_equal(scored, np.arange(first, len(ids) - 1)):
        problems.append("what is scored is not one answer up to its end")
    if ids[-1] != special[template.END_OF_TURN]:
        problems.append(f"does not end with {template.END_OF_TURN}")
    if ids[first] != special["<|assistant|>"]:
        problems.append("the prompt does not end with <|assistant|>")
    if ids[:2].tolist() != [special[tag] for tag in template.PREFIX]:
        problems.append(f"does not begin with {' '.join(template.PREFIX)}")
    if np.isin(ids[first + 1:-1], list(special.values())).any():
        problems.append("a special token inside the answer")
    return problems, ids[:first + 1].tolist()
