"""Whether workers can exchange blocks: a tiny model is offered and merged by all that a run would use."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import nn
from torch.distributed import Store

from ..blocks import split_into_blocks
from ..gossip.engine import GossipEngine
from ..gossip.topology import PeerSampler
from ..ledger import Ledger
from ..ledger.ledger import Account, effective_masses
from ..ledger.mixing import UNIT
from ..windows import PeerWindows, open_windows
from .finding import Finding

_WAYS = {
    "shared": "peers read each other's memory in place",
    "nixl": "peers send each other blocks by NIXL",
    "shared and nixl": "peers on this machine read each other's memory in place, the others send blocks by NIXL",
}
_WIDTH = 64


def try_exchange(
    gather: Callable[[Any], list[Any]], rank: int, device: torch.device, token: bytes, seconds: float
) -> list[Finding]:
    """Open windows, offer each block to all neighbours, merge what they offer, and count. Collective.

    Args:
        gather: Collects one object from every worker.
        rank: This worker.
        device: Where its model is to be.
        token: The job's secret.
        seconds: How long a block may be on its way.

    Raises:
        Exception: Windows cannot be opened; with the reason, and the remedy where there is one.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)  # of this thread
    model = nn.Sequential(*(nn.Linear(_WIDTH, _WIDTH) for _ in range(2))).to(device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(rank)
    blocks = split_into_blocks(model)
    windows = open_windows("auto", blocks, rank, gather, token=token, job=b"doctor")
    try:
        world_size = len(gather(None))  # all are open
        sampler = PeerSampler(rank, world_size, remote=windows.ledger.remote)
        sampler.remote = []  # nobody has turns: every way is to be tried
        engine = GossipEngine(blocks, windows, sampler)
        for block in blocks:
            engine.offer(block)
        offered = gather(windows.ledger.account())
        late = _merge_all(engine, windows, offered, seconds)
        values = torch.cat([parameter.detach().flatten() for parameter in model.parameters()]).cpu()
        answers = gather((windows.ledger.account(), float(values.min()), float(values.max()), late))
        if late:
            remedy = "look for a firewall: all TCP ports must be open between the machines"
            who = ", ".join(map(str, late))
            return [Finding("exchange", f"what rank {who} offered has not come in {seconds:g} s", "error", remedy)]
        if any(its_late for *_, its_late in answers):
            return [Finding("exchange", "all blocks have come here, but not everywhere", "skipped")]
        return _judge(windows, {other: account for other, (account, *_) in enumerate(answers)}, rank, values)
    finally:
        windows.close()


def try_collective(
    gather: Callable[[Any], list[Any]],
    connect: Callable[[], Store],
    rank: int,
    device: torch.device,
    seconds: float,
) -> list[Finding]:
    """Form the process group that evaluations and checkpoints need, and add up a number. Collective."""
    world_size = len(gather(None))
    backend = "nccl" if device.type == "cuda" else "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    limit = timedelta(seconds=seconds)
    torch.distributed.init_process_group(backend, store=connect(), rank=rank, world_size=world_size, timeout=limit)
    total = torch.ones(1, device=device)
    torch.distributed.all_reduce(total)
    if int(total) != world_size:
        return [Finding("group", f"{backend} adds up {world_size} ones to {int(total)}", "error")]
    return [Finding("group", f"{backend} connects all workers (for evaluations and checkpoints)")]


def _merge_all(engine: GossipEngine, windows: PeerWindows, accounts: Sequence[Account], seconds: float) -> list[int]:
    """Merge until nothing is missing of what all have offered. Who has offered something that has not come."""
    ledger: Ledger = windows.ledger
    end = time.monotonic() + seconds
    while True:
        for block in range(len(engine.mine)):
            engine.take_offers(block)
        taken = ledger.account().taken
        late = [
            peer
            for peer, account in enumerate(accounts)
            if peer != ledger.rank and (account.offered[:, ledger.rank] != taken[:, peer]).any()
        ]
        if not late or time.monotonic() > end:
            return late
        time.sleep(0.001)


def _judge(windows: PeerWindows, accounts: dict[int, Account], rank: int, values: torch.Tensor) -> list[Finding]:
    """Mass is to be what it was, to the unit, and each weight a mean of what the workers had."""
    masses = effective_masses(accounts).sum(axis=1)
    if any(int(mass) != len(accounts) * UNIT for mass in masses):
        text = f"mass is not conserved: {[int(mass) for mass in masses]} instead of {len(accounts) * UNIT}"
        return [Finding("exchange", text, "error", "please report it")]
    lowest, highest = float(values.min()), float(values.max())
    is_mean = -1e-3 < lowest <= highest < len(accounts) - 1 + 1e-3
    if not is_mean or (len(accounts) == 2 and lowest <= rank <= highest):
        text = f"blocks that have come are wrong: after merging, rank {rank} has {lowest:g} to {highest:g}"
        return [Finding("exchange", text, "error", "please report it")]
    text = f"{_WAYS.get(windows.kind, windows.kind)}: offered, merged, mass exact"
    return [Finding("exchange", text)]
