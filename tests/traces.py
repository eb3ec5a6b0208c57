"""What holds of every trace, and what one has to say."""

import json
from collections import Counter, defaultdict


def read(file):
    """A trace, after a look at its format and at whether the events of each thread nest.

    With small numbers for processes and threads: from 0, and from 0 in each process.
    """
    trace = json.loads(file.read_text())
    assert set(trace) == {"displayTimeUnit", "traceEvents", "otherData"}
    threads = defaultdict(list)
    named, owners = set(), set()
    for event in trace["traceEvents"]:
        assert {"name", "ph", "pid", "tid"} <= set(event)
        assert event["tid"] >= event["pid"] > 0  # 0 is another thread's number for Perfetto
        owners.add((event["tid"], event["pid"]))
        event["pid"], event["tid"] = event["pid"] // 10_000 - 1, event["tid"] - event["pid"]
        if event["ph"] == "M":
            assert event["name"] in ("process_name", "process_sort_index", "thread_name", "thread_sort_index")
            assert len(event["args"]) == 1
            named.add((event["name"], event["pid"], event["tid"]))
            continue
        assert event["ph"] == "X"
        assert event["cat"] in ("work", "exchange", "wait", "meeting", "delay")
        # In whole nanoseconds, as viewers count them
        start, length = round(event["ts"] * 1000), round(event["dur"] * 1000)
        assert start >= 0
        assert length >= 0
        threads[event["pid"], event["tid"]].append((start, start + length))
    assert len({thread for thread, _ in owners}) == len(owners)  # Perfetto knows threads by their numbers alone
    for process, thread in threads:
        assert ("process_name", process, 0) in named
        assert ("thread_name", process, thread) in named
    for events in threads.values():
        assert_nests(events)
    return trace


def assert_nests(events):
    """No two overlap in part. Args: (start, end) in the order of the file."""
    open_until = []
    latest = 0
    for start, end in events:
        assert start >= latest
        latest = start
        while open_until and open_until[-1] <= start:
            open_until.pop()
        assert not open_until or end <= open_until[-1], (start, end, open_until)
        open_until.append(end)


def names(trace, what="process_name"):
    """Of the processes, or with `thread_name` of the threads, by number."""
    found = defaultdict(list)
    for event in trace["traceEvents"]:
        if event["name"] == what:
            found[event["pid"]].append(event["args"]["name"])
    return dict(found)


def events(trace, name, process=None):
    return [e for e in trace["traceEvents"] if e["name"] == name and process in (None, e["pid"])]


def counts(trace, process):
    """How many events of each kind a worker has."""
    return Counter(e["name"] for e in trace["traceEvents"] if e["pid"] == process and e["ph"] == "X")


def merges(trace, process):
    """Merges with peers."""
    return sum(event["args"]["peers"] for event in events(trace, "merge", process))
