"""Formats of preference data: parses a row of JSON into a conversation and its two answers."""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

Messages = tuple[tuple[str, str], ...]  # (role, text) of each message; roles as in template.py

# Fields that a row of each type must have; --dataset_type auto tries the types in this order.
FIELDS = {
    "cvalues": ("prompt", "pos_resp", "neg_resp"),
    "dpo": ("conversations", "chosen", "rejected"),
    "pairs": ("chosen", "rejected")}
ROLES = {
    "system": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant",
    "observation": "observation", "tool": "observation"}


class ParsedRow(NamedTuple):
    """The content of a row.

    Attributes:
        messages: the conversation before the answer.
        chosen: the preferred answer.
        rejected: the other answer.
    """
    messages: Messages
    chosen: str
    rejected: str


def parse_row(row: Any, kind: str) -> ParsedRow:
    """Parse one row.

    Args:
        row: the row's JSON value.
        kind: a key of FIELDS.

    Raises:
        ValueError: the row does not have the format; the message says where.
    """
    return _PARSERS[kind](row)


def detect_type(row: Any) -> str:
    """Dataset type of a row, by its fields.

    Raises:
        ValueError: no type has these fields.
    """
    for kind, fields in FIELDS.items():
        if isinstance(row, dict) and all(name in row for name in fields):
            return kind
    found = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
    raise ValueError("--dataset_type auto needs the fields of one type "
                     f"({describe_fields(FIELDS)}); this row has: {found or 'none'}")


def describe_fields(kinds: Iterable[str]) -> str:
    """The fields of some types, for a message."""
    return "; ".join(f"{kind}: {', '.join(FIELDS[kind])}" for kind in kinds)


def _parse_cvalues(row: Any) -> ParsedRow:
    prompt, chosen, rejected = _field_values(row, "cvalues")
    return ParsedRow((("user", _text(prompt, "prompt")),), _answer(chosen, "pos_resp"),
                     _answer(rejected, "neg_resp"))


def _parse_dpo(row: Any) -> ParsedRow:
    conversation, chosen, rejected = _field_values(row, "dpo")
    messages = _messages(conversation, "conversations")
    if row.get("system"):
        messages = (("system", _text(row["system"], "system")), *messages)
    return ParsedRow(_prompt(messages, "conversations"), _answer(chosen, "chosen"),
                     _answer(rejected, "rejected"))


def _parse_pairs(row: Any) -> ParsedRow:
    """Parse a row as TRL does: without a prompt, the common prefix of the answers is the prompt."""
    chosen, rejected = _field_values(row, "pairs")
    prompt = row.get("prompt")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise ValueError(f"'chosen' is {type(chosen).__name__} but 'rejected' is "
                         f"{type(rejected).__name__}; use two strings or two lists of messages")
    are_answers = isinstance(chosen, str) or (_is_single(chosen) and _is_single(rejected))
    if isinstance(prompt, str) and are_answers:
        prompt = [{"role": "user", "content": prompt}]
    if isinstance(prompt, str) or prompt is None:  # full conversations repeat a string prompt
        split = _split_texts if isinstance(chosen, str) else _split_conversations
        messages, chosen, rejected = split(chosen, rejected)
    else:
        messages = _messages(prompt, "prompt")
    return ParsedRow(_prompt(messages, "prompt"), _answer(chosen, "chosen"),
                     _answer(rejected, "rejected"))


_PARSERS = {"cvalues": _parse_cvalues, "dpo": _parse_dpo, "pairs": _parse_pairs}


def _field_values(row: Any, kind: str) -> list[Any]:
    """Values of a row's required fields, in the order of FIELDS."""
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {type(row).__name__}")
    for name in FIELDS[kind]:
        if name not in row:
            raise ValueError(f"missing '{name}'; a {kind} row has {', '.join(FIELDS[kind])}")
    return [row[name] for name in FIELDS[kind]]


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"'{name}' is {type(value).__name__}; expected a string")
    return value


def _is_single(value: Any) -> bool:
    """Whether a value is one message, or a list of one message."""
    return isinstance(value, dict) or (isinstance(value, list) and len(value) == 1)


def _answer(value: Any, name: str) -> str:
    """Text of an answer: a string, a message, or a list of one message."""
    if not isinstance(value, str):
        messages = _messages([value] if isinstance(value, dict) else value, name)
        if len(messages) != 1 or messages[0][0] != "assistant":
            roles = ", ".join(role for role, _ in messages)
            raise ValueError(f"'{name}' holds {roles or 'no message'}; expected one assistant "
                             "message")
        value = messages[0][1]
    if not value.strip():
        raise ValueError(f"'{name}' is empty; add the answer or remove the row")
    return value


def _messages(value: Any, name: str) -> Messages:
    """Messages of a list of objects with role and content, or from and value."""
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise ValueError(f"'{name}' is not a list of messages; expected objects with role and "
                         "content, or from and value")
    messages = []
    for message in value:
        role = message.get("role", message.get("from"))
        if not isinstance(role, str) or role not in ROLES:
            raise ValueError(f"'{name}' has the role {role!r}; known roles: {', '.join(ROLES)}")
        if message.get("tool_calls"):
            raise ValueError(f"'{name}' has tool_calls, which the template does not render; write "
                             "the call as text")
        text = _text(message.get("content", message.get("value")), f"{name} of {role}")
        messages.append((ROLES[role], text))
    return tuple(messages)


def _prompt(messages: Messages, name: str) -> Messages:
    """The messages, if the last of them can be answered."""
    if not messages or messages[-1][0] == "assistant":
        found = "ends with the assistant" if messages else "holds no message"
        raise ValueError(f"'{name}' {found}; the last message must be one to answer")
    return messages


def _common_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Length of the common prefix of two sequences."""
    differing = (n for n, (a, b) in enumerate(zip(first, second)) if a != b)
    return next(differing, min(len(first), len(second)))


def _split_texts(chosen: Any, rejected: Any) -> tuple[Messages, Any, Any]:
    """Split the common prefix of two strings off as the prompt."""
    prompt = chosen[:_common_length(chosen, rejected)]
    if len(prompt) in (len(chosen), len(rejected)):
        raise ValueError("no 'prompt', and it cannot be inferred: one answer is a prefix of the "
                         "other; add 'prompt'")
    if prompt.endswith(" "):  # the space belongs to the answers, as in TRL
        prompt = prompt[:-1]
    return (("user", prompt),), chosen[len(prompt):], rejected[len(prompt):]


def _split_conversations(chosen: Any, rejected: Any) -> tuple[Messages, Any, Any]:
    """Split two conversations that differ only in their last message into prompt and answers."""
    chosen, rejected = _messages(chosen, "chosen"), _messages(rejected, "rejected")
    common = _common_length(chosen, rejected)
    common = min(common, len(chosen) - 1, len(rejected) - 1)  # the last message is the answer
    if common < 0 or len(chosen) != common + 1 or len(rejected) != common + 1:
        raise ValueError(f"'chosen' and 'rejected' share {max(common, 0)} messages of "
                         f"{len(chosen)} and {len(rejected)}; only their last messages may differ")
    answers = [[{"role": side[-1][0], "content": side[-1][1]}] for side in (chosen, rejected)]
    return chosen[:-1], *answers
