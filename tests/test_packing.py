"""Packing: a permutation that fits, full rows, about as many pairs in each."""

import sys
import tracemalloc

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from mindrlhf.data.packing import MIN_TOKENS_PER_PAIR, max_pairs, pack_pairs

sys.path.append(str(ROOT / "benchmarks"))
import data_model


def cvalues_like(pairs):
    """int (N, 2), lengths as benchmarks/data_model.py models them."""
    return data_model.lengths(pairs)


@st.composite
def cases(draw):
    seq_len = draw(st.integers(1, 300))
    return draw(
        st.lists(st.tuples(st.integers(1, seq_len), st.integers(1, seq_len)), max_size=60)
    ), seq_len


@given(cases())
def test_rows_are_a_permutation_of_the_pairs_and_fit(case):
    lengths, seq_len = case
    rows = pack_pairs(lengths, seq_len)
    assert sorted(pair for row in rows for pair in row) == list(range(len(lengths)))
    for row in rows:
        assert 0 < len(row) <= max_pairs(seq_len)
        assert (np.array([lengths[pair] for pair in row]).sum(0) <= seq_len).all()
    assert rows == pack_pairs(lengths, seq_len)


@given(cases())
def test_no_row_could_have_taken_a_pair_of_a_later_row(case):
    """Each row is filled before the next begins: no pair that is left fits. (64 tries suffice
    here.)
    """
    lengths, seq_len = case
    rows = pack_pairs(lengths, seq_len)
    for number, row in enumerate(rows):
        room = seq_len - np.array([lengths[pair] for pair in row]).sum(0)
        later = [pair for other in rows[number + 1 :] for pair in other]
        if len(row) < max_pairs(seq_len):
            assert not any((room >= lengths[pair]).all() for pair in later)


def test_by_hand():
    """Longest first: (9, 9) has room only for (1, 1), (6, 2) takes (2, 6), (5, 5) takes (5, 5)."""
    lengths = np.array([(5, 5), (6, 2), (9, 9), (1, 1), (2, 6), (5, 5)])
    scaled = pack_pairs(lengths * MIN_TOKENS_PER_PAIR, 10 * MIN_TOKENS_PER_PAIR)
    assert sorted(map(sorted, scaled)) == [[0, 5], [1, 4], [2, 3]]
    assert sorted(pack_pairs(lengths, 320)[0]) == [0, 1, 2, 3, 4, 5]
    assert len(pack_pairs(lengths, 10)) == 6  # a row of fewer than 64 positions takes one pair


def test_the_longer_side_is_at_least_95_percent_full():
    lengths = cvalues_like(20_000)
    rows = pack_pairs(lengths, 8192)
    assert lengths.sum(0).max() / (len(rows) * 8192) >= 0.95


def test_rows_hold_about_as_many_pairs_so_that_pairs_weigh_alike():
    """First-fit decreasing puts 12 to 116 pairs into a row here (standard deviation 17)."""
    sizes = np.array([len(row) for row in pack_pairs(cvalues_like(20_000), 8192)])[:-5]
    assert sizes.std() < 0.15 * sizes.mean()


@pytest.mark.parametrize(
    ("lengths", "seq_len", "rows"),
    [
        ([], 8, 0),
        ([(8, 8)], 8, 1),
        ([(1, 1)] * 100, 3200, 1),
        ([(1, 1)] * 101, 3200, 2),
        ([(3200, 1), (1, 3200)], 3200, 2),
    ],
)
def test_edges(lengths, seq_len, rows):
    assert len(pack_pairs(lengths, seq_len)) == rows


def test_memory_is_linear_in_the_number_of_pairs():
    def peak(pairs):
        lengths = cvalues_like(pairs)
        tracemalloc.start()
        pack_pairs(lengths, 8192)
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return top

    assert peak(16_000) < 4.5 * peak(4_000)
