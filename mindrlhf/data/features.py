"""Pairs to tokens, and tokens to model inputs: alone decides which position predicts what."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, NamedTuple

import numpy as np

from mindrlhf.data.preference import Pair
from mindrlhf.models.glm4 import template
from mindrlhf.models.glm4.tokenizer import Glm4Tokenizer
from mindrlhf.records import INPUTS

# If a pair exceeds a row: keep the prompt's end, keep its start, or drop the pair.
TRUNCATIONS = ("keep_end", "keep_start", "drop")


@dataclass(frozen=True)
class TokenPair:
    """Token ids of one pair: the shared prompt, and both responses with their stop tokens."""
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

    @property
    def size(self) -> int:
        """Positions that the pair takes in a row."""
        one = self.chosen == self.rejected
        return group_size(len(self.prompt), len(self.chosen) + (0 if one else len(self.rejected)))


class ComparedPair(NamedTuple):
    """Which two answers a pair compares.

    Attributes:
        chosen, rejected: indices of answers.
        number: of the pair: its row in the source.
    """
    chosen: int
    rejected: int
    number: int


@dataclass(frozen=True)
class TokenGroup:
    """Token ids of one prompt and of its distinct answers, and the pairs that compare them.

    Attributes:
        prompt: ends with the tag after which an answer begins.
        answers: responses with their stop tokens.
        pairs: their answers are counted within the group.
        logps: reference log-prob of each answer, nats; empty before the reference pass.
    """
    prompt: list[int]
    answers: list[list[int]]
    pairs: list[ComparedPair] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)


def group_size(prompt: Any, answers: Any) -> Any:
    """Positions of a group in a row, see row_inputs().

    Args:
        prompt: tokens of the prompt, an int or an array of them.
        answers: tokens of all answers together, the same.
    """
    return prompt - 1 + answers


def tokenize_pair(tokenizer: Glm4Tokenizer, pair: Pair) -> TokenPair:
    """Encode prompt and responses separately, so that no token spans their boundary."""
    return TokenPair(template.prompt_ids(tokenizer, pair.messages),
                     template.response_ids(tokenizer, pair.chosen),
                     template.response_ids(tokenizer, pair.rejected))


def truncate_prompt(tokens: TokenPair, seq_len: int, *, tokenizer: Glm4Tokenizer,
                    truncation: str = "keep_end") -> tuple[TokenPair | None, int]:
    """Shorten the prompt until it fits into seq_len positions, together with both responses.

    Only text is cut, from all messages as if they were one; the prefix, the tags and the newlines
    after them stay. Both responses keep the same prompt and are never cut.

    Args:
        tokens: the pair.
        seq_len: positions of a row.
        tokenizer: distinguishes tags from text.
        truncation: one of TRUNCATIONS.

    Returns:
        The pair and the number of tokens cut; (None, 0) if no text of the prompt fits.
    """
    excess = tokens.size - seq_len
    if excess <= 0:
        return tokens, 0
    text = template.text_positions(tokenizer, tokens.prompt)
    if truncation == "drop" or excess >= len(text):  # nothing of it would be left
        return None, 0
    cut = set(text[:excess] if truncation == "keep_end" else text[-excess:])
    prompt = [token for position, token in enumerate(tokens.prompt) if position not in cut]
    return TokenPair(prompt, tokens.chosen, tokens.rejected), excess


def row_inputs(groups: Sequence[TokenGroup], seq_len: int, pad_id: int) -> dict[str, np.ndarray]:
    """Build the model inputs of one row: each prompt once, each answer once.

    A group is its prompt without the last token, then for each answer the prompt's last token and
    the response without its last token. So an answer's own positions predict its response, from
    the first token to the stop token, and no position has two labels. A position attends to the
    earlier positions of its prompt and of its own answer, and counts its place from the prompt's
    start. Example: prompt a b c, answers D E and F G H (-: padding):

        input_ids    a b c D c F G -
        labels       - - D E F G H -
        group_ids    1 1 1 1 1 1 1 0
        answer_ids   0 0 1 1 2 2 2 0
        positions    0 1 2 3 2 3 4 0

    Args:
        groups: of the row, in order.
        seq_len: positions of the row, S.
        pad_id: id of the padding token.

    Returns:
        The columns of records.INPUTS: int32, shape (S,). Positions with an answer id are scored.
    """
    row = {name: np.zeros(seq_len, np.int32) for name in INPUTS}
    row["input_ids"][:] = row["labels"][:] = pad_id
    end, answer_ids = 0, count(1)
    for group_id, group in enumerate(groups, 1):
        *context, last = group.prompt
        begin, end = end, end + len(context)
        row["input_ids"][begin:end] = context
        row["positions"][begin:end] = range(len(context))
        for response in group.answers:
            start, end = end, end + len(response)
            row["input_ids"][start:end] = [last, *response[:-1]]
            row["labels"][start:end] = response
            row["answer_ids"][start:end] = next(answer_ids)
            row["positions"][start:end] = range(len(context), len(context) + len(response))
        row["group_ids"][begin:end] = group_id
    return row
