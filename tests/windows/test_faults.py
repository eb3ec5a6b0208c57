"""Real processes that exchange blocks over TCP, some of which freeze or die."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fleet import LOOPBACK, wait_until
from launching import ROOT
from torch.distributed import TCPStore


@pytest.fixture(scope="module")
def starter():
    """Starts workers quickly, as it has imported all that they need."""
    environment = {**os.environ, **LOOPBACK, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).with_name("exchanging.py"))]
    process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "ready\n"
    yield process
    process.stdin.close()
    process.stdout.close()
    process.wait(60)


class Workers:
    """Processes that exchange blocks; see `exchanging.py`."""

    def __init__(self, starter, folder, number=3, wire_dtype="fp32"):
        self.folder = folder
        self.number = number
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        starter.stdin.write(json.dumps([number, self.store.port, str(folder), wire_dtype]) + "\n")
        starter.stdin.flush()

    def exit_code(self, rank):
        file = self.folder / f"exit-{rank}"
        return int(file.read_text()) if file.exists() else None

    def status(self, rank):
        file = self.folder / f"status-{rank}.json"
        return json.loads(file.read_text()) if file.exists() else {"reads": {}}

    def reads(self, rank, peer):
        return self.status(rank)["reads"].get(str(peer), 0)

    def wait_for_reads(self, rank, peer, more=3):
        """Wait until a worker has read some more blocks of a peer."""
        goal = self.reads(rank, peer) + more
        wait_until(
            lambda: self.reads(rank, peer) >= goal or self.exit_code(rank) is not None,
            f"rank {rank} reads rank {peer}; {self.logs()}",
            timeout=40,
        )
        assert self.exit_code(rank) is None, self.logs()

    def signal(self, rank, what):
        os.kill(int((self.folder / f"pid-{rank}").read_text()), what)

    def exclude(self, *ranks):
        temporary = self.folder / "exclude.tmp"
        temporary.write_text(json.dumps(ranks))
        os.replace(temporary, self.folder / "exclude")

    def logs(self):
        return "\n".join(file.read_text() for file in self.folder.glob("log-*.txt"))

    def stop(self, *ranks):
        """End in order: these workers come to their end by themselves, and have never seen a wrong value."""
        (self.folder / "stop").touch()
        for rank in ranks:
            wait_until(lambda rank=rank: self.exit_code(rank) is not None, f"the end of rank {rank}")
            assert self.exit_code(rank) == 0, self.logs()
            assert self.status(rank)["wrong"] == 0

    def kill(self):
        for rank in range(self.number):
            if self.exit_code(rank) is None and (self.folder / f"pid-{rank}").exists():
                self.signal(rank, signal.SIGKILL)


@pytest.fixture
def start(starter, tmp_path):
    started = []

    def start(*arguments, **options):
        started.append(Workers(starter, tmp_path, *arguments, **options))
        return started[-1]

    yield start
    for workers in started:
        workers.kill()


@pytest.mark.parametrize("wire_dtype", ["fp32", "bf16"])
def test_a_frozen_worker_holds_up_nobody_and_comes_back(start, wire_dtype):
    workers = start(wire_dtype=wire_dtype)
    for rank, peer in ((0, 1), (0, 2), (1, 2), (2, 0)):
        workers.wait_for_reads(rank, peer)
    workers.signal(2, signal.SIGSTOP)
    time.sleep(4)  # it counts as silent after 3
    for _ in range(3):
        workers.wait_for_reads(0, 1)
        workers.wait_for_reads(1, 0)
    workers.signal(2, signal.SIGCONT)
    for rank, peer in ((0, 2), (1, 2), (2, 0), (2, 1)):
        workers.wait_for_reads(rank, peer)
    assert "has broken" not in workers.logs()
    workers.stop(0, 1, 2)


def test_what_a_frozen_worker_writes_after_it_was_excluded_gets_into_nothing(start):
    workers = start()
    for rank, peer in ((0, 1), (0, 2), (1, 2), (2, 0), (2, 1)):
        workers.wait_for_reads(rank, peer)
    before = workers.status(0)["staging"]
    workers.signal(2, signal.SIGSTOP)
    time.sleep(0.5)
    workers.exclude(2)
    workers.wait_for_reads(0, 1, more=10)
    workers.wait_for_reads(1, 0, more=10)
    assert workers.status(0)["staging"] <= 1.5 * before
    workers.signal(2, signal.SIGCONT)
    workers.wait_for_reads(0, 1, more=10)
    workers.wait_for_reads(1, 0, more=10)
    workers.stop(0, 1, 2)


def test_a_killed_worker_takes_nobody_with_it(start):
    workers = start()
    for rank, peer in ((0, 1), (0, 2), (1, 2), (2, 0)):
        workers.wait_for_reads(rank, peer)
    workers.signal(2, signal.SIGKILL)
    for _ in range(2):
        workers.wait_for_reads(0, 1, more=10)
        workers.wait_for_reads(1, 0, more=10)
    workers.exclude(2)
    workers.wait_for_reads(0, 1, more=10)
    workers.stop(0, 1)
    assert "connection to rank 2 has broken" in workers.logs()


def test_a_worker_that_wakes_when_its_peer_has_died_goes_on(start):
    """Where blocks were read, and not written, the one that wakes was ended by UCX."""
    workers = start()
    for rank, peer in ((0, 1), (0, 2), (1, 2), (2, 0), (2, 1)):
        workers.wait_for_reads(rank, peer)
    workers.signal(2, signal.SIGSTOP)
    time.sleep(0.5)
    workers.signal(1, signal.SIGKILL)
    time.sleep(0.5)
    workers.signal(2, signal.SIGCONT)
    for rank, peer in ((0, 2), (2, 0)):
        workers.wait_for_reads(rank, peer, more=10)
    workers.stop(0, 2)
