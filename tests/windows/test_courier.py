"""The courier, one round at a time, over a network that does what the test says."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from queues import FakeQueues
from torch import nn

from layup_hf.blocks import split_into_blocks
from layup_hf.device import HOST
from layup_hf.ledger import REPORT, Ledger
from layup_hf.ledger.mixing import UNIT
from layup_hf.windows import wire
from layup_hf.windows.courier import Courier
from layup_hf.windows.layout import Layout
from layup_hf.windows.pace import Pace
from layup_hf.windows.peers import Peer, Postmark
from layup_hf.windows.receiving import Receiving
from layup_hf.windows.serving import Serving
from layup_hf.windows.staging import Staging

TOKEN, JOB, BLOCKS = b"t" * 32, b"j" * 16, 4


class Network:
    """Stands in for a `Transport`: remembers what is sent, and fails towards peers that are `down`, except that writes
    to them which are `stuck` neither fail nor end.
    """

    device_number = 0

    def __init__(self):
        self.inbox, self.sent, self.writes, self.down, self.connected = [], [], [], set(), []
        self.registered, self.disconnected = set(), []

    def register(self, tensors):
        self.registered |= {tensor.data_ptr() for tensor in tensors}

    def forget(self, tensor):
        self.registered.remove(tensor.data_ptr())

    def key(self, tensor):
        return f"key {tensor.data_ptr()}".encode()

    def accept_key(self, key, name):
        pass

    def connect(self, address):
        self.connected.append(address)
        if address in self.down:
            raise ConnectionError("unreachable")
        return address

    def disconnect(self, name):
        self.disconnected.append(name)

    def send(self, name, message):
        if name in self.down:
            raise ConnectionError("gone")
        self.sent.append((name, message))

    def write(self, name, source, target, device):
        if name in self.down:
            raise ConnectionError("gone")
        self.writes.append({"to": name, "source": source, "target": target, "done": False, "stuck": False})
        return self.writes[-1]

    def is_written(self, handle):
        if handle["to"] in self.down and not handle["stuck"]:
            raise ConnectionError("gone")
        return handle["done"]

    def release(self, handle):
        pass

    def receive(self):
        messages, self.inbox = self.inbox, []
        return messages

    def close(self):
        pass


class Setup:
    """Worker 0 of `workers`, all of which are on other hosts, with the voices of the others."""

    def __init__(self, workers=3, wire_dtype="fp32", queues=HOST, on_host=False):
        self.blocks = blocks = split_into_blocks(nn.Sequential(*(nn.Linear(3, 3) for _ in range(BLOCKS))))
        peers = range(1, workers)
        self.network = Network()
        memory = np.zeros(Ledger.size(BLOCKS, workers), np.uint64)
        self.ledger = Ledger(memory, BLOCKS, workers, 0, peers)
        layout = Layout(blocks, wire_dtype, on_host=on_host)
        self.staging, self.serving = Staging(layout, self.network, queues), Serving(layout, self.network, queues)
        self.peers = {rank: Peer(rank, f"w{rank}", f"w{rank}") for rank in peers}
        postmark = Postmark(TOKEN, JOB, 0, workers, BLOCKS)
        peers = list(self.peers.values())
        parts = (self.staging, Receiving(layout), self.serving, Pace(None), postmark)
        self.courier = Courier(self.network, self.ledger, peers, *parts)
        self.numbers = itertools.count(1)

    def say(self, sender, content, **changes):
        """A message of a peer comes, and is acted upon."""
        about = {"token": TOKEN, "job": JOB, "sender": sender, "receiver": 0, "sequence": next(self.numbers)}
        message = wire.encode(content, **{**about, **changes})
        self.network.inbox.append((f"w{sender}", message))
        self.courier._round()
        return message

    def offer(self, sender, block, units=UNIT // 2, **fields):
        self.say(sender, report(block, offered=units, mass=UNIT, **fields))

    def heard(self, receiver, kind):
        """What of one kind has been sent to a peer, in order."""
        messages = [
            wire.decode(message, token=TOKEN, job=JOB, receiver=receiver, world_size=len(self.peers) + 1, num_blocks=4)
            for name, message in self.network.sent
            if name == f"w{receiver}"
        ]
        return [message.content for message in messages if isinstance(message.content, kind)]

    def answer(self, sender):
        """The peer has written what it was asked for last."""
        request = self.heard(sender, wire.Request)[-1]
        self.say(sender, wire.Answer(request.number, request.block))


def report(block, settled=0, **fields):
    row = np.zeros(1, dtype=REPORT)
    row["block"] = block
    for name, value in fields.items():
        row[name] = value
    return wire.Report(settled, 0, 0, 0.0, row)


def test_what_is_offered_is_asked_for_and_then_ready():
    setup = Setup()
    setup.offer(2, 1)
    (request,) = setup.heard(2, wire.Request)
    assert (request.number, request.block) == (1, 1)
    assert not setup.staging.ready
    setup.answer(2)
    assert list(setup.staging.ready) == [(2, 1)]


def test_a_slot_goes_to_the_block_that_was_merged_longest_ago():
    setup = Setup(workers=4)
    for block in (0, 1, 3):
        setup.courier.note_merged(1, block)
    setup.courier.note_merged(2, 2)
    setup.courier.note_merged(2, 0)
    setup.courier.accepts = lambda peer, block: False
    for sender in (1, 2, 3):
        for block in range(BLOCKS):
            setup.offer(sender, block)
    setup.courier.accepts = lambda peer, block: True
    setup.courier._round()
    asked = {rank: [request.block for request in setup.heard(rank, wire.Request)] for rank in (1, 2, 3)}
    assert sorted(itertools.chain(*asked.values())) == [1, 3]  # two slots, two blocks


def test_no_more_than_two_blocks_come_at_a_time_whatever_the_number_of_peers():
    sizes = {}
    for workers in (2, 8):
        setup = Setup(workers)
        for sender in range(1, workers):
            setup.offer(sender, 0)
            setup.offer(sender, 1)
        asked = sum(len(setup.heard(rank, wire.Request)) for rank in range(1, workers))
        assert asked == min(2, workers - 1)
        sizes[workers] = setup.staging.num_bytes
    assert sizes[2] == sizes[8] == 2 * setup.serving.layout.size


def test_what_has_been_taken_and_not_released_is_not_asked_for_again():
    setup = Setup(2)
    setup.offer(1, 0)
    setup.answer(1)
    setup.staging.take_ready(1, 0)
    setup.courier._round()
    assert len(setup.heard(1, wire.Request)) == 1


def test_a_peer_that_asks_is_written_to_and_told():
    setup = Setup()
    setup.say(1, wire.Request(1, 2, 4096, 0, b"key"))
    (write,) = setup.network.writes
    block = setup.serving.layout.live(2)
    assert write["source"] == [(tensor.data_ptr(), tensor.nbytes) for tensor in block]
    assert [address for address, _ in write["target"]] == [4096, 4096 + 64]
    assert setup.heard(1, wire.Answer) == []
    write["done"] = True
    setup.courier._round()
    assert setup.heard(1, wire.Answer) == [wire.Answer(1, 2)]
    setup.say(1, wire.Request(1, 2, 4096, 0, b"key"))  # it has not heard
    assert setup.heard(1, wire.Answer) == [wire.Answer(1, 2)] * 2
    assert len(setup.network.writes) == 1


def asks(wire_dtype, block):
    """For a block that does not go from where it lies: rounded, or in few bits."""
    return wire.Request(1, block, 4096, 0, b"key", 7, () if wire_dtype == "bf16" else (1.0, 1.0))


@pytest.fixture(params=["bf16", "int8", "int4"])
def rounded(request):
    return request.param


def test_blocks_that_are_rounded_go_to_one_peer_after_the_other(rounded):
    setup = Setup(wire_dtype=rounded)
    for rank in (1, 2):
        setup.say(rank, asks(rounded, rank))
    (first,) = setup.network.writes
    sizes = {"bf16": [18, 6], "int8": [64 + 8 + 3], "int4": [64 + 8 + 2]}  # a sum and its words, twice
    assert [size for _, size in first["source"]] == [size for _, size in first["target"]] == sizes[rounded]
    first["done"] = True
    setup.courier._round()
    setup.courier._round()
    assert [write["to"] for write in setup.network.writes] == ["w1", "w2"]


def test_a_buffer_that_an_excluded_peer_is_written_from_is_not_used_for_others(rounded):
    setup = Setup(wire_dtype=rounded)
    for rank in (1, 2):
        setup.say(rank, asks(rounded, rank))
    setup.courier.exclude(1)
    setup.courier._round()
    first, second = setup.network.writes
    assert first["source"][0] != second["source"][0]
    registered = len(setup.network.registered)
    first["done"] = second["done"] = True
    setup.courier._round()
    assert len(setup.network.registered) == registered - 1


def staged(**options):
    """Blocks on a device that the network does not reach; it copies when the test says so."""
    queues = FakeQueues()
    return Setup(queues=queues, on_host=True, **options), queues


def come(setup, sender, block, value):
    """The peer has written what it was asked for: every tensor of the block has this value."""
    slot = setup.peers[sender].request
    assert slot.block == block
    for tensor in setup.serving.layout.views(slot.buffer, block):
        tensor.fill_(value)
    setup.answer(sender)


def test_what_has_come_to_the_host_is_ready_when_the_device_has_it():
    setup, queues = staged()
    setup.offer(1, 2)
    come(setup, 1, 2, 3.0)
    assert not setup.staging.ready
    assert setup.courier._round()[1]  # something is under way
    assert len(setup.heard(1, wire.Request)) == 1  # and is not asked for again
    queues.run_copies()
    setup.courier._round()
    slot = setup.staging.take_ready(1, 2)
    assert all(bool((tensor == 3).all()) for tensor in slot.views[2])
    setup.staging.release(1, 2)
    assert not slot.is_idle  # before the device has merged it
    queues.run_computing()
    assert slot.is_idle


@pytest.mark.parametrize("end", ["excluded", "settled"])
def test_what_cannot_be_used_any_more_when_the_device_has_it_frees_its_slot(end):
    setup, queues = staged()
    setup.offer(1, 2)
    come(setup, 1, 2, 3.0)
    if end == "excluded":
        setup.courier.exclude(1)
    else:
        setup.ledger.settle({rank: setup.ledger.account() for rank in range(3)})
    setup.courier._round()
    queues.run_copies()
    setup.courier._round()
    assert not setup.staging.ready
    assert not setup.staging.is_bringing
    assert len(setup.staging._free) == 2


@pytest.mark.parametrize("wire_dtype", ["fp32", "bf16", "int8", "int4"])
def test_a_block_goes_when_the_host_has_it(wire_dtype):
    setup, queues = staged(wire_dtype=wire_dtype)
    steps = (1.0, 1.0) if wire_dtype.startswith("int") else ()
    setup.say(1, wire.Request(1, 2, 4096, 0, b"key", 7, steps))
    assert not setup.network.writes
    assert setup.network.registered >= {setup.serving._buffer.data_ptr()}
    queues.run_copies()
    setup.courier._round()
    (write,) = setup.network.writes
    begin, end = setup.serving._buffer.data_ptr(), setup.serving._buffer.data_ptr() + setup.serving._buffer.numel()
    offsets = [address - begin for address, _ in write["source"]]
    assert offsets == [address - 4096 for address, _ in write["target"]]
    assert all(begin <= address <= address + size <= end for address, size in write["source"])
    if not steps:
        sent = setup.serving.layout.views(setup.serving._buffer, 2)
        for there, here in zip(sent, setup.blocks[2].tensors, strict=True):
            torch.testing.assert_close(there, here.to(there.dtype))


def test_a_peer_that_asks_for_another_block_meanwhile_gets_that_one():
    setup, queues = staged()
    for number, block in ((1, 2), (2, 3)):
        setup.say(1, wire.Request(number, block, 4096, 0, b"key"))
    queues.run_copies()
    setup.courier._round()
    (write,) = setup.network.writes
    write["done"] = True
    setup.courier._round()
    assert setup.heard(1, wire.Answer) == [wire.Answer(2, 3)]
    sent = setup.serving.layout.views(setup.serving._buffer, 3)
    assert all(torch.equal(there, here) for there, here in zip(sent, setup.blocks[3].tensors, strict=True))


def test_the_slot_of_an_excluded_peer_is_put_aside():
    setup = Setup()
    setup.offer(1, 0)
    asked = setup.heard(1, wire.Request)[0].address
    setup.courier.exclude(1)
    for block in (0, 1, 2):
        setup.offer(2, block)
        setup.answer(2)
    addresses = {request.address for request in setup.heard(2, wire.Request)}
    assert len(addresses) == 2
    assert asked not in addresses
    assert setup.staging.num_bytes == 3 * setup.serving.layout.size


def test_a_peer_that_was_lost_is_connected_again_and_told_everything(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("layup_hf.windows.courier.time.monotonic", lambda: now[0])
    setup = Setup()
    setup.offer(1, 0)
    asked = setup.heard(1, wire.Request)[0].address
    setup.network.down.add("w1")
    setup.ledger.offer(0, 1, 10)
    now[0] += 1
    setup.courier._round()
    assert not setup.peers[1].is_connected
    for _ in range(100):
        now[0] += 0.1
        setup.courier._round()
    assert 4 <= len(setup.network.connected) <= 8  # less and less often
    setup.network.down.clear()
    setup.network.sent.clear()
    now[0] += 10
    setup.courier._round()
    setup.courier._round()
    assert [len(told.blocks) for told in setup.heard(1, wire.Report)] == [BLOCKS]
    assert [request.address for request in setup.heard(1, wire.Request)][:1] == [asked]
    assert setup.staging.num_bytes == 3 * setup.serving.layout.size
    setup.answer(1)
    assert not setup.staging.ready  # something may still come over the old connection: that slot rests
    setup.offer(1, 1)
    addresses = [request.address for request in setup.heard(1, wire.Request)]
    assert addresses[-1] != asked
    setup.answer(1)
    assert list(setup.staging.ready) == [(1, setup.heard(1, wire.Request)[-1].block)]
    now[0] += 11
    setup.offer(1, 2)
    setup.courier._round()
    assert setup.staging.num_bytes == 2 * setup.serving.layout.size  # none stands in for another any more


def test_a_connection_is_not_ended_before_what_is_under_way_on_it(monkeypatch):
    """NIXL would let the write go on, from and into memory that is used for something else meanwhile."""
    now = [1000.0]
    monkeypatch.setattr("layup_hf.windows.courier.time.monotonic", lambda: now[0])
    setup = Setup()
    setup.say(1, wire.Request(1, 0, 4096, 0, b"key"))
    (write,) = setup.network.writes
    write["stuck"] = True
    setup.network.down.add("w1")
    now[0] += 1
    setup.courier._round()
    assert not setup.peers[1].is_connected
    setup.courier._round()
    assert not setup.network.disconnected
    write["stuck"] = False
    setup.courier._round()
    assert setup.network.disconnected == ["w1"]
    assert setup.peers[1].write is None


def test_silent_peers_do_not_keep_the_slots_of_the_others(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("layup_hf.windows.courier.time.monotonic", lambda: now[0])
    setup = Setup(workers=4)
    for sender in (1, 2):
        setup.offer(sender, 0)
    setup.offer(3, 0)
    assert not setup.heard(3, wire.Request)
    now[0] += 3.5
    setup.offer(3, 1)
    setup.courier._round()
    assert len(setup.heard(3, wire.Request)) == 1
    setup.answer(3)
    setup.answer(1)  # it was not dead
    assert list(setup.staging.ready) == [(3, setup.heard(3, wire.Request)[0].block), (1, 0)]


def test_a_silent_peer_does_not_keep_the_buffer_from_the_others(monkeypatch, rounded):
    now = [1000.0]
    monkeypatch.setattr("layup_hf.windows.courier.time.monotonic", lambda: now[0])
    setup = Setup(wire_dtype=rounded)
    setup.say(1, asks(rounded, 0))
    now[0] += 3.5
    setup.say(2, asks(rounded, 0))
    setup.courier._round()
    first, second = setup.network.writes
    assert first["source"][0] != second["source"][0]
    registered = len(setup.network.registered)
    first["done"] = second["done"] = True
    setup.courier._round()
    assert len(setup.network.registered) == registered - 1
    assert len(setup.heard(1, wire.Answer)) == len(setup.heard(2, wire.Answer)) == 1


def test_reports_of_before_a_consensus_point_change_nothing_after_it():
    setup = Setup()
    accounts = {0: setup.ledger.account()}
    setup.ledger.settle(accounts)
    setup.offer(1, 0)
    assert setup.ledger.pending(0) == []
    setup.offer(1, 0, settled=1)
    assert setup.ledger.pending(0) == [(1, UNIT // 2)]
    assert not setup.courier.refused


def offered(ledger, units=100):
    ledger.offer(0, 1, units)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (report(0, taken=101), "taken mass"),
        (report(0, taken=2**64 - 1), "taken mass"),
        (report(0, offered=3 * UNIT + 1), "offered mass"),
        (report(0, offered=2**64 - 1), "offered mass"),
        (report(0, mass=3 * UNIT + 1), "mass"),
        (wire.Answer(1, 0), "number"),
    ],
)
def test_what_cannot_be_true_is_refused(content, reason, caplog):
    setup = Setup()
    offered(setup.ledger)
    before = setup.ledger.masses()
    for _ in range(3):
        setup.say(1, content)
    assert setup.courier.refused == {reason: 3}
    assert (setup.ledger.masses() == before).all()
    assert sum("refused a message" in record.message for record in caplog.records) == 1


def test_mass_that_has_been_taken_or_offered_does_not_go_back():
    setup = Setup()
    offered(setup.ledger)
    setup.say(1, report(0, taken=50, offered=70))
    setup.say(1, report(0, taken=49, offered=70))
    setup.say(1, report(0, taken=50, offered=69))
    assert setup.courier.refused == {"taken mass": 1, "offered mass": 1}
    assert setup.ledger.untaken(0) == 50
    assert setup.ledger.pending(0) == [(1, 70)]


def test_replays_strangers_and_excluded_peers_are_refused():
    setup = Setup()
    message = setup.say(1, report(0, offered=5))
    for name in ("w1", "w2", "w9"):
        setup.network.inbox.append((name, message))
    setup.courier._round()
    setup.courier.exclude(2)
    setup.say(2, report(0, offered=5))
    assert setup.courier.refused == {"sequence": 1, "rank": 2, "excluded": 1}
    assert setup.courier.figures()["layup/refused_messages"] == 4


bits64 = st.one_of(st.integers(0, 2**64 - 1), st.integers(0, 4 * UNIT), st.integers(2**64 - 100, 2**64 - 1))


steps = st.lists(st.sampled_from([0.0, 1e-3, 1.0, 1e38, float("nan")]), max_size=3).map(tuple)


@st.composite
def messages(draw):
    """Messages by one who knows the token, or does not, with any content; sometimes damaged."""
    rows = np.zeros(draw(st.integers(0, 3)), dtype=REPORT)
    for row in rows:
        row["block"] = draw(st.integers(0, 5))
        for name in ("offered", "taken", "mass", "steps", "stamp"):
            row[name] = draw(bits64)
    block = draw(st.integers(0, 5))
    content = draw(
        st.sampled_from(
            [
                wire.Report(draw(st.integers(0, 1)), draw(bits64), draw(bits64), draw(st.floats()), rows),
                wire.Request(draw(bits64), block, draw(bits64), 0, draw(st.binary(max_size=20))),
                wire.Request(draw(bits64), block, 4096, 0, b"key", draw(bits64), draw(steps)),
                wire.Answer(draw(bits64), block),
                wire.Answer(draw(bits64), block, is_written=False),
            ]
        )
    )
    message = wire.encode(
        content,
        token=draw(st.sampled_from([TOKEN, TOKEN, TOKEN, b"wrong"])),
        job=draw(st.sampled_from([JOB, JOB, JOB, b"k" * 16])),
        sender=draw(st.integers(0, 3)),
        receiver=draw(st.sampled_from([0, 0, 0, 1])),
        sequence=draw(st.integers(0, 40)),
    )
    if draw(st.integers(0, 5)) == 0:
        message = draw(st.sampled_from([message[:-3], message + b"..", b"", draw(st.binary(max_size=60))]))
    return draw(st.sampled_from(["w1", "w2", "who"])), message


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(st.lists(messages(), min_size=1, max_size=12), st.sampled_from(["fp32", "int8"]))
def test_whatever_comes_no_mass_is_made(received, wire_dtype):
    """Also by one who knows the secret: it may give and take only what exists, and what is refused changes nothing."""
    setup = Setup(wire_dtype=wire_dtype)
    for block in range(BLOCKS):
        setup.ledger.offer(block, 1, 1000)
    own = setup.ledger.account()
    for name, message in received:
        before = setup.ledger._offered.copy(), setup.ledger._taken.copy(), setup.ledger.masses()
        refused = sum(setup.courier.refused.values())
        setup.network.inbox.append((name, message))
        setup.courier._round()
        if sum(setup.courier.refused.values()) > refused:
            after = setup.ledger._offered, setup.ledger._taken, setup.ledger.masses()
            assert all((old == new).all() for old, new in zip(before, after, strict=True))
    account = setup.ledger.account()
    assert all((getattr(account, name) == getattr(own, name)).all() for name in ("own", "offered", "taken"))
    for block in range(BLOCKS):
        assert 0 <= setup.ledger.untaken(block) <= 1000
        assert all(units <= 3 * UNIT for _, units in setup.ledger.pending(block))
    assert bool((setup.ledger.masses() <= 3 * UNIT).all())


def test_a_failure_of_the_thread_is_raised_where_figures_are_asked_for(monkeypatch):
    setup = Setup()
    monkeypatch.setattr(setup.network, "receive", lambda: 1 / 0)
    setup.courier.start()
    setup.courier._thread.join(10)
    with pytest.raises(RuntimeError, match="exchange with other hosts has failed"):
        setup.courier.figures()
    setup.courier.close()


def test_bf16_rounds_and_integers_do_not():
    blocks = split_into_blocks(nn.Linear(3, 3))
    layout = Layout(blocks, "bf16")
    assert layout.converts
    assert layout.num_bytes == [2 * 12]
    assert not Layout(split_into_blocks(nn.Linear(3, 3).bfloat16()), "bf16").converts
    buffer = layout.new_buffer()
    torch._foreach_copy_(layout.views(buffer, 0), layout.live(0))
    assert torch.equal(layout.views(buffer, 0)[0].float(), blocks[0].tensors[0].bfloat16().float())
