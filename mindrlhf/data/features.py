"""Pairs to tokens, and tokens to model inputs: alone shifts the labels and masks the loss."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mindrlhf.data.preference import Pair
from mindrlhf.models.glm4 import template
from mindrlhf.models.glm4.tokenizer import Glm4Tokenizer

# If prompt + longer answer exceed a row: keep the prompt's end, keep its start, or drop the pair.
TRUNCATIONS = ("keep_end", "keep_start", "drop")


@dataclass(frozen=True)
class TokenPair:
    """Token ids of one pair: the shared prompt, and both responses with their stop tokens."""
    prompt: list[int]
    chosen: list[int]
    rejected: list[int]

    @property
    def longest(self) -> int:
        """Tokens of the longer side, prompt included."""
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


def tokenize_pair(tokenizer: Glm4Tokenizer, pair: Pair) -> TokenPair:
    """Encode prompt and responses separately, so that no token spans their boundary."""
    return TokenPair(template.prompt_ids(tokenizer, pair.messages),
                     template.response_ids(tokenizer, pair.chosen),
                     template.response_ids(tokenizer, pair.rejected))


def truncate_prompt(tokens: TokenPair, seq_len: int, *, tokenizer: Glm4Tokenizer,
                    truncation: str = "keep_end") -> tuple[TokenPair | None, int]:
    """Shorten the prompt until prompt + longer response fit into seq_len tokens.

    Only text is cut, from all messages as if they were one; the prefix, the tags and the newlines
    after them stay. Both responses keep the same prompt and are never cut.

    Args:
        tokens: the pair.
        seq_len: positions of a row.
        tokenizer: distinguishes tags from text.
        truncation: one of TRUNCATIONS.

    Returns:
        The pair and the number of tokens cut, or (None, 0) if the pair does not fit.
    """
    excess = tokens.longest - seq_len
    if excess <= 0:
        return tokens, 0
    text = template.text_positions(tokenizer, tokens.prompt)
    if truncation == "drop" or excess > len(text):
        return None, 0
    cut = set(text[:excess] if truncation == "keep_end" else text[-excess:])
    prompt = [token for position, token in enumerate(tokens.prompt) if position not in cut]
    return TokenPair(prompt, tokens.chosen, tokens.rejected), excess


def row_columns(pairs: Sequence[TokenPair], side: str, seq_len: int,
                pad_id: int) -> dict[str, np.ndarray]:
    """Build the model inputs of one side of one row.

    The label of position t is the sequence's token t + 1. A position is scored if its label is a
    response token. The last prompt token predicts the first response token, so a sequence of p
    prompt and r response tokens scores the r positions p - 1 to p + r - 2; the last of them
    predicts the stop token. Example with p = 3, r = 2 (D E: response, -: padding):

        input_ids    a b c D E -
        labels       b c D E - -
        loss_mask    0 0 1 1 0 0
        segment_ids  1 1 1 1 1 0

    Args:
        pairs: the row's pairs in order.
        side: "chosen" or "rejected".
        seq_len: positions of the row, S.
        pad_id: id of the padding token.

    Returns:
        int32 arrays of shape (S,): input_ids, labels, loss_mask, segment_ids.
    """
    input_ids = np.full(seq_len, pad_id, np.int32)
    labels = np.full(seq_len, pad_id, np.int32)
    loss_mask = np.zeros(seq_len, np.int32)
    segment_ids = np.zeros(seq_len, np.int32)
    start = 0
    for number, pair in enumerate(pairs, 1):
        response = getattr(pair, side)
        ids = pair.prompt + response
        end = start + len(ids)
        input_ids[start:end] = ids
        labels[start:end - 1] = ids[1:]
        loss_mask[start + len(pair.prompt) - 1:end - 1] = 1
        segment_ids[start:end] = number
        start = end
    return {"input_ids": input_ids, "labels": labels, "loss_mask": loss_mask,
            "segment_ids": segment_ids}
