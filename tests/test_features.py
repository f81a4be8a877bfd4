"""Labels, answers, positions and truncation: hand-made values, and properties of any pairs."""

import numpy as np
import pytest
from conftest import GOLDEN
from hypothesis import given
from hypothesis import strategies as st

from mindrlhf.data.features import (
    TRUNCATIONS,
    TokenGroup,
    group_size,
    row_inputs,
    tokenize_pair,
    truncate_prompt,
)
from mindrlhf.data.preference import Pair
from mindrlhf.models.glm4.tokenizer import Glm4Tokenizer

PAD = 9999


def lists(columns):
    return {name: values.tolist() for name, values in columns.items()}


def test_a_group_by_hand():
    """Prompt 1 2 3, answers 4 5 and 6 7 8: positions 2, 3 predict the first, 4 to 6 the second."""
    columns = row_inputs([TokenGroup([1, 2, 3], [[4, 5], [6, 7, 8]])], 8, PAD)
    assert lists(columns) == {
        "input_ids": [1, 2, 3, 4, 3, 6, 7, PAD],
        "labels": [PAD, PAD, 4, 5, 6, 7, 8, PAD],
        "group_ids": [1, 1, 1, 1, 1, 1, 1, 0],
        "answer_ids": [0, 0, 1, 1, 2, 2, 2, 0],
        "positions": [0, 1, 2, 3, 2, 3, 4, 0],
    }


def test_two_groups_by_hand():
    """The second group begins anew; its answers are counted on."""
    groups = [TokenGroup([1], [[2], [3]]), TokenGroup([4, 5], [[6, 7]])]
    assert lists(row_inputs(groups, 6, PAD)) == {
        "input_ids": [1, 1, 4, 5, 6, PAD],
        "labels": [2, 3, PAD, 6, 7, PAD],
        "group_ids": [1, 1, 2, 2, 2, 0],
        "answer_ids": [1, 2, 0, 3, 3, 0],
        "positions": [0, 0, 0, 1, 2, 0],
    }


@st.composite
def rows(draw):
    """(groups, S); all tokens of the row differ, so that each can be traced."""
    sizes = draw(
        st.lists(st.tuples(st.integers(1, 9), st.lists(st.integers(1, 9), min_size=1, max_size=4)))
    )
    numbers = iter(range(100_000))
    groups = [
        TokenGroup(
            [next(numbers) for _ in range(prompt)],
            [[next(numbers) for _ in range(size)] for size in answers],
        )
        for prompt, answers in sizes
    ]
    used = sum(group_size(prompt, sum(answers)) for prompt, answers in sizes)
    return groups, used + draw(st.integers(0, 5))


@given(rows())
def test_every_response_token_is_scored_once_and_nothing_else(drawn):
    """Each answer's positions, after those of its prompt, are the sequence prompt + answer."""
    groups, seq_len = drawn
    columns = row_inputs(groups, seq_len, PAD)
    assert all(
        values.shape == (seq_len,) and values.dtype == np.int32 for values in columns.values()
    )
    ids, labels, answer_ids = columns["input_ids"], columns["labels"], columns["answer_ids"]
    responses = [
        (number, group, response)
        for number, group in enumerate(groups, 1)
        for response in group.answers
    ]
    assert labels[answer_ids > 0].tolist() == [token for *_, ids in responses for token in ids]
    for answer, (number, group, response) in enumerate(responses, 1):
        prompt = (columns["group_ids"] == number) & (answer_ids == 0)
        own = answer_ids == answer
        sequence = group.prompt + response
        assert ids[prompt | own].tolist() == sequence[:-1]
        assert columns["positions"][prompt | own].tolist() == list(range(len(sequence) - 1))
        assert labels[own].tolist() == sequence[len(group.prompt) :]
    padding = columns["group_ids"] == 0
    assert (ids[padding] == PAD).all()
    assert not answer_ids[padding].any()
    assert (labels[answer_ids == 0] == PAD).all()


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
            12,
            "[gMASK]<sop><|system|>\n<|user|>\n<|assistant|>\n<|user|>\nm<|assistant|>",
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
        tokens, tokens.size - cut, tokenizer=tokenizer, truncation=truncation
    )
    assert lost == cut
    assert tokenizer.decode(short.prompt, show_special=True) == left
    assert (short.chosen, short.rejected) == (tokens.chosen, tokens.rejected)


def test_a_pair_goes_where_nothing_of_its_prompt_fits_beside_the_answers(tokenizer):
    tokens = tokenize_pair(tokenizer, Pair(MESSAGES, "yes", "no, thanks"))
    for excess in (13, 14):  # the prompt has 13 tokens of text
        assert truncate_prompt(tokens, tokens.size - excess, tokenizer=tokenizer) == (None, 0)
    assert truncate_prompt(tokens, tokens.size, tokenizer=tokenizer, truncation="drop") == (
        tokens,
        0,
    )
    assert truncate_prompt(tokens, tokens.size - 1, tokenizer=tokenizer, truncation="drop") == (
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
            seq_len + len(tokens.prompt) - tokens.size - len(tags) - len(messages)
        )  # a newline a tag
        if short is None:
            assert room <= 0 or (truncation == "drop" and tokens.size > seq_len)
            return
        assert short.size == min(tokens.size, seq_len)
        assert lost == tokens.size - short.size
        assert [token for token in short.prompt if token >= 316] == tags
        assert (short.chosen, short.rejected) == (tokens.chosen, tokens.rejected)

    holds()
