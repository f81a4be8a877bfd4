"""Rows of a preference file to pairs."""
import json
from dataclasses import dataclass

from mindrlhf.cli import UserError, existing_file

CVALUES_FIELDS = ("prompt", "pos_resp", "neg_resp")
DATASET_TYPES = ("cvalues",)


@dataclass(frozen=True)
class Pair:
    """One prompt with a preferred and a rejected answer.

    Attributes:
        messages: ((role, text), ...), the conversation before the answer.
        chosen, rejected: the answers.
    """
    messages: tuple
    chosen: str
    rejected: str


def read_cvalues(path):
    """Read pairs from JSON lines with the fields of CValues-Comparison: prompt, pos_resp, neg_resp.

    Returns:
        list[Pair], in the order of the file; blank lines are passed over.

    Raises:
        UserError: naming the first line that is no JSON, lacks a field, or has an empty answer.
    """
    path = existing_file(path, "the preference pairs")
    pairs = []
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                pairs.append(_cvalues_pair(line, f"{path}:{number}"))
    if not pairs:
        raise UserError(f"{path}: holds no pairs; a cvalues row has {', '.join(CVALUES_FIELDS)}")
    return pairs


def _cvalues_pair(line, place):
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: not UTF-8 (byte {error.start}); save the file as UTF-8") from None
    except (json.JSONDecodeError, RecursionError) as error:
        detail = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else "too deep"
        raise UserError(f"{place}: not JSON ({detail}); each line holds one JSON object") from None
    if not isinstance(row, dict):
        raise UserError(f"{place}: a JSON object expected, got {type(row).__name__}")
    for field in CVALUES_FIELDS:
        if field not in row:
            raise UserError(f"{place}: missing '{field}'; a cvalues row has {', '.join(CVALUES_FIELDS)}")
        if not isinstance(row[field], str):
            raise UserError(f"{place}: '{field}' is {type(row[field]).__name__}; a string expected")
    for field in CVALUES_FIELDS[1:]:
        if not row[field].strip():
            raise UserError(f"{place}: '{field}' is empty; an answer needs text, or remove the line")
    return Pair((("user", row["prompt"]),), row["pos_resp"], row["neg_resp"])
