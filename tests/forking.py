"""Python processes without the seconds of their imports: forks of one that has imported what they need.

Most of the time of a test that starts workers would go into imports, three for each two workers: the launcher's and
theirs. So every process that runs tests keeps a server, which has imported transformers and what belongs to it, and has
done nothing else; each process that it is asked for is a fork of it. `forked.py` is what happens there.

A forked process is what a started one is: with a session, a folder, a command line and an environment of its own (in
/proc, too, where tests find it), one thread, and the exit code, the output and the signals of any other. What is alike
in all that a server has forked is the order of sets of strings.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import torch

ROOT = Path(__file__).parent.parent
PYTHONPATH = f"{ROOT}:{ROOT / 'tests'}"
SERVER = "LAYUP_TEST_FORKS"
"""Variable with the address of the server, an abstract socket: a launcher, itself forked, has its workers from it."""
OWN = ("LAYUP_", "PYTEST_", "TMPDIR")
"""How the names of variables begin that no import reads, so that they may differ from those of the server."""
MOST_BYTES = 1 << 16
"""Of an order, which is a command and an environment, and of each of them."""
ROOM = "-" * (MOST_BYTES - 1)
"""Stands in the server's command line and environment, so that those of a fork find room where /proc shows them."""


@functools.cache
def server() -> str:
    """The address of this process's server, which is started at the first call and ends with this process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": PYTHONPATH, "LAYUP_TEST_ROOM": ROOM}
    command = [sys.executable, "-u", str(ROOT / "tests" / "forked.py"), ROOM]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, env=environment, start_new_session=True, **pipes)
    assert process.stdin is not None
    assert process.stdout is not None
    address = process.stdout.readline().strip()
    assert address, "the process that forks others has not come up"
    process.stdout.close()

    def end(stdin: IO[str] = process.stdin) -> None:
        stdin.close()
        process.wait(30)

    atexit.register(end)
    return address


@functools.cache
def variables_at_the_start() -> dict[str, str]:
    """Those that what the server imports has found."""
    server()
    return others(os.environ)


def others(environment: Any) -> dict[str, str]:
    names = {"OMP_NUM_THREADS", "PYTHONPATH", SERVER}
    return {name: value for name, value in environment.items() if name not in names and not name.startswith(OWN)}


def can_fork(command: Sequence[str], environment: dict[str, str]) -> bool:
    """Whether this is a command of Python whose imports would find what the server's have found.

    Not where there is a GPU: what has been forked cannot use it, if an import has as much as looked for it.
    """
    if command[0] != sys.executable or torch.cuda.is_available():
        return False
    if environment.get("OMP_NUM_THREADS") != "1" or environment.get("PYTHONPATH") != PYTHONPATH:
        return False
    return others(environment) == variables_at_the_start()


class ForkedProcess:
    """As much of a `subprocess.Popen` of a command of Python as is needed; it is the server's child.

    Args:
        args: `[sys.executable, "-u", SCRIPT, ...]`, or with `-m MODULE` in place of the script.
        env: All variables; unset: those of this process.
        stdout: File; unset: this process's. stderr: the same, or `subprocess.STDOUT`.
        cwd: Folder; unset: this process's.
        start_new_session: As for `subprocess.Popen`.
    """

    def __init__(
        self,
        args: Sequence[str],
        *,
        env: dict[str, str] | None = None,
        stdout: IO[Any] | None = None,
        stderr: IO[Any] | int | None = None,
        cwd: str | Path | None = None,
        start_new_session: bool = False,
    ) -> None:
        self.args = list(args)
        self.returncode: int | None = None
        environment = dict(os.environ if env is None else env)
        address = environment.setdefault(SERVER, os.environ.get(SERVER) or server())
        order = {
            "command": self.args,
            "environment": environment,
            "folder": str(cwd or Path.cwd()),
            "is_session": start_new_session,
        }
        output = 1 if stdout is None else stdout.fileno()
        errors = output if stderr == subprocess.STDOUT else 2 if stderr is None else stderr.fileno()  # type: ignore[union-attr]
        message = json.dumps(order).encode()
        assert len(message) < MOST_BYTES, "too long for an order"
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._connection.connect("\0" + address)
        socket.send_fds(self._connection, [message], [output, errors])
        self.pid = int(self._connection.recv(64))

    def poll(self) -> int | None:
        """The exit code, negative if it was a signal, or None if it has not ended yet."""
        if self.returncode is None and select.select([self._connection], [], [], 0)[0]:
            self._take_exit_code()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """The exit code, when it has ended. Raises subprocess.TimeoutExpired."""
        if self.returncode is None:
            if not select.select([self._connection], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self._take_exit_code()
        assert self.returncode is not None
        return self.returncode

    def _take_exit_code(self) -> None:
        code = self._connection.recv(64)
        if not code:
            raise RuntimeError("The process that forks others has ended.")
        self.returncode = int(code)
        self._connection.close()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)
