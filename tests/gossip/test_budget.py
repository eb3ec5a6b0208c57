"""How many peers are read: what the time allows, in whole offers, spread over steps and blocks."""

from types import SimpleNamespace

import pytest
import torch
from fleet import Fleet
from hypothesis import given
from hypothesis import strategies as st
from test_gossip import make_models

from layup_hf.blocks.snapshot import Snapshots
from layup_hf.gossip.budget import LEAST, ReadBudget
from layup_hf.gossip.engine import GossipEngine
from layup_hf.trainer.exchange import Exchange
from layup_hf.trainer.options import Options
from layup_hf.trainer.state import RunState
from layup_hf.trainer.tracing import Tracing


class At:
    """A mark that is made at a time."""

    def __init__(self, seconds, done=True):
        self.seconds, self.done = seconds, done

    def is_done(self):
        return self.done

    def seconds_since(self, earlier):
        return self.seconds - earlier.seconds


def measured(cost, step, blocks=4, most=7, merged=1, steps=5):
    """After some steps of so many seconds, in which merging one peer of one block has taken `cost` seconds."""
    budget = ReadBudget(blocks, most)
    for number in range(steps):
        budget.begin_step(number * step)
        for block in range(blocks):
            budget.note_merge(block, merged, At(0.0), At(cost * merged))
    return budget


def test_one_peer_until_something_is_known():
    budget = ReadBudget(4, 7)
    budget.begin_step(0.0)
    budget.begin_step(1.0)
    assert budget.peers == 1
    assert [budget.due(block) for block in range(4)] == [1, 1, 1, 1]


@pytest.mark.parametrize("merged", [1, 3])
def test_merging_takes_a_fiftieth_of_a_step(merged):
    assert measured(cost=0.001, step=1.0, merged=merged).peers == pytest.approx(0.02 / 0.004)


def test_there_are_never_more_than_there_are_peers_nor_fewer_than_mix_at_all():
    assert measured(cost=1e-6, step=1.0).peers == 7
    assert measured(cost=1.0, step=1.0).peers == LEAST
    assert measured(cost=0.0, step=0.0).peers >= LEAST


def test_what_the_device_has_not_made_yet_is_measured_later():
    budget, end = ReadBudget(1, 7), At(0.001, done=False)
    budget.begin_step(0.0)
    budget.note_merge(0, 1, At(0.0), end)
    budget.begin_step(0.1)
    assert budget.peers == 1
    end.done = True
    budget.begin_step(0.2)
    assert budget.peers == pytest.approx(0.02 * 0.1 / 0.001)


def test_a_pause_between_two_steps_and_a_merge_that_was_interrupted_do_not_count():
    budget = measured(cost=0.001, step=1.0)
    before = budget.peers
    budget.note_merge(0, 1, At(0.0), At(5.0))
    budget.begin_step(1000.0)
    assert budget.peers == pytest.approx(before)


def test_blocks_that_have_not_been_merged_count_as_the_others():
    budget = ReadBudget(10, 7)
    budget.begin_step(0.0)
    budget.note_merge(3, 1, At(0.0), At(0.001))
    budget.begin_step(1.0)
    assert budget.peers == pytest.approx(0.02 / 0.01)


@given(cost=st.floats(1e-4, 1e-1), blocks=st.integers(1, 20), steps=st.integers(20, 60))
def test_offers_are_as_many_as_the_budget_gives_and_steps_cost_alike(cost, blocks, steps):
    budget = measured(cost=cost, step=1.0, blocks=blocks)
    offers = [[budget.due(block) for block in range(blocks)] for _ in range(steps)]
    for block in range(blocks):
        assert abs(sum(step[block] for step in offers) - budget.peers * steps) <= 1.001
    in_a_step = [sum(step) for step in offers]
    assert max(in_a_step) - min(in_a_step) <= blocks // 2 + 2


def test_the_engine_offers_what_the_budget_gives():
    fleet = Fleet(make_models(4))
    budget = measured(cost=0.01, step=1.0, blocks=3, most=3)  # two thirds of a peer
    engine = GossipEngine(fleet.blocks[0], fleet.windows[0], fleet.samplers[0], budget=budget)
    for _ in range(6):
        for block in fleet.blocks[0]:
            engine.offer(block)
        for worker in (1, 2, 3):
            for index in range(3):
                fleet.run(("merge", worker, index))
    assert engine.counts["offers"] == pytest.approx(6 * 3 * 2 / 3, abs=2)
    assert engine.counts["skipped_offers"] == 0
    assert engine.figures()["layup/peers_per_step"] == pytest.approx(2 / 3, abs=0.001)
    engine.exclude(3)
    engine.exclude(2)
    assert budget.most == 1
    fleet.close()


def test_merges_are_measured_where_they_are_made():
    fleet = Fleet(make_models(2))
    budget = ReadBudget(3, 1)
    engine = GossipEngine(fleet.blocks[0], fleet.windows[0], fleet.samplers[0], budget=budget)
    for _ in range(2):
        engine.resume()
        for block in fleet.blocks[1]:
            fleet.engines[1].offer(block)
        for block in fleet.blocks[0]:
            engine.merge(block)
    engine.resume()
    assert all(0 < cost < 1 for costs in budget._costs for cost in costs)
    assert all(len(costs) == 2 for costs in budget._costs)
    fleet.close()


@pytest.mark.parametrize(
    ("device", "peers", "is_found"), [("cpu", None, False), ("cuda", None, True), ("cuda", 2, False)]
)
@pytest.mark.parametrize("merge_at", ["boundary", "arrival"])
def test_how_many_are_read_is_found_out_on_gpus_unless_it_is_said(device, peers, is_found, merge_at):
    fleet = Fleet(make_models(3))
    on_device = [SimpleNamespace(tensors=[SimpleNamespace(device=torch.device(device))])]
    model = SimpleNamespace(blocks=on_device, is_free=lambda index: False, snapshots=Snapshots())
    host = SimpleNamespace(options=Options(peers_per_step=peers, merge_at=merge_at))
    exchange = Exchange(
        host,
        RunState(),
        members=SimpleNamespace(may_exchange=lambda: True),
        model=model,
        tracing=Tracing(host),
    )
    engine = exchange.make_engine(fleet.blocks[0], fleet.windows[0], fleet.samplers[0])
    assert ("layup/peers_per_step" in engine.figures()) == is_found
    engine.close()
    fleet.close()
