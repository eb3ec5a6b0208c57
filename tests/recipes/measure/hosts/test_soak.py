"""Whether a soak tells a process that grows from one whose heap gives memory back now and then."""

import pytest

from recipes.measure.hosts.soak import growth_per_hour

SECONDS = [10.0 * i for i in range(1, 271)]


def test_the_slope_of_steady_growth_is_found():
    values = [400 + 6 * second / 3600 for second in SECONDS]
    assert growth_per_hour(SECONDS, values) == pytest.approx(6)


@pytest.mark.parametrize("growth", [0, 30])
def test_what_is_given_back_more_often_at_first_is_no_growth(growth):
    """A line through all values would rise by about 30."""
    values = [400 + growth * second / 3600 for second in SECONDS]
    for number in range(0, 135, 3):
        values[number] -= 25
    assert growth_per_hour(SECONDS, values) == pytest.approx(growth, abs=0.5)


def test_a_few_samples_are_enough():
    assert growth_per_hour([0.0, 1800.0, 3600.0], [1, 2, 3]) == pytest.approx(2)
