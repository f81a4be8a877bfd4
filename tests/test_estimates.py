"""Intervals and errors of pairs that share prompts, by hand and against a simulation."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mindrlhf.inference import estimates

ALONE = np.arange(10)


def test_by_hand():
    """8 of 10 right: Wilson's interval is 0.490 to 0.943; the errors are those of textbooks."""
    advantages = np.array([1.0] * 8 + [-1.0] * 2)
    assert estimates.wilson_interval(0.8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    found = estimates.accuracy_of(advantages, ALONE)
    assert (found.value, found.pairs, found.prompts, found.ties) == (0.8, 10, 10, 0)
    # N - 1 in the variance: 9 independent pairs would have it
    assert (found.low, found.high) == pytest.approx(estimates.wilson_interval(0.8, 9))
    mean = estimates.mean_of(advantages, ALONE)
    assert mean.value == pytest.approx(0.6)
    assert mean.error == pytest.approx(advantages.std(ddof=1) / np.sqrt(10))


def test_a_tie_counts_one_half():
    found = estimates.accuracy_of(np.array([1.0, 0.0, -1.0, 0.0]), np.arange(4))
    assert (found.value, found.ties) == (0.5, 2)
    ties = estimates.accuracy_of(np.zeros(10), ALONE)
    assert (ties.value, ties.ties) == (0.5, 10)
    assert ties.low < 0.4 < 0.6 < ties.high


def test_all_right_is_no_single_point():
    found = estimates.accuracy_of(np.ones(30), np.arange(30) // 3)
    assert (found.value, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx(estimates.wilson_interval(1.0, 10)[0])


@pytest.mark.parametrize("pairs", [2, 3, 7])
def test_prompts_with_the_same_share_count_once(pairs):
    """No variance between them; of 3 pairs with one right, the sums are 1e-17 instead of 0."""
    advantages = np.tile([1.0] + [-1.0] * (pairs - 1), 100)
    found = estimates.accuracy_of(advantages, np.repeat(np.arange(100), pairs))
    assert (found.low, found.high) == pytest.approx(estimates.wilson_interval(1 / pairs, 100))


@given(st.lists(st.sampled_from([-1.0, 0.0, 2.0]), min_size=2, max_size=30), st.integers(2, 4))
def test_copies_of_a_prompt_s_pairs_change_no_error(values, times):
    values = np.array(values)
    prompts = np.arange(len(values))
    copied = np.repeat(values, times), np.repeat(prompts, times)
    one, many = estimates.mean_of(values, prompts), estimates.mean_of(*copied)
    assert many.value == pytest.approx(one.value)
    assert many.error == pytest.approx(one.error)
    one, many = estimates.accuracy_of(values, prompts), estimates.accuracy_of(*copied)
    if np.abs(np.sign(values)).min() > 0:  # ties make pairs better than independent ones
        assert (many.low, many.high) == pytest.approx((one.low, one.high))
    assert many.low <= one.value <= many.high


def test_a_single_prompt_has_no_error():
    assert estimates.mean_of(np.array([1.0, 3.0]), np.zeros(2)).error is None
    found = estimates.accuracy_of(np.ones(5), np.zeros(5))
    assert (found.low, found.high) == estimates.wilson_interval(1.0, 1)


def test_the_interval_covers_the_truth():
    """300 samples of 40 prompts with three pairs that agree in part: 95 % of the intervals."""
    random = np.random.default_rng(0)
    covered = independent = 0
    prompts = np.repeat(np.arange(40), 3)
    for _ in range(300):
        chance = np.repeat(random.beta(1.6, 0.4, 40), 3)  # 0.8 on average
        values = np.where(random.random(120) < chance, 1.0, -1.0)
        found = estimates.accuracy_of(values, prompts)
        covered += found.low <= 0.8 <= found.high
        low, high = estimates.wilson_interval(found.value, 120)
        independent += low <= 0.8 <= high
    assert covered / 300 > 0.92
    assert independent / 300 < 0.9  # what clustering is for


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60))
def test_lengths_are_cut_into_up_to_four_parts_that_hold_every_pair(sizes):
    tokens = np.array([[size, size] for size in sizes])
    parts = estimates.label_lengths(tokens)
    assert 1 <= len(parts) <= 4
    assert (np.sum(list(parts.values()), 0) == 1).all()
    for name, own in parts.items():
        first, _, last = name.removesuffix(" tokens").partition("-")
        assert tokens[own].sum(1).min() == int(first)
        assert tokens[own].sum(1).max() == int(last or first)


def test_slices_leave_out_empty_parts():
    advantages, tokens = np.array([1.0, -1.0]), np.array([[3, 1], [2, 1]])
    found = estimates.slice_pairs(estimates.label_longer(tokens), advantages, np.arange(2))
    assert [(each.name, each.accuracy.pairs) for each in found] == [("chosen is longer", 2)]
    assert found[0].accuracy.value == 0.5
