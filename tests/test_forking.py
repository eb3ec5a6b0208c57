"""What the tests rely on where workers are forked: a fork is what a process started from scratch is."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from forking import ForkedProcess, can_fork
from launching import Run, environment_of, processes_with

LOOK = """
import sys
began_with = {name: name in sys.modules for name in ("torch", "transformers", "peft", "layup_hf", "launching", "trl")}
import json, logging, os, pathlib, random, signal, tempfile, threading
import numpy, torch, transformers.trainer
from torch.utils.data import DataLoader

class Here:
    pass

def work(_):
    return os.environ["LAYUP_TEST_RUN"], torch.utils.data.get_worker_info().id

found = {
    "arguments": [sys.argv, sys.path],
    "main": [__name__, __file__, Here.__module__, sys.modules["__main__"].Here is Here],
    "environment": dict(os.environ),
    "inherited": sorted(line for line in os.popen("env").read().splitlines() if not line.startswith(("_=", "SHLVL="))),
    "temporary": tempfile.gettempdir(),
    "folder": os.getcwd(),
    "leads": [os.getsid(0) == os.getpid(), os.getpgid(0) == os.getpid()],
    "threads": [threading.active_count(), torch.get_num_threads()],
    "signals": [str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD)],
    "loggers": [logging.getLogger(name).level for name in ("root", "transformers", "torch.distributed")],
    "loaded": list(DataLoader([0, 1], batch_size=None, num_workers=2, collate_fn=work)),
    "sockets": [name for name in os.listdir("/proc/self/fd")
                if os.path.exists(f"/proc/self/fd/{name}") and "socket" in os.readlink(f"/proc/self/fd/{name}")],
}
own = {"random": [random.random(), float(numpy.random.rand()), float(torch.rand(1))], "began_with": began_with}
print(json.dumps([found, own]))
"""


def start(kind, script, folder, *arguments):
    """A process of this script in an environment of its own; its log."""
    command = [sys.executable, "-u", str(script), *arguments]
    environment = environment_of(folder.name, folder, folder)
    assert can_fork(command, environment)
    log = folder / f"{script.stem}-{kind.__name__}.txt"
    with log.open("w") as file:
        return kind(command, env=environment, cwd=folder, stdout=file, stderr=file, start_new_session=True), log


@pytest.fixture
def script(tmp_path):
    def write(text):
        file = tmp_path / "script.py"
        file.write_text(text)
        return file

    return write


def test_a_fork_finds_what_a_new_process_finds(script, tmp_path):
    file, found = script(LOOK), []
    for kind in (subprocess.Popen, ForkedProcess, ForkedProcess):
        process, log = start(kind, file, tmp_path, "--option", "ü and a space")
        assert process.wait(100) == 0, log.read_text()
        found.append(json.loads(log.read_text().splitlines()[-1]))
    (new, _), (first, own), (second, others) = found
    for each in (new, first, second):
        for name in (
            "LAYUP_TEST_FORKS",
            "TORCHINDUCTOR_CACHE_DIR",
        ):  # to have others forked; set by an import, if unset
            value = each["environment"].pop(name, None)
            each["inherited"] = [line for line in each["inherited"] if line != f"{name}={value}"]
    assert first == new
    assert second == new
    assert own["began_with"] == {
        **dict.fromkeys(("torch", "transformers", "peft"), True),
        **dict.fromkeys(("layup_hf", "launching", "trl"), False),
    }
    assert not set(own["random"]) & set(others["random"])


ENDS = {
    "print('by')": 0,
    "import sys; sys.exit(3)": 3,
    "import os; os._exit(4)": 4,
    "raise ValueError('made on purpose')": 1,
    "import atexit; atexit.register(print, 'at the end'); raise SystemExit('a word')": 1,
    "import os, signal; os.kill(os.getpid(), signal.SIGKILL)": -signal.SIGKILL,
    "import os, signal; os.kill(os.getpid(), signal.SIGTERM)": -signal.SIGTERM,
    "import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(5)": -signal.SIGINT,
    "import threading, time; threading.Timer(0.2, print, ['later']).start()": 0,
}


@pytest.mark.parametrize("text", ENDS)
def test_a_fork_ends_as_a_new_process_ends(text, script, tmp_path):
    file, said = script(text), []
    for kind in (subprocess.Popen, ForkedProcess):
        process, log = start(kind, file, tmp_path)
        assert process.wait(60) == process.poll() == process.returncode == ENDS[text]
        said.append(log.read_text().splitlines()[-1:])
    assert said[0] == said[1]


def test_a_fork_is_found_and_ended_as_a_new_process_is(script, tmp_path):
    file = script("import os, time; os.fork(); print('up', flush=True); time.sleep(1000)")
    process, log = start(ForkedProcess, file, tmp_path, "--option")
    while log.read_text().count("up") < 2:
        time.sleep(0.02)
    members = processes_with("LAYUP_TEST_RUN", tmp_path.name)
    assert len(members) == 2
    assert psutil.Process(process.pid).parent().cmdline()[1].endswith("tests/forked.py")
    for member in members:
        assert [part for part in member.cmdline() if part] == [sys.executable, "-u", str(file), "--option"]
        assert member.environ()["LAYUP_TEST_RESULTS"] == str(tmp_path)
    assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.01)
    process.terminate()
    assert process.wait(10) == -signal.SIGTERM
    process.kill()  # nobody is there any more
    os.kill(next(member.pid for member in members if member.pid != process.pid), signal.SIGKILL)
    psutil.wait_procs(members, 10)


def test_what_imports_would_find_otherwise_is_started_from_scratch(script, tmp_path, monkeypatch):
    command, environment = [sys.executable, "-u", "script.py"], environment_of("name", tmp_path, tmp_path)
    assert can_fork(command, environment)
    assert can_fork(command, {**environment, "LAYUP_TOKEN": "another"})
    assert not can_fork(["env", *command], environment)
    for name in ("HF_ENDPOINT", "TRANSFORMERS_VERBOSITY", "PYTHONPATH", "OMP_NUM_THREADS"):
        assert not can_fork(command, {**environment, name: "another"})
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    assert not can_fork(command, environment_of("name", tmp_path, tmp_path))


TELL = """
import json, os, pathlib, signal, sys, time
mine = pathlib.Path(os.environ["LAYUP_TEST_RESULTS"], "result-" + os.environ["RANK"])
mine.with_suffix(".json.new").write_text(json.dumps(dict(os.environ)))
os.rename(mine.with_suffix(".json.new"), mine.with_suffix(".json"))
other = pathlib.Path(os.environ["LAYUP_TEST_RESULTS"], "result-0.json")
while not other.exists():
    time.sleep(0.05)
if os.environ["RANK"] == "1":
    sys.exit(5)
time.sleep(100)
"""
OF_ONE_RUN = {"MASTER_PORT", "TORCHELASTIC_ERROR_FILE", "TORCHELASTIC_RUN_ID", "TMPDIR", "LAYUP_TEST_RUN"}
OF_ONE_RUN |= {"LAYUP_TEST_RESULTS", "LAYUP_TEST_FORKS"}


def test_the_launcher_does_with_forked_workers_what_it_does_with_others(script, tmp_path):
    """Their environment, the end of all when one fails, and the report."""
    file, environments = script(TELL), []
    for forked in (False, True):
        (folder := tmp_path / f"{forked}").mkdir()
        started = Run(file, 2, ["--option"], folder, forked=forked)
        assert isinstance(started.process, ForkedProcess) == forked
        assert started.wait(100) == 1
        started.assert_nothing_left()
        assert "exitcode  : 5 (pid: " in started.output, started.output
        assert "closing signal SIGTERM" in started.output
        results = [
            {name: value for name, value in each.items() if name not in OF_ONE_RUN} for each in started.results()
        ]
        environments.append(results)
        assert len(results) == 2
    assert environments[0] == environments[1]
