"""Sharing: equal prompts and answers are found once, nothing is lost, and groups fit into rows."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mindrlhf.data import groups, mindrecord
from mindrlhf.data.features import ComparedPair, TokenPair
from mindrlhf.data.groups import (
    Limits,
    bundle_pairs,
    estimate_tokens,
    find_sequences,
    group_sizes,
    make_groups,
    row_limits,
)
from mindrlhf.data.packing import pack_groups
from mindrlhf.data.preference import Pair

# one prompt with three answers, of which b is chosen in one pair and rejected in another
THREE = [
    TokenPair([1, 2], [10], [20, 21]),
    TokenPair([1, 2], [20, 21], [30]),
    TokenPair([1, 2], [10], [30]),
]


def test_three_pairs_of_one_prompt_by_hand():
    found = find_sequences(THREE, share=True)
    assert found.prompts == [[1, 2]]
    assert found.answers == [[10], [20, 21], [30]]
    assert found.pairs == [(0, 1), (1, 2), (0, 2)]
    (group,) = make_groups(found.sizes, range(3), row_limits(48))
    assert (group.answers, group.pairs, group.tokens) == ([0, 1, 2], [0, 1, 2], 4)
    assert groups.group_sizes(found.sizes, [group]).tolist() == [[5, 3, 3]]
    # alone, each of the six sequences has 1 position of the prompt and one for each answer token
    assert found.sizes.unshared(np.arange(3)) == 6 + 1 + 2 + 2 + 1 + 1 + 1


def test_without_sharing_each_pair_is_a_group():
    found = find_sequences(THREE, share=False)
    assert len(found.prompts) == 3
    assert len(found.answers) == 6
    made = make_groups(found.sizes, range(3), row_limits(48))
    assert [group.pairs for group in made] == [[0], [1], [2]]


def test_equal_answers_to_different_prompts_are_not_shared():
    found = find_sequences([TokenPair([1], [5], [6]), TokenPair([2], [5], [6])], share=True)
    assert found.prompt_of == [0, 0, 1, 1]


def test_a_pair_of_two_equal_answers_has_one_answer():
    pair = TokenPair([1, 2], [5, 6], [5, 6])
    assert pair.size == 3
    assert find_sequences([pair], share=False).pairs == [(0, 0)]


@pytest.mark.parametrize(
    ("limits", "split"),
    [
        (Limits(5, 9, 9), [[0, 1, 2]]),
        (Limits(4, 9, 9), [[0], [1], [2]]),
        (Limits(99, 2, 9), [[0], [1], [2]]),
        (Limits(99, 9, 2), [[0, 1], [2]]),
    ],
)
def test_a_group_that_exceeds_a_row_is_split(limits, split):
    made = make_groups(find_sequences(THREE, share=True).sizes, range(3), limits)
    assert [group.pairs for group in made] == split


def test_conversations_are_bundled_in_the_order_of_their_first_pairs():
    pairs = [Pair((("user", text),), "a", "b") for text in "xyxzy"]
    assert bundle_pairs(pairs, share=True) == [[0, 2], [1, 4], [3]]
    assert bundle_pairs(pairs, share=False) == [[0], [1], [2], [3], [4]]


def test_tokens_are_estimated_from_the_bytes_of_distinct_texts():
    pairs = [Pair((("user", "12345678"),), "你好" * 2, answer) for answer in ("abcd", "abcd" * 3)]
    assert estimate_tokens(pairs, [0, 1]) == (8 + 12 + 4 + 12) // 4


PROMPTS = st.lists(st.integers(0, 2), min_size=1, max_size=6)
RESPONSES = st.lists(st.integers(3, 5), min_size=1, max_size=6)
PAIRS = st.lists(st.builds(TokenPair, PROMPTS, RESPONSES, RESPONSES), min_size=1, max_size=40)


def visible(row, place):
    """(token ids, positions) that a position attends to, by the rule of the design."""
    earlier = np.arange(len(row["input_ids"])) <= place
    same = row["group_ids"] == row["group_ids"][place]
    own = np.isin(row["answer_ids"], (0, row["answer_ids"][place]))
    seen = earlier & same & own
    return row["input_ids"][seen].tolist(), row["positions"][seen].tolist()


@given(PAIRS, st.integers(0, 40), st.booleans())
def test_any_pairs_in_rows_of_any_length_are_read_back(pairs, room, share):
    """Each answer token is predicted from its prompt and the tokens before it, at their positions,
    and each pair is in the rows once, with its answers' log-probs.
    """
    seq_len = max(pair.size for pair in pairs) + room
    logps = np.array(
        [
            (
                -hash(tuple(pair.prompt + pair.chosen)) % 97,
                -hash(tuple(pair.prompt + pair.rejected)) % 97,
            )
            for pair in pairs
        ]
    )
    rows = mindrecord.make_rows(pairs, -logps, seq_len=seq_len, pad_id=9, share=share)
    found = {}
    for row in rows:
        for chosen, rejected, number in zip(row["chosen"], row["rejected"], row["pair_ids"]):
            if number < 0:
                continue
            assert number not in found
            sides = []
            for answer in (chosen, rejected):
                own = np.flatnonzero(row["answer_ids"] == answer + 1)
                response = row["labels"][own].tolist()
                prompt = visible(row, own[0])[0]
                for count, place in enumerate(own):
                    ids, positions = visible(row, place)
                    assert ids == prompt + response[:count]
                    assert positions == list(range(len(ids)))
                assert row["answer_tokens"][answer] == len(response)
                sides.append((prompt, response, row["reference_logps"][answer]))
            found[number] = sides
    assert sorted(found) == list(range(len(pairs)))
    for number, pair in enumerate(pairs):
        assert found[number] == [
            (pair.prompt, pair.chosen, -logps[number, 0]),
            (pair.prompt, pair.rejected, -logps[number, 1]),
        ]


@given(PAIRS, st.integers(0, 40))
def test_each_prompt_and_answer_is_in_one_row_unless_its_group_is_split(pairs, room):
    limits = row_limits(max(pair.size for pair in pairs) + room)
    found = find_sequences(pairs, share=True)
    made = make_groups(found.sizes, range(len(pairs)), limits)
    assert sorted(pair for group in made for pair in group.pairs) == list(range(len(pairs)))
    assert (groups.group_sizes(found.sizes, made) <= limits).all()
    prompts = Counter(group.prompt for group in made)
    assert set(prompts) == set(range(len({tuple(pair.prompt) for pair in pairs})))
    for group in made:
        if prompts[group.prompt] == 1:
            texts = {
                tuple(ids)
                for pair in pairs
                if pair.prompt == found.prompts[group.prompt]
                for ids in (pair.chosen, pair.rejected)
            }
            assert sorted(map(tuple, found.read(group).answers)) == sorted(texts)


def test_pairs_of_a_group_keep_their_answers():
    found = find_sequences(THREE, share=True)
    (group,) = make_groups(found.sizes, [2, 1], row_limits(48))
    assert group.answers == [0, 2, 1]
    assert found.read(group).pairs == [ComparedPair(0, 1, 2), ComparedPair(2, 1, 1)]


def test_ten_ranked_answers_are_one_group():
    """45 pairs in 45 + 160 positions: a row of 256 takes 16 answers and 64 pairs, one of 512 takes
    two such groups.
    """
    answers = [[number] * 16 for number in range(10)]
    ranked = [
        TokenPair([prompt] * 46, better, worse)
        for prompt in (90, 91)
        for place, better in enumerate(answers)
        for worse in answers[place + 1 :]
    ]
    found = find_sequences(ranked, share=True)
    assert row_limits(256) == (256, 16, 64)
    needs = group_sizes(found.sizes, make_groups(found.sizes, range(90), row_limits(256)))
    assert needs.tolist() == [[205, 10, 45]] * 2
    assert len(pack_groups(needs, row_limits(512))) == 1
