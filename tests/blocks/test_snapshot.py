"""What blocks were stays readable while they change, and is copied only where they do."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from layup_hf.blocks import snapshot as module
from layup_hf.blocks import split_into_blocks
from layup_hf.blocks.snapshot import Snapshot, Snapshots, owners_of


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Pieces and tensors of a few bytes count."""
    monkeypatch.setattr(module, "PIECE", 48)
    monkeypatch.setattr(module, "_LEAST", 16)


class Trained:
    """Three layers in blocks of their own, one frozen, one with complex numbers, and what AdamW has of them."""

    def __init__(self):
        torch.manual_seed(0)
        self.model = nn.Sequential(*(nn.Linear(6, 5) for _ in range(4)))
        self.model[1].to(torch.bfloat16)
        self.model[2].weight = nn.Parameter(torch.randn(5, 6, dtype=torch.complex64))
        self.model[3].requires_grad_(False)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained)
        self.step(range(3))
        self.blocks = split_into_blocks(self.model)
        self.tensors = [*self.model.parameters(), *self.moments()]

    def moments(self):
        return [state[name] for state in self.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]

    def step(self, layers):
        for number in layers:
            for parameter in self.model[number].parameters():
                parameter.grad = torch.ones_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def take(self):
        snapshot = Snapshot(owners_of(self.model, self.blocks, self.optimizer.state))
        return snapshot, [snapshot.extent(t.untyped_storage(), 0, t.nbytes) for t in self.tensors]


def bytes_of(tensor):
    return bytes(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())


@given(st.lists(st.tuples(st.sampled_from(["read", "step", "merge", "agree"]), st.integers(0, 2)), max_size=40))
def test_it_is_what_it_was_in_whatever_order_it_is_read_and_changed(events):
    trained = Trained()
    wanted = [bytes_of(tensor) for tensor in trained.tensors]
    snapshot, extents = trained.take()
    found = [b""] * len(extents)

    def read_all():
        for number, extent in enumerate(extents):
            for piece in snapshot.read(extent):
                found[number] += bytes(piece)
                yield

    reading = read_all()
    for event, layer in events:
        if event == "read":
            next(reading, None)
        elif event == "step":
            snapshot.before_write(layer)
            trained.step([layer])
        elif event == "merge":
            snapshot.before_write(layer, weights_alone=True)
            with torch.no_grad():
                trained.model[layer].weight.mul_(0.5)
        else:
            snapshot.before_agreement()
            with torch.no_grad():
                for parameter in trained.model.parameters():
                    parameter.add_(1)
    for _ in reading:
        pass
    assert found == wanted


def test_nothing_is_copied_that_does_not_change_or_has_been_read():
    trained = Trained()
    snapshot, extents = trained.take()
    assert not any(extent.is_copied for extent in extents if extent.size >= 16)
    first = extents[0]
    for _ in snapshot.read(first):
        pass
    snapshot.before_write(0)
    trained.step([0])
    assert first.source is None
    copied = [extent for extent in extents if extent.is_copied and extent.owner is not None]
    assert {id(extent.owner.tensor) for extent in copied} <= {
        id(tensor) for p in trained.model[0].parameters() for tensor in (p, *trained.optimizer.state[p].values())
    }
    assert len(copied) == 5  # all of the layer's but the weight: both moments of two, and the bias


def test_a_step_waits_for_no_reader_that_does_something_with_a_piece():
    trained = Trained()
    snapshot, extents = trained.take()
    reading = snapshot.read(extents[0])
    next(reading)  # and the reader is busy with it
    snapshot.before_write(0)
    assert extents[0].is_copied


def test_buffers_and_what_nobody_is_known_to_own_are_copied_at_once():
    trained = Trained()
    snapshot, _ = trained.take()
    other = torch.zeros(100)
    extent = snapshot.extent(other.untyped_storage(), 8, 80)
    assert extent.is_copied
    other.fill_(1)
    assert b"".join(map(bytes, snapshot.read(extent))) == bytes(80)


@pytest.mark.parametrize("number", [0, -1])
def test_a_change_that_nobody_has_told_of_is_found_out(number):
    trained = Trained()
    snapshot, extents = trained.take()
    with torch.no_grad():
        trained.tensors[number].add_(1)
    with pytest.raises(RuntimeError, match="changed by something else than its block's step"):
        list(snapshot.read(extents[number]))
    block = 0 if number == 0 else 2
    snapshot.before_write(block)  # raises nothing in the middle of a step
    assert "changed by something else" in str(snapshot.failure)


def test_without_memory_for_a_copy_the_reader_fails_and_not_the_step(monkeypatch):
    def fail(*args, **kwargs):
        raise MemoryError("made on purpose")

    trained = Trained()
    snapshot, extents = trained.take()
    monkeypatch.setattr(Snapshot, "_copy", fail)
    snapshot.before_write(0)
    with pytest.raises(MemoryError, match="made on purpose"):
        list(snapshot.read(extents[0]))


def test_while_there_is_none_nothing_is_kept():
    snapshots = Snapshots()
    snapshots.before_step(0)
    snapshots.before_merge(0)
    snapshots.before_agreement()
    trained = Trained()
    snapshots.present, extents = trained.take()
    snapshots.before_merge(0)
    assert extents[0].is_copied
    snapshots.end()
    snapshots.end()
    snapshots.before_step(1)
    assert not extents[2].is_copied


def test_weights_that_two_blocks_share_a_storage_of_are_copied_at_once():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    both = torch.randn(2, 4, 4)
    for layer, weight in zip(model, both, strict=True):
        layer.weight.data = weight
    snapshot = Snapshot(owners_of(model, split_into_blocks(model), {}))
    assert snapshot.extent(both.untyped_storage(), 0, both.nbytes).is_copied
