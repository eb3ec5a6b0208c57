"""The file that viewers open.

In the Trace Event Format of Chrome, as JSON, which Perfetto reads, too: complete events ("ph": "X") with `ts` and `dur`
in microseconds, a process for each worker, a thread for each of its tracks. Events of a thread nest, as viewers want.
(https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU, https://perfetto.dev/docs/faq)
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .clocks import wall_times
from .events import FIELDS, KINDS

_THREADS = 10_000  # at most, of a process


def write(file: str | os.PathLike[str], recordings: Iterable[dict[str, Any]], begin: int) -> int:
    """Write the trace of several workers, so that it is whole or not there.

    Args:
        file: Where to.
        recordings: From `Trace.recording`, one after the other, so that they need not be in memory together.
        begin: Of the trace: the earliest `begin_of` them.

    Returns:
        How many events it has.

    Raises:
        OSError: It cannot be written.
    """
    workers: list[dict[str, Any]] = []

    def events() -> Iterator[dict[str, Any]]:
        for process, recording in enumerate(recordings):
            workers.append(_told(recording))
            yield from _events(process, recording, begin)

    _write(Path(file), events(), begin, workers)
    return sum(worker["events"] for worker in workers)


def _write(place: Path, events: Iterable[dict[str, Any]], begin: int, workers: list[dict[str, Any]]) -> None:
    """The format's frame around events. Args: `workers` is complete when the events have ended."""
    place.parent.mkdir(parents=True, exist_ok=True)
    unfinished = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        with unfinished.open("w") as out:
            out.write('{"displayTimeUnit":"ms","traceEvents":[')
            for number, event in enumerate(events):
                out.write((",\n" if number else "\n") + json.dumps(event, separators=(",", ":")))
            told = {"producer": "layup_hf", "began": begin, "workers": workers}
            out.write(f'\n],"otherData":{json.dumps(told)}}}\n')
        unfinished.replace(place)
    finally:
        unfinished.unlink(missing_ok=True)


def begin_of(recording: dict[str, Any]) -> int:
    """The earliest time in it, in nanoseconds since 1970; of nothing, a time that is later than any."""
    starts = [int(events["start"].min()) for _, _, events in _tracks(recording) if len(events)]
    if not starts:
        return np.iinfo(np.int64).max
    return int(wall_times(np.array([min(starts)]), recording["clock"])[0])


def _tracks(recording: dict[str, Any]) -> Iterator[tuple[str, int, np.ndarray]]:
    for name, count, content in recording["tracks"]:
        yield name, count, np.frombuffer(content, FIELDS)


def _told(recording: dict[str, Any]) -> dict[str, Any]:
    """What the file says of a worker, beside its events."""
    readings = recording["clock"]["readings"]
    kept = {name: len(events) for name, _, events in _tracks(recording)}
    return {
        "rank": recording["rank"],
        "host": recording["host"],
        "events": sum(kept.values()),
        "events_not_kept": sum(count - kept[name] for name, count, _ in recording["tracks"]),
        "clock": "read against rank 0's" if readings else "its own wall clock",
        "clock_error_us": max((reading[2] for reading in readings), default=0) / 1000,
    }


def _number_of(process: int) -> int:
    """For the viewers, that of a process and of its main thread: with room for more threads before the next.

    Perfetto takes a thread 0 for the main thread, and knows threads by their numbers: none is to have that of another.
    """
    return (process + 1) * _THREADS


def _events(process: int, recording: dict[str, Any], begin: int) -> Iterator[dict[str, Any]]:
    """Of one worker, as the format has them."""
    rank, host, blocks = recording["rank"], recording["host"], recording["blocks"]
    process = _number_of(process)
    yield _named("process_name", process, process, name=f"rank {rank} ({host})")
    yield _named("process_sort_index", process, process, sort_index=process)
    for thread, (name, _, events) in enumerate(_tracks(recording), start=process):
        yield _named("thread_name", process, thread, name=name)
        yield _named("thread_sort_index", process, thread, sort_index=thread - process)
        starts = wall_times(events["start"], recording["clock"]) - begin
        ends = wall_times(events["end"], recording["clock"]) - begin
        # What contains comes before what is contained; of two of one time, that which was told later contains.
        for at in np.lexsort((-np.arange(len(events)), -ends, starts)).tolist():
            kind = KINDS[events["kind"][at]]
            event = {"name": kind.name, "cat": kind.category, "ph": "X", "pid": process, "tid": thread}
            event |= {"ts": int(starts[at]) / 1000, "dur": int(ends[at] - starts[at]) / 1000}
            place, count = int(events["place"][at]), int(events["count"][at])
            told: dict[str, Any] = {}
            if kind.place and place >= 0:
                is_named = kind.place == "block" and place < len(blocks)
                told[kind.place] = blocks[place] if is_named else place
            if count:
                told["peers"] = count
            yield event | {"args": told} if told else event


def _named(what: str, process: int, thread: int, **args: Any) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": process, "tid": thread, "args": args}


def part_of(file: str | os.PathLike[str], rank: int) -> Path:
    """Where a worker writes what it has alone: `trace.rank-1.json` beside `trace.json`."""
    place = Path(file)
    return place.with_name(f"{place.stem}.rank-{rank}{place.suffix}")


def join(file: str | os.PathLike[str]) -> list[Path]:
    """Join what workers have written aside into one file, by the wall times in them.

    Args:
        file: The one that the option `trace` names.

    Returns:
        What has been joined.

    Raises:
        FileNotFoundError: There is nothing.
    """
    place = Path(file)
    parts = sorted(place.parent.glob(f"{place.stem}.rank-*{place.suffix}"), key=_rank_in)
    if not parts:
        raise FileNotFoundError(f"No worker has written a part of {place}: there is no {part_of(place, 0).name}.")
    traces = [json.loads(part.read_text()) for part in parts]
    begin = min(trace["otherData"]["began"] for trace in traces)
    workers = [worker for trace in traces for worker in trace["otherData"]["workers"]]
    _write(place, _moved(traces, begin), begin, workers)
    return parts


def _moved(traces: list[dict[str, Any]], begin: int) -> Iterator[dict[str, Any]]:
    """The events of several files, as those of one."""
    for process, trace in enumerate(traces):
        later = trace["otherData"]["began"] - begin
        for event in trace["traceEvents"]:
            number = _number_of(process)
            moved = event | {"pid": number, "tid": number + event["tid"] - event["pid"]}
            if event["name"] == "process_sort_index":
                moved["args"] = {"sort_index": number}
            if "ts" in event:
                moved["ts"] = (round(event["ts"] * 1000) + later) / 1000
            yield moved


def _rank_in(part: Path) -> int:
    rank = part.stem.rpartition("-")[2]
    return int(rank) if rank.isdigit() else -1
