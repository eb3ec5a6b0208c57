"""The engine against the simulation of all workers."""

import pytest
import torch
from fleet import Fleet, wait_until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reference import UNIT, Simulation, random_schedule
from torch import nn

from layup_hf.gossip.budget import ReadBudget
from layup_hf.gossip.engine import GossipEngine


def make_models(world_size, num_blocks=3, width=5):
    torch.manual_seed(world_size)
    return [nn.Sequential(*(nn.Linear(width, width) for _ in range(num_blocks))) for _ in range(world_size)]


def simulate(fleet):
    return Simulation([[block.tensors for block in blocks] for blocks in fleet.blocks])


def assert_same(fleet, simulation):
    for worker, blocks in enumerate(fleet.blocks):
        for block in blocks:
            for real, expected in zip(block.tensors, simulation.values[worker][block.index], strict=True):
                assert torch.equal(real, expected), f"worker {worker}, {block}"
            ledger = fleet.windows[worker].ledger
            assert ledger.own(block.index) == simulation.own[worker][block.index]
            assert ledger.untaken(block.index) == simulation.untaken(worker, block.index)


@settings(max_examples=25, suppress_health_check=list(HealthCheck))
@given(world_size=st.integers(2, 5), length=st.integers(1, 150), seed=st.integers(0, 2**31))
def test_engine_equals_simulation_bitwise(world_size, length, seed):
    fleet = Fleet(make_models(world_size))
    simulation = simulate(fleet)
    for operation in random_schedule(world_size, 3, length, seed):
        fleet.run(operation)
        getattr(simulation, operation[0])(*operation[1:])
    assert_same(fleet, simulation)
    for block in range(3):
        assert simulation.total(block) == world_size * UNIT
        assert [int(units) for units in fleet.windows[0].ledger.masses().sum(axis=1)] == [world_size * UNIT] * 3
    fleet.close()


def test_merges_alone_leave_the_mass_weighted_mean_unchanged():
    fleet = Fleet([model.double() for model in make_models(4)])
    simulation = simulate(fleet)
    before = simulation.mean(0)
    for operation in random_schedule(4, 3, 200, seed=3):
        if operation[0] != "step":
            fleet.run(operation)
            getattr(simulation, operation[0])(*operation[1:])
    assert_same(fleet, simulation)
    for old, new in zip(before, simulation.mean(0), strict=True):
        assert [float(x) for x in new] == pytest.approx([float(x) for x in old], rel=1e-12, abs=1e-12)


def test_a_merge_reads_the_live_block_not_the_one_that_was_offered():
    fleet = Fleet(make_models(2))
    sender, receiver = fleet.blocks[0][0], fleet.blocks[1][0]
    fleet.run(("offer", 0, 0, 1))
    for tensor in sender.tensors:
        tensor.fill_(7.0)
    expected = [torch.lerp(tensor, torch.full_like(tensor, 7.0), 1 / 3) for tensor in receiver.tensors]
    fleet.run(("merge", 1, 0))
    assert all(torch.equal(a, b) for a, b in zip(receiver.tensors, expected, strict=True))


def test_a_peer_that_has_not_taken_the_last_offer_is_not_offered_another():
    fleet = Fleet(make_models(3))
    for _ in range(3):
        fleet.run(("offer", 0, 0, 1))
    counts = fleet.engines[0].counts
    assert (counts["offers"], counts["skipped_offers"]) == (2, 1)
    assert [peer for peer, _ in fleet.windows[1].ledger.pending(0)] == [0]
    fleet.run(("merge", 1, 0))
    fleet.run(("offer", 0, 0, 1))
    assert counts["offers"] == 3


def test_a_single_unit_of_mass_is_not_offered():
    fleet = Fleet(make_models(2))
    fleet.windows[0].ledger.offer(0, 1, UNIT - 1)
    fleet.run(("merge", 1, 0))
    fleet.run(("offer", 0, 0, 1))
    assert fleet.windows[0].ledger.own(0) == 1
    assert fleet.engines[0].counts["skipped_offers"] == 1


def test_untaken_offers_count_in_the_weight():
    """Own mass alone would give 1/2 here, and lose most of worker 0's updates."""
    fleet = Fleet(make_models(3))
    mine = fleet.blocks[0][0].tensors[0]
    theirs = fleet.blocks[1][0].tensors[0].clone()
    fleet.run(("offer", 0, 0, 2))  # keeps 1/3, 2/3 untaken
    fleet.run(("offer", 1, 0, 2))  # 1/3 to each
    expected = torch.lerp(mine, theirs, 1 / 4)
    fleet.run(("merge", 0, 0))
    torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-7)


def test_figures_name_what_happened():
    fleet = Fleet(make_models(2))
    fleet.run(("offer", 0, 0, 1))
    fleet.run(("merge", 1, 0))
    figures = fleet.engines[1].figures()
    assert figures["layup/merges"] == 1
    assert figures["layup/bytes_read"] == fleet.blocks[0][0].num_bytes
    assert figures["layup/mass_max"] == 1.5
    assert figures["layup/mass_min"] == 0.5
    assert figures["layup/staleness"] == 0
    assert "layup/staleness" not in fleet.engines[1].figures()


def test_staleness_counts_the_steps_of_all_workers_since_the_peer_last_stepped():
    fleet = Fleet(make_models(3))
    fleet.run(("offer", 0, 0, 1))  # to 1; every offer follows a step
    for worker in (1, 2, 2):
        fleet.run(("offer", worker, 0, 1))
    fleet.run(("merge", 1, 0))
    assert fleet.engines[1].staleness == {0: 1, 3: 1}
    assert fleet.engines[0].staleness == {}


def test_figures_tell_the_median_staleness_since_they_were_last_asked_for():
    fleet = Fleet(make_models(3))
    engine = fleet.engines[1]

    def merge_after(steps):
        fleet.run(("offer", 0, 0, 1))  # to 1
        for _ in range(steps):
            fleet.run(("offer", 2, 1, 0))  # of another block: not counted
            fleet.run(("offer", 2, 0, 0))
        fleet.run(("merge", 1, 0))

    for steps in (1, 1, 4):
        merge_after(steps)
    assert engine.figures()["layup/staleness"] == 1
    merge_after(5)
    assert engine.figures()["layup/staleness"] == 5
    assert "layup/staleness" not in engine.figures()
    assert engine.staleness == {1: 2, 4: 1, 5: 1}  # of the whole run


def test_a_tensor_that_peers_no_longer_see_is_noticed():
    fleet = Fleet(make_models(2))
    fleet.engines[0].require_same_memory()
    parameter = fleet.blocks[0][1].parameters[0]
    parameter.data = parameter.data[:2].clone()
    with pytest.raises(RuntimeError, match=r"block '1' was replaced during training: \(5, 5\).* now \(2, 5\)"):
        fleet.engines[0].require_same_memory()


def test_a_block_is_offered_after_every_so_many_own_steps_of_it():
    fleet = Fleet(make_models(2))
    engine = GossipEngine(fleet.blocks[0], fleet.windows[0], fleet.samplers[0], offer_every=3)
    ledger = fleet.windows[1].ledger
    offered = []
    for _ in range(6):
        engine.offer(fleet.blocks[0][0])
        engine.offer(fleet.blocks[0][1])
        offered.append(bool(ledger.pending(0)))
        fleet.run(("merge", 1, 0))
    assert offered == [False, False, True, False, False, True]
    assert engine.counts["offers"] == 3  # block 1 has not been taken
    assert engine.counts["skipped_offers"] == 1
    assert ledger.staleness(0, 0) == 0  # all steps count, offered or not


def test_what_has_come_of_a_free_block_is_merged_at_the_next_moment():
    fleet = Fleet(make_models(2), "nixl")
    free = set()
    engine = GossipEngine(fleet.blocks[0], fleet.windows[0], fleet.samplers[0], is_free=free.__contains__)
    distant = fleet.distant[0]
    fleet.run(("offer", 1, 2, 1))
    distant.courier.accepts = lambda peer, block: True
    wait_until(lambda: distant.staging.ready, "the block")
    engine.merge(fleet.blocks[0][0])
    assert engine.counts["merges"] == 0  # block 2 is in use
    free.add(2)
    engine.merge(fleet.blocks[0][0])
    assert engine.counts["merges"] == 1
    assert fleet.windows[0].ledger.pending(2) == []
    fleet.close()


def test_a_block_that_has_not_come_yet_counts_for_nothing():
    fleet = Fleet(make_models(2), "nixl")
    fleet.run(("offer", 1, 0, 1))
    fleet.wait_until_all_know()
    before = [tensor.clone() for tensor in fleet.blocks[0][0].tensors]
    fleet.engines[0].merge(fleet.blocks[0][0])
    assert all(torch.equal(a, b) for a, b in zip(fleet.blocks[0][0].tensors, before, strict=True))
    assert not any(fleet.engines[0].counts.values())
    assert fleet.engines[0].staleness == {}
    assert len(fleet.windows[0].ledger.pending(0)) == 1
    fleet.close()


def test_figures_tell_what_came_over_the_network():
    fleet = Fleet(make_models(2), "nixl")
    fleet.run(("offer", 1, 0, 1))
    fleet.run(("merge", 0, 0))
    figures = fleet.engines[0].figures()
    assert figures["layup/megabytes_per_second"] > 0
    assert 0 < figures["layup/link_busy"] <= 1
    assert "layup/refused_messages" not in figures
    assert fleet.engines[0].figures()["layup/megabytes_per_second"] == 0
    fleet.close()


class Watched:
    """Windows that say what has been given back, and show blocks of some peers rounded, as they come over a network."""

    def __init__(self, windows, rounded=()):
        self._windows, self._rounded, self.released = windows, rounded, []

    def __getattr__(self, name):
        return getattr(self._windows, name)

    def read(self, peer, block):
        theirs = self._windows.read(peer, block)
        return [tensor.bfloat16() for tensor in theirs] if peer in self._rounded else theirs

    def release(self, peer, block):
        self.released.append(peer)
        self._windows.release(peer, block)


def watched(dtype=torch.float32, rounded=(), **options):
    """A fleet of four, of which three have offered a block, and the engine that is about to merge it."""
    fleet = Fleet([model.to(dtype) for model in make_models(4)])
    for peer in (1, 2, 3):
        fleet.run(("offer", peer, 0, 1))
    windows = Watched(fleet.windows[0], rounded)
    return fleet, windows, GossipEngine(fleet.blocks[0], windows, fleet.samplers[0], **options)


def test_a_pass_over_the_block_takes_merges_along_and_what_it_reads_is_kept_until_it_has():
    (fleet, windows, engine), (other, _, usual) = watched(), watched()
    block, own = fleet.blocks[0][0], windows.ledger.own(0)
    before = [tensor.clone() for tensor in block.tensors]
    with engine.merging(block) as offers:
        assert [offer.peer for offer in offers] == [1, 2, 3]
        assert all(torch.equal(a, b) for a, b in zip(block.tensors, before, strict=True))
        assert (windows.released, windows.ledger.own(0), engine.counts["merges"]) == ([], own, 0)
        for offer in offers:
            torch._foreach_lerp_(engine.mine[0], offer.theirs, offer.weight)
    usual.merge(other.blocks[0][0])
    assert all(torch.equal(a, b) for a, b in zip(block.tensors, other.blocks[0][0].tensors, strict=True))
    assert windows.released == [1, 2, 3]
    assert windows.ledger.own(0) == other.windows[0].ledger.own(0) > own
    assert engine.counts == usual.counts
    fleet.close()
    other.close()


@pytest.mark.parametrize("reason", ["bf16", "measured"])
def test_what_is_rounded_or_measured_is_merged_before_a_pass(reason):
    options = {"dtype": torch.bfloat16} if reason == "bf16" else {"budget": ReadBudget(3, 3)}
    fleet, windows, engine = watched(**options)
    block = fleet.blocks[0][0]
    before = [tensor.clone() for tensor in block.tensors]
    with engine.merging(block) as offers:
        assert offers == []
        assert windows.released == [1, 2, 3]
        assert not any(torch.equal(a, b) for a, b in zip(block.tensors, before, strict=True))
    assert engine.counts["merges"] == 3
    fleet.close()


def test_one_peers_block_that_came_rounded_leaves_the_others_to_the_pass():
    fleet, windows, engine = watched(rounded=(2,))
    block, own = fleet.blocks[0][0], windows.ledger.own(0)
    theirs = [[tensor.clone() for tensor in fleet.blocks[peer][0].tensors] for peer in (2, 1, 3)]
    units = dict(windows.ledger.pending(0))
    expected, mass = [tensor.clone() for tensor in block.tensors], own
    for peer, tensors in zip((2, 1, 3), theirs, strict=True):
        seen = [tensor.bfloat16().float() if peer == 2 else tensor for tensor in tensors]
        torch._foreach_lerp_(expected, seen, units[peer] / (mass + units[peer]))
        mass += units[peer]
    with engine.merging(block) as offers:
        assert [offer.peer for offer in offers] == [1, 3]
        assert windows.released == [2]
        for offer in offers:
            torch._foreach_lerp_(engine.mine[0], offer.theirs, offer.weight)
    torch.testing.assert_close(block.tensors, expected)
    assert windows.ledger.own(0) == mass
    fleet.close()
