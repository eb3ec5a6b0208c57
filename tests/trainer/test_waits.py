"""Who was waited for at meetings."""

import logging
import time

import pytest

from layup_hf.trainer import waits
from layup_hf.trainer.waits import UNKNOWN, Waits


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(waits.time, "monotonic", lambda: now[0])
    return now


def test_a_worker_measures_how_long_it_stands(clock):
    account = Waits()
    assert account.stood == UNKNOWN
    with account.standing():
        clock[0] += 3.0
    assert account.stood == 3.0
    with pytest.raises(RuntimeError), account.standing():
        raise RuntimeError("the others do not come")
    assert account.stood == UNKNOWN


def test_the_others_wait_for_who_stands_for_the_shortest_time():
    account = Waits()
    account.note([UNKNOWN] * 3, [5, 5, 5], tells=True)  # there was none before
    assert account.summary() == ""
    account.note([4.0, 0.0, 1.0], [9, 9, 9], tells=True)
    account.note([0.5, 0.0, 2.5], [9, 9, 9], tells=True)
    account.note([0.0, 0.1, 0.2], [9, 9, 9], tells=True)
    assert account.summary() == "LayUp: when all met, the others waited 6.5 s for rank 1."


@pytest.mark.parametrize(
    ("steps", "why"),
    [
        ([20, 20, 2], "which made 0.2 steps a second where the median was 2."),
        ([20, 20, 20], "whose steps were not slower than the others': it did something else, or was stopped."),
    ],
)
def test_a_long_wait_is_told_with_its_cause(clock, caplog, steps, why):
    account = Waits()
    account.note([UNKNOWN] * 3, [0, 0, 0], tells=True)
    clock[0] += 10.0
    account.note([1.0, 0.0, 0.5], steps, tells=True)  # of the gathering before
    with caplog.at_level(logging.WARNING):
        account.note([30.0, 29.0, 0.0], steps, tells=False)
        assert not caplog.records
        clock[0] += 10.0
        account.note([1.0, 0.0, 0.5], [2 * made for made in steps], tells=True)
        assert not caplog.records
        account.note([30.0, 29.0, 0.0], steps, tells=True)
    (record,) = caplog.records
    assert record.message == f"LayUp: the others waited 30 s for rank 2, {why}"


def test_when_ranks_change_the_account_is_closed_and_begun_anew(caplog):
    account = Waits()
    account.note([4.0, 0.0], [1, 1], tells=True)
    account.stood = 4.0
    with caplog.at_level(logging.WARNING):
        account.begin_anew(tells=True)
    assert [record.message for record in caplog.records] == ["LayUp: when all met, the others waited 4.0 s for rank 1."]
    assert (account.stood, account.summary()) == (UNKNOWN, "")
    account.note([1.0, 2.0, UNKNOWN], [1, 1, 0], tells=True)  # one has joined
    assert account.summary() == ""


def test_standing_goes_by_a_clock_that_is_not_set():
    account = Waits()
    with account.standing():
        time.sleep(0.01)
    assert 0.01 <= account.stood < 60
