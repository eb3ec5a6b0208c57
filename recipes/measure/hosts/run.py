"""One run of workers in a lab: started, watched, and what they wrote."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..common.command import passed_on
from ..common.lab import Host, Lab
from .files import read_lines
from .forker import WORKER_NAME, ForkedLauncher, Forker

WORKER = "recipes.measure.hosts.worker"


def worker_arguments(options: argparse.Namespace, methods: list[str]) -> list[str]:
    """What every kind of run says to its workers."""
    names = ("batch_size", "block_size", "config_overrides")
    return ["--methods", *methods, *passed_on(options, *names), *options.rest]


def measured(what: str, hosts: int, arguments: Sequence[str], seconds: float) -> list[Any]:
    """What all workers of one run in a lab of its own have measured; what rank 0 says meanwhile is shown.

    Args:
        what: Of `worker.py`.
        hosts: How many.
        arguments: For the workers.
        seconds: At most.
    """
    with Lab(hosts) as lab, tempfile.TemporaryDirectory() as folder:
        run = HostsRun(lab, Path(folder), what, arguments)
        workers = run.finish(seconds, lambda line: print(line, file=sys.stderr))
    return [entry for worker in workers for entry in worker]


class HostsRun:
    """Workers of `worker.py`, one on each host of a lab, each started by an `accelerate launch` of its own.

    Args:
        lab: Where.
        folder: Empty folder for logs and results.
        what: Of `worker.py`.
        arguments: For it.
        forkers: One for each host: workers are forked instead of launched.
        port: Of rank 0's store.
        environment: Further variables of all workers.

    Attributes:
        launchers: The present launcher of each host.
    """

    def __init__(
        self,
        lab: Lab,
        folder: Path,
        what: str,
        arguments: Sequence[str],
        forkers: Sequence[Forker] | None = None,
        port: int = 29500,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.environment = dict(environment or {})
        self.lab, self.folder, self.forkers, self.port = lab, folder, forkers, port
        self.arguments = [what, f"--folder={folder}", "--host={host}", *arguments]
        self.launchers: list[subprocess.Popen | ForkedLauncher] = [self.start(host) for host in lab.hosts]

    def start(self, host: Host) -> subprocess.Popen | ForkedLauncher:
        """Start the worker of one host; its output is appended to a log."""
        file = self.folder / f"log-{host.index}.txt"
        if self.forkers is not None:
            arguments = [argument.replace("{host}", str(host.index)) for argument in self.arguments]
            return self.forkers[host.index].start(arguments, len(self.lab.hosts), self.port, file, self.environment)
        with file.open("a") as log:
            options = {"stdout": log, "stderr": subprocess.STDOUT, "env": self.environment}
            return self.lab.launch(WORKER, self.arguments, [host], self.port, **options)[0]

    def restart(self, host: Host) -> None:
        """Repeat the launch of a host whose launch has ended."""
        self.launchers[host.index] = self.start(host)

    def log(self, host: Host) -> str:
        return (self.folder / f"log-{host.index}.txt").read_text(errors="replace")

    def notes(self, host: Host) -> list[dict[str, Any]]:
        """What a `train` worker has noted so far."""
        return read_lines(self.folder / f"notes-{host.index}.jsonl")

    def result(self, host: Host) -> Any:
        """What a worker wrote when it ended; None if it has not ended as it should."""
        file = self.folder / f"worker-{host.index}.json"
        return json.loads(file.read_text()) if file.exists() else None

    def pids(self, host: Host) -> list[int]:
        """Every process of this run in a host."""
        return host.pids() if self.forkers is None else self.forkers[host.index].pids()

    def end_processes(self, host: Host) -> None:
        """Kill every process of this run in a host."""
        host.end_processes() if self.forkers is None else self.forkers[host.index].end_workers()

    def worker(self, host: Host) -> int | None:
        """Process id of the worker itself, if it lives."""
        for pid in self.pids(host):
            try:
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                name = Path(f"/proc/{pid}/comm").read_text().strip()
            except OSError:
                continue  # it has just ended
            is_launched = WORKER.encode() in words and b"accelerate.commands.launch" not in words
            if is_launched or name == WORKER_NAME:
                return pid
        return None

    def signal(self, host: Host, number: signal.Signals) -> None:
        """Send a signal to the worker of a host, and not to its launcher."""
        pid = self.worker(host)
        if pid is None:
            raise RuntimeError(f"The worker of host {host.index} has ended already:\n{self.log(host)[-3000:]}")
        os.kill(pid, number)

    def wait_until(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        """Wait, while the workers live.

        Raises:
            RuntimeError: It has not come in time, or a launcher has ended with an error; with the logs' ends.
        """
        end = time.monotonic() + seconds
        while not condition():
            failed = [n for n, launcher in enumerate(self.launchers) if launcher.poll() not in (None, 0)]
            if failed or time.monotonic() > end:
                reason = f"host {failed[0]} failed" if failed else f"it took more than {seconds:.0f} s"
                logs = "\n".join(f"host {h.index}: {self.log(h)[-2500:]}" for h in self.lab.hosts)
                raise RuntimeError(f"No {what}, as {reason}:\n{logs}")
            time.sleep(0.1)

    def finish(self, seconds: float, on_line: Callable[[str], None] = lambda line: None) -> list[Any]:
        """Serve the workers' wishes for a rate until all have ended well, and take what they wrote.

        Args:
            seconds: At most.
            on_line: Called with every line of rank 0's log that begins with "measured".
        """
        rate, shown = None, 0

        def has_ended() -> bool:
            nonlocal rate, shown
            wish = self.folder / "rate-wanted.txt"
            wanted = wish.read_text() if wish.exists() else ""
            if wanted and wanted != rate:
                self.lab.set_rate(wanted)
                rate = wanted
                (self.folder / "rate.txt").write_text(rate)
            lines = [line for line in self.log(self.lab.hosts[0]).splitlines() if line.startswith("measured")]
            for line in lines[shown:]:
                on_line(line.removeprefix("measured "))
            shown = len(lines)
            return all(launcher.poll() == 0 for launcher in self.launchers)

        self.wait_until(has_ended, seconds, "end of all workers")
        return [self.result(host) for host in self.lab.hosts]
