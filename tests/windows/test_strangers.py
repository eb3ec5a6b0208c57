"""Real UCX clients that are none of the workers: what they could do, and what stops them."""

import contextlib
import json
import os
import subprocess
import sys

import pytest
import torch
from fleet import LOOPBACK, Fleet, closed_at_the_end, wait_until
from launching import ROOT, SCRIPTS
from torch import nn

from layup_hf.ledger import effective_masses
from layup_hf.ledger.mixing import UNIT
from layup_hf.windows import wire
from recipes.measure.common import lab as lab_module
from recipes.measure.common.lab import INTERFACE, Lab

ENVIRONMENT = {**os.environ, **LOOPBACK, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}


@contextlib.contextmanager
def start(host=None, **order):
    """On a host of a lab; unset: here. Ends with the context."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, str(SCRIPTS / "stranger.py")]
    if host is None:
        process = subprocess.Popen(command, env=ENVIRONMENT, **pipes)
    else:
        process = host.popen(command, env={**ENVIRONMENT, "UCX_NET_DEVICES": INTERFACE}, **pipes)
    print(json.dumps(order), file=process.stdin, flush=True)
    with process:
        try:
            yield process
        finally:
            process.kill()


def answer(process):
    return json.loads(process.stdout.readline())


@pytest.fixture(scope="module")
def lab():
    if (why := lab_module.missing()) is not None:
        pytest.skip(why)
    with Lab(hosts=1, outsiders=1) as made:
        yield made


@pytest.mark.parametrize("gets_in", [True, False])
def test_a_port_is_all_that_it_takes_to_write_into_a_worker_so_it_is_open_to_workers_alone(lab, gets_in):
    """The first case shows what UCX allows: neither an address of an agent nor a key is known to the stranger."""
    (own,), (other,) = lab.hosts, lab.outsiders
    admits = [other.address] if gets_in else []
    with start(own, do="listen", admits=admits) as worker:
        with start(other, do="write", to=own.address, **answer(worker)) as stranger:
            assert answer(stranger) == {"begins": True}
            if gets_in:
                assert answer(stranger) == {"written": True}
            else:  # it knocks for minutes
                with pytest.raises(subprocess.TimeoutExpired):
                    stranger.wait(4)
                stranger.kill()
        worker.stdin.write("done\n")
        worker.stdin.flush()
        assert answer(worker) == {"private": 7 * 64 if gets_in else 0}


@pytest.fixture
def make_fleet():
    yield from closed_at_the_end(Fleet)


def test_what_a_stranger_sends_under_a_workers_name_changes_nothing(make_fleet, monkeypatch, caplog):
    """It has learnt a worker's address, and what that worker has been sent. It sends that again, and what it made."""
    recorded = []
    encode = wire.encode
    monkeypatch.setattr(wire, "encode", lambda *a, **k: recorded.append(encode(*a, **k)) or recorded[-1])
    fleet = make_fleet([nn.Linear(4, 4) for _ in range(2)], kind="nixl", hosts=["a", "b"])
    fleet.run(("offer", 0, 0, 1))
    fleet.run(("merge", 1, 0))
    courier = fleet.distant[1].courier
    job = recorded[0][10:26]  # as it stands in the head
    content = wire.Report(settled=0, done=10**9, tokens=0, loss=0.0, blocks=fleet.windows[0].ledger.report_to(1))
    forged = encode(content, token=b"a guess", job=job, sender=0, receiver=1, sequence=1 << 40)
    messages = [*recorded[:20], forged, forged[:40], b"x", b"LYUP" * 20, os.urandom(300), bytes(1 << 16)]
    address = courier._transport.address().hex()
    name = next(iter(courier._by_name))
    with start(do="send", address=address, name=name, messages=[m.hex() for m in messages], times=500) as sender:
        assert answer(sender) == {"sent": 500}
    wait_until(lambda: sum(courier.refused.values()) >= 450, f"refusals: {courier.refused}")
    assert set(courier.refused) <= {"sequence", "signature", "length", "format", "rank", "job"}
    assert {"sequence", "signature", "length"} <= set(courier.refused)
    assert int(fleet.windows[1].ledger.done[0]) < 10**9
    with torch.no_grad():
        for block, value in zip(fleet.blocks, (1.0, 0.0), strict=True):
            for tensor in block[0].tensors:
                tensor.fill_(value)
    fleet.run(("offer", 0, 0, 1))
    fleet.run(("merge", 1, 0))
    assert all(0 < float(tensor.min()) < 1 for tensor in fleet.blocks[1][0].tensors)
    fleet.wait_until_all_know()
    accounts = {rank: windows.ledger.account() for rank, windows in enumerate(fleet.windows)}
    assert (effective_masses(accounts).sum(axis=1) == 2 * UNIT).all()
    assert caplog.text.count("refused a message") <= 2 * 6  # once for each reason and sender


def test_who_knows_the_secret_is_believed(make_fleet):
    fleet = make_fleet([nn.Linear(4, 4) for _ in range(2)], kind="nixl", hosts=["a", "b"])
    courier, ledger = fleet.distant[1].courier, fleet.windows[1].ledger
    rows = fleet.windows[0].ledger.report_to(1)
    report = wire.Report(settled=0, done=10**9, tokens=0, loss=0.0, blocks=rows[:0])
    job = courier._postmark._job
    message = wire.encode(report, token=b"secret", job=job, sender=0, receiver=1, sequence=1 << 40)
    with start(
        do="send",
        address=courier._transport.address().hex(),
        name=next(iter(courier._by_name)),
        messages=[message.hex()],
        times=1,
    ) as sender:
        assert answer(sender) == {"sent": 1}
    wait_until(lambda: int(ledger.done[0]) == 10**9, "what was said")
