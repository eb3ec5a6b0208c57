"""Workers without the seconds that a launch takes: forked from a process in their host that has imported everything.

A hundred runs of half a minute would spend most of their time on imports. A `Forker` stays in a host from run to run;
what it starts there is `forked.py`.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..common.lab import INTERFACE, Host

SERVER = "recipes.measure.hosts.forked"
WORKER_NAME = "forked-worker"  # as `ps -o comm` shows it


class ForkedLauncher:
    """The parent of a forked worker; as much of a `subprocess.Popen` as is needed of a launcher."""

    def __init__(self, forker: Forker, pid: int) -> None:
        self.forker, self.pid = forker, pid
        self.code: int | None = None

    def poll(self) -> int | None:
        if self.code is None:
            self.code = self.forker.ask(do="poll", pid=self.pid)
        return self.code

    def wait(self, seconds: float) -> int:
        end = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(f"forked worker {self.pid}", seconds)
            time.sleep(0.05)
        return self.poll()


class Forker:
    """A process in a host that starts workers of `worker.py`; ends with the lab."""

    def __init__(self, host: Host) -> None:
        self.host = host
        environment = {
            "ACCELERATE_MIXED_PRECISION": "no",
            "NIXL_LOG_LEVEL": "FATAL",
            "UCX_LOG_LEVEL": "FATAL",
            "GLOO_SOCKET_IFNAME": INTERFACE,
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RUN_ID": "none",
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "1",
        }
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = host.popen([sys.executable, "-m", SERVER], env=environment, **pipes)

    def ask(self, **order: Any) -> Any:
        """Give one order and take the answer. Raises RuntimeError if the process has ended."""
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(order), file=self.process.stdin, flush=True)
            if answer := self.process.stdout.readline():
                return json.loads(answer)
        raise RuntimeError(f"The process that starts workers in {self.host.name} has ended.")

    def start(
        self, arguments: Sequence[str], workers: int, port: int, log: Path, more: Mapping[str, str] | None = None
    ) -> ForkedLauncher:
        """Fork a worker; its output is appended to a log. `port` is that of rank 0's store, `more` for the worker's
        environment.
        """
        rank = str(self.host.index)
        environment = {"RANK": rank, "GROUP_RANK": rank, "WORLD_SIZE": str(workers), "GROUP_WORLD_SIZE": str(workers)}
        environment |= {"MASTER_ADDR": self.host.lab.hosts[0].address, "MASTER_PORT": str(port)}
        environment |= more or {}
        return ForkedLauncher(self, self.ask(do="start", arguments=arguments, environment=environment, log=str(log)))

    def pids(self) -> list[int]:
        """Every process in the host but this one."""
        return [pid for pid in self.host.pids() if pid != self.process.pid]

    def end_workers(self) -> None:
        """End every process in the host but this one."""
        self.host.end_processes(but=self.process.pid)
