"""Pairs to tokens, and tokens to model inputs: the one place that shifts by one and masks the loss."""
from dataclasses import dataclass

import numpy as np

from mindrlhf.models.glm4 import template

# where prompt + longer answer exceed a row: the prompt loses its oldest tokens, its newest, or the pair goes
TRUNCATIONS = ("keep_end", "keep_start", "drop")


@dataclass(frozen=True)
class TokenPair:
    """Token ids of one pair: the prompt once, and the two responses with their stop tokens."""
    prompt: list
    chosen: list
    rejected: list

    @property
    def longest(self):
        """Tokens of the longer side."""
        return len(self.prompt) + max(len(self.chosen), len(self.rejected))


def tokenize_pair(tokenizer, pair):
    """Pair -> TokenPair. Prompt and responses are encoded apart, so no token spans their border."""
    return TokenPair(template.prompt_ids(tokenizer, pair.messages),
                     template.response_ids(tokenizer, pair.chosen),
                     template.response_ids(tokenizer, pair.rejected))


def truncate_prompt(tokens, seq_len, *, tokenizer, truncation="keep_end"):
    """Shorten the prompt until prompt + longer response fit into seq_len tokens.

    Only text is cut, the tokens of all messages taken as one: prefix, tags and the newlines after them stay.
    Both responses keep the same prompt, and are never cut themselves.

    Args:
        tokens: TokenPair.
        seq_len: positions of a row.
        tokenizer: Glm4Tokenizer, tells tags from text.
        truncation: one of TRUNCATIONS.

    Returns:
        (TokenPair, number of tokens cut), or (None, 0) where the pair does not fit.
    """
    cut = tokens.longest - seq_len
    if cut <= 0:
        return tokens, 0
    text = template.text_positions(tokenizer, tokens.prompt)
    if truncation == "drop" or cut > len(text):
        return None, 0
    gone = set(text[:cut] if truncation == "keep_end" else text[-cut:])
    prompt = [token for place, token in enumerate(tokens.prompt) if place not in gone]
    return TokenPair(prompt, tokens.chosen, tokens.rejected), cut


def row_columns(pairs, side, seq_len, pad_id):
    """Model inputs of one side of one row.

    Position t of a sequence predicts its token t + 1: the label. It is scored where the label is a response
    token: the last prompt token predicts the first response token, so a sequence of p prompt and r response
    tokens scores positions p - 1 to p + r - 2, r of them, the stop token's among them. By hand, p = 3, r = 2:

        input_ids    a b c D E -      (D E: response, -: padding)
        labels       b c D E - -
        loss_mask    0 0 1 1 0 0
        segment_ids  1 1 1 1 1 0

    Args:
        pairs: list[TokenPair], the row's pairs in order.
        side: "chosen" or "rejected".
        seq_len: positions of the row, S.
        pad_id: id of the padding token.

    Returns:
        dict of int32 arrays of shape (S,): input_ids, labels, loss_mask, segment_ids.
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
    return {"input_ids": input_ids, "labels": labels, "loss_mask": loss_mask, "segment_ids": segment_ids}
