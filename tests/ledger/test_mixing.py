"""Push-sum arithmetic conserves mass and the mass-weighted mean."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from layup_hf.ledger.mixing import MODULUS, UNIT, difference, merge_weight, share

values = st.fractions(min_value=-1000, max_value=1000)
words = st.integers(0, MODULUS - 1)


@given(own=st.integers(0, MODULUS - 1), receivers=st.integers(1, 1000))
def test_share_never_gives_more_than_there_is_and_keeps_at_least_as_much(own, receivers):
    units = share(own, receivers)
    remainder = own - receivers * units
    assert units >= 0
    assert remainder >= units
    assert remainder - units <= receivers  # all hold an equal part, up to what cannot be divided


@pytest.mark.parametrize(("receivers", "part"), [(1, 2), (2, 3), (7, 8)])
def test_share_is_the_equal_part(receivers, part):
    assert share(UNIT, receivers) == UNIT // part


def test_share_of_too_little_is_nothing():
    assert share(1, 1) == share(0, 3) == share(3, 3) == 0
    assert share(4, 3) == 1


@pytest.mark.parametrize(("own", "receivers"), [(-1, 1), (UNIT, 0)])
def test_share_refuses_what_makes_no_sense(own, receivers):
    with pytest.raises(ValueError, match="cannot be divided"):
        share(own, receivers)


@given(
    offered=st.integers(1, 1024 * UNIT),
    own=st.integers(1, 1024 * UNIT),
    untaken=st.integers(0, 1024 * UNIT),
)
def test_merge_weight_is_between_zero_and_one(offered, own, untaken):
    """For the masses of up to 1024 workers, in whatever distribution."""
    weight = merge_weight(offered, own, untaken)
    assert 0 < weight < 1
    assert weight == float(Fraction(offered, own + untaken + offered))


@pytest.mark.parametrize(("offered", "own", "untaken"), [(0, 1, 1), (-1, 1, 1), (1, -1, 1), (1, 1, -1)])
def test_merge_weight_refuses_what_makes_no_sense(offered, own, untaken):
    with pytest.raises(ValueError, match="Cannot merge"):
        merge_weight(offered, own, untaken)


@given(data=st.data(), count=st.integers(1, 8))
def test_arrays_are_taken_element_by_element(data, count):
    """As integers are, up to the mass of 1024 workers."""
    draws = st.lists(st.integers(1, 340 * UNIT), min_size=count, max_size=count)
    offered, own, untaken = (data.draw(draws) for _ in range(3))
    receivers = data.draw(st.lists(st.integers(1, 1000), min_size=count, max_size=count))
    weights = merge_weight(*(np.array(units) for units in (offered, own, untaken)))
    assert weights.tolist() == [merge_weight(*units) for units in zip(offered, own, untaken, strict=True)]
    shares = share(np.array(own), np.array(receivers))
    assert shares.tolist() == [share(*pair) for pair in zip(own, receivers, strict=True)]


def test_arrays_with_one_entry_that_makes_no_sense_are_refused():
    with pytest.raises(ValueError, match="cannot be divided"):
        share(np.array([UNIT, -1]), np.array([1, 1]))
    with pytest.raises(ValueError, match="Cannot merge"):
        merge_weight(np.array([1, 0]), np.array([1, 1]), np.array([0, 0]))


@st.composite
def mergers(draw):
    """Masses of a receiver whose sum after the merge is a power of two, so that the weight is exact in a float."""
    total = 2 ** draw(st.integers(2, 50))
    offered = draw(st.integers(1, total - 1))
    own = draw(st.integers(0, total - offered))
    return offered, own, total - offered - own


@given(merger=mergers(), senders_rest=st.integers(0, UNIT), mine=values, theirs=values)
def test_a_merge_leaves_the_mass_weighted_sum_unchanged(merger, senders_rest, mine, theirs):
    offered, own, untaken = merger
    before = (own + untaken) * mine + (senders_rest + offered) * theirs
    weight = Fraction(merge_weight(offered, own, untaken))
    merged = mine + weight * (theirs - mine)
    after = (own + offered + untaken) * merged + senders_rest * theirs
    assert after == before


@given(earlier=words, amount=words)
def test_difference_holds_when_the_counter_has_wrapped(earlier, amount):
    assert difference((earlier + amount) % MODULUS, earlier) == amount
