"""Packing: a permutation of the groups that fits, full rows, about as many pairs in each."""

import sys
import tracemalloc

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from mindrlhf.data.groups import Limits
from mindrlhf.data.packing import pack_groups

sys.path.append(str(ROOT / "benchmarks"))
import data_model


def cvalues_like(pairs):
    """int (N, 3): positions, answers and pairs of groups of one pair each."""
    sizes = data_model.parts(pairs).sum(1) - 1
    return np.stack([sizes, np.full(pairs, 2), np.full(pairs, 1)], 1)


@st.composite
def cases(draw):
    """(sizes of groups, limits)."""
    limits = Limits(*(draw(st.integers(1, most)) for most in (300, 20, 20)))
    size = st.tuples(*(st.integers(1, most) for most in limits))
    return draw(st.lists(size, max_size=60)), limits


@given(cases())
def test_rows_are_a_permutation_of_the_groups_and_fit(case):
    sizes, limits = case
    rows = pack_groups(sizes, limits)
    assert sorted(group for row in rows for group in row) == list(range(len(sizes)))
    for row in rows:
        assert row
        assert (np.array([sizes[group] for group in row]).sum(0) <= limits).all()
    assert rows == pack_groups(sizes, limits)


@given(cases())
def test_no_row_could_have_taken_a_group_of_a_later_row(case):
    """Each row is filled before the next begins: no group that is left fits. (64 tries suffice
    here.)
    """
    sizes, limits = case
    rows = pack_groups(sizes, limits)
    for number, row in enumerate(rows):
        room = limits - np.array([sizes[group] for group in row]).sum(0)
        later = [group for other in rows[number + 1 :] for group in other]
        assert not any((room >= sizes[group]).all() for group in later)


def test_by_hand():
    """Longest first: 9 has room only for 1, then 7 for 3, 6 for 4, and 5 is left."""
    sizes = [(size, 2, 1) for size in (5, 6, 9, 1, 7, 3, 4)]
    assert list(map(sorted, pack_groups(sizes, Limits(10, 9, 9)))) == [[2, 3], [4, 5], [1, 6], [0]]
    assert [len(row) for row in pack_groups(sizes, Limits(100, 4, 9))] == [2, 2, 2, 1]
    assert [len(row) for row in pack_groups(sizes, Limits(100, 99, 3))] == [3, 3, 1]


def test_rows_are_at_least_98_percent_full():
    sizes = cvalues_like(20_000)
    rows = pack_groups(sizes, Limits(8192, 512, 512))
    assert sizes[:, 0].sum() / (len(rows) * 8192) >= 0.98


def test_rows_hold_about_as_many_pairs_so_that_pairs_weigh_alike():
    """First-fit decreasing puts 7 to 66 pairs into a row here (standard deviation 11)."""
    rows = pack_groups(cvalues_like(20_000), Limits(8192, 512, 512))
    sizes = np.array([len(row) for row in rows])[:-5]
    assert sizes.std() < 0.15 * sizes.mean()


@pytest.mark.parametrize(
    ("sizes", "limits", "rows"),
    [
        ([], Limits(8, 2, 2), 0),
        ([(8, 2, 1)], Limits(8, 2, 2), 1),
        ([(1, 2, 1)] * 100, Limits(3200, 200, 200), 1),
        ([(1, 2, 1)] * 101, Limits(3200, 200, 200), 2),
    ],
)
def test_edges(sizes, limits, rows):
    assert len(pack_groups(sizes, limits)) == rows


def test_memory_is_linear_in_the_number_of_groups():
    def peak(groups):
        sizes = cvalues_like(groups)
        tracemalloc.start()
        pack_groups(sizes, Limits(8192, 512, 512))
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return top

    assert peak(16_000) < 4.5 * peak(4_000)
