"""The test by which a difference between two methods is one."""

import math
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipes.measure.compare.significance import LEVEL, SEEDS, p_value, verdict

LOSSES = st.lists(st.floats(-10, 10), min_size=1, max_size=8)


def test_all_of_one_sign_is_the_least_likely():
    assert p_value([0.1] * 6) == 2 / 64
    assert p_value([0.1, 0.2, 0.3, 0.4, 0.5, 0.6]) == 2 / 64
    assert p_value([-0.1, 0.2, 0.3, 0.4, 0.5, 0.6]) == 4 / 64  # also with the sign of the smallest turned
    assert p_value([0.1, -0.1]) == p_value([0.0]) == 1.0


def test_fewer_seeds_than_it_needs_can_show_nothing():
    assert p_value([1.0] * SEEDS) < LEVEL <= p_value([1.0] * (SEEDS - 1))


@given(LOSSES)
def test_it_is_a_share_of_all_choices_of_signs_whatever_the_side_and_the_scale(differences):
    p = p_value(differences)
    assert 2 / 2 ** len(differences) <= p <= 1 or len(differences) == 1
    assert (p * 2 ** len(differences)).is_integer()
    assert p_value([-difference for difference in differences]) == p
    assert p_value([4 * difference for difference in differences]) == p


@given(st.lists(st.integers(1, 9), min_size=3, max_size=6))
def test_chance_alone_is_below_a_level_no_more_often_than_that(sizes):
    """Over all choices of signs, which are equally likely if there is no difference."""
    values = [
        p_value([s * size for s, size in zip(signs, sizes, strict=True)])
        for signs in product((1, -1), repeat=len(sizes))
    ]
    for level in (0.05, 0.1, 0.25, 0.5):
        assert sum(p <= level for p in values) <= level * len(values)


@pytest.mark.parametrize(
    ("differences", "words"),
    [
        ([-0.1, -0.2, -0.1, -0.2, -0.1, -0.2], "-0.150 ± 0.055 (p = 0.031)"),
        ([-0.1, 0.2, -0.1, 0.2, -0.1, 0.2], "none (+0.050 ± 0.164, p = 0.625)"),
        ([-0.1] * 5, "none (-0.100 with 5 of the 6 seeds that the test needs)"),
        ([math.inf] + [-0.1] * 5, "none (not every seed came to its end)"),
        ([math.nan] + [-0.1] * 5, "none (not every seed came to its end)"),
        ([], "none (no seed in common)"),
    ],
)
def test_what_it_does_not_show_is_none(differences, words):
    assert verdict(differences) == words
