"""Real workers for tests: started by `accelerate launch`, watched, and cleaned up whatever happens."""

from __future__ import annotations

import json
import os
import shutil
import signal
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

ROOT = Path(__file__).parent.parent
SCRIPTS = Path(__file__).parent / "scripts"


class Run:
    """One `accelerate launch` with a port, a temporary folder and a name of its own.

    Args:
        script: File in `tests/scripts`, or a path.
        processes: Number of workers.
        arguments: For the script.
        folder: Empty folder for the log, the results and temporary files.
        prefix: Command that runs the launcher, such as one that changes its surroundings first.
    """

    def __init__(
        self, script: str | Path, processes: int, arguments: list[str], folder: Path, prefix: Sequence[str] = ()
    ) -> None:
        self.name = uuid.uuid4().hex
        self.folder = folder
        self.log = folder / "log.txt"
        self.temporary = Path(tempfile.mkdtemp(prefix="layup-"))  # short: sockets in it have at most 108 characters
        environment = {
            **os.environ,
            "LAYUP_TEST_RUN": self.name,
            "LAYUP_TEST_RESULTS": str(folder),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
            "TMPDIR": str(self.temporary),
        }
        launcher = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port=0"]
        launcher += ["--multi_gpu"] if processes > 1 else []
        command = [*prefix, *launcher, f"--num_processes={processes}", str(SCRIPTS / script), *arguments]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    @property
    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def members(self) -> list[psutil.Process]:
        """Every live process of this run, the launcher included."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get("LAYUP_TEST_RUN") == self.name and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

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


def shared_memory_files() -> set[str]:
    return set(os.listdir("/dev/shm"))


def run(
    script: str | Path, processes: int, arguments: list[str], folder: Path, timeout: float = 200, **options: Any
) -> Run:
    """Run to a successful end, leaving nothing behind."""
    before = shared_memory_files()
    started = Run(script, processes, arguments, folder, **options)
    code = started.wait(timeout)
    assert code == 0, f"exit code {code}:\n{started.output[-8000:]}"
    started.assert_nothing_left()
    assert shared_memory_files() <= before
    return started
