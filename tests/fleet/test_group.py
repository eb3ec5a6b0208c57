"""Process groups of real workers: a collective that waits for a frozen peer can be ended, and a new group formed."""

import json
import random
import subprocess
import sys
import tempfile
import time
import uuid
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch
from launching import SCRIPTS, environment_of, processes_with

from layup_hf.fleet.group import is_of_group
from layup_hf.fleet.job import start_keeper
from layup_hf.fleet.store import JobStore
from recipes.measure.hosts.outsider import take_places

WORKERS = 3
TOKEN = bytes(32)
SENDERS = ("127.0.0.66", "127.0.0.67")  # no worker sends from there


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Of those that are left, by rank."""
    folder, name = tmp_path_factory.mktemp("group"), uuid.uuid4().hex
    _, port = start_keeper("127.0.0.1", TOKEN, is_open=False)
    with tempfile.TemporaryDirectory() as temporary, (folder / "log.txt").open("w") as log:
        started = [
            subprocess.Popen(
                [sys.executable, str(SCRIPTS / "group.py"), *map(str, (rank, WORKERS, port))],
                env=environment_of(name, folder, Path(temporary)),
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            for rank in range(WORKERS)
        ]
        try:
            tried = be_there_before_the_last(JobStore("127.0.0.1", port, TOKEN))
            end = time.monotonic() + 90
            while any(process.poll() is None for process in started[:-1]) and time.monotonic() < end:
                time.sleep(0.1)
            codes = [process.poll() for process in started]
        finally:
            for process in processes_with("LAYUP_TEST_RUN", name):
                process.kill()
            for process in started:
                process.wait(10)
    output = (folder / "log.txt").read_text()
    assert codes == [0, 0, None], output[-8000:]
    assert output.count("the process group is destroyed at exit") == WORKERS - 1, output[-8000:]
    found = [json.loads((folder / f"result-{rank}.json").read_text()) for rank in range(WORKERS - 1)]
    return [{**result, "strangers": tried} for result in found]


def be_there_before_the_last(store):
    """Where the first of those left listens, and who got in from two other addresses; then the last one may come."""
    store.wait(["forms"], timedelta(seconds=120))
    process, places = psutil.Process(int(store.get("forms"))), []
    end = time.monotonic() + 20
    while not places and time.monotonic() < end:
        time.sleep(0.2)  # it has begun to listen long before somebody finds it
        places = [c.laddr for c in process.net_connections("tcp") if c.status == psutil.CONN_LISTEN]
    held = [take_places(tuple(place), random.Random(0), 3, sender) for sender in SENDERS for place in places]
    store.set("strangers have tried", "")
    return {"places": len(places), "got in": [len(one) for one in held]}


def test_all_that_are_there_form_a_group(results):
    for rank, result in enumerate(results):
        assert result["era 1"]["torch"] == [rank, 3]
        assert result["era 1"]["gathered"] == [0, 1, 2]


def test_a_collective_that_waits_for_a_frozen_peer_is_ended(results):
    for result in results:
        assert 0.5 < result["aborted"]["seconds"] < 10
        assert result["aborted"]["is_of_group"], result["aborted"]["error"]


def test_strangers_who_are_there_before_a_member_do_not_take_its_place(results):
    """gloo would take them for it: the group would not form, and end after a minute."""
    assert results[0]["strangers"] == {"places": 1, "got in": [0, 0]}
    assert results[0]["era 2"]["gathered"] == [0, 1]


def test_what_else_is_connected_stays_so(results):
    assert all(result["store_answers"] for result in results)


def test_those_who_are_left_form_a_new_group_at_once(results):
    for rank, result in enumerate(results):
        assert result["era 2"]["seconds"] < 30
        assert result["era 2"]["torch"] == [rank, 2]
        assert result["era 2"]["gathered"] == [0, 1]


@pytest.mark.parametrize(("era", "workers"), [("era 1", 3), ("era 2", 2)])
def test_accelerate_sees_the_group(results, era, workers):
    for rank, result in enumerate(results):
        assert result["alone"] == [1, "NO"]
        assert result[era]["accelerate"] == [rank, workers]
        assert result[era]["accelerator"] == [rank, workers, rank == 0]
        assert result[era]["kind"] == "MULTI_CPU"


def caused_by(cause):
    error = RuntimeError("wrapped")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer"), True),
        (torch.distributed.DistNetworkError("recv failed"), True),
        (torch.distributed.DistBackendError("NCCL error: remote process exited"), True),
        (caused_by(torch.distributed.DistStoreError("wait timeout")), True),
        (RuntimeError("CUDA out of memory"), False),
        (RuntimeError("Mass is not conserved"), False),
        (caused_by(KeyError("loss")), False),
    ],
)
def test_errors_of_the_group_are_told_from_others(error, expected):
    assert is_of_group(error) is expected
