"""The arithmetic of the methods that are compared."""

import copy
from types import SimpleNamespace

import pytest
import torch
from fleet import open_fleet
from torch import nn

from layup_hf.blocks import split_into_blocks
from layup_hf.gossip.topology import PeerSampler
from layup_hf.ledger.mixing import UNIT
from recipes.measure.compare import local
from recipes.measure.compare.gossip import EqualEngine, SnapshotEngine, WholeModelEngine, copy_of, one_block
from recipes.measure.compare.local import OuterSteps
from recipes.measure.compare.method import Setup
from recipes.measure.compare.methods import ring_bytes


def test_a_ring_sends_and_receives_all_but_a_worker_s_part_twice():
    assert ring_bytes(100, 1) == 0
    assert ring_bytes(100, 2) == 200
    assert ring_bytes(100, 4) == 300


@pytest.mark.parametrize("overlaps", [False, True])
def test_outer_steps_use_the_mean_change_at_once_or_one_synchronisation_later(monkeypatch, overlaps):
    """One parameter, which local steps lower by 1 in every period; the other worker changes nothing."""
    monkeypatch.setattr(local.dist, "all_reduce", lambda tensor, async_op: SimpleNamespace(wait=lambda: None))
    model, setup = nn.Linear(1, 1, bias=False), Setup(steps=6, period=2)
    callback = OuterSteps(setup, overlaps=overlaps, lr=0.5, momentum=0.5)
    args, state = SimpleNamespace(world_size=2), SimpleNamespace(global_step=0, max_steps=6)
    start = model.weight.item()
    callback.on_train_begin(args, state, None, model=model)
    weights = []
    for step in range(1, 7):
        with torch.no_grad():
            model.weight.sub_(0.5)
        state.global_step = step
        callback.on_step_end(args, state, None)
        weights.append(start - model.weight.item())
    # Velocities 0.5, 0.75, 0.875 at rate 0.5; in between, the local steps from the outer weights.
    outer = [0.0, 0.25, 1.0625] if overlaps else [0.25, 0.625, 1.0625]
    assert weights[1::2] == pytest.approx(outer, abs=1e-6)
    assert weights[::2] == pytest.approx([0.5, outer[0] + 0.5, outer[1] + 0.5], abs=1e-6)
    assert setup.reduced == 3 * 4


def models_and_blocks(count):
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1)) for _ in range(count)]
    return models, [one_block(split_into_blocks(model), model) for model in models]


def flat(block):
    return torch.cat([tensor.flatten() for tensor in block.tensors]).double()


def test_one_block_has_the_whole_model():
    models, blocks = models_and_blocks(1)
    assert [id(p) for p in blocks[0].parameters] == [id(p) for p in models[0].parameters()]
    assert blocks[0].parameter_names == tuple(name for name, _ in models[0].named_parameters())


def test_snapshots_are_merged_as_they_were_offered_and_the_sum_by_mass_is_kept():
    _, blocks = models_and_blocks(2)
    copies = [copy_of(block) for block in blocks]
    windows = open_fleet([[block] for block in copies])
    engines = [
        SnapshotEngine(
            [blocks[rank]],
            windows[rank],
            PeerSampler(rank, 2, 1),
            copies=[copies[rank]],
        )
        for rank in range(2)
    ]
    before = [flat(block) for block in blocks]
    engines[0].offer(blocks[0])
    with torch.no_grad():
        for parameter in blocks[0].parameters:
            parameter.add_(1.0)  # its next step, of which the peer is to see nothing
    engines[1].merge(blocks[1])
    assert torch.allclose(flat(blocks[1]), (before[0] / 2 + before[1]) / 1.5, atol=1e-6)
    ledger = windows[0].ledger
    assert (ledger.own(0), windows[1].ledger.own(0)) == (UNIT // 2, UNIT + UNIT // 2)
    assert int(ledger.masses().sum()) == 2 * UNIT


def test_pairwise_averages_have_equal_weights_and_masses_and_come_once_per_step():
    _, blocks = models_and_blocks(3)
    windows = open_fleet([[block] for block in blocks])
    engines = [EqualEngine([block], windows[rank], PeerSampler(rank, 3, 1)) for rank, block in enumerate(blocks)]
    before = [flat(block) for block in blocks]
    engines[0].offer(blocks[0])
    chosen = next(rank for rank in (1, 2) if windows[rank].ledger.pending(0))
    engines[chosen].merge(blocks[chosen])
    assert torch.allclose(flat(blocks[chosen]), (before[0] + before[chosen]) / 2, atol=1e-6)
    engines[0].offer(blocks[0])
    halfway = copy.deepcopy(flat(blocks[chosen]))
    engines[chosen].merge(blocks[chosen])  # forward has begun
    assert torch.equal(flat(blocks[chosen]), halfway)
    assert int(windows[0].ledger.masses().sum()) == 3 * UNIT
    assert abs(int(windows[0].ledger.own(0)) - UNIT) <= 2
    assert issubclass(EqualEngine, WholeModelEngine)
