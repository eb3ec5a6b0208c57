"""One counter for all workers: consecutive draws, calls to meetings, and failures."""

import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist
from fleet import together
from hypothesis import given, settings
from hypothesis import strategies as st

from layup_hf.fleet.job import start_keeper
from layup_hf.fleet.store import JobStore
from layup_hf.progress.ahead import Ahead
from layup_hf.progress.clock import ProgressClock, WorkerFailure


def clocks(workers, start=0, store=None):
    store = store or dist.HashStore()
    return [ProgressClock(store, start if rank == 0 else None) for rank in range(workers)]


@pytest.fixture
def connect():
    """Makes connections to the store of a job."""
    place = start_keeper("127.0.0.1", bytes(32), is_open=False)
    return lambda: JobStore(*place, bytes(32))


# ---- Draws ----


@settings(max_examples=50)
@given(workers=st.lists(st.integers(0, 4), max_size=40), start=st.integers(0, 2**40))
def test_draws_are_consecutive_over_all_workers(workers, start):
    everybody = clocks(5, start)
    assert [everybody[worker].draw() for worker in workers] == list(range(start, start + len(workers)))


def test_draws_of_threads_are_consecutive(connect):
    everybody = clocks(4, start=7, store=connect())
    numbers = together([lambda c=clock: [c.draw() for _ in range(50)] for clock in everybody])
    assert sorted(itertools.chain(*numbers)) == list(range(7, 207))
    assert all(own == sorted(own) for own in numbers)


@pytest.mark.parametrize("most", [1, 8])
def test_draws_ahead_are_consecutive_over_all_workers(connect, most):
    """What one holds when it ends has been drawn, too."""
    everybody = clocks(4, start=7, store=connect())

    def draw(clock):
        with ThreadPoolExecutor(1) as executor:
            clock.draw_ahead(connect(), lambda ask: Ahead(ask, executor, most=most))
            numbers = [clock.draw() for _ in range(50)]
            return numbers, [value - 1 for value in clock._ahead.held()]

    drawn = together([lambda c=clock: draw(c) for clock in everybody])
    numbers = sorted(itertools.chain(*(own + held for own, held in drawn)))
    assert numbers == list(range(7, 7 + len(numbers)))
    assert all(own == sorted(own) for own, _ in drawn)
    assert all(1 <= len(held) <= most for _, held in drawn)


def test_looking_draws_nothing():
    first, second = clocks(2, start=3)
    first.look()
    second.look()
    assert first.draw() == 3


# ---- Meetings ----


def test_a_call_is_seen_by_everybody_who_draws_or_looks():
    caller, drawing, looking, idle = everybody = clocks(4)
    assert not any(clock.called for clock in everybody)
    caller.call_meeting()
    drawing.draw()
    looking.look()
    assert (drawing.called, looking.called, idle.called) == (True, True, False)


def test_an_answered_call_is_over_and_draws_go_on_where_they_were():
    first, second, third = everybody = clocks(3, start=10)
    assert [clock.draw() for clock in everybody] == [10, 11, 12]
    first.call_meeting()
    assert second.draw() == 13
    assert second.called
    second.answer_calls()
    assert third.draw() == 14
    assert second.draw() == 15
    assert not third.called
    assert not second.called


def test_several_calls_are_answered_at_once():
    everybody = clocks(5, start=2)
    for clock in (*everybody, everybody[3]):
        clock.call_meeting()
    everybody[0].answer_calls()
    assert [clock.draw() for clock in everybody] == [2, 3, 4, 5, 6]
    assert not any(clock.called for clock in everybody)


@settings(max_examples=100)
@given(st.lists(st.tuples(st.sampled_from(["draw", "look", "call_meeting", "answer_calls"]), st.integers(0, 2))))
def test_calls_and_answers_never_change_what_is_drawn(actions):
    everybody, drawn, has_call = clocks(3), 0, False
    for action, worker in actions:
        result = getattr(everybody[worker], action)()
        if action == "draw":
            assert result == drawn
            drawn += 1
        if action in ("draw", "look"):
            assert everybody[worker].called == has_call
        else:
            has_call = action == "call_meeting"


def test_an_answer_without_a_call_changes_nothing():
    first, second = clocks(2, start=5)
    first.answer_calls()
    assert second.draw() == 5


@pytest.fixture
def ahead():
    """A worker that draws ahead, and one that does not."""
    store = dist.HashStore()
    first, second = clocks(2, store=store)
    with ThreadPoolExecutor(1) as executor:
        first.draw_ahead(store, lambda ask: Ahead(ask, executor))
        yield first, second


def test_a_call_is_seen_by_who_draws_ahead_at_the_latest_with_what_it_draws_next(ahead):
    drawing, caller = ahead
    drawing.draw()
    drawing._ahead.held()
    caller.call_meeting()
    drawing.draw()
    drawing._ahead.held()
    assert drawing.called


def test_what_was_drawn_before_an_answer_does_not_call_again(ahead):
    drawing, caller = ahead
    drawing.draw()
    caller.call_meeting()
    drawing.draw()
    caller.answer_calls()
    drawing.forget_calls()
    assert not drawing.called
    assert drawing.draw() == 2
    assert caller.draw() > 2
    assert not drawing.called


def test_a_call_does_not_change_what_is_drawn_ahead(ahead):
    drawing, caller = ahead
    numbers = []
    for _ in range(5):
        numbers.append(drawing.draw())
        caller.call_meeting()
    assert numbers == [0, 1, 2, 3, 4]


def test_who_draws_ahead_hears_of_a_failure(ahead):
    drawing, failing = ahead
    drawing.draw()
    failing.report_failure("rank 1: disk full")
    with pytest.raises(WorkerFailure, match="rank 1: disk full"):  # noqa: PT012
        for _ in range(3):
            drawing.draw()


# ---- Failures ----


def test_after_a_failure_every_draw_and_look_of_every_worker_raises_what_was_reported():
    everybody = clocks(3)
    everybody[0].draw()
    everybody[1].report_failure("rank 1: disk full")
    for clock in everybody * 2:
        for action in (clock.draw, clock.look, clock.answer_calls):
            with pytest.raises(WorkerFailure, match=r"^rank 1: disk full$"):
                action()


@pytest.mark.parametrize("failures", [2, 7, 8, 16])
def test_several_failures_are_noticed_too(failures):
    """On a host that breaks, all workers may fail at once."""
    *failing, alive = clocks(failures + 1)
    for rank, clock in enumerate(failing):
        clock.report_failure(f"rank {rank}: disk full")
    for action in (alive.draw, alive.look):
        with pytest.raises(WorkerFailure, match=r"rank \d+: disk full"):
            action()


def test_a_failure_is_noticed_besides_calls():
    first, second, third = clocks(3)
    first.call_meeting()
    second.report_failure("no memory")
    third.call_meeting()
    with pytest.raises(WorkerFailure, match="no memory"):
        third.draw()


def test_the_report_of_a_failure_can_be_asked_for():
    first, second = clocks(2)
    assert second.failure() is None
    first.report_failure("Größe: 3 µm")
    assert second.failure() == "Größe: 3 µm"
