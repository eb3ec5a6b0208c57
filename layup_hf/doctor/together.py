"""What workers find out about each other: who is there, the secret, the interface, the network, the store."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.distributed import Store

from ..fleet.data import travels
from ..fleet.network import GPUDIRECT_VARIABLE, Network, allowed_rdma_devices, rdma_devices, reaches_gpus
from ..fleet.secret import TOKEN_VARIABLE, draw_token, given_token
from ..fleet.started import launches
from ..windows import opening
from ..windows.transport import Transport
from .finding import Finding
from .libraries import installed
from .link import Probe, Sink

_ASKS, _ASKING_SECONDS = 50, 1.0

Gather = Callable[[Any], list[Any]]


@travels
@dataclass(frozen=True)
class Card:
    """What a worker says of itself at first.

    Attributes:
        host: Names its machine and container.
        network: Names what its loopback interface reaches.
        node: Name of the machine, for people.
        process: Its number there.
        secret: A hash of LAYUP_TOKEN, if that is set.
        drawn: A secret to use if none is set.
        versions: Of its libraries.
    """

    host: str
    network: str
    node: str
    process: int
    secret: str | None
    drawn: bytes
    versions: dict[str, str] = field(default_factory=dict)

    @classmethod
    def mine(cls) -> Card:
        given = given_token()
        secret = hashlib.sha256(given).hexdigest() if given is not None else None
        drawn = draw_token() if given is None else b""
        network = Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/net")
        return cls(opening.host(), network, os.uname().nodename, os.getpid(), secret, drawn, installed())


def token_of(cards: Sequence[Card]) -> bytes:
    """What all workers sign with in this look: the job's secret where they have the same, else what rank 0 has drawn.

    Where they differ, that is a finding of its own, and must not hide what else there is.
    """
    given = given_token()
    if given is not None and len({card.secret for card in cards}) == 1:
        return given
    return hashlib.sha256(b"".join(card.drawn for card in cards)).digest()


def check_secret(cards: Sequence[Card]) -> list[Finding]:
    """Whether all workers have the same secret, where they are started by several launches."""
    secrets = [card.secret for card in cards]
    if len(set(secrets)) > 1:
        others = [rank for rank, secret in enumerate(secrets) if secret != secrets[0]]
        text = f"rank {', '.join(map(str, others))} has another {TOKEN_VARIABLE} than rank 0, or only one has any"
        return [Finding("secret", text, "error", f"set {TOKEN_VARIABLE} to the same secret for all workers")]
    if secrets[0] is not None:
        return [Finding("secret", f"{TOKEN_VARIABLE} is set, and the same everywhere")]
    if launches() == 1:
        return []
    text = f"{TOKEN_VARIABLE} is not set: who reaches the store can get the job's secret, and join or read the model"
    return [Finding("secret", text, "warning", f"set {TOKEN_VARIABLE} to the same secret for all workers")]


def check_interface(name: str | None, cards: Sequence[Card]) -> list[Finding]:
    """Which network interface would be used; with several launches, it is from here on."""
    towards = os.environ.get("MASTER_ADDR") or "127.0.0.1"
    if launches() == 1 and name is None:
        return []
    try:
        network = Network.find(name, towards)
    except ValueError as error:
        remedy = "name one with `network_interface`" if name is None else "choose one of these for `network_interface`"
        return [Finding("interface", str(error), "error", remedy)]
    if launches() > 1:
        network.use()
    text = f"{network.interface} ({network.address})"
    known = {name: {network.interface} for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "UCX_NET_DEVICES")}
    known["UCX_NET_DEVICES"].add(network.ucx_devices())
    others = {
        variable: value
        for variable, own in known.items()
        if (value := os.environ.get(variable)) is not None and value not in own
    }
    if others:
        text += f", but {', '.join(f'{variable}={value}' for variable, value in others.items())}"
        return [Finding("interface", text, "warning", "unset these variables, or make sure that they are meant")]
    if len({card.network for card in cards}) > 1 and network.address.startswith("127."):
        text += ": other machines do not reach this one by it"
        return [Finding("interface", text, "error", "give another address as `--main_process_ip`")]
    return [Finding("interface", text)]


def check_store(store: Store) -> list[Finding]:
    """How long the launcher's store takes to answer. In the background, a run asks it once or twice in a step."""
    times: list[float] = []
    end = time.monotonic() + _ASKING_SECONDS
    while len(times) < _ASKS and time.monotonic() < end:
        began = time.perf_counter()
        store.add("asked", 1)
        times.append(time.perf_counter() - began)
    milliseconds = 1000 * statistics.median(times)
    text = f"answers in {milliseconds:.2g} ms"
    if milliseconds > 100:
        remedy = "put rank 0 (`--main_process_ip`) on a machine that the others reach quickly"
        return [Finding("store", f"{text}: steps that are shorter than that will wait", "warning", remedy)]
    return [Finding("store", text, score=-milliseconds)]


def check_nixl(cards: Sequence[Card], device: torch.device) -> list[Finding]:
    """Whether NIXL works here, and what it would use. Needed between hosts alone."""
    is_needed = len({card.host for card in cards}) > 1
    if importlib.util.find_spec("nixl") is None:
        if not is_needed:
            return [Finding("nixl", "not installed; not needed here: it is for workers on several machines")]
        text = f"not installed on {os.uname().nodename}: workers on several machines exchange blocks through it"
        return [Finding("nixl", text, "error", "pip install 'layup_hf[nixl]'")]
    interface, ways = os.environ.get("UCX_NET_DEVICES"), os.environ.get("UCX_TLS")
    transport = Transport(f"doctor-{os.getpid()}", device)
    transport.close()
    rdma = allowed_rdma_devices()
    uses = f"RDMA ({', '.join(rdma)}) or TCP, whichever UCX finds faster" if rdma else "TCP"
    if not rdma:
        uses += ", as UCX_NET_DEVICES leaves out RDMA" if rdma_devices() else ", as there is no RDMA device"
    if ways or interface:
        given = [f"{name}={value}" for name, value in (("UCX_TLS", ways), ("UCX_NET_DEVICES", interface)) if value]
        uses += f" ({', '.join(given)})"
    if device.type == "cuda":
        way = "from GPU to GPU" if reaches_gpus() else f"through the host's memory, without {GPUDIRECT_VARIABLE}=1"
        uses += f", {way}"
    need = "" if is_needed else "; not needed here"
    return [Finding("nixl", f"{cards[0].versions.get('nixl', 'installed')}, would use {uses}{need}")]


def check_links(
    gather: Gather, cards: Sequence[Card], rank: int, interface: str | None, token: bytes, seconds: float
) -> list[Finding]:
    """Measure the network from each host to the next, by the first worker of each. Collective."""
    hosts = sorted({card.host for card in cards}, key=[card.host for card in cards].index)
    leaders = [next(other for other, card in enumerate(cards) if card.host == host) for host in hosts]
    place, failure, probe, round_trip, rate = None, "", None, 0.0, 0.0
    with contextlib.ExitStack() as stack:
        if rank in leaders:
            try:
                network = Network.find(interface, os.environ.get("MASTER_ADDR") or "127.0.0.1")
                place = Sink(network.address, token, seconds).place
            except (OSError, ValueError) as error:
                failure = str(error)
        places = gather(place)
        there: tuple[str, int] | None = places[_next(leaders, rank)] if rank in leaders else None
        reached = "{}:{}".format(*there) if there is not None else ""
        try:
            if there is not None:
                probe = stack.enter_context(Probe(there, token, seconds))
                round_trip = probe.round_trip()
        except OSError as error:
            failure, probe = f"{reached} is not reached: {error}", None
        gather(None)  # until here nobody has sent much
        try:
            rate = probe.rate() if probe is not None else 0.0
        except OSError as error:
            failure = f"{reached} has not taken what was sent: {error}"
        answers: list[tuple[float, float, str]] = gather((round_trip, rate, failure))
    if failures := [f"rank {leader}: {answers[leader][2]}" for leader in leaders if answers[leader][2]]:
        remedy = "look for a firewall: all TCP ports must be open between the machines; or name `network_interface`"
        return [Finding("network", "; ".join(failures), "error", remedy)]
    slowest = min(leaders, key=lambda leader: answers[leader][1])
    round_trip, rate, _ = answers[slowest]
    text = (
        f"{8 * rate / 1e6:.3g} Mbit/s and {1000 * round_trip:.2g} ms there and back, from {cards[slowest].node} to "
        f"{cards[_next(leaders, slowest)].node} by one TCP connection: {rate / 4e6:.2g} million parameters in fp32 a "
        "second"
    )
    return [Finding("network", text + (f" (the slowest of {len(leaders)} links)" if len(leaders) > 2 else ""))]


def _next(leaders: Sequence[int], rank: int) -> int:
    return leaders[(leaders.index(rank) + 1) % len(leaders)]


def marker(output_dir: Path) -> Path | None:
    """Leave an empty file in the output directory, if that exists."""
    file = output_dir / f".layup-doctor-{os.uname().nodename}-{os.getpid()}"
    try:
        file.touch()
    except OSError:
        return None
    return file


def check_shared_disk(gather: Gather, rank: int, output_dir: Path) -> list[Finding]:
    """Whether all workers see the output directory of rank 0. Collective."""
    file = marker(output_dir) if rank == 0 else None
    try:
        name = gather(file.name if file is not None else None)[0]
        sees = gather(name is None or (output_dir / name).exists())
    finally:
        if file is not None:
            file.unlink(missing_ok=True)
    if all(sees):
        return []
    others = ", ".join(str(other) for other, sees_it in enumerate(sees) if not sees_it)
    text = f"rank {others} has another {output_dir} than rank 0: its optimizer's state will not be in checkpoints"
    return [Finding("disk", text, "warning", "use a file system that all machines share, or accept that")]
