"""GLM-4's chat template. No other module knows its tags.

    [gMASK] <sop> <|user|> \\n {prompt} <|assistant|>      the prompt
    \\n {answer} <|user|>                                   the response

`<|user|>` ends an assistant's turn, so it is the stop token that training teaches. Text is encoded
without special tokens: a tag that a user types remains text. Source: build_single_message of
GLM-4's tokenizer.
"""
from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

VERSION = "glm4-chat-1"  # stored in the sidecar of the data; raise it when the tokens change
PREFIX = ("[gMASK]", "<sop>")
END_OF_TURN = "<|user|>"
STOP_TOKENS = ("<|endoftext|>", "<|user|>", "<|observation|>")


class Tokenizer(Protocol):
    """The part of Glm4Tokenizer that the template uses."""

    @property
    def special(self) -> Mapping[str, int]:
        """Special token -> id."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text without special tokens."""


def prompt_ids(tokenizer: Tokenizer, messages: Iterable[tuple[str, str]]) -> list[int]:
    """Token ids of a conversation, from [gMASK] to the <|assistant|> before the answer.

    Args:
        tokenizer: GLM-4's tokenizer.
        messages: (role, text) of each turn; a role is system, user, assistant or observation.
    """
    ids = [tokenizer.special[tag] for tag in PREFIX]
    for role, text in messages:
        ids += [tokenizer.special[f"<|{role}|>"], *tokenizer.encode("\n"), *tokenizer.encode(text)]
    return [*ids, tokenizer.special["<|assistant|>"]]


def text_positions(tokenizer: Tokenizer, prompt: Sequence[int]) -> list[int]:
    """Positions in prompt_ids() that are text: no prefix, no tag, no newline after a tag."""
    special = set(tokenizer.special.values())
    return [place for place, token in enumerate(prompt)
            if token not in special and prompt[place - 1] not in special]


def response_ids(tokenizer: Tokenizer, answer: str) -> list[int]:
    """Token ids of an answer, including its stop token."""
    return [*tokenizer.encode("\n"), *tokenizer.encode(answer), tokenizer.special[END_OF_TURN]]
