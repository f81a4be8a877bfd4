"""Messages: reads conversations, answers and texts from the values of a row.

A value of another kind is a ValueError that names the field.
"""
from __future__ import annotations

import re
from typing import Any

Messages = tuple[tuple[str, str], ...]  # (role, text) of each message; roles as in template.py

ROLES = {
    "system": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant",
    "observation": "observation", "tool": "observation"}
EMPTY: tuple[Any, ...] = (None, "", [], {}, "[]")
_SPEAKER = re.compile(r"(?:\A\s*|\n\n)(Human|Assistant):")  # of a dialogue of HH-RLHF


def messages_of(value: Any, name: str) -> Messages:
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
        text = text_of(message.get("content", message.get("value")), f"{name} of {role}")
        messages.append((ROLES[role], text))
    return tuple(messages)


def history_of(value: Any) -> Messages:
    """Messages of a list of [question, answer], or of a list of messages."""
    if value in EMPTY:
        return ()
    if isinstance(value, list) and all(isinstance(turn, list) and len(turn) == 2 for turn in value):
        return tuple((role, text_of(text, "history")) for turn in value
                     for role, text in zip(("user", "assistant"), turn))
    return messages_of(value, "history")


def prompt_of(messages: Messages, name: str) -> Messages:
    """The messages, if the last of them can be answered."""
    if not messages or messages[-1][0] == "assistant":
        found = "ends with the assistant" if messages else "holds no message"
        raise ValueError(f"'{name}' {found}; the last message must be one to answer")
    return messages


def dialogue_of(text: str) -> Messages:
    """Turns of a dialogue as in HH-RLHF, `Human: ... Assistant: ...`; () if the text is none."""
    if not _SPEAKER.match(text):
        return ()
    pieces = _SPEAKER.split(text)[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    return tuple((roles[who], said.strip()) for who, said in zip(pieces[::2], pieces[1::2]))


def open_dialogue(text: str) -> Messages:
    """Turns of a dialogue that ends with an empty turn of the assistant; () if the text is none."""
    turns = dialogue_of(text)
    return turns[:-1] if turns[-1:] == (("assistant", ""),) else ()


def answer_of(value: Any, name: str) -> str:
    """Text of an answer: a string, a message, or a list of one message."""
    if not isinstance(value, str):
        messages = messages_of([value] if isinstance(value, dict) else value, name)
        if len(messages) != 1 or messages[0][0] != "assistant":
            roles = ", ".join(role for role, _ in messages)
            raise ValueError(f"'{name}' holds {roles or 'no message'}; expected one assistant "
                             "message")
        value = messages[0][1]
    if not value.strip():
        raise ValueError(f"'{name}' is empty; add the answer or remove the row")
    return value


def is_answer(value: Any) -> bool:
    """Whether a value is a string, a message, or a list of one message."""
    return isinstance(value, (str, dict)) or (isinstance(value, list) and len(value) == 1)


def text_of(value: Any, name: str) -> str:
    """The value, which must be a string."""
    if not isinstance(value, str):
        raise ValueError(f"'{name}' is {type(value).__name__}; expected a string")
    return value


def texts_in(value: Any) -> list[str]:
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
