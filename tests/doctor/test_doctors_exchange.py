"""The exchange that is tried before a run: over every way that blocks will go."""

import os
import threading
from unittest import mock

import torch
from fleet import LOOPBACK, gather_between_threads, together

from layup_hf.doctor.exchange import try_exchange
from layup_hf.ledger import Ledger
from layup_hf.windows import opening


def test_each_worker_offers_to_all_its_neighbours_on_other_hosts():
    workers, place, offers = 3, threading.local(), set()
    for_rank, offer = gather_between_threads(workers), Ledger.offer

    def note(ledger, block, peer, units):
        offers.add((ledger.rank, peer, block))
        offer(ledger, block, peer, units)

    def host():
        return place.host

    def action(rank):
        place.host = f"host {rank}"
        return try_exchange(for_rank(rank), rank, torch.device("cpu"), b"secret", 20.0)

    with (
        mock.patch.object(opening, "host", host),
        mock.patch.dict(os.environ, LOOPBACK),
        mock.patch.object(Ledger, "offer", note),
    ):
        found = together([lambda rank=rank: action(rank) for rank in range(workers)])
    assert [[finding.level for finding in findings] for findings in found] == [["ok"]] * workers, found
    pairs = {(sender, receiver) for sender in range(workers) for receiver in range(workers) if sender != receiver}
    assert {(sender, receiver) for sender, receiver, _ in offers} == pairs
