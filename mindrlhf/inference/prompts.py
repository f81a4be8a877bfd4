"""Prompts from a file: a line of text each, or rows of JSON."""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from mindrlhf.cli import UserError, existing_file
from mindrlhf.data import formats, sources
from mindrlhf.data.messages import Messages
from mindrlhf.inference.engine import require_room
from mindrlhf.models.glm4 import template
from mindrlhf.models.glm4.tokenizer import Glm4Tokenizer
from mindrlhf.parallel import Settings


class Prompt(NamedTuple):
    """One prompt of a file.

    Attributes:
        line: of the file, from 1.
        messages: the conversation, without a system prompt that --system adds.
        ids: token ids with the chat template.
    """
    line: int
    messages: Messages
    ids: list[int]


def with_system(messages: Messages, system: str | None) -> Messages:
    """The conversation with a system prompt, unless it has one."""
    has_one = any(role == "system" for role, _ in messages)
    return messages if system is None or has_one else (("system", system), *messages)


def read_prompts(path: str | Path, tokenizer: Glm4Tokenizer, settings: Settings,
                 system: str | None = None) -> list[Prompt]:
    """Read and check every prompt of a file, before anything is computed.

    Args:
        path: .txt: each line with text is a prompt. Else the formats of sources.py: rows with
            `prompt`, `messages`, or the fields of a type in formats.FORMATS, whose answers are
            ignored.
        tokenizer: of the model.
        settings: as config.load_settings returns them, of run_mode predict.
        system: system prompt of conversations that have none.

    Raises:
        UserError: a row is no prompt, or leaves no room for an answer.
    """
    path = existing_file(path, "the prompts of --predict_file")
    rows = _text_rows(path) if path.suffix.lower() == ".txt" else sources.read_file_rows(path)
    prompts = []
    for line, value, problem in rows:
        try:
            if problem:
                raise ValueError(problem)
            messages = formats.parse_prompt(value)
        except ValueError as error:
            raise UserError(f"{path}:{line}: {error}") from None
        ids = template.prompt_ids(tokenizer, with_system(messages, system))
        require_room(ids, settings, f"{path}:{line}: the prompt")
        prompts.append(Prompt(line, messages, ids))
    if not prompts:
        raise UserError(f"{path}: holds no prompt; give one a line")
    return prompts


def _text_rows(path: Path) -> Iterator[sources.JsonRow]:
    """Rows {"prompt": line} of the lines that have text."""
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                raise UserError(f"{path}:{number}: not UTF-8 (byte {error.start}); save the file "
                                "as UTF-8") from None
            if text.strip():
                yield sources.JsonRow(number, {"prompt": text}, None)


def as_json(messages: Messages) -> list[dict[str, Any]]:
    """Messages with role and content, as rows of JSON have them."""
    return [{"role": role, "content": text} for role, text in messages]
