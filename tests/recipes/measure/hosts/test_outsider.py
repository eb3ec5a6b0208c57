"""The outsider's tools work where nobody stops them: else that they do no harm would say nothing."""

import pickle
import random
import socket
from datetime import timedelta

import pytest
from torch.distributed import TCPStore

from layup_hf.fleet.job import Job, start_keeper
from recipes.measure.hosts import outsider
from recipes.measure.hosts.outsider import MARK, Planted, Target


@pytest.fixture
def store():
    """As a launcher keeps one, with a few keys."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20))
    for key in ("layup_hf/job", "layup_hf/clock", "key of somebody"):
        server.set(key, "1")
    return server


def target_at(tmp_path, *ports, seconds=5.0):
    target = Target(["127.0.0.1"], ports[0], tmp_path, seconds, random.Random(0))
    vars(target)["ports"] = [("127.0.0.1", port) for port in ports]
    return target


def test_what_listens_is_found(store):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.listen(5)
        ports = sorted([store.port, silent.getsockname()[1]])
        around = range(ports[0] - 5, ports[1] + 5) if ports[1] - ports[0] < 500 else ports
        assert set(ports) <= set(outsider.open_ports("127.0.0.1", around))
        assert outsider.connect("127.0.0.1", store.port) is not None
        assert outsider.connect("127.0.0.1", silent.getsockname()[1]) is None


def test_torchs_store_is_open_to_all(store, tmp_path):
    target = target_at(tmp_path, store.port)
    outsider.reading(target)
    assert target.notes["values read"] >= 3
    outsider.malformed(target)
    assert target.notes["values written"] > 20
    assert store.num_keys() > 20
    outsider.deleted_keys(target)
    assert not store.check(["layup_hf/clock"])
    assert not store.check(["layup_hf/job"])


def test_what_is_planted_is_run_by_who_unpickles_it(tmp_path):
    pickle.loads(pickle.dumps(Planted(tmp_path)))
    assert len(list(tmp_path.glob(f"{MARK}*"))) == 1


SECRET = bytes(range(32))


def test_a_guessed_secret_changes_nothing_in_the_store_of_a_job(tmp_path):
    host, port = start_keeper("127.0.0.1", SECRET, is_open=False)
    mine = Job(host, port, 2, "run", 5.0).connect(SECRET)
    mine.add("clock", 5)
    target = target_at(tmp_path, port, seconds=1)
    outsider.guessed_secret(target)
    assert target.notes["guesses"] > 3
    assert not target.notes["tells its secret"]
    assert mine.add("clock", 0) == 5


def test_without_a_token_the_store_of_a_job_tells_its_secret(tmp_path):
    host, port = start_keeper("127.0.0.1", SECRET, is_open=True)
    mine = Job(host, port, 2, "run", 5.0).connect(SECRET)
    target = target_at(tmp_path, port, seconds=0.3)
    outsider.guessed_secret(target)
    assert target.notes["tells its secret"]
    assert Job(host, port, 2, "run", 5.0).connect().token == SECRET
    assert mine.add("clock", 0) == 0
