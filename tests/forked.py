"""The process that others are forked from (see `forking.py`), and what becomes of a fork.

It does one thing at a time and has one thread, so a fork finds nothing that another thread held. What it imports stands
below, also what scripts would import on their way; neither `layup_hf` nor anything of the tests is among it.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import selectors
import socket
import subprocess
import sys
import tempfile
import types
import uuid
from pathlib import Path
from typing import Any

import datasets  # noqa: F401
import numpy as np
import peft  # noqa: F401
import torch
import torch._dynamo
import torch.distributed.fsdp
import torch.distributed.run
from accelerate.commands import launch
from forking import MOST_BYTES, ROOM, ForkedProcess
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler
from transformers import GPT2LMHeadModel, Seq2SeqTrainer  # noqa: F401


class Forker:
    """Forks what it is asked for at a socket, one order a connection, and says there how it has ended."""

    def __init__(self) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._address = f"layup-test-{uuid.uuid4().hex}"
        self._listener.bind("\0" + self._address)
        self._listener.listen(64)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(sys.stdin, selectors.EVENT_READ)
        self._children: dict[int, tuple[int, socket.socket]] = {}

    def serve(self) -> dict[str, Any] | None:
        """Fork until the standard input ends. In a fork, returns its order."""
        print(self._address, flush=True)
        while True:
            for key, _ in self._selector.select():
                if key.fileobj is sys.stdin:
                    return None
                if key.fileobj is not self._listener:
                    self._bury(key.fd)
                elif order := self._fork(self._listener.accept()[0]):
                    return order

    def _fork(self, connection: socket.socket) -> dict[str, Any] | None:
        message, descriptors, _, _ = socket.recv_fds(connection, MOST_BYTES, 2)
        pid = os.fork()
        if pid == 0:
            descriptors.insert(0, os.open(os.devnull, os.O_RDONLY))
            for target, descriptor in enumerate(descriptors):
                os.dup2(descriptor, target)
            others = [connection for _, connection in self._children.values()]
            for each in (self._selector, self._listener, connection, *others):
                each.close()
            for descriptor in (*descriptors, *self._children):
                os.close(descriptor)
            return json.loads(message)
        for descriptor in descriptors:
            os.close(descriptor)
        watch = os.pidfd_open(pid)
        self._children[watch] = pid, connection
        self._selector.register(watch, selectors.EVENT_READ)
        connection.send(str(pid).encode())
        return None

    def _bury(self, watch: int) -> None:
        pid, connection = self._children.pop(watch)
        self._selector.unregister(watch)
        os.close(watch)
        _, status = os.waitpid(pid, 0)
        with connection, contextlib.suppress(BrokenPipeError):  # who asked for it may have ended before it
            connection.send(str(os.waitstatus_to_exitcode(status)).encode())


def become(command: list[str], environment: dict[str, str], folder: str, is_session: bool = False) -> None:
    """Be what a new process with this command, environment and folder is at its beginning."""
    if is_session:
        os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    show_in_proc(command, environment)
    tempfile.tempdir = None  # of another TMPDIR
    np.random.seed()  # Python's own generator does that by itself
    torch.default_generator.seed()


def show_in_proc(command: list[str], environment: dict[str, str]) -> None:
    """Write them where /proc reads `cmdline` and `environ`; whoever looks for a process looks there."""
    begin, end, environment_begin, environment_end = map(int, Path("/proc/self/stat").read_text().split()[-5:-1])
    for place, size, texts in (
        (begin, end - begin, command),
        (
            environment_begin,
            environment_end - environment_begin,
            [f"{name}={environment[name]}" for name in environment],
        ),
    ):
        text = "".join(f"{each}\0" for each in texts).encode(errors="surrogateescape")
        assert len(text) < size, "no room for it"
        ctypes.memset(place, 0, size)
        ctypes.memmove(place, text, len(text))


def run(arguments: list[str]) -> None:
    """Be Python with these arguments, which are of one of the two kinds that there are."""
    if arguments[:2] == ["-m", launch.__name__]:
        sys.argv[:] = [launch.__file__, *arguments[2:]]
        # The launcher is the real one; but for its workers, which are forked, too.
        launch.subprocess = types.SimpleNamespace(Popen=ForkedProcess, CalledProcessError=subprocess.CalledProcessError)
        subprocess_handler.Popen = ForkedProcess
        launch.main()
        return
    sys.argv[:] = arguments[1:] if arguments[0] == "-u" else arguments
    script = sys.argv[0]
    sys.path[0] = str(Path(script).parent)
    main = types.ModuleType("__main__")
    main.__file__ = script
    sys.modules["__main__"] = main
    exec(compile(Path(script).read_bytes(), script, "exec"), main.__dict__)


if __name__ == "__main__":
    variables = {name: value for name, value in os.environ.items() if value != ROOM}
    become([sys.executable, __file__], variables, os.getcwd())
    gc.freeze()  # else the first collection of each fork would touch, and so copy, all there is
    order = Forker().serve()
    if order is not None:
        become(**order)
        run(order["command"][1:])
