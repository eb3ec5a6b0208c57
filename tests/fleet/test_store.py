"""The store of a job, which a process of its own keeps for who knows the secret."""

import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from datetime import timedelta
from threading import Thread, Timer

import psutil
import pytest
from fleet import together, wait_until
from hypothesis import given, settings
from hypothesis import strategies as st
from keepers import TOKEN, Keeper
from launching import ROOT
from torch.distributed import DistNetworkError, HashStore, PrefixStore

from layup_hf.fleet import channel
from layup_hf.fleet.store import JobStore, WrongSecret

# ---- The keeper ----


@pytest.fixture
def keeper():
    keeper = Keeper()
    yield keeper
    keeper.close()


def has_ended(process):
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_the_keeper_listens_on_the_named_address_alone(lasting):
    listening = [c.laddr for c in lasting.process.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert listening == [lasting.place]
    assert lasting.job.host == "127.0.0.1"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", lasting.job.port), timeout=5)


def test_the_secret_is_not_to_be_seen_from_outside(lasting):
    assert TOKEN.strip() not in "".join((*lasting.process.cmdline(), *lasting.process.environ().values())).encode()


def test_all_who_connect_share_what_it_holds(lasting):
    lasting.store.set("key", "value")
    assert lasting.connect().get("key") == b"value"
    assert [store.add("count", 1) for store in (lasting.store, lasting.connect())] == [1, 2]


def operate(store):
    """Every operation, with what it gives."""
    store.set("a", "1")
    store.set("b", b"\x00\xff")
    yield [store.get("a"), store.get("b"), store.multi_get(["b", "a"])]
    yield [store.check(["a", "b"]), store.check(["a", "c"])]
    yield [store.add("n", 5), store.add("n", -7), store.get("n"), store.add("a", 1), store.get("a")]
    yield [store.compare_set("n", "-2", "7"), store.compare_set("n", "y", "z"), store.get("n")]
    store.set("n", "12")
    yield [store.add("n", 1), store.delete_key("n"), store.check(["n"]), store.add("n", 2)]
    yield [store.compare_set("new", "", "first"), store.compare_set("new", "", "second")]
    yield [store.compare_set("none", "some", "other"), store.check(["none"])]
    yield [store.delete_key("a"), store.delete_key("a"), store.check(["a"])]


def test_it_does_what_the_stores_of_torch_do(keeper):
    assert list(operate(keeper.connect())) == list(operate(HashStore()))


@pytest.mark.parametrize("value", ["x", "", "1e3", "-", "9" * 400, "9" * 5000, b"\xff\xfe", "[" * 100_000])
def test_who_counts_is_not_stopped_by_what_others_write(keeper, value):
    """Without a given secret anybody may be among those others."""
    worker = keeper.connect()
    keeper.connect().set("early", value)  # before anybody has counted
    assert worker.add("early", 1) in (1, (1 << 63) - 1)  # as far as a counter goes
    worker.add("clock", 5)
    with suppress(DistNetworkError):  # who writes what is no number loses its connection
        keeper.connect().set("clock", value)
    with suppress(DistNetworkError):
        keeper.connect().compare_set("clock", "5", value)
    assert worker.add("clock", 1) in (6, (1 << 63) - 1)


def test_a_counter_goes_no_further_than_64_bits(keeper):
    store = keeper.connect()
    for _ in range(4):
        store.add("up", 1 << 62)
        store.add("down", -(1 << 62))
    assert (store.add("up", 0), store.add("down", 0)) == ((1 << 63) - 1, -(1 << 63) + 1)


def test_a_prefix_of_torch_may_be_put_before(keeper):
    """As for a process group."""
    store = keeper.connect()
    prefixed = PrefixStore("group", store)
    prefixed.set("key", "value")
    assert prefixed.add("count", 3) == 3
    assert (store.get("group/key"), store.get("group/count")) == (b"value", b"3")
    prefixed.wait(["key"], timedelta(seconds=1))


def test_a_key_is_waited_for(keeper):
    store, other = keeper.connect(), keeper.connect()
    Timer(0.3, lambda: other.set("late", "value")).start()
    assert store.get("late") == b"value"
    with pytest.raises(DistNetworkError, match=r"Nobody has set never, late in the store of the job in time"):
        store.wait(["never", "late"], timedelta(seconds=0.05))


def test_much_may_be_said_at_once(keeper):
    store, much = keeper.connect(), bytes(range(256)) * 40000
    store.set("much", much)
    assert store.get("much") == much


def test_several_threads_may_use_one_connection(keeper):
    store = keeper.connect()
    numbers = together([lambda: [store.add("count", 1) for _ in range(100)] for _ in range(4)])
    assert sorted(itertools.chain(*numbers)) == list(range(1, 401))


def test_when_it_has_gone_every_call_says_so(keeper):
    store = keeper.connect()
    keeper.close()
    for _ in range(2):
        with pytest.raises(DistNetworkError, match="The store of the job does not answer"):
            store.add("count", 1)


# ---- Who does not know the secret ----


def test_who_has_another_secret_is_refused(lasting):
    with pytest.raises(WrongSecret, match=r"another secret than the job\. Set LAYUP_TOKEN to the job's"):
        JobStore(*lasting.place, bytes(32))
    assert lasting.store.add("still", 1) == 1


def test_who_has_none_is_told_that_the_job_has_one(lasting, monkeypatch):
    monkeypatch.delenv("LAYUP_TOKEN", raising=False)
    with pytest.raises(WrongSecret, match=r"only one of the job and this worker \(a worker that has none\)"):
        JobStore(*lasting.place)


def test_a_job_without_a_given_secret_tells_it_to_all(monkeypatch):
    keeper = Keeper(is_open=True)
    try:
        monkeypatch.delenv("LAYUP_TOKEN", raising=False)
        assert JobStore(*keeper.place).token == TOKEN
        monkeypatch.setenv("LAYUP_TOKEN", "some")
        with pytest.raises(WrongSecret, match=r"only one of the job and this worker \(a job that has none\)"):
            JobStore(*keeper.place)
    finally:
        keeper.close()


def test_a_store_that_does_not_know_the_secret_is_not_believed():
    """Somebody else's, at the place of the job's: it proves nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def pretend():
            connection, _ = listener.accept()
            with connection:
                connection.sendall(channel.Hello.make(None).pack())
                connection.recv(channel.REQUEST_BYTES)
                connection.sendall(b"x" * channel.ANSWER_BYTES)

        thread = Thread(target=pretend)
        thread.start()
        with pytest.raises(channel.Refused, match="does not know the job's secret"):
            JobStore(*listener.getsockname(), TOKEN)
        thread.join()


def speak(place, *messages, seconds=5.0):
    """Say something to the keeper that is no client; what it answers until it closes the connection."""
    heard = b""
    with socket.create_connection(place, timeout=seconds) as connection:
        for message in messages:
            with suppress(OSError):
                connection.sendall(message)
        with suppress(OSError):
            while part := connection.recv(1 << 16):
                heard += part
    return heard


@settings(max_examples=30, deadline=None)
@given(messages=st.lists(st.binary(min_size=1, max_size=200), min_size=1, max_size=3))
def test_what_is_no_proof_closes_the_connection(lasting, messages):
    messages.append(bytes(channel.REQUEST_BYTES))  # enough to be looked at
    assert speak(lasting.place, *messages)[channel.HELLO_BYTES :] in (channel.REFUSAL, b"")
    assert lasting.store.check(["nothing"]) is False


def recorded(place):
    """What a client sends that proves itself and then counts, and the hello that it was for."""
    with socket.create_connection(place, timeout=5) as connection:
        hello = channel.Hello.unpack(connection.recv(channel.HELLO_BYTES, socket.MSG_WAITALL))
        request, nonces = channel.request(TOKEN, hello)
        message = channel.Session.of(TOKEN, nonces).requests.seal(channel.pack((b"add", b"replayed", b"1")))
        connection.sendall(request)
        connection.recv(channel.ANSWER_BYTES, socket.MSG_WAITALL)
        connection.sendall(message)
        connection.recv(1000)
    return request, message


def test_what_was_recorded_says_nothing_again(lasting):
    request, message = recorded(lasting.place)
    before = lasting.store.get("replayed")
    assert speak(lasting.place, request, message)[channel.HELLO_BYTES :] in (channel.REFUSAL, b"")
    assert lasting.store.get("replayed") == before


@pytest.mark.parametrize(
    "change",
    [
        lambda message: message[:-1] + bytes([message[-1] ^ 1]),
        lambda message: message[:10] + bytes([message[10] ^ 1]) + message[11:],
        lambda message: b"\xff\xff\xff\xff" + message[4:],
    ],
    ids=["signature", "content", "length"],
)
def test_a_message_that_was_changed_on_its_way_ends_the_connection(lasting, change):
    with socket.create_connection(lasting.place, timeout=5) as connection:
        hello = channel.Hello.unpack(connection.recv(channel.HELLO_BYTES, socket.MSG_WAITALL))
        request, nonces = channel.request(TOKEN, hello)
        message = channel.Session.of(TOKEN, nonces).requests.seal(channel.pack((b"add", b"changed", b"1")))
        connection.sendall(request)
        connection.recv(channel.ANSWER_BYTES, socket.MSG_WAITALL)
        connection.sendall(change(message))
        assert connection.recv(1) == b""
    assert not lasting.store.check(["changed"])


def test_a_flood_of_connections_keeps_nobody_out(keeper):
    store = keeper.connect()
    flood = []
    try:
        for _ in range(600):
            connection = socket.socket()
            connection.setblocking(False)
            connection.connect_ex(keeper.place)
            flood.append(connection)
        assert store.add("count", 1) == 1
        assert keeper.connect().add("count", 1) == 2
        assert keeper.process.num_fds() < 300
    finally:
        for connection in flood:
            connection.close()


# ---- How long it is there ----

STARTER = """
from layup_hf.fleet.job import start_keeper
import time
print(*start_keeper("127.0.0.1", b"secret of the job".ljust(32), is_open=False), flush=True)
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
        store = JobStore(host, int(port), TOKEN)
        store.set("key", "value")
        os.killpg(starter.pid, signal.SIGKILL)
        starter.wait(60)
        assert not has_ended(process)
        assert os.getsid(process.pid) == process.pid
        assert JobStore(host, int(port), TOKEN).get("key") == b"value"
    finally:
        process.kill()


def test_it_ends_when_the_last_worker_has_gone(keeper):
    first, second = keeper.connect(), keeper.connect()
    del first
    time.sleep(6)
    assert second.add("count", 1) == 1
    del second
    wait_until(lambda: has_ended(keeper.process), "the keeper ends")


def test_it_ends_if_no_worker_comes():
    keeper = Keeper(idle_seconds=1.0)
    try:
        with socket.create_connection(keeper.place):  # which proves nothing
            wait_until(lambda: has_ended(keeper.process), "the keeper ends")
    finally:
        keeper.close()


def test_it_needs_no_library(lasting):
    """Its process stays with every job: it is small, and there at once."""
    assert lasting.process.memory_info().rss < 40 << 20


# ---- A group that was made without a launcher's store ----

LAUNCHED = """
import sys
from pathlib import Path
from accelerate import debug_launcher

def main():
    from stock import arguments, gpt2, text
    from layup_hf import LayupTrainer
    args = arguments(Path(sys.argv[1]), max_steps=4)
    trainer = LayupTrainer(model=gpt2(), args=args, train_dataset=text())
    steps = trainer.train().global_step
    Path(sys.argv[1], f"trained-{args.process_index}").write_text(f"{steps} steps of {args.world_size} workers")

if __name__ == "__main__":
    debug_launcher(main, num_processes=2)
"""


def test_workers_of_the_debug_launcher_train(tmp_path):
    script = tmp_path / "launched.py"
    script.write_text(LAUNCHED)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, script, tmp_path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    written = [(tmp_path / f"trained-{rank}").read_text() for rank in range(2)]
    assert written == ["4 steps of 2 workers"] * 2, done.stdout + done.stderr
