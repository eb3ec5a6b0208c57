"""Clocks of several machines: a worker in a time namespace has another monotonic clock, and it is known which."""

import json
import shutil
import socket
import subprocess
import sys

import pytest
import traces
from launching import SCRIPTS, environment_of

AHEAD = 1000  # seconds that the second worker's clock is ahead

ELSEWHERE = ["unshare", "--time", "--monotonic", str(AHEAD), "--fork"]
can_be_elsewhere = shutil.which("unshare") and not subprocess.run([*ELSEWHERE, "true"], capture_output=True).returncode


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    if not can_be_elsewhere:
        pytest.skip("needs the right to make time namespaces")
    folder = tmp_path_factory.mktemp("clocks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    workers = []
    for rank, prefix in enumerate([[], ELSEWHERE]):
        place = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        environment = environment_of("clocks", folder, folder) | place
        command = [*prefix, sys.executable, str(SCRIPTS / "clocks.py"), str(folder)]
        workers.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))
    try:
        for worker in workers:
            _, errors = worker.communicate(timeout=100)
            assert worker.returncode == 0, errors
    finally:
        for worker in workers:
            worker.kill()
    results = [json.loads((folder / f"result-{rank}.json").read_text()) for rank in range(2)]
    return results, traces.read(folder / "trace.json")


def test_how_far_a_clock_is_ahead_is_known_within_the_error_that_is_told(outcome):
    (first, second), _ = outcome
    assert second["now"] - first["now"] > (AHEAD - 100) * 1e9
    assert [ahead for _, ahead, _ in first["clock"]["readings"]] == [0, 0]
    assert len(second["clock"]["readings"]) == 2  # at the beginning and at the end
    for _, ahead, error in second["clock"]["readings"]:
        assert abs(ahead + AHEAD * 10**9) <= error
        assert 0 < error < 10**9


def test_what_happened_at_once_is_shown_at_once(outcome):
    _, trace = outcome
    one, other = traces.events(trace, "step")
    assert one["pid"] != other["pid"]
    error = 2 * max(worker["clock_error_us"] for worker in trace["otherData"]["workers"])
    assert max(one["ts"], other["ts"]) <= min(one["ts"] + one["dur"], other["ts"] + other["dur"]) + error
    assert [worker["clock"] for worker in trace["otherData"]["workers"]] == ["read against rank 0's"] * 2


def test_recording_has_ended(outcome):
    assert [result["is recording"] for result in outcome[0]] == [False, False]
