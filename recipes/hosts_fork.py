"""Workers without the seconds that a launch takes: forked from a process in their host that has imported everything.

A hundred runs of half a minute would spend most of their time on imports. A `Forker` stays in a host from run to run.
Each worker gets a parent of its own, in the place of its launcher: that gives it the environment which `accelerate
launch` gives, keeps the store if it is rank 0's, and ends as torch's launcher does, at once with an error if the worker
has failed. A worker is a whole process with a session of its own and ends as any Python does.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lab import INTERFACE, Host

WORKER_NAME = "forked-worker"  # as `ps -o comm` shows it
OTHERS_SECONDS = 2  # rank 0's parent keeps the store so long after its worker has ended well


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
    """A process in a host that starts workers of `hosts_worker.py`; ends with the lab."""

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
        self.process = host.popen([sys.executable, __file__], env=environment, **pipes)

    def ask(self, **order: Any) -> Any:
        """Give one order and take the answer. Raises RuntimeError if the process has ended."""
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(order), file=self.process.stdin, flush=True)
            if answer := self.process.stdout.readline():
                return json.loads(answer)
        raise RuntimeError(f"The process that starts workers in {self.host.name} has ended.")

    def start(self, arguments: Sequence[str], workers: int, port: int, log: Path) -> ForkedLauncher:
        """Fork a worker; its output is appended to a log. `port` is that of rank 0's store."""
        rank = str(self.host.index)
        environment = {"RANK": rank, "GROUP_RANK": rank, "WORLD_SIZE": str(workers), "GROUP_WORLD_SIZE": str(workers)}
        environment |= {"MASTER_ADDR": self.host.lab.hosts[0].address, "MASTER_PORT": str(port)}
        return ForkedLauncher(self, self.ask(do="start", arguments=arguments, environment=environment, log=str(log)))

    def pids(self) -> list[int]:
        """Every process in the host but this one."""
        return [pid for pid in self.host.pids() if pid != self.process.pid]

    def end_workers(self) -> None:
        """End every process in the host but this one."""
        self.host.end_processes(but=self.process.pid)


# ---- In the host ----


def serve() -> list[str] | None:
    """Follow orders until there are no more; in a forked worker, returns its arguments."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        order = json.loads(line)
        if order["do"] == "start":
            answer = pid = os.fork()
            if pid == 0:
                return launch(order)
        else:
            pid, status = os.waitpid(order["pid"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        print(json.dumps(answer), file=answers, flush=True)
    return None


def launch(order: dict[str, Any]) -> list[str]:
    """Be the launcher of a worker that is forked here. Returns in the worker, with its arguments, alone."""
    os.setsid()
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream, target in ((0, os.open(os.devnull, os.O_RDONLY)), (1, log), (2, log)):
        os.dup2(target, stream)
    os.environ.update(order["environment"])
    worker = os.fork()
    if worker == 0:
        os.setsid()
        Path("/proc/self/comm").write_text(WORKER_NAME)
        return order["arguments"]
    code = 1
    try:
        store = None
        if os.environ["RANK"] == "0":
            from torch.distributed import TCPStore

            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            store = TCPStore(address, port, is_master=True, wait_for_workers=False)
        code = os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1])
        if store is not None and code == 0:
            time.sleep(OTHERS_SECONDS)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1 if code < 0 else code)


if __name__ == "__main__":
    import hosts_worker
    import nixl._api  # noqa: F401

    import layup_hf.windows.nixl  # noqa: F401

    arguments = serve()
    if arguments is not None:
        sys.argv[1:] = arguments
        hosts_worker.main()
