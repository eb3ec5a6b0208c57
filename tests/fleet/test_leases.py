"""How long a worker may be silent, by a clock that the test sets."""

import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from layup_hf.fleet import leases
from layup_hf.fleet.leases import Leases


@pytest.fixture
def clock(monkeypatch):
    """Seconds since the start; a list, so that the test can move it."""
    time = [0.0]
    monkeypatch.setattr(leases, "now", lambda: time[0])
    return time


def live(made, clock, beats, member="1"):
    """Look at a member every second, while it beats at these moments; the moments at which its lease had run out."""
    ended = []
    for second in range(int(beats[-1]) + 1):
        clock[0] = float(second)
        beat = sum(moment <= second for moment in beats)
        if made.has_run_out(member, str(beat).encode(), False, "rank 1"):
            ended.append(second)
    return ended


def test_a_lease_that_was_given_holds_as_long_as_was_said(clock):
    assert live(Leases(10.0), clock, [0, 8, 16, 27]) == []  # seen at 16, it may be silent until 26
    assert live(Leases(10.0), clock, [0, 8, 16, 30]) == [27, 28, 29]


def test_who_is_late_is_waited_for_longer_by_how_late_it_has_been(clock, caplog):
    made = Leases(10.0, adapts=True)
    with caplog.at_level(logging.WARNING):
        assert live(made, clock, [0, 8, 16, 38]) == []  # 3 x 8
        assert made.patience("1") == 40.0  # four leases are the most
    (record,) = caplog.records
    assert "rank 1 gives signs of life up to 8 s apart" in record.message
    assert "silent for 24 s, not 10 s" in record.message


def test_who_is_in_time_is_not(clock, caplog):
    made = Leases(10.0, adapts=True)
    assert live(made, clock, [0, 2, 4, 6, 9]) == []
    clock[0] = 20.0
    assert made.has_run_out("1", b"5", False, "rank 1")
    assert made.patience("2") == 10.0  # never heard of
    assert not caplog.records


def test_patience_fades_when_beats_come_in_time_again(clock):
    made = Leases(10.0, adapts=True)
    live(made, clock, [0, 9, *range(10, 60)])
    assert made.patience("1") == 10.0


def test_after_it_was_away_a_worker_gives_the_others_a_whole_lease(clock):
    made = Leases(10.0, adapts=True)
    made.has_run_out("1", b"1", False, "rank 1")
    clock[0] = 100.0
    assert not made.has_run_out("1", b"1", True, "rank 1")
    clock[0] = 109.0
    assert not made.has_run_out("1", b"1", False, "rank 1")
    clock[0] = 111.0
    assert made.has_run_out("1", b"1", False, "rank 1")


@given(st.lists(st.floats(0.1, 100.0), min_size=1, max_size=30), st.booleans())
def test_nobody_is_waited_for_less_than_a_lease_or_more_than_four(gaps, adapts):
    made, time = Leases(10.0, adapts), [0.0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(leases, "now", lambda: time[0])
        for beat, gap in enumerate(gaps):
            made.has_run_out("1", str(beat).encode(), False, "rank 1")
            time[0] += gap
            assert made.has_run_out("1", str(beat).encode(), False, "rank 1") == (gap > made.patience("1"))
            assert 10.0 <= made.patience("1") <= (40.0 if adapts else 10.0)
