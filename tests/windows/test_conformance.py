"""What windows of every kind do alike."""

import functools
import gc
import threading

import psutil
import pytest
import torch
from fleet import Fleet, distant_part, open_fleet, wait_until
from reference import UNIT, Simulation, random_schedule
from torch import nn

from layup_hf.blocks import split_into_blocks
from layup_hf.ledger import effective_masses
from layup_hf.windows import NixlWindows

KINDS = {
    "shared": {"kind": "shared"},
    "nixl": {"kind": "nixl"},
    "bf16": {"kind": "nixl", "wire_dtype": "bf16"},
    "int8": {"kind": "nixl", "wire_dtype": "int8"},
    "through the host": {"kind": "nixl"},
    "mixed": {"kind": "auto", "hosts": ["a", "b", "a", "c"]},
}


@pytest.fixture(params=list(KINDS))
def kind(request, monkeypatch):
    if request.param == "through the host":  # as with blocks on a GPU that the network does not reach
        monkeypatch.setattr(NixlWindows, "open", functools.partial(NixlWindows.open, through_host=True))
    return request.param


@pytest.fixture
def make_fleet():
    fleets = []

    def make(kind, workers=3, **changes):
        options = {**KINDS[kind]}
        if "hosts" in options:
            options["hosts"] = options["hosts"][:workers]
        torch.manual_seed(workers)
        models = [nn.Sequential(*(nn.Linear(5, 5) for _ in range(3))) for _ in range(workers)]
        fleets.append(Fleet(models, **options, **changes))
        return fleets[-1]

    yield make
    for fleet in fleets:
        fleet.close()


class RoundingSimulation(Simulation):
    """Workers see each other's values in bf16."""

    def merge(self, worker, block):
        live = [[tensor.clone() for tensor in copies[block]] for copies in self.values]
        for other, copies in enumerate(self.values):
            if other != worker:
                for tensor in copies[block]:
                    tensor.copy_(tensor.bfloat16().float())
        super().merge(worker, block)
        for other, copies in enumerate(self.values):
            if other != worker:
                for tensor, old in zip(copies[block], live[other], strict=True):
                    tensor.copy_(old)


def offer_and_read(fleet, sender, receiver, block=0):
    """What the receiver sees of the sender's block when it has been offered."""
    fleet.run(("offer", sender, block, 2))
    fleet.wait_until_all_know()
    if (distant := fleet.distant[receiver]) is not None:
        distant.courier.accepts = lambda peer, index: (peer, index) == (sender, block)
    return wait_until(lambda: fleet.windows[receiver].read(sender, block), "the block")


def test_a_peer_reads_what_has_been_offered(kind, make_fleet):
    fleet = make_fleet(kind)
    for tensor in fleet.blocks[2][1].tensors:
        tensor.fill_(3.0)
    for receiver in (0, 1):
        seen = offer_and_read(fleet, 2, receiver, block=1)
        assert [tensor.shape for tensor in seen] == [tensor.shape for tensor in fleet.blocks[0][1].tensors]
        assert {tensor.dtype for tensor in seen} == {torch.bfloat16 if kind == "bf16" else torch.float32}
        assert all(bool((tensor == 3).all()) for tensor in seen)
        fleet.windows[receiver].release(2, 1)


@pytest.mark.parametrize("workers", [2, 4])
def test_the_engine_equals_the_simulation(kind, workers, make_fleet):
    """Bitwise; where what comes is rounded at random, but for that."""
    fleet = make_fleet(kind, workers)
    simulated = [[block.tensors for block in blocks] for blocks in fleet.blocks]
    simulation = (RoundingSimulation if kind == "bf16" else Simulation)(simulated)
    for operation in random_schedule(workers, 3, 90, seed=workers):
        fleet.run(operation)
        getattr(simulation, operation[0])(*operation[1:])
    fleet.wait_until_all_know()
    for worker, blocks in enumerate(fleet.blocks):
        ledger = fleet.windows[worker].ledger
        for block in blocks:
            for real, expected in zip(block.tensors, simulation.values[worker][block.index], strict=True):
                tolerance = 0.1 if kind == "int8" else 0.0  # weights are about 1 apart
                assert torch.allclose(real, expected, rtol=0, atol=tolerance), f"worker {worker}, {block}"
            assert ledger.own(block.index) == simulation.own[worker][block.index]
            assert ledger.untaken(block.index) == simulation.untaken(worker, block.index)
    held = effective_masses({worker: windows.ledger.account() for worker, windows in enumerate(fleet.windows)})
    assert held.sum(axis=1).tolist() == [workers * UNIT] * 3
    wait_until(lambda: (fleet.windows[0].ledger.masses() == held).all(), "masses of the others")


def test_what_was_offered_before_a_consensus_point_is_not_merged_after_it(kind, make_fleet):
    fleet = make_fleet(kind)
    fleet.run(("offer", 1, 0, 2))
    fleet.wait_until_all_know()
    if (distant := fleet.distant[0]) is not None:
        distant.courier.accepts = lambda peer, block: True
        wait_until(lambda: distant.staging.ready, "the block")
    accounts = {rank: windows.ledger.account() for rank, windows in enumerate(fleet.windows)}
    for windows in fleet.windows:
        windows.ledger.settle(accounts)
    before = [tensor.clone() for tensor in fleet.blocks[0][0].tensors]
    fleet.engines[0].merge(fleet.blocks[0][0])
    assert all(torch.equal(a, b) for a, b in zip(fleet.blocks[0][0].tensors, before, strict=True))
    fleet.wait_until_all_know()
    for windows in fleet.windows:
        wait_until(lambda w=windows: w.ledger.masses().tolist() == [[UNIT] * 3] * 3, "masses")
    for tensor in fleet.blocks[1][0].tensors:
        tensor.fill_(9.0)
    away = (offer_and_read(fleet, 1, 0)[0] - 9).abs().max()  # and what is offered now, is
    assert float(away) <= (0.5 if kind == "int8" else 0.0)


def test_an_excluded_peer_is_done_without(kind, make_fleet):
    fleet = make_fleet(kind)
    fleet.run(("offer", 2, 0, 2))
    fleet.run(("offer", 0, 0, 2))
    fleet.wait_until_all_know()
    fleet.gone.add(2)
    for rank in (0, 1):
        fleet.engines[rank].exclude(2)
        fleet.engines[rank].exclude(2)
        assert fleet.samplers[rank].count == 1
        assert [peer for peer, _ in fleet.windows[rank].ledger.pending(0)] == ([] if rank == 0 else [0])
    before = fleet.windows[0].ledger.account().own[0]
    fleet.run(("offer", 2, 1, 2))
    fleet.run(("merge", 1, 0))
    fleet.run(("offer", 1, 1, 2))
    fleet.run(("merge", 0, 1))
    accounts = {rank: fleet.windows[rank].ledger.account() for rank in (0, 1)}
    assert effective_masses(accounts).sum(axis=1).tolist() == [2 * UNIT] * 3
    assert fleet.windows[0].ledger.account().own[0] == before
    assert fleet.windows[0].ledger.pending(1) == []


def test_closing_twice_leaves_nothing_open(kind):
    models = [nn.Linear(4, 4) for _ in range(3)]
    options = {**KINDS[kind]}
    if "hosts" in options:
        options["hosts"] = options["hosts"][:3]
    Fleet(models, **options).close()  # what the libraries open once
    gc.collect()
    before = threading.active_count(), psutil.Process().num_fds(), psutil.Process().num_threads()
    fleet = Fleet(models, **options)
    fleet.run(("offer", 0, 0, 2))
    fleet.run(("merge", 1, 0))
    fleet.close()
    fleet.close()
    del fleet
    gc.collect()
    after = threading.active_count(), psutil.Process().num_fds(), psutil.Process().num_threads()
    assert all(now <= then for now, then in zip(after, before, strict=True)), (before, after)


def test_different_models_are_refused_on_every_worker(kind):
    options = {**KINDS[kind]}
    if "hosts" in options:
        options["hosts"] = options["hosts"][:3]
    before = set(threading.enumerate())
    errors = open_fleet([split_into_blocks(nn.Linear(4, width)) for width in (4, 5, 4)], **options)
    for error in errors:
        assert isinstance(error, ValueError)
        assert "Worker 1 has a different model" in str(error)
        assert "(5, 4)" in str(error)
    assert not set(threading.enumerate()) - before


@pytest.mark.parametrize("kind", ["nixl", "bf16", "int8", "mixed"])
def test_a_wrong_token_is_refused_on_every_worker(kind):
    options = {**KINDS[kind]}
    if "hosts" in options:
        options["hosts"] = options["hosts"][:3]
    before = set(threading.enumerate())
    errors = open_fleet([split_into_blocks(nn.Linear(4, 4)) for _ in range(3)], tokens=[b"a", b"b", b"a"], **options)
    for error in errors:
        assert isinstance(error, ValueError)
        assert "LAYUP_TOKEN" in str(error)
    assert not set(threading.enumerate()) - before


def test_only_peers_of_other_hosts_go_over_the_network(make_fleet):
    fleet = make_fleet("mixed", 4)
    assert [sorted(windows.distant.courier._peers) for windows in fleet.windows if hasattr(windows, "distant")] == [
        [1, 3],
        [1, 3],
    ]
    assert sorted(distant_part(fleet.windows[1]).courier._peers) == [0, 2, 3]
