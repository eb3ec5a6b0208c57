"""Real workers for tests: started by `accelerate launch`, watched, and cleaned up whatever happens.

Launcher and workers are forked from a process that has imported what they need (see `forking.py`), unless a test asks
for them from scratch, or their imports would find another environment.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from forking import PYTHONPATH, ROOT, ForkedProcess, can_fork

SCRIPTS = ROOT / "tests" / "scripts"


def environment_of(name: str, folder: Path, temporary: Path) -> dict[str, str]:
    """Of everything that belongs to one run."""
    return {
        **os.environ,
        "LAYUP_TEST_RUN": name,
        "LAYUP_TEST_RESULTS": str(folder),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": PYTHONPATH,
        "TMPDIR": str(temporary),
    }


def processes_with(variable: str, value: str) -> list[psutil.Process]:
    """Every live process that has this in its environment."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(variable) == value and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def start_process(
    command: Sequence[str], environment: dict[str, str], log: Path, forked: bool
) -> subprocess.Popen | ForkedProcess:
    """In a session of its own, forked if that is wished and possible; it writes into the log."""
    start = ForkedProcess if forked and can_fork(command, environment) else subprocess.Popen
    with log.open("w") as file:
        return start(command, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)


class Run:
    """One `accelerate launch` with a port, a temporary folder and a name of its own.

    Args:
        script: File in `tests/scripts`, or a path.
        processes: Number of workers.
        arguments: For the script.
        folder: Empty folder for the log, the results and temporary files.
        prefix: Command that runs the launcher, such as one that changes its surroundings first.
        forked: Whether launcher and workers may be forked; if not, they are started from scratch, as any launch is.
    """

    def __init__(
        self,
        script: str | Path,
        processes: int,
        arguments: list[str],
        folder: Path,
        prefix: Sequence[str] = (),
        forked: bool = True,
    ) -> None:
        self.name = uuid.uuid4().hex
        self.folder = folder
        self.log = folder / "log.txt"
        self.temporary = Path(tempfile.mkdtemp(prefix="layup-"))  # short: sockets in it have at most 108 characters
        environment = environment_of(self.name, folder, self.temporary)
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port=0"]
        launcher += ["--multi_gpu"] if processes > 1 else []
        command = [*prefix, *launcher, f"--num_processes={processes}", str(SCRIPTS / script), *arguments]
        self.process = start_process(command, environment, self.log, forked)

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def members(self) -> list[psutil.Process]:
        """Every live process of this run, the launcher included."""
        return processes_with("LAYUP_TEST_RUN", self.name)

    def worker(self, rank: int) -> psutil.Process:
        return next(p for p in self.members() if p.environ().get("RANK") == str(rank))

    def wait_for(self, text: str, times: int = 1, timeout: float = 120) -> None:
        """Wait until the log has `text` this often."""
        end = time.monotonic() + timeout
        while self.output.count(text) < times:
            if time.monotonic() > end or self.process.poll() is not None:
                self.kill()
                pytest.fail(f"{text!r} did not come {times} times:\n{self.output[-8000:]}")
            time.sleep(0.1)

    def wait(self, timeout: float = 200) -> int:
        """The launcher's exit code; a run that hangs is killed and fails the test with its log."""
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            pytest.fail(f"The workers did not end within {timeout} s:\n{self.output[-8000:]}")

    def kill(self) -> None:
        for process in self.members():
            process.send_signal(signal.SIGKILL)
        self.process.wait(10)

    def assert_nothing_left(self) -> None:
        """No process, no temporary file. (Shared memory has no name: it ends with the processes.)"""
        end = time.monotonic() + 10
        while (left := self.members()) and time.monotonic() < end:
            time.sleep(0.1)
        assert not left, f"processes left: {left}"
        files = [str(path) for path in self.temporary.rglob("*") if path.is_file()]
        assert not files, f"temporary files left: {files}"
        shutil.rmtree(self.temporary)

    def results(self) -> list[dict]:
        """What each worker wrote into `result-RANK.json`, in the order of ranks."""
        return [json.loads(file.read_text()) for file in sorted(self.folder.glob("result-*.json"))]


class Launches:
    """One job, each of whose workers has an `accelerate launch` of its own, as on hosts of their own.

    A context manager: whatever happens, no process is left.

    Args:
        script: File in `tests/scripts`.
        workers: How many launches the job is started with.
        arguments: For the script.
        folder: Empty folder for the logs, the results, the model and temporary files.
        environment: Further variables of all workers.
        forked: Whether launchers and workers may be forked; if not, they are started from scratch, as any launch is.
    """

    def __init__(
        self,
        script: str,
        workers: int,
        arguments: Sequence[str],
        folder: Path,
        environment: dict[str, str] | None = None,
        forked: bool = True,
    ) -> None:
        self.name = uuid.uuid4().hex
        self.folder = folder
        self.launchers: dict[str, subprocess.Popen | ForkedProcess] = {}
        self._forked = forked
        self._script, self._workers = str(SCRIPTS / script), workers
        self._arguments = [*arguments, f"--output_dir={folder / 'model'}"]
        self._temporary = Path(tempfile.mkdtemp(prefix="layup-"))
        self._environment = {**environment_of(self.name, folder, self._temporary), **(environment or {})}
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]

    def start(self, rank: int, *, name: str = "", restarts: int = 0, environment: dict[str, str] | None = None) -> None:
        """Launch one of the workers that the job begins with, or launch it again under another name."""
        places = [f"--num_machines={self._workers}", f"--machine_rank={rank}", f"--num_processes={self._workers}"]
        store = ["--main_process_ip=127.0.0.1", f"--main_process_port={self._port}", f"--max_restarts={restarts}"]
        self._launch(name or str(rank), ["--multi_gpu", *places, *store], [], environment)

    def join(self, name: str, place: str, environment: dict[str, str] | None = None) -> None:
        """Launch one more worker that is to join."""
        self._launch(name, ["--num_processes=1", "--num_machines=1"], [f"--join={place}"], environment)

    def _launch(
        self, name: str, options: list[str], arguments: list[str], environment: dict[str, str] | None = None
    ) -> None:
        launcher = [sys.executable, "-m", "accelerate.commands.launch"]
        command = [*launcher, *options, self._script, *self._arguments, *arguments]
        environment = {**self._environment, **(environment or {}), "LAYUP_TEST_LAUNCH": name}
        self.launchers[name] = start_process(command, environment, self.log(name), self._forked)

    def log(self, name: str) -> Path:
        return self.folder / f"log-{name}.txt"

    def output(self, name: str | None = None) -> str:
        """What one launch has written, or all one after the other."""
        names = self.launchers if name is None else [name]
        return "\n".join(self.log(each).read_text(errors="replace") for each in names)

    def workers(self) -> dict[str, psutil.Process]:
        """The live workers by the names of their launches."""
        found = {}
        for process in processes_with("LAYUP_TEST_RUN", self.name):
            try:
                if (
                    process.cmdline()[1:2] == ["-u"]
                    and self._script in process.cmdline()
                    and "RANK" in process.environ()
                ):
                    found[process.environ()["LAYUP_TEST_LAUNCH"]] = process
            except psutil.NoSuchProcess:
                continue
        return found

    def wait_for(self, text: str, name: str | None = None, times: int = 1, timeout: float = 120) -> None:
        """Wait until a launch (unset: all together) has written the text this often."""
        end = time.monotonic() + timeout
        while self.output(name).count(text) < times:
            if time.monotonic() > end:
                pytest.fail(f"{text!r} did not come {times} times from {name or 'anybody'}:\n{self._tails()}")
            time.sleep(0.1)

    def wait(self, timeout: float = 120) -> None:
        """Wait until no worker is left.

        Launchers wait for the launchers of those that were killed, so they are ended.
        """
        end = time.monotonic() + timeout
        while self.workers():
            if time.monotonic() > end:
                pytest.fail(f"{list(self.workers())} did not end within {timeout} s:\n{self._tails()}")
            time.sleep(0.1)

    def results(self) -> dict[str, dict]:
        """What each worker wrote that came to its end, by the names of their launches."""
        files = {name: self.folder / f"result-{name}.json" for name in self.launchers}
        return {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}

    def _tails(self) -> str:
        return "\n".join(f"---- {name}\n{self.output(name)[-4000:]}" for name in self.launchers)

    def __enter__(self) -> Launches:
        return self

    def __exit__(self, *exception: object) -> None:
        for process in processes_with("LAYUP_TEST_RUN", self.name):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for launcher in self.launchers.values():
            launcher.wait(10)
        shutil.rmtree(self._temporary)


def abandoned_shared_memory() -> set[str]:
    """Files in /dev/shm that no process has open: whoever made them has left them behind.

    Those of other tests, which may run at the same time, are open. Python's own locks are not counted: whatever is
    killed leaves them to its resource tracker.
    """
    files = {name for name in os.listdir("/dev/shm") if not name.startswith("sem.mp-")}
    in_use = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            in_use.update(re.findall(r"/dev/shm/(\S+)", (process / "maps").read_text(errors="replace")))
        with contextlib.suppress(OSError):
            in_use.update(Path(os.readlink(handle)).name for handle in (process / "fd").iterdir())
    return (files - in_use) & set(os.listdir("/dev/shm"))


def assert_no_memory_abandoned_since(before: set[str]) -> None:
    """What is left behind stays; a file of another test, seen between two of its steps, is open or gone soon."""
    end = time.monotonic() + 10
    while left := abandoned_shared_memory() - before:
        assert time.monotonic() < end, f"left behind in /dev/shm: {sorted(left)}"
        time.sleep(0.2)


def run(
    script: str | Path, processes: int, arguments: list[str], folder: Path, timeout: float = 200, **options: Any
) -> Run:
    """Run to a successful end, leaving nothing behind."""
    before = abandoned_shared_memory()
    started = Run(script, processes, arguments, folder, **options)
    code = started.wait(timeout)
    assert code == 0, f"exit code {code}:\n{started.output[-8000:]}"
    started.assert_nothing_left()
    assert_no_memory_abandoned_since(before)
    return started


def run_cases(script: str, processes: int, cases: dict[str, list[str]], folder: Path) -> dict[str, list[dict]]:
    """What each worker has to say of each case, all in one launch of a script that takes them by `worker.run_cases`."""
    options = [option for case in cases.values() for option in ("--then", *case)][1:]
    results = run(script, processes, options, folder).results()
    return {name: [worker[number] for worker in results] for number, name in enumerate(cases)}
