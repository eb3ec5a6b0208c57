"""What people are told about the workers."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PrinterCallback, ProgressCallback

from layup_hf.ledger.counts import percentile
from layup_hf.trainer.report import share_text, show_shares, summary


class Bar:
    """What a progress bar is told."""

    def __init__(self):
        self.told = []

    def set_postfix_str(self, text, refresh=True):
        self.told.append((text, refresh))


@pytest.mark.parametrize(
    ("done", "text"),
    [
        ([51, 49], "51/49 %"),
        ([1, 1, 1], "33/33/33 %"),
        ([7], "100 %"),
        ([0, 3], "0/100 %"),
        ([0, 0], "0/0 %"),
        (np.array([3, 1], np.uint64), "75/25 %"),
    ],
)
def test_shares_are_per_cent_of_the_steps_in_the_order_of_ranks(done, text):
    assert share_text(done) == text


@given(st.lists(st.integers(0, 2**63), min_size=1, max_size=8))
def test_shares_add_up_to_a_whole(done):
    numbers = [int(part) for part in share_text(np.array(done, np.uint64)).removesuffix(" %").split("/")]
    assert len(numbers) == len(done)
    assert abs(sum(numbers) - 100 * any(done)) <= len(done) / 2


@given(st.lists(st.integers(0, 50), min_size=1), st.integers(0, 100))
def test_a_percentile_is_the_smallest_value_that_so_many_do_not_exceed(values, percent):
    result = percentile(Counter(values), percent)
    enough = [
        value for value in sorted(values) if 100 * sum(other <= value for other in values) >= percent * len(values)
    ]
    assert result == enough[0]


@given(st.lists(st.integers(0, 10**6), min_size=1), st.sampled_from([0, 25, 50, 75, 100]))
def test_a_percentile_is_that_of_numpy(values, percent):
    assert percentile(Counter(values), percent) == np.percentile(values, percent, method="inverted_cdf")


def test_a_percentile_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="Nothing has been counted"):
        percentile(Counter(), 50)


def test_the_summary_tells_steps_staleness_and_mass():
    staleness = Counter({0: 40, 2: 50, 9: 5, 400: 5})
    assert summary(np.array([60, 20], np.uint64), staleness, [1.0, 0.996]) == (
        "LayUp: steps by worker 60/20 (75/25 %); merges were 2 clock steps old (median; 95 % at most 9); "
        "mass by worker at the end 1.00/1.00."
    )


def test_the_summary_says_if_nothing_was_merged():
    assert summary([3], Counter(), [1.0]) == (
        "LayUp: steps by worker 3 (100 %); nothing was merged; mass by worker at the end 1.00."
    )


def test_shares_stand_behind_the_progress_bar_and_nowhere_else():
    shown, hidden, other = ProgressCallback(), ProgressCallback(), PrinterCallback()
    shown.training_bar, shown.prediction_bar, other.training_bar = Bar(), Bar(), Bar()
    show_shares([other, hidden, shown, SimpleNamespace(training_bar=Bar())], [3, 1])
    assert shown.training_bar.told == [("shares 75/25 %", False)]  # drawn with the bar's next step
    assert shown.prediction_bar.told == other.training_bar.told == []
    assert hidden.training_bar is None


def test_shares_stand_behind_the_bar_of_a_subclass():
    class OwnProgress(ProgressCallback):
        pass

    callback = OwnProgress()
    callback.training_bar = Bar()
    show_shares([callback], [1, 1])
    assert callback.training_bar.told == [("shares 50/50 %", False)]
