"""Blocks that come in 8 or 4 bits: two couriers, one round after the other, over memory that the test may change."""

import copy
import ctypes
import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from layup_hf.blocks import split_into_blocks
from layup_hf.device import HOST
from layup_hf.ledger import Ledger, effective_masses
from layup_hf.ledger.mixing import UNIT, merge_weight
from layup_hf.windows import wire
from layup_hf.windows.coding import reach
from layup_hf.windows.courier import Courier
from layup_hf.windows.layout import BITS, Layout
from layup_hf.windows.pace import Pace
from layup_hf.windows.peers import Peer, Postmark
from layup_hf.windows.receiving import MARGIN, Receiving
from layup_hf.windows.serving import Serving
from layup_hf.windows.staging import Staging

TOKEN, JOB = b"t" * 32, b"j" * 16


class Memory:
    """Stands in for a `Transport`: a peer's memory is this process's own.

    Attributes:
        written: Bytes of each write from here.
        spoils: Is given the target of each write when it has been made.
    """

    device_number = 0

    def __init__(self, name, everybody):
        self.name, self.everybody, self.inbox, self.written = name, everybody, [], []
        self.spoils = lambda target: None
        everybody[name] = self

    def key(self, tensor):
        return b"key"

    def register(self, *args):
        pass

    forget = accept_key = disconnect = release = register

    def send(self, name, message):
        self.everybody[name].inbox.append((self.name, message))

    def receive(self):
        messages, self.inbox = self.inbox, []
        return messages

    def write(self, name, source, target, device):
        for (begin, size), (end, room) in zip(source, target, strict=True):
            assert size == room
            ctypes.memmove(end, begin, size)
        self.written.append(sum(size for _, size in source))
        self.spoils(target)
        return "written"

    def is_written(self, handle):
        return True


class Pair:
    """Two workers with models that are equal at first."""

    def __init__(self, model, wire_dtype, on_host=False):
        everybody = {}
        self.models = [model, copy.deepcopy(model)]
        self.blocks = [split_into_blocks(model) for model in self.models]
        self.count = len(self.blocks[0])
        self.transports = [Memory(f"w{rank}", everybody) for rank in (0, 1)]
        self.layouts = [Layout(blocks, wire_dtype, on_host=on_host) for blocks in self.blocks]
        self.receiving = [Receiving(layout) for layout in self.layouts]
        self.ledgers, self.staging, self.couriers = [], [], []
        for rank, transport in enumerate(self.transports):
            layout, other = self.layouts[rank], 1 - rank
            memory = np.zeros(Ledger.size(self.count, 2), np.uint64)
            self.ledgers.append(Ledger(memory, self.count, 2, rank, [other]))
            self.staging.append(Staging(layout, transport, HOST))
            parts = (self.staging[-1], self.receiving[rank], Serving(layout, transport, HOST), Pace(None))
            peers = [Peer(other, f"w{other}", f"w{other}")]
            postmark = Postmark(TOKEN, JOB, rank, 2, self.count)
            self.couriers.append(Courier(transport, self.ledgers[-1], peers, *parts, postmark))

    def rounds(self, number=20):
        for _ in range(number):
            for courier, ledger in zip(self.couriers, self.ledgers, strict=True):
                courier._reporter._next = 0.0  # say what is new at once
                courier._round()
                assert ledger is courier._ledger

    def fetch(self, block=0, units=1000):
        """Worker 1 offers a block to worker 0, which takes it: (what it saw, bytes that were written for it)."""
        before = len(self.transports[1].written)
        self.ledgers[1].offer(block, 0, units)
        self.rounds()
        slot = self.staging[0].take_ready(1, block)
        assert slot is not None
        seen = [tensor.clone() for tensor in slot.views[block]]
        self.ledgers[0].take(block, 1, units)
        self.staging[0].release(1, block)
        self.couriers[0].note_merged(1, block)
        self.rounds()
        return seen, self.transports[1].written[before:]

    def move(self, rank, far, seed=0):
        """Change what a worker has by so much."""
        random = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in self.models[rank].parameters():
                parameter += far * (torch.rand(parameter.shape, generator=random) * 2 - 1)


def model(width=96):
    torch.manual_seed(1)
    return nn.Linear(width, width)


@pytest.fixture(params=[*BITS, *(f"{wire_dtype} through the host" for wire_dtype in BITS)])
def pair(request):
    return Pair(model(), request.param.split()[0], on_host="host" in request.param)


def largest_error(pair, seen):
    return max(
        float((mine - theirs).detach().abs().max())
        for mine, theirs in zip(pair.blocks[1][0].tensors, seen, strict=True)
    )


def test_what_is_known_comes_in_few_bits(pair):
    layout = pair.layouts[0]
    whole, coded = layout.num_bytes[0], layout.coded_bytes[0]
    assert coded < whole * layout.bits / 32 + 64 + 8 * 5  # sums of 5 pieces, and what aligns the second tensor
    pair.move(1, 0.01)
    seen, written = pair.fetch()
    assert written == [whole]
    assert largest_error(pair, seen) == 0.0
    for number in range(5):
        pair.move(1, 0.001, seed=number)
        seen, written = pair.fetch()
        assert len(written) == 1
        assert written[0] <= coded + 64
        most = MARGIN[layout.bits] / reach(layout.bits)  # steps, of a distance that rounding has made larger
        assert 0 < largest_error(pair, seen) <= most / (1 - most) * 0.015
    assert pair.receiving[0].resent == 0
    assert "layup/resent_blocks" not in pair.couriers[0].figures()


def test_what_is_too_far_away_comes_again_as_it_is_and_nothing_else_is_seen(pair):
    layout = pair.layouts[0]
    pair.move(1, 0.01)
    pair.fetch()
    pair.move(1, 3.0)
    seen, written = pair.fetch()
    assert [size >= layout.num_bytes[0] for size in written] == [False] * 3 + [True]
    assert largest_error(pair, seen) == 0.0
    assert pair.couriers[0].figures()["layup/resent_blocks"] == 3
    seen, written = pair.fetch()
    assert [size >= layout.num_bytes[0] for size in written] == [False]  # by the new distance
    assert largest_error(pair, seen) <= MARGIN[layout.bits] * 3.1 / reach(layout.bits)


def test_what_is_known_of_other_blocks_and_peers_serves_for_all():
    torch.manual_seed(1)
    layers = nn.Sequential(*(nn.Linear(40, 40) for _ in range(3)))
    pair = Pair(layers, "int8")
    pair.move(1, 0.01)
    sizes = [pair.fetch(block)[1] for block in range(3)]
    whole = pair.layouts[0].num_bytes[0]
    assert [[size >= whole for size in written] for written in sizes] == [[True], [False], [False]]
    for block in (1, 2):
        seen = pair.fetch(block)[0]
        for mine, theirs in zip(pair.blocks[1][block].tensors, seen, strict=True):
            assert float((mine - theirs).detach().abs().max()) <= 4 * MARGIN[8] * 0.01 / reach(8)
    of_another = pair.receiving[0]._distances(1, 7)
    assert np.array_equal(of_another, pair.receiving[0]._known[1, 1])


def test_what_is_a_little_too_far_away_comes_again_with_longer_steps(pair):
    layout = pair.layouts[0]
    pair.move(1, 0.01)
    pair.fetch()
    pair.move(1, 0.1, seed=3)
    seen, written = pair.fetch()
    assert len(written) == 2
    assert max(written) < layout.num_bytes[0]
    assert 0 < largest_error(pair, seen) <= 4 * MARGIN[layout.bits] * 0.01 / reach(layout.bits)


def test_what_has_been_equal_and_begins_to_differ_comes_with_longer_steps(pair):
    """From a step of as many digits as fp32 has."""
    pair.fetch()
    pair.fetch()
    for power in (-4, -3, -2):
        pair.move(1, 10.0**power, seed=power + 9)
    _, written = pair.fetch()
    assert len(written) == 4
    bound = MARGIN[pair.layouts[0].bits] / reach(pair.layouts[0].bits)
    seen, written = pair.fetch()
    assert len(written) == 1
    assert written[0] < pair.layouts[0].num_bytes[0]
    assert 0 < largest_error(pair, seen) <= bound * 0.0112


@pytest.mark.parametrize("place", [0, 1, 2])
def test_what_has_changed_on_its_way_is_not_used(pair, place):
    """Sums, words of weights, or words of biases."""
    pair.move(1, 0.01)
    pair.fetch()
    plan = pair.layouts[0].coded_views(torch.empty(pair.layouts[0].coded_size, dtype=torch.uint8), 0)
    offset = [0, plan[0][1].sums.nbytes + 17, pair.layouts[0]._coded[0][1].words][place]

    def spoil(target):
        ctypes.c_uint8.from_address(target[0][0] + offset).value ^= 4
        pair.transports[1].spoils = lambda target: None

    pair.transports[1].spoils = spoil
    seen, written = pair.fetch()
    bound = MARGIN[pair.layouts[0].bits] / reach(pair.layouts[0].bits)
    assert len(written) == 2
    assert largest_error(pair, seen) <= 4 * bound * 0.01
    assert pair.receiving[0].resent == 1


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_no_number_comes_as_it_is(pair, bad):
    pair.move(1, 0.01)
    pair.fetch()
    with torch.no_grad():
        pair.models[1].bias[3] = bad
    for _ in range(3):
        seen, written = pair.fetch()
        assert written == [pair.layouts[0].num_bytes[0]]  # what cannot be coded is not sent at all
        assert torch.equal(seen[1].isfinite(), pair.models[1].bias.isfinite())
    with torch.no_grad():
        pair.models[1].bias[3] = 0.0
    sizes = [pair.fetch()[1] for _ in range(3)]
    assert sizes[-1][0] < pair.layouts[0].num_bytes[0]


def test_other_kinds_of_numbers_come_as_they_are(pair):
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.short = nn.Linear(40, 40), nn.Parameter(torch.randn(33, dtype=torch.bfloat16))
            self.empty = nn.Parameter(torch.empty(0))
            self.norm = nn.BatchNorm1d(5)

    pair = Pair(Mixed(), {8: "int8", 4: "int4"}[pair.layouts[0].bits])
    pair.move(1, 0.01)
    pair.fetch()
    pair.models[1].norm.num_batches_tracked.fill_(12345)
    with torch.no_grad():
        pair.models[1].short += 1
    seen, written = pair.fetch()
    assert len(written) == 1
    assert written[0] < pair.layouts[0].num_bytes[0] / 2
    for mine, theirs in zip(pair.blocks[1][0].tensors, seen, strict=True):
        assert mine.dtype == theirs.dtype
        if mine.dtype != torch.float32:
            assert torch.equal(mine, theirs)
        elif mine.numel():
            assert float((mine - theirs).abs().max()) < 0.02


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    bits=st.sampled_from(list(BITS)),
    moves=st.lists(st.tuples(st.integers(0, 1), st.integers(-9, 7)), min_size=1, max_size=8),
)
def test_whatever_happens_nothing_wrong_is_seen_and_mass_is_kept(bits, moves):
    """Both workers may go anywhere between two exchanges."""
    pair = Pair(model(20), bits)
    for number, (rank, power) in enumerate(moves):
        pair.move(rank, 10.0**power, seed=number)
        receiver, steps = pair.receiving[0], []
        prepare = receiver.prepare
        receiver.prepare = lambda slot, prepare=prepare, steps=steps: (prepare(slot), steps.append(slot.steps))[0]
        seen, _ = pair.fetch()
        del receiver.prepare
        last = steps[-1]  # what was asked for last is what is seen
        assert largest_error(pair, seen) <= (max(last) * (1 + 1e-3) if last else 0.0)
    masses = effective_masses({rank: ledger.account() for rank, ledger in enumerate(pair.ledgers)})
    assert masses.sum(axis=1).tolist() == [2 * UNIT] * pair.count


def test_a_merge_keeps_the_weighted_sum_but_for_rounding_which_is_none_in_the_mean(pair):
    """What a merge adds to the sum of mass times value is the mass of it all times its weight times what rounding
    changed; over many merges that goes to zero.
    """
    pair.move(1, 0.05)
    pair.fetch()
    own, untaken, units = UNIT, 0, UNIT // 2
    weight = merge_weight(units, own, untaken)
    x, y = (pair.blocks[rank][0].tensors[0].detach().double() for rank in (0, 1))
    total, repeats = torch.zeros_like(x), 60
    for _ in range(repeats):
        seen, _ = pair.fetch()
        merged = x + weight * (seen[0].double() - x)
        before = own * x + units * y  # the offered mass stands for the sender's value until it is taken
        total += ((own + units) * merged - before) / UNIT
    step = max(pair.receiving[0]._steps(1, 0))
    assert float(total.abs().max()) / repeats < 6 * 0.5 * weight * 1.5 * step / repeats**0.5
    assert abs(float(total.mean())) / repeats < 6 * 0.5 * weight * 1.5 * step / (repeats * x.numel()) ** 0.5


def test_requests_and_answers_that_make_no_sense_are_refused(pair):
    pair.move(1, 0.01)
    pair.fetch()

    def say(content, sequence):
        message = wire.encode(content, token=TOKEN, job=JOB, sender=1, receiver=0, sequence=sequence)
        pair.transports[0].inbox.append(("w1", message))
        pair.couriers[0]._round()

    count, written = pair.layouts[0].num_steps[0], len(pair.transports[0].written)
    say(wire.Request(7, 0, 0, 0, b"", 1, (1.0,) * (count + 1)), 1000)
    assert pair.couriers[0].refused == {"steps": 1}
    pair.receiving[0]._known.clear()
    pair.ledgers[1].offer(0, 0, 10)
    pair.couriers[1]._reporter._next = 0.0
    pair.couriers[1]._round()
    pair.couriers[0]._round()  # has asked for the block as it is
    peer = pair.couriers[0]._peers[1]
    say(wire.Answer(peer.requests, 0, is_written=False), 1001)
    assert pair.couriers[0].refused == {"steps": 1, "answer": 1}
    assert peer.request is not None
    assert len(pair.transports[0].written) == written


def test_a_worker_that_has_not_heard_is_answered_again(pair):
    pair.move(1, 0.01)
    pair.fetch()
    peer = pair.couriers[1]._peers[0]
    with torch.no_grad():
        pair.models[1].bias[3] = math.nan
    pair.fetch()
    number, block = peer.wanted_number, 0
    request = wire.Request(number + 1, block, 0, 0, b"", 1, (1.0,) * pair.layouts[1].num_steps[0])
    for sequence in (1000, 1001):
        message = wire.encode(request, token=TOKEN, job=JOB, sender=0, receiver=1, sequence=sequence)
        pair.transports[1].inbox.append(("w0", message))
        pair.transports[0].inbox.clear()
        pair.couriers[1]._round()
        answers = [pair.couriers[0]._postmark.decode(message).content for _, message in pair.transports[0].inbox]
        assert wire.Answer(number + 1, block, is_written=False) in answers
