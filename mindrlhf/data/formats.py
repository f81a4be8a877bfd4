"""Formats of preference data: parses a row of JSON into a conversation and its two answers.

No part of a prompt is lost silently: a row is refused if a prompt field is not in the result.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from mindrlhf.data import pair_types
from mindrlhf.data.messages import (
    EMPTY,
    Messages,
    answer_of,
    dialogue_of,
    history_of,
    is_answer,
    messages_of,
    open_dialogue,
    prompt_of,
    text_of,
    texts_in,
)

Row = dict[str, Any]

COMMON = ("system", "history")  # optional in each format
# Fields that hold (part of) a prompt wherever they occur: their text must be in the conversation.
PROMPT_FIELDS = ("prompt", "system_prompt", "system_message", "instruction", "input", "question",
                 "query", "problem", "context", "conversations", "messages")
NOT_RENDERED = ("tools", "images", "videos", "audios")


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
        is_whole = "chosen" in FORMATS[kind].fields and not is_answer(row["chosen"])
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
        messages = open_dialogue(value) or (("user", value),)
    else:
        messages = messages_of(value, name)
    messages = _add_common(row, prompt_of(messages, name))
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
    return ParsedRow((("user", text_of(row[question], question)),), answer_of(row[chosen], chosen),
                     answer_of(row[rejected], rejected))


def _parse_alpaca(row: Row, fields: Sequence[str]) -> ParsedRow:
    """An instruction and its input make up the question, as in LLaMA-Factory."""
    texts = [text_of(row[name], name) for name in ("instruction", "input")
             if row.get(name) not in (None, "")]
    return _parse_question({**row, "instruction": "\n".join(texts)}, fields)


def _parse_dpo(row: Row, fields: Sequence[str]) -> ParsedRow:
    """Messages and two answers."""
    conversation, chosen, rejected = fields
    messages = prompt_of(messages_of(row[conversation], conversation), conversation)
    return ParsedRow(messages, answer_of(row[chosen], chosen), answer_of(row[rejected], rejected))


def _parse_pairs(row: Row, fields: Sequence[str]) -> ParsedRow:
    """Answers to a prompt, or two conversations that differ only in their answers."""
    chosen, rejected, prompt = row["chosen"], row["rejected"], row.get("prompt")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise ValueError(f"'chosen' is {type(chosen).__name__} but 'rejected' is "
                         f"{type(rejected).__name__}; use two strings or two lists of messages")
    if prompt is not None and is_answer(chosen) and is_answer(rejected):
        if isinstance(prompt, str) and (turns := open_dialogue(prompt)):
            answers = (answer_of(chosen, "chosen").strip(), answer_of(rejected, "rejected").strip())
            return ParsedRow(prompt_of(turns, "prompt"), *answers)
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        return _parse_dpo({**row, "prompt": prompt}, ("prompt", *fields))
    if not isinstance(chosen, str):
        return _split_turns(messages_of([chosen] if isinstance(chosen, dict) else chosen, "chosen"),
                            messages_of([rejected] if isinstance(rejected, dict) else rejected,
                                      "rejected"), fields)
    _require_nothing_else(row, "pairs")
    sides = [dialogue_of(chosen), dialogue_of(rejected)]
    if not all(sides):
        raise ValueError("no 'prompt', and 'chosen' and 'rejected' share no turns ('Human: ... "
                         "Assistant: ...'); add 'prompt', or set --dataset_type implicit if their "
                         "common beginning is the prompt")
    return _split_turns(sides[0], sides[1], fields)


def _parse_implicit(row: Row, fields: Sequence[str]) -> ParsedRow:
    """Two strings: their common prefix is the prompt, as in TRL."""
    chosen, rejected = (text_of(row[name], name) for name in fields)
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
    messages = messages_of(row[conversation], conversation)
    if not messages or messages[-1][0] != "assistant":
        raise ValueError(f"'{conversation}' does not end with the assistant; its last message must "
                         "be the chosen answer")
    return ParsedRow(prompt_of(messages[:-1], conversation),
                     answer_of(messages[-1][1], conversation), answer_of(row[rejected], rejected))


def _parse_conversations(row: Row, fields: Sequence[str]) -> ParsedRow:
    """Two conversations that differ only in their answers."""
    chosen, rejected = (messages_of(row[name], name) for name in fields)
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
    head, body, earlier = messages[:start], messages[start:], history_of(row.get("history"))
    if body[:len(earlier)] != earlier:
        body = earlier + body
    if row.get("system") not in EMPTY:
        system = (("system", text_of(row["system"], "system")),)
        head = head if head[:1] == system else system + head
    return head + body


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
        turns = open_dialogue(value) if isinstance(value, str) else ()
        lost = {*([text for _, text in turns] or texts_in(value))} - there
        if lost and not set(map(_words, lost)) <= set(map(_words, there)):
            raise ValueError(f"the text of '{name}' is in no message of the {kind} row and would "
                             "be lost; put it into the prompt, or remove the field")


def _words(text: str) -> str:
    """The text with single spaces."""
    return " ".join(text.split())


def _require_nothing_else(row: Row, kind: str) -> None:
    """Refuse two strings beside which other text stands: it may be the prompt."""
    known = FORMATS[kind].known
    others = [name for name, value in row.items() if name not in known and texts_in(value)]
    if others:
        raise ValueError(f"no 'prompt', but text in {', '.join(map(repr, others))}; rename the "
                         "field with the prompt to 'prompt', or remove these fields")


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
    prompt = prompt_of(chosen[:-1], "prompt")
    answers = [answer_of({"role": side[-1][0], "content": side[-1][1]}, name)
               for name, side in zip(names, (chosen, rejected))]
    return ParsedRow(prompt, *answers)
