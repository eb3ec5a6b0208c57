"""Events in memory: the last ones, which nest, in memory that does not grow."""

import itertools
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from traces import assert_nests

from layup_hf.trace import events
from layup_hf.trace.events import BACKWARD, FIELDS, FORWARD, KINDS, MERGE, STEP, Trace, Track


def kept(track):
    return np.frombuffer(track.content(), FIELDS)


@pytest.mark.parametrize("count", [0, 1, 4, 5, 6, 14, 15, 16])
def test_the_last_events_are_kept_in_their_order(count):
    track = Track(5)
    for number in range(count):
        track.add(STEP, number, number)
    assert track.count == count
    assert kept(track)["place"].tolist() == list(range(count))[-5:]
    assert kept(track)["start"].tolist() == list(range(count))[-5:]


def test_an_event_is_what_was_told():
    track = Track(5)
    start = events.now()
    track.add(MERGE, start, place=3, count=2)
    with track.span(FORWARD):
        pass
    merge, forward = kept(track).tolist()
    assert merge[0] == start
    assert start <= merge[1] <= forward[0] <= forward[1] <= events.now()
    assert [merge[2], forward[2]] == [MERGE, FORWARD]
    assert merge[3:] == (2, 3)
    assert forward[3:] == (0, -1)


def test_what_raises_is_recorded_too():
    track = Track(5)
    with pytest.raises(ArithmeticError), track.span(BACKWARD):
        raise ArithmeticError
    assert [KINDS[number].name for number in kept(track)["kind"]] == ["backward"]


def test_events_take_no_more_memory_than_was_taken_at_first():
    track = Track(1000)
    track.add(STEP, 0)
    tracemalloc.start()
    try:
        for number in range(5000):
            track.add(STEP, number, number)
        size, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert size < 1000  # a few integers
    assert len(track.content()) == 1000 * 26


TREES = st.recursive(st.just([]), lambda inner: st.lists(inner, max_size=4), max_leaves=30)


@given(TREES, st.integers(1, 12), st.lists(st.integers(0, 3), min_size=1, max_size=7))
def test_events_nest_also_where_some_are_not_kept(tree, most, ticks):
    """Also where the clock stands still."""
    ticking = itertools.cycle(ticks)
    time, track = 0, Track(most)

    def tick():
        nonlocal time
        time += next(ticking)
        return time

    def record(children):
        with track.span(STEP):
            for child in children:
                record(child)

    stock, events.now = events.now, tick
    try:
        record(tree)
    finally:
        events.now = stock
    found = [(int(start), int(end)) for start, end in zip(kept(track)["start"], kept(track)["end"], strict=True)]
    order = sorted(range(len(found)), key=lambda at: (found[at][0], -found[at][1], -at))
    assert_nests([found[at] for at in order])


def test_kinds_differ_in_their_names():
    names = [kind.name for kind in KINDS]
    assert len(set(names)) == len(names)
    assert {kind.category for kind in KINDS} == {"work", "exchange", "wait", "meeting", "delay"}


def test_a_track_is_made_once():
    trace = Trace()
    assert trace.track("from rank 1") is trace.track("from rank 1")
    assert trace.track("training") is trace.training
    trace.track("from rank 1").add(MERGE, 0)
    told = trace.recording(rank=2)
    assert told["rank"] == 2
    assert [(name, count) for name, count, _ in told["tracks"]] == [("training", 0), ("from rank 1", 1)]
