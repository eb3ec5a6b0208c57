"""Real workers, some of which lack something, differ, hang or die: the report says so, and comes in time."""

import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from fleet import LOOPBACK, wait_until
from launching import ROOT
from torch.distributed import TCPStore

HERE = Path(__file__).parent
SEVERAL = {"GROUP_WORLD_SIZE": "2"}  # launches


@pytest.fixture(scope="module")
def starter():
    """Starts workers quickly, as it has imported all that they need."""
    environment = {**os.environ, **LOOPBACK, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(map(str, [ROOT, ROOT / "tests", ROOT / "tests/windows"]))
    process = subprocess.Popen(
        [sys.executable, str(HERE / "starting.py")],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    yield process
    process.stdin.close()
    process.stdout.close()
    process.wait(60)


@pytest.fixture
def examine(starter, tmp_path):
    """Runs the doctor; returns its exit codes and reports, by rank. Who is stopped is killed at the end."""
    stores = []

    def start(workers=2, faults=None, environment=None, timeout=20, arguments=(), stays=(), ends_all=False):
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        stores.append(store)
        order = {
            "workers": workers,
            "port": store.port,
            "folder": str(tmp_path),
            "arguments": ["--output_dir", str(tmp_path), "--timeout", str(timeout), *arguments],
            "environment": environment or {},
            "ends_all": ends_all,
            "faults": {str(rank): names.split() for rank, names in (faults or {}).items()},
        }
        starter.stdin.write(json.dumps(order) + "\n")
        starter.stdin.flush()
        ranks = [rank for rank in range(workers) if rank not in stays]
        files = {rank: tmp_path / f"exit-{rank}" for rank in ranks}
        logs = {rank: tmp_path / f"log-{rank}.txt" for rank in range(workers)}
        wait_until(
            lambda: all(file.exists() for file in files.values()),
            f"the end of all; {[log.read_text() for log in logs.values() if log.exists()]}",
            timeout=60,
        )
        codes = {rank: int(file.read_text()) for rank, file in files.items()}
        return codes, {rank: plain(log.read_text()) for rank, log in logs.items()}

    yield start
    for file in tmp_path.glob("pid-*"):
        with suppress(ProcessLookupError):
            os.kill(int(file.read_text()), signal.SIGKILL)


def plain(text):
    """Lines that were broken to fit are whole again."""
    lines = []
    for line in text.splitlines():
        if line.startswith(" " * 15):
            lines[-1] += f" {line.strip()}"
        else:
            lines.append(" ".join(line.split()))
    return "\n".join(lines)


def can_mount():
    return not subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode


def test_workers_that_have_all(examine):
    codes, reports = examine(3)
    assert codes == {0: 0, 1: 0, 2: 0}, reports
    assert "ok exchange peers read each other's memory in place: offered, merged, mass exact" in reports[0]
    assert "ok group gloo connects all workers" in reports[0]
    assert reports[0].splitlines()[-1].startswith("Training would work here.")
    assert "rank" not in reports[0]
    assert reports[1] == reports[2] == ""


def test_workers_on_several_hosts(examine):
    codes, reports = examine(3, {2: "is_on_another_host"}, SEVERAL)
    assert set(codes.values()) == {0}, reports
    report = reports[0]
    assert "exchange rank 0-1: peers on this machine read each other's memory in place, the others send" in report
    assert "exchange rank 2: peers send each other blocks by NIXL: offered, merged, mass exact" in report
    assert "Mbit/s and" in report
    assert "warning secret LAYUP_TOKEN is not set" in report
    assert "-> set LAYUP_TOKEN to the same secret for all workers" in report
    assert "UCX_TLS=tcp" in report


def test_who_lacks_nixl_is_named(examine):
    codes, reports = examine(2, {1: "is_on_another_host", 0: "lacks_nixl"}, SEVERAL)
    assert codes == {0: 1, 1: 1}
    assert "ERROR nixl rank 0: not installed on" in reports[0]
    assert "-> pip install 'layup_hf[nixl]'" in reports[0]
    assert "Training would not work here: see nixl, exchange." in reports[0]


def test_where_it_is_not_needed_nixl_may_be_missing(examine):
    codes, reports = examine(1, {0: "lacks_nixl"})
    assert codes == {0: 0}
    assert "ok nixl not installed; not needed here" in reports[0]


def test_a_seam_that_is_missing_on_one_worker_hides_nothing_else(examine):
    codes, reports = examine(2, {1: "lacks_a_seam"})
    assert codes == {0: 1, 1: 1}
    assert "ok versions rank 0:" in reports[0]
    assert "ERROR versions rank 1: layup_hf does not work with transformers" in reports[0]
    assert "Run: pip install 'transformers>=" in reports[0]
    assert "ok exchange peers read" in reports[0]


def test_other_versions_are_named(examine):
    codes, reports = examine(2, {1: "has_another_torch"})
    assert codes == {0: 0, 1: 0}
    assert "warning versions the workers have different ones: torch" in reports[0]
    assert "2.13.9 on rank 1" in reports[0]


def test_another_secret(examine):
    codes, reports = examine(2, {1: "has_another_secret"}, {**SEVERAL, "LAYUP_TOKEN": "one"})
    assert codes == {0: 1, 1: 1}
    assert "ERROR secret rank 1 has another LAYUP_TOKEN than rank 0, or only one has any" in reports[0]
    assert "ok exchange" in reports[0]
    assert "one" not in reports[0].split("LAYUP_TOKEN=")


def test_an_interface_that_is_not_there(examine):
    codes, reports = examine(2, environment=SEVERAL, arguments=["--network_interface=ib7"])
    assert codes == {0: 1, 1: 1}
    assert "ERROR interface network_interface='ib7' is no interface with an IPv4 address" in reports[0]


def test_a_machine_that_is_not_reached(examine):
    codes, reports = examine(2, {0: "is_behind_a_firewall", 1: "is_on_another_host"}, SEVERAL)
    assert codes == {0: 1, 1: 1}
    assert "ERROR network rank 0: 127.0.0.1:" in reports[0]
    assert "is not reached: timed out -> look for a firewall" in reports[0]


@pytest.mark.skipif(not can_mount(), reason="needs the right to mount")
def test_machines_without_a_common_disk(examine, tmp_path):
    codes, reports = examine(2, {1: "is_on_another_host has_a_small_disk"}, SEVERAL)
    assert codes == {0: 0, 1: 0}
    assert f"warning disk rank 1 has another {tmp_path} than rank 0: its optimizer's state" in reports[0]
    assert not list(tmp_path.glob(".layup-doctor*"))


def test_too_few_files(examine):
    codes, reports = examine(2, {1: "has_few_files"})
    assert codes == {0: 1, 1: 1}
    assert "ERROR files rank 1: only 100 may be open" in reports[0]
    assert "`ulimit -n 400`" in reports[0]


def test_memory_that_cannot_be_mapped(examine):
    codes, reports = examine(2, {1: "cannot_map_the_others"})
    assert codes == {0: 1, 1: 1}
    assert "ERROR exchange rank 1: Cannot map the memory of worker process" in reports[0]
    assert "rank 0: RuntimeError: Worker 1 could not open its windows" in reports[0]


def test_a_disk_that_hangs(examine):
    codes, reports = examine(2, {1: "hangs_in_a_check"}, timeout=6)
    assert codes == {0: 1, 1: 1}
    assert "ERROR disk rank 1: This did not end within 3 s." in reports[0]
    assert "ok exchange" in reports[0]


@pytest.mark.skipif(not can_mount(), reason="needs the right to mount")
@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("has_a_full_disk", "ERROR disk rank 1: {} cannot be written: No space left on device -> the disk is full"),
        (
            "has_a_disk_for_reading_only",
            "ERROR disk rank 1: {} cannot be written: Read-only file system -> the file system is",
        ),
        (
            "has_a_small_disk",
            "warning disk rank 1: {} can be written; 1.07 GB free: one checkpoint of a model of 89 mi",
        ),
        (
            "has_little_shared_memory",
            "warning shm rank 1: /dev/shm has 67.1 MB free of 67.1 MB. LayUp does not use it;",
        ),
    ],
)
def test_a_file_system(examine, tmp_path, fault, said):
    codes, reports = examine(2, {1: fault})
    assert set(codes.values()) == {int("ERROR" in said)}
    assert said.format(tmp_path) in reports[0], reports[0]
    assert "ok exchange" in reports[0]


@pytest.mark.parametrize(("rank", "fault"), [(0, "freezes_at_once"), (2, "freezes")])
def test_a_worker_that_hangs(examine, fault, rank):
    seconds = 3 if fault == "freezes_at_once" else 8  # the other one has to come to where it freezes
    codes, reports = examine(3, {rank: fault}, timeout=seconds, stays=[rank])
    assert set(codes.values()) == {1}
    reporter = 1 if rank == 0 else 0
    assert f"ERROR workers rank {rank} does not answer" in reports[reporter]
    if fault == "freezes":
        assert ": it is stopped -> `kill -CONT" in reports[reporter]
        assert f"-- exchange not looked at: rank {rank} has not answered within 8" in reports[reporter]
    assert sum("Training would not work here" in report for report in reports.values()) == 1


@pytest.fixture
def by_another_launcher():
    """Environment of a launcher that keeps no store: rank 0 does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return {"TORCHELASTIC_USE_AGENT_STORE": "False", "MASTER_PORT": str(free.getsockname()[1])}


def test_a_launcher_without_a_store(examine, by_another_launcher):
    codes, reports = examine(2, environment=by_another_launcher)
    assert codes == {0: 0, 1: 0}
    assert "ok exchange" in reports[0]


def test_who_loses_the_store_reports_alone(examine, by_another_launcher):
    codes, reports = examine(2, {0: "dies"}, by_another_launcher, timeout=3)
    assert codes == {0: 3, 1: 1}
    assert "ERROR workers rank 1 reports alone, as the store of the launch does not answer any more:" in reports[1]


def test_a_worker_that_is_too_late(examine):
    """What has not been looked at is not well."""
    codes, reports = examine(2, {1: "comes_late"}, timeout=3)
    assert codes == {0: 1, 1: 1}
    assert "ERROR workers rank 1 " in reports[0]
    assert "Training would not work here: see workers." in reports[0]


def test_a_worker_that_dies(examine):
    """A launcher ends the others at once: there is a report all the same, and it does not wait for the time limit."""
    codes, reports = examine(3, {1: "dies"}, timeout=100, ends_all=True)
    assert codes == {0: 1, 1: 3, 2: 1}
    assert "ERROR workers rank 1 does not answer" in reports[0]
    assert ": it has died -> look at its log" in reports[0]
    assert reports[2] == ""


def test_a_worker_that_dies_in_another_launch(examine):
    codes, reports = examine(2, {1: "dies"}, SEVERAL, timeout=3)
    assert codes == {0: 1, 1: 3}
    assert ": it has died -> look at its log" in reports[0]
