"""The file: of the format that viewers read, bounded, whole or not there, and joined from what workers wrote alone."""

import subprocess
import sys

import numpy as np
import pytest
import traces
from hypothesis import given
from hypothesis import strategies as st

from layup_hf.fleet import data
from layup_hf.trace import clocks, file
from layup_hf.trace.__main__ import main
from layup_hf.trace.clocks import Reading, SharedClock, wall_times
from layup_hf.trace.events import FORWARD, MERGE, ON_ITS_WAY, STEP, Trace


def recorded(rank, steps=3, most=None):
    trace = Trace()
    trace.blocks = ["head", "layer"]
    for number in range(steps):
        with trace.training.span(STEP, number):
            with trace.training.span(FORWARD):
                pass
            trace.training.add(MERGE, clocks.now(), place=1, count=2)
    trace.track("from rank 7").add(ON_ITS_WAY, clocks.now(), place=5)
    return trace.recording(rank)


def written(folder, *recordings):
    begin = min(map(file.begin_of, recordings))
    count = file.write(folder / "deep" / "trace.json", recordings, begin)
    trace = traces.read(folder / "deep" / "trace.json")
    assert count == sum(event["ph"] == "X" for event in trace["traceEvents"])
    assert [path.name for path in (folder / "deep").iterdir()] == ["trace.json"]
    return trace


def test_each_worker_is_a_process_and_each_track_a_thread(tmp_path):
    trace = written(tmp_path, recorded(0), recorded(3, steps=1))
    (first,), (second,) = traces.names(trace).values()
    assert first.startswith("rank 0 (")
    assert second.startswith("rank 3 (")
    assert traces.names(trace, "thread_name") == {0: ["training", "from rank 7"], 1: ["training", "from rank 7"]}
    assert traces.counts(trace, 0) == {"step": 3, "forward": 3, "merge": 3, "block on its way": 1}
    assert traces.merges(trace, 0) == 6
    assert [event["args"] for event in traces.events(trace, "step", 0)] == [{"number": n} for n in range(3)]
    assert traces.events(trace, "merge", 1)[0]["args"] == {"block": "layer", "peers": 2}
    assert traces.events(trace, "block on its way", 1)[0]["args"] == {"block": 5}  # a number that has no name
    assert trace["otherData"]["workers"][1] == {
        "rank": 3,
        "host": trace["otherData"]["workers"][0]["host"],
        "events": 4,
        "events_not_kept": 0,
        "clock": "its own wall clock",
        "clock_error_us": 0,
    }


def test_a_recording_can_be_said_to_others(tmp_path):
    recording = recorded(1)
    assert data.decode(data.encode(recording)) == recording


def test_a_worker_without_events_is_there(tmp_path):
    trace = written(tmp_path, recorded(0), Trace().recording(1))
    assert len(traces.names(trace)) == 2
    assert traces.counts(trace, 1) == {}


def test_a_long_run_makes_a_file_of_limited_size(tmp_path, monkeypatch):
    monkeypatch.setattr("layup_hf.trace.events.MOST_OF_TRAINING", 90)
    trace = written(tmp_path, recorded(0, steps=1000))
    steps = traces.events(trace, "step")
    assert [step["args"]["number"] for step in steps] == list(range(970, 1000))
    assert trace["otherData"]["workers"][0]["events_not_kept"] == 2910
    assert (tmp_path / "deep/trace.json").stat().st_size < 160 * 100


def test_what_cannot_be_written_leaves_nothing(tmp_path):
    def recordings():
        yield recorded(0)
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        file.write(tmp_path / "trace.json", recordings(), 0)
    assert list(tmp_path.iterdir()) == []


# ---- Clocks ----

TIMES = st.lists(st.integers(0, 2**50), min_size=1, max_size=20).map(sorted)
READINGS = st.lists(
    st.tuples(st.integers(0, 2**50), st.integers(-(2**30), 2**30)), max_size=3, unique_by=lambda r: r[0]
)


@given(TIMES, READINGS, st.integers(-(2**60), 2**60), st.integers(0, 2**60))
def test_times_keep_their_order(times, readings, base, wall):
    """Where a clock drifts by less than it goes."""
    clock = SharedClock()
    at = 0
    for distance, drift in sorted(readings):
        at += distance + abs(drift) + 1
        clock.read("another", wall, Reading(at, base + drift // 4))
    found = wall_times(np.array(times), clock.told())
    assert found.dtype == np.int64
    assert (np.diff(found) >= 0).all()


def test_between_two_readings_a_clock_goes_evenly():
    clock = SharedClock()
    clock.read("rank 0's", 10**6, Reading(1000, -(10**15), 5))
    clock.read("rank 0's", 10**6, Reading(2000, -(10**15) + 100, 5))
    times = np.array([0, 1000, 1500, 2000, 9000])
    expected = times - 10**15 + np.array([0, 0, 50, 100, 100]) + 10**6
    assert wall_times(times, clock.told()).tolist() == expected.tolist()


def test_of_another_reference_earlier_readings_are_worth_nothing():
    clock = SharedClock()
    clock.read("one", 1, Reading(0, 77))
    clock.read("other", 2, Reading(5, 1000))
    assert wall_times(np.array([0]), clock.told()).tolist() == [1002]


def test_without_a_reading_times_are_those_of_the_wall_clock():
    assert abs(wall_times(np.array([clocks.now()]), SharedClock().told())[0] / 1e9 - clocks.time.time()) < 1


# ---- Joining ----


def test_parts_are_joined_at_the_times_in_them(tmp_path):
    place = tmp_path / "trace.json"
    recordings = [recorded(0), recorded(10), recorded(2)]
    for recording in recordings:
        part = file.part_of(place, recording["rank"])
        file.write(part, [recording], file.begin_of(recording))
        traces.read(part)
    whole = tmp_path / "whole.json"
    file.write(whole, [recordings[0], recordings[2], recordings[1]], min(map(file.begin_of, recordings)))
    command = [sys.executable, "-W", "error", "-m", "layup_hf.trace", str(place)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == f"{place} has what was in trace.rank-0.json, trace.rank-2.json, trace.rank-10.json.\n"
    joined = traces.read(place)
    assert joined == traces.read(whole)


@pytest.mark.parametrize("arguments", [[], ["--help"], ["a.json", "b.json"]])
def test_the_command_says_what_it_takes(arguments):
    with pytest.raises(SystemExit, match="the file that the option `trace` names"):
        main(arguments)


def test_where_there_is_no_part_the_first_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no trace\.rank-0\.json"):
        file.join(tmp_path / "trace.json")
    with pytest.raises(SystemExit, match="No worker has written a part"):
        main([str(tmp_path / "trace.json")])
