"""Jobs as others find them: in their own store, and in the launcher's."""

import json
import socket
import time
from datetime import timedelta
from functools import partial
from threading import Thread

import pytest
from keepers import TOKEN, Keeper
from torch.distributed import HashStore, TCPStore

from layup_hf.fleet.job import Job, launcher_store
from layup_hf.fleet.secret import given_token
from layup_hf.fleet.store import WORKERS

# ---- Jobs ----


@pytest.fixture
def job(monkeypatch):
    """One that has been announced in its own store and in the launcher's."""
    monkeypatch.setenv("LAYUP_TOKEN", "given")
    token, launcher = given_token(), HashStore()
    keeper = Keeper(token=token)
    job = Job(*keeper.place, workers=3, run="run", lease_seconds=7.5)
    job.announce(token, launcher)
    yield job, launcher
    keeper.close()


def test_a_job_is_found_where_it_was_announced(job):
    job, launcher = job
    assert Job.find(launcher) == job
    assert Job.at(f"127.0.0.1:{job.port}") == job


def test_a_store_without_a_job_has_none():
    assert Job.find(HashStore()) is None


FORGED = {"host": "127.0.0.1", "port": 1, "workers": 3, "run": "run", "lease_seconds": 7.5}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no json",
        json.dumps(FORGED),
        json.dumps(FORGED) + "0" * 32,
        json.dumps(FORGED) + "x" * 32,
        "[" * 100000 + "0" * 32,
        json.dumps([1]) + "0" * 32,
        json.dumps(FORGED | {"workers": "all"}) + "0" * 32,
        json.dumps(FORGED | {"more": 1}) + "0" * 32,
        "\xff" * 40,
    ],
)
def test_what_somebody_else_announces_is_not_believed(job, text, caplog):
    job, launcher = job
    launcher.set("job", text)
    assert Job.find(launcher) is None
    assert "is not believed" in caplog.text


def test_an_announcement_that_was_changed_is_not_believed(job):
    job, launcher = job
    text = launcher.get("job").decode()
    launcher.set("job", text.replace(f'"port": {job.port}', '"port": 1'))
    assert Job.find(launcher) is None


@pytest.mark.parametrize("place", ["", "host", "host:", "host:port", "7000", "127.0.0.1:70x", "127.0.0.1:65536"])
def test_what_is_no_place_is_refused(place):
    with pytest.raises(ValueError, match=rf"join='{place}' is not the address of a job's store: give HOST:PORT"):
        Job.at(place)


def test_a_place_where_nobody_listens_is_refused_soon():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{free.getsockname()[1]}"
        began = time.monotonic()
        with pytest.raises(ValueError, match=rf"join='{place}': no job answers there"):
            Job.at(place)
    assert time.monotonic() - began < 12


@pytest.mark.timeout(60)
@pytest.mark.parametrize("host", ["no-such-host.invalid", "two words", "a" * 300, "ä" * 80])
def test_a_host_whose_name_leads_nowhere_is_refused(host):
    with pytest.raises(ValueError, match=rf"join='{host}:29500': no job answers there"):
        Job.at(f"{host}:29500")


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
    with socket.create_server(("127.0.0.1", 0)) as listener:
        Thread(target=lambda: listener.accept()[0].sendall(b"220 mail ready" * 20), daemon=True).start()
        with pytest.raises(ValueError, match=r"What answers there is no store of layup_hf, or of another version"):
            Job.at(f"127.0.0.1:{listener.getsockname()[1]}")


def test_a_store_without_a_job_is_refused(lasting, monkeypatch):
    monkeypatch.setattr("layup_hf.fleet.store.given_token", lambda: TOKEN)
    with pytest.raises(ValueError, match=r"there is a store, but no job of layup_hf has been announced in it"):
        Job.at(f"127.0.0.1:{lasting.job.port}")


def test_a_job_is_running_as_long_as_it_has_workers(job):
    job, _ = job
    assert not job.is_running()
    job.connect().add(WORKERS, 1)
    assert job.is_running()


# ---- The launcher's store ----


@pytest.fixture
def launcher(monkeypatch):
    """The store of the process group, as a launcher keeps it."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    return store


def test_the_launchers_store_is_reached(launcher):
    launcher_store().set("key", "value")
    assert launcher_store().get("key") == b"value"


@pytest.mark.parametrize("name", ["MASTER_ADDR", "MASTER_PORT"])
def test_a_launcher_that_does_not_say_where_the_store_is_is_refused(name, launcher, monkeypatch):
    monkeypatch.delenv(name)
    with pytest.raises(ValueError, match=rf"{name}.* is not set.*`accelerate launch` or `torchrun`"):
        launcher_store()


def test_a_store_that_does_not_answer_is_named(monkeypatch):
    quickly = partial(TCPStore, timeout=timedelta(milliseconds=100))
    monkeypatch.setattr("layup_hf.fleet.job.TCPStore", lambda *args, timeout, **options: quickly(*args, **options))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    with pytest.raises(ConnectionError, match=r"127\.0\.0\.1:1 \(MASTER_ADDR and MASTER_PORT\) does not answer"):
        launcher_store()
