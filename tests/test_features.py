"""Shift, loss mask, segments and truncation: hand-made values, and properties of any pairs."""

from collections import Counter

import numpy as np
import pytest
from conftest import GOLDEN
from hypothesis import given
from hypothesis import strategies as st

from mindrlhf.data.features import (
    TRUNCATIONS,
    TokenPair,
    row_columns,
    tokenize_pair,
    truncate_prompt,
)
from mindrlhf.data.preference import Pair
from mindrlhf.models.glm4.tokenizer import Glm4Tokenizer
from mindrlhf.records import SIDES

PAD = 9999


def test_one_pair_by_hand():
    """Prompt a b c, answer D E, six positions: position 2 predicts D, position 3 predicts E."""
    columns = row_columns([TokenPair([1, 2, 3], [4, 5], [6])], "chosen", 6, PAD)
    assert columns["input_ids"].tolist() == [1, 2, 3, 4, 5, PAD]
    assert columns["labels"].tolist() == [2, 3, 4, 5, PAD, PAD]
    assert columns["loss_mask"].tolist() == [0, 0, 1, 1, 0, 0]
    assert columns["segment_ids"].tolist() == [1, 1, 1, 1, 1, 0]
    columns = row_columns([TokenPair([1, 2, 3], [4, 5], [6])], "rejected", 6, PAD)
    assert columns["labels"].tolist() == [2, 3, 6, PAD, PAD, PAD]
    assert columns["loss_mask"].tolist() == [0, 0, 1, 0, 0, 0]


def test_two_pairs_by_hand():
    columns = row_columns(
        [TokenPair([1], [2], [3]), TokenPair([4, 5], [6, 7], [8])], "chosen", 6, PAD
    )
    assert columns["input_ids"].tolist() == [1, 2, 4, 5, 6, 7]
    assert columns["labels"].tolist() == [
        2,
        PAD,
        5,
        6,
        7,
        PAD,
    ]  # nothing leads from a pair to the next
    assert columns["loss_mask"].tolist() == [1, 0, 0, 1, 1, 0]
    assert columns["segment_ids"].tolist() == [1, 1, 2, 2, 2, 2]


@st.composite
def rows(draw):
    """(pairs, S); all tokens of the row differ, so that each can be traced."""
    sizes = draw(st.lists(st.tuples(*[st.integers(1, 9)] * 3), max_size=6))
    numbers = iter(range(10_000))
    pairs = [
        TokenPair(*([next(numbers) for _ in range(size)] for size in triple)) for triple in sizes
    ]
    used = max(
        [sum(len(pair.prompt) + len(getattr(pair, side)) for pair in pairs) for side in SIDES]
    )
    return pairs, used + draw(st.integers(0, 5))


@given(rows(), st.sampled_from(SIDES))
def test_every_response_token_is_scored_once_and_nothing_else(drawn, side):
    pairs, seq_len = drawn
    columns = row_columns(pairs, side, seq_len, PAD)
    assert all(
        values.shape == (seq_len,) and values.dtype == np.int32 for values in columns.values()
    )
    ids, labels, mask = columns["input_ids"], columns["labels"], columns["loss_mask"]
    scored = labels[mask == 1].tolist()
    assert Counter(scored) == Counter(token for pair in pairs for token in getattr(pair, side))
    assert set(mask.tolist()) <= {0, 1}
    for place in np.flatnonzero(mask):  # shift: the predicted token is one position later
        assert labels[place] == ids[place + 1]
        assert columns["segment_ids"][place] == columns["segment_ids"][place + 1]
    for number, pair in enumerate(pairs, 1):
        member = columns["segment_ids"] == number
        assert ids[member].tolist() == pair.prompt + getattr(pair, side)
        assert mask[member].sum() == len(getattr(pair, side))
    padding = columns["segment_ids"] == 0
    assert (ids[padding] == PAD).all()
    assert not mask[padding].any()
    assert padding.sum() == seq_len - sum(
        len(pair.prompt) + len(getattr(pair, side)) for pair in pairs
    )


@pytest.fixture(scope="module")
def tokenizer():
    return Glm4Tokenizer(GOLDEN / "tokenizer.model")


MESSAGES = (("system", "abcd"), ("user", "efgh"), ("assistant", "ij"), ("user", "klm"))


@pytest.mark.parametrize(
    ("truncation", "cut", "left"),
    [
        (
            "keep_end",
            1,
            "[gMASK]<sop><|system|>\nbcd<|user|>\nefgh<|assistant|>\nij<|user|>\nklm<|assistant|>",
        ),
        (
            "keep_end",
            6,
            "[gMASK]<sop><|system|>\n<|user|>\ngh<|assistant|>\nij<|user|>\nklm<|assistant|>",
        ),
        (
            "keep_end",
            13,
            "[gMASK]<sop><|system|>\n<|user|>\n<|assistant|>\n<|user|>\n<|assistant|>",
        ),
        (
            "keep_start",
            4,
            "[gMASK]<sop><|system|>\nabcd<|user|>\nefgh<|assistant|>\ni<|user|>\n<|assistant|>",
        ),
    ],
)
def test_the_prompt_loses_text_only(tokenizer, truncation, cut, left):
    tokens = tokenize_pair(tokenizer, Pair(MESSAGES, "yes", "no, thanks"))
    short, lost = truncate_prompt(
        tokens, tokens.longest - cut, tokenizer=tokenizer, truncation=truncation
    )
    assert lost == cut
    assert tokenizer.decode(short.prompt, show_special=True) == left
    assert (short.chosen, short.rejected) == (tokens.chosen, tokens.rejected)


def test_a_pair_goes_where_its_answer_and_tags_do_not_fit(tokenizer):
    tokens = tokenize_pair(tokenizer, Pair(MESSAGES, "yes", "no, thanks"))
    assert truncate_prompt(tokens, tokens.longest - 14, tokenizer=tokenizer) == (None, 0)
    assert truncate_prompt(tokens, tokens.longest, tokenizer=tokenizer, truncation="drop") == (
        tokens,
        0,
    )
    assert truncate_prompt(tokens, tokens.longest - 1, tokenizer=tokenizer, truncation="drop") == (
        None,
        0,
    )


def test_properties_of_truncation(tokenizer):
    words = st.text(alphabet="abc <|\n", max_size=12)
    roles = st.sampled_from(["system", "user", "assistant"])

    @given(
        st.lists(st.tuples(roles, words), min_size=1, max_size=4),
        words,
        words,
        st.integers(1, 80),
        st.sampled_from(TRUNCATIONS),
    )
    def holds(messages, chosen, rejected, seq_len, truncation):
        tokens = tokenize_pair(tokenizer, Pair(tuple(messages), chosen, rejected))
        short, lost = truncate_prompt(tokens, seq_len, tokenizer=tokenizer, truncation=truncation)
        tags = [token for token in tokens.prompt if token >= 316]
        room = (
            seq_len - max(len(tokens.chosen), len(tokens.rejected)) - len(tags) - len(messages)
        )  # a newline a tag
        if short is None:
            assert room < 0 or (truncation == "drop" and tokens.longest > seq_len)
            return
        assert short.longest == min(tokens.longest, seq_len)
        assert lost == tokens.longest - short.longest
        assert [token for token in short.prompt if token >= 316] == tags
        assert (short.chosen, short.rejected) == (tokens.chosen, tokens.rejected)

    holds()
