"""Formats of preference data: parses a row of JSON into a conversation and its two answers.

No part of a prompt is lost silently: a row is refused if a prompt field is not in the result.
"""
from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from mindrlhf.data import pair_types

Messages = tuple[tuple[str, str], ...]  # (role, text) of each message; roles as in template.py
Row = dict[str, Any]

ROLES = {
    "system": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant",
    "observation": "observation", "tool": "observation"}
COMMON = ("system", "history")  # optional in each format
# Fields that hold (part of) a prompt wherever they occur: their text must be in the conversation.
PROMPT_FIELDS = ("prompt", "system_prompt", "system_message", "instruction", "input", "question",
                 "query", "problem", "context", "conversations", "messages")
NOT_RENDERED = ("tools", "images", "videos", "audios")
EMPTY: tuple[Any, ...] = (None, "", [], {}, "[]")
_SPEAKER = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")  # of a dialogue of HH-RLHF


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


class Format(NamedTuple):
    """A format of rows.

    Attributes:
        parse: parses a row, given the names in `fields`.
        fields: what a row must have.
        optional: what it may have besides COMMON.
    """
    parse: Callable[[Row, Sequence[str]], ParsedRow]
    fields: tuple[str, ...]
    optional: tuple[str, ...] = ()

    @property
    def known(self) -> tuple[str, ...]:
        """All fields that the format uses."""
        return (*self.fields, *self.optional, *COMMON)


def parse_row(row: Any, kind: str) -> ParsedRow:
    """Parse one row.

    Args:
        row: the row's JSON value.
        kind: a key of FORMATS.

    Raises:
        ValueError: the row does not have the format, or part of its prompt would be lost; the
            message says where.
    """
    fields = FORMATS[kind].fields
    if not isinstance(row, dict):
        raise ValueError(f"expected a JSON object, got {type(row).__name__}")
    for name in fields:
        if name not in row:
            raise ValueError(f"missing '{name}'; a {kind} row has {', '.join(fields)}")
    _require_rendered(row)
    parsed = FORMATS[kind].parse(row, fields)
    parsed = parsed._replace(messages=_add_common(row, parsed.messages))
    _require_all_prompts(row, kind, parsed)
    return parsed


def detect_type(row: Any) -> str:
    """Dataset type of a row: of those whose fields it has, the one that uses most of its fields.

    Raises:
        ValueError: no type has these fields.
    """
    def used(kind: str) -> int:
        optional = sum(row.get(name) not in EMPTY for name in FORMATS[kind].optional)
        return len(FORMATS[kind].fields) + optional

    kinds = [kind for kind, form in FORMATS.items()
             if isinstance(row, dict) and all(name in row for name in form.fields)]
    if kinds:
        kind = max(kinds, key=used)  # the first of several
        is_whole = "chosen" in FORMATS[kind].fields and not _is_answer(row["chosen"])
        return "pairs" if is_whole else kind  # only the answers of pairs may be conversations
    found = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
    raise ValueError("--dataset_type auto needs the fields of one type "
                     f"({describe_fields(FORMATS)}); this row has: {found or 'none'}")


def parse_prompt(row: Any) -> Messages:
    """The conversation before the answer, of a row to be answered.

    Args:
        row: the row's JSON value: with the fields of a type of FORMATS, whose answers are ignored;
            or with `messages` or `conversations`, or `prompt`, a string or messages; and COMMON.

    Raises:
        ValueError: it is none of these; the message says what is wrong.
    """
    if isinstance(row, dict) and any(all(name in row for name in form.fields)
                                     for form in FORMATS.values()):
        return parse_row(row, detect_type(row)).messages
    names = [name for name in ("messages", "conversations", "prompt")
             if isinstance(row, dict) and row.get(name) not in EMPTY]
    if not names:
        found = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
        raise ValueError("no prompt; a row has prompt, messages, or the fields of a data set; this "
                         f"one has {found or 'none'}")
    name, value = names[0], row[names[0]]
    _require_rendered(row)
    if isinstance(value, str):
        messages = _open_dialogue(value) or (("user", value),)
    else:
        messages = _messages(value, name)
    messages = _add_common(row, _prompt(messages, name))
    _require_all_prompts(row, "prompt", ParsedRow(messages, "", ""))
    return messages


def describe_fields(kinds: Iterable[str]) -> str:
    """The fields of some types, for a message."""
    return "; ".join(f"{kind}: {', '.join(FORMATS[kind].fields)}" for kind in kinds)


def ignored_fields(row: Row, kind: str) -> list[str]:
    """Names of the fields with content that the format does not use."""
    known = FORMATS[kind].known
    return [name for name, value in row.items() if name not in known and value not in EMPTY]


def _parse_question(row: Row, fields: Sequence[str]) -> ParsedRow:
    """A question, which is a string, and two answers."""
    question, chosen, rejected = fields
    return ParsedRow((("user", _text(row[question], question)),), _answer(row[chosen], chosen),
                     _answer(row[rejected], rejected))


def _parse_alpaca(row: Row, fields: Sequence[str]) -> ParsedRow:
    """An instruction and its input make up the question, as in LLaMA-Factory."""
    texts = [_text(row[name], name) for name in ("instruction", "input")
             if row.get(name) not in (None, "")]
    return _parse_question({**row, "instruction": "\n".join(texts)}, fields)


def _parse_dpo(row: Row, fields: Sequence[str]) -> ParsedRow:
    """Messages and two answers."""
    conversation, chosen, rejected = fields
    messages = _prompt(_messages(row[conversation], conversation), conversation)
    return ParsedRow(messages, _answer(row[chosen], chosen), _answer(row[rejected], rejected))


def _parse_pairs(row: Row, fields: Sequence[str]) -> ParsedRow:
    """Answers to a prompt, or two conversations that differ only in their answers."""
    chosen, rejected, prompt = row["chosen"], row["rejected"], row.get("prompt")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise ValueError(f"'chosen' is {type(chosen).__name__} but 'rejected' is "
                         f"{type(rejected).__name__}; use two strings or two lists of messages")
    if prompt is not None and _is_answer(chosen) and _is_answer(rejected):
        if isinstance(prompt, str) and (turns := _open_dialogue(prompt)):
            answers = (_answer(chosen, "chosen").strip(), _answer(rejected, "rejected").strip())
            return ParsedRow(_prompt(turns, "prompt"), *answers)
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        return _parse_dpo({**row, "prompt": prompt}, ("prompt", *fields))
    if not isinstance(chosen, str):
        return _split_turns(_messages([chosen] if isinstance(chosen, dict) else chosen, "chosen"),
                            _messages([rejected] if isinstance(rejected, dict) else rejected,
                                      "rejected"), fields)
    _require_nothing_else(row, "pairs")
    sides = [_dialogue(chosen), _dialogue(rejected)]
    if not all(sides):
        raise ValueError("no 'prompt', and 'chosen' and 'rejected' share no turns ('Human: ... "
                         "Assistant: ...'); add 'prompt', or set --dataset_type implicit if their "
                         "common beginning is the prompt")
    return _split_turns(sides[0], sides[1], fields)


def _parse_implicit(row: Row, fields: Sequence[str]) -> ParsedRow:
    """Two strings: their common prefix is the prompt, as in TRL."""
    chosen, rejected = (_text(row[name], name) for name in fields)
    _require_nothing_else(row, "implicit")
    prompt = chosen[:_common_length(chosen, rejected)]
    if len(prompt) in (len(chosen), len(rejected)):
        raise ValueError("no 'prompt', and it cannot be inferred: one answer is a prefix of the "
                         "other; add 'prompt'")
    if not prompt.strip():
        raise ValueError("no 'prompt', and it cannot be inferred: 'chosen' and 'rejected' have no "
                         "common prefix; add 'prompt'")
    prompt = prompt[:-1] if prompt.endswith(" ") else prompt  # the space belongs to the answers
    return ParsedRow((("user", prompt),), chosen[len(prompt):], rejected[len(prompt):])


def _parse_swift(row: Row, fields: Sequence[str]) -> ParsedRow:
    """A conversation with the chosen answer, and the rejected answer."""
    conversation, rejected = fields
    messages = _messages(row[conversation], conversation)
    if not messages or messages[-1][0] != "assistant":
        raise ValueError(f"'{conversation}' does not end with the assistant; its last message must "
                         "be the chosen answer")
    return ParsedRow(_prompt(messages[:-1], conversation), _answer(messages[-1][1], conversation),
                     _answer(row[rejected], rejected))


def _parse_conversations(row: Row, fields: Sequence[str]) -> ParsedRow:
    """Two conversations that differ only in their answers."""
    chosen, rejected = (_messages(row[name], name) for name in fields)
    return _split_turns(chosen, rejected, fields)


# --dataset_type: the format of its rows. The fields of a question come before those of the answers.
FORMATS = {
    "cvalues": Format(_parse_question, ("prompt", "pos_resp", "neg_resp"), pair_types.FIELDS),
    "dpo": Format(_parse_dpo, ("conversations", "chosen", "rejected")),
    "pairs": Format(_parse_pairs, ("chosen", "rejected"), ("prompt",)),
    "implicit": Format(_parse_implicit, ("chosen", "rejected")),
    "alpaca": Format(_parse_alpaca, ("instruction", "chosen", "rejected"), ("input",)),
    "orca": Format(_parse_question, ("question", "chosen", "rejected")),
    "input": Format(_parse_question, ("input", "chosen", "rejected")),
    "swift": Format(_parse_swift, ("messages", "rejected_response")),
    "swift_messages": Format(_parse_conversations, ("messages", "rejected_messages")),
    "swift_query": Format(_parse_question, ("query", "response", "rejected_response"))}


def _add_common(row: Row, messages: Messages) -> Messages:
    """Put the system prompt and the history before the messages, unless they stand there."""
    start = next((n for n, (role, _) in enumerate(messages) if role != "system"), len(messages))
    head, body, earlier = messages[:start], messages[start:], _history(row.get("history"))
    if body[:len(earlier)] != earlier:
        body = earlier + body
    if row.get("system") not in EMPTY:
        system = (("system", _text(row["system"], "system")),)
        head = head if head[:1] == system else system + head
    return head + body


def _history(value: Any) -> Messages:
    """Messages of a list of [question, answer], or of a list of messages."""
    if value in EMPTY:
        return ()
    if isinstance(value, list) and all(isinstance(turn, list) and len(turn) == 2 for turn in value):
        return tuple((role, _text(text, "history")) for turn in value
                     for role, text in zip(("user", "assistant"), turn))
    return _messages(value, "history")


def _require_rendered(row: Row) -> None:
    """Refuse a row with content that the template does not render."""
    for name in NOT_RENDERED:
        if row.get(name) not in EMPTY:
            raise ValueError(f"'{name}' is not empty, and the template does not render it; write "
                             "it as text into the messages")


def _require_all_prompts(row: Row, kind: str, parsed: ParsedRow) -> None:
    """Refuse a row with a prompt field whose texts are no messages, white space apart.

    `prompt` is checked even if the format knows it, because whole conversations replace it.
    """
    known = FORMATS[kind].known if kind in FORMATS else COMMON
    there = {*(text for _, text in parsed.messages), parsed.chosen}
    for name in PROMPT_FIELDS:
        value = row.get(name)
        if value in EMPTY or (name in known and name != "prompt"):
            continue
        turns = _open_dialogue(value) if isinstance(value, str) else ()
        lost = {*([text for _, text in turns] or _texts(value))} - there
        if lost and not set(map(_words, lost)) <= set(map(_words, there)):
            raise ValueError(f"the text of '{name}' is in no message of the {kind} row and would "
                             "be lost; put it into the prompt, or remove the field")


def _words(text: str) -> str:
    """The text with single spaces."""
    return " ".join(text.split())


def _require_nothing_else(row: Row, kind: str) -> None:
    """Refuse two strings beside which other text stands: it may be the prompt."""
    known = FORMATS[kind].known
    others = [name for name, value in row.items() if name not in known and _texts(value)]
    if others:
        raise ValueError(f"no 'prompt', but text in {', '.join(map(repr, others))}; rename the "
                         "field with the prompt to 'prompt', or remove these fields")


def _texts(value: Any) -> list[str]:
    """All strings with content in a JSON value, roles of messages apart."""
    found, rest = [], [value]
    while rest:
        item = rest.pop()
        if isinstance(item, dict):
            rest += [part for name, part in item.items() if name not in ("role", "from")]
        elif isinstance(item, list):
            rest += item
        elif isinstance(item, str) and item.strip():
            found.append(item)
    return found


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"'{name}' is {type(value).__name__}; expected a string")
    return value


def _is_answer(value: Any) -> bool:
    """Whether a value is a string, a message, or a list of one message."""
    return isinstance(value, (str, dict)) or (isinstance(value, list) and len(value) == 1)


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


def _dialogue(text: str) -> Messages:
    """Turns of a dialogue as in HH-RLHF, `Human: ... Assistant: ...`; () if the text is none."""
    if not _SPEAKER.match(text):
        return ()
    pieces = _SPEAKER.split(text)[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    return tuple((roles[who], said.strip()) for who, said in zip(pieces[::2], pieces[1::2]))


def _open_dialogue(text: str) -> Messages:
    """Turns of a dialogue that ends with an empty turn of the assistant; () if the text is none."""
    turns = _dialogue(text)
    return turns[:-1] if turns[-1:] == (("assistant", ""),) else ()


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


def _split_turns(chosen: Messages, rejected: Messages, names: Sequence[str]) -> ParsedRow:
    """Split two conversations that differ only in their last message into prompt and answers."""
    common = _common_length(chosen, rejected)
    common = min(common, len(chosen) - 1, len(rejected) - 1)  # the last message is the answer
    if common < 0 or len(chosen) != common + 1 or len(rejected) != common + 1:
        raise ValueError(f"'{names[0]}' and '{names[1]}' share {max(common, 0)} messages of "
                         f"{len(chosen)} and {len(rejected)}; only their last messages may differ")
    prompt = _prompt(chosen[:-1], "prompt")
    answers = [_answer({"role": side[-1][0], "content": side[-1][1]}, name)
               for name, side in zip(names, (chosen, rejected))]
    return ParsedRow(prompt, *answers)
