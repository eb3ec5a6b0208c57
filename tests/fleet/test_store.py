"""The stores that workers share: the launcher's, and the one that a process of its own keeps for several launches."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from datetime import timedelta
from functools import partial

import psutil
import pytest
from fleet import wait_until
from launching import ROOT
from torch.distributed import PrefixStore, TCPStore

from layup_hf.fleet.keeper import BEATS, WORKERS
from layup_hf.fleet.network import Network
from layup_hf.fleet.store import Job, launcher_store, start_keeper
from layup_hf.progress.clock import ProgressClock, WorkerFailure

# ---- The keeper ----


class Keeper:
    """A keeper that this process has started."""

    def __init__(self):
        before = set(psutil.Process().children())
        host, port = start_keeper(Network("lo", "127.0.0.1"), 15.0)
        (self.process,) = set(psutil.Process().children()) - before
        self.job = Job(host, port, workers=2, run="run", lease_seconds=15.0)
        self.store = self.job.connect()  # and so it serves

    def close(self):
        with suppress(psutil.NoSuchProcess):
            self.process.kill()


@pytest.fixture
def keeper():
    keeper = Keeper()
    yield keeper
    keeper.close()


@pytest.fixture(scope="module")
def waiting_keeper():
    """One that no worker has come to."""
    keeper = Keeper()
    yield keeper
    keeper.close()


def has_ended(process):
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_the_keeper_listens_on_the_named_address_alone(waiting_keeper):
    listening = [c.laddr for c in waiting_keeper.process.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert listening == [(waiting_keeper.job.host, waiting_keeper.job.port)]
    assert waiting_keeper.job.host == "127.0.0.1"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", waiting_keeper.job.port), timeout=5)


def test_all_who_connect_share_what_it_holds(waiting_keeper):
    waiting_keeper.store.set("key", "value")
    assert waiting_keeper.job.connect().get("key") == b"value"
    assert [store.add("count", 1) for store in (waiting_keeper.store, waiting_keeper.job.connect())] == [1, 2]


STARTER = """
from layup_hf.fleet.network import Network
from layup_hf.fleet.store import start_keeper
import time
print(*start_keeper(Network("lo", "127.0.0.1"), 15.0), flush=True)
time.sleep(100)
"""


def test_it_outlives_who_started_it_and_its_whole_group():
    """A launcher that ends a worker kills the whole group."""
    starter = subprocess.Popen(
        [sys.executable, "-c", STARTER],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )
    host, port = starter.stdout.readline().split()
    (process,) = psutil.Process(starter.pid).children()
    try:
        job = Job(host, int(port), workers=2, run="run", lease_seconds=15.0)
        job.connect().set("key", "value")
        os.killpg(starter.pid, signal.SIGKILL)
        starter.wait(60)
        time.sleep(1.5)
        assert not has_ended(process)
        assert os.getsid(process.pid) == process.pid
        assert job.connect().get("key") == b"value"
    finally:
        process.kill()


def test_it_ends_when_the_last_worker_has_left(keeper):
    for _ in range(2):
        keeper.store.add(WORKERS, 1)
        keeper.store.add(BEATS, 1)
    keeper.store.add(WORKERS, -1)
    time.sleep(1.5)
    assert not has_ended(keeper.process)
    keeper.store.add(WORKERS, -1)
    wait_until(lambda: has_ended(keeper.process), "the keeper ends")


def test_it_waits_for_the_first_worker(waiting_keeper):
    time.sleep(1.5)
    assert not has_ended(waiting_keeper.process)


def test_it_ends_when_nobody_has_given_a_sign_of_life_for_long():
    """Its workers have all been killed: nobody counts them out."""
    listener = socket.create_server(("127.0.0.1", 0))
    script = str(ROOT / "layup_hf" / "fleet" / "keeper.py")
    with listener:
        port = listener.getsockname()[1]
        process = subprocess.Popen(
            [sys.executable, script, str(listener.fileno()), "3"], pass_fds=[listener.fileno()], start_new_session=True
        )
    try:
        store = Job("127.0.0.1", port, 1, "run", 1.0).connect()
        store.add(WORKERS, 1)
        began = time.monotonic()
        while time.monotonic() < began + 5:
            store.add(BEATS, 1)
            assert process.poll() is None
            time.sleep(0.2)
        assert process.wait(8) == 0
    finally:
        process.kill()
        process.wait()


# ---- Jobs ----


def serve():
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@pytest.fixture
def job():
    """One that has been announced in its own store and in the launcher's."""
    server, launcher = serve(), PrefixStore("launcher", serve())
    job = Job("127.0.0.1", server.port, workers=3, run="run", lease_seconds=7.5)
    job.announce(launcher)
    yield job, launcher
    del server


def test_a_job_is_found_where_it_was_announced(job):
    job, launcher = job
    assert Job.find(launcher) == job
    assert Job.find(job.connect()) == job
    assert Job.at(f"127.0.0.1:{job.port}") == job


def test_a_job_need_not_be_announced_to_a_launcher():
    server = serve()
    job = Job("127.0.0.1", server.port, workers=1, run="run", lease_seconds=2.0)
    job.announce(None)
    assert Job.at(f"127.0.0.1:{server.port}") == job


def test_a_store_without_a_job_has_none(job):
    assert Job.find(PrefixStore("other", serve())) is None


@pytest.mark.parametrize("place", ["", "host", "host:", "host:port", "7000", "127.0.0.1:70x", "127.0.0.1:65536"])
def test_what_is_no_place_is_refused(place):
    with pytest.raises(ValueError, match=rf"join='{place}' is no place of a job: give HOST:PORT"):
        Job.at(place)


def test_a_place_where_nobody_listens_is_refused_soon():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{free.getsockname()[1]}"
        began = time.monotonic()
        with pytest.raises(ValueError, match=rf"join='{place}': no job answers there"):
            Job.at(place)
    assert time.monotonic() - began < 12


def test_a_place_that_says_nothing_is_refused_soon():
    """A host behind a firewall: connections are not even refused."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        place = listener.getsockname()
        waiting = [socket.socket() for _ in range(4)]  # until there is no more room for one
        for each in waiting:
            each.setblocking(False)
            each.connect_ex(place)
        began = time.monotonic()
        with pytest.raises(ValueError, match="no job answers there, as it has ended or is not reached from here"):
            Job.at(f"127.0.0.1:{place[1]}")
        assert 5 < time.monotonic() - began < 15
        for each in waiting:
            each.close()


def test_a_store_of_something_else_is_refused():
    server = serve()
    with pytest.raises(ValueError, match=r"there is a store, but no job of layup_hf has been announced in it"):
        Job.at(f"127.0.0.1:{server.port}")


def test_a_job_is_running_as_long_as_it_has_workers(job):
    job, _ = job
    assert not job.is_running()
    job.connect().add(WORKERS, 1)
    assert job.is_running()


# ---- The launcher's store ----


@pytest.fixture
def launcher(monkeypatch):
    """The store of the process group, as a launcher keeps it."""
    store = serve()
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    return store


def connect_store(run):
    return PrefixStore(run, launcher_store())


def test_the_workers_of_a_run_meet_in_the_launchers_store(launcher):
    first, second = ProgressClock(connect_store("run"), 4), ProgressClock(connect_store("run"))
    assert [first.draw(), second.draw(), first.draw()] == [4, 5, 6]
    first.call_meeting()
    second.look()
    assert second.called
    first.report_failure("gone")
    with pytest.raises(WorkerFailure, match="gone"):
        second.draw()
    assert first.failure() == second.failure() == "gone"


def test_two_runs_do_not_see_each_other(launcher):
    former = ProgressClock(connect_store("former"), 100)
    former.draw()
    former.report_failure("gone")
    later = ProgressClock(connect_store("later"), 0)
    assert [later.draw(), later.draw()] == [0, 1]
    assert later.failure() is None
    assert former.failure() == "gone"


@pytest.mark.parametrize("name", ["MASTER_ADDR", "MASTER_PORT"])
def test_a_launcher_that_does_not_say_where_the_store_is_is_refused(name, launcher, monkeypatch):
    monkeypatch.delenv(name)
    with pytest.raises(ValueError, match=rf"{name}.* is not set.*`accelerate launch` or `torchrun`"):
        connect_store("run")


def test_a_store_that_does_not_answer_is_named(monkeypatch):
    quickly = partial(TCPStore, timeout=timedelta(milliseconds=100))
    monkeypatch.setattr("layup_hf.fleet.store.TCPStore", lambda *args, timeout, **options: quickly(*args, **options))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    with pytest.raises(ConnectionError, match=r"127\.0\.0\.1:1 \(MASTER_ADDR and MASTER_PORT\) does not answer"):
        connect_store("run")


# ---- The store of the process group ----

MEMBER = """
import sys
import torch.distributed as dist
from layup_hf.fleet.store import GroupStore

rank, method, machine = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=method, rank=rank, world_size=2)


def gather(item):
    found = [None, None]
    dist.all_gather_object(found, item)
    return found


store = GroupStore(rank, gather, machine)
connections = [store.connect(run) for run in ("first", "second")]
connections[0].add("count", 1)
dist.barrier()
print(connections[0].add("count", 0), connections[1].add("count", 0), flush=True)
dist.barrier()
dist.destroy_process_group()
"""


def run_members(method, machines=("here", "here")):
    """What each of two processes prints, and what it fails with."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MASTER_")}
    environment |= {"PYTHONPATH": str(ROOT)}
    members = [
        subprocess.Popen(
            [sys.executable, "-c", MEMBER, str(rank), method, machine],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, machine in enumerate(machines)
    ]
    return [member.communicate(timeout=120) for member in members]


def test_a_group_that_was_made_through_a_file_has_a_store_that_rank_0_keeps(tmp_path):
    assert [output for output, _ in run_members(f"file://{tmp_path}/group")] == ["2 0\n"] * 2


def test_a_group_has_its_own_store_wherever_that_is():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert [output for output, _ in run_members(f"tcp://127.0.0.1:{port}")] == ["2 0\n"] * 2


def test_a_group_of_several_hosts_that_was_made_through_a_file_is_refused(tmp_path):
    for output, error in run_members(f"file://{tmp_path}/group", machines=("here", "there")):
        assert output == ""
        assert "ValueError: The process group has been made without a store" in error
        assert "`accelerate launch` or `torchrun`" in error


LAUNCHED = """
import sys
from pathlib import Path
from accelerate import debug_launcher

def main():
    from stock import arguments, gpt2, text
    from layup_hf import LayupTrainer
    args = arguments(Path(sys.argv[1]), max_steps=4)
    trainer = LayupTrainer(model=gpt2(), args=args, train_dataset=text())
    print("steps", trainer.train().global_step, args.world_size, flush=True)

if __name__ == "__main__":
    debug_launcher(main, num_processes=2)
"""


def test_workers_of_the_debug_launcher_train(tmp_path):
    script = tmp_path / "launched.py"
    script.write_text(LAUNCHED)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, script, tmp_path], env=environment, capture_output=True, text=True, timeout=200, check=True
    )
    assert done.stdout.count(" 4 2\n") == 2  # of two processes that write at the same time
