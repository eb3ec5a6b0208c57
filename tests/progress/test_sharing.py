"""Every sample goes to exactly one worker, whoever is slow, draws ahead, stops or resumes."""

import copy
import itertools
import json
import pickle
import random
from collections import Counter, deque
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from accelerate.data_loader import BatchSamplerShard, SeedableRandomSampler
from fleet import together
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, Sampler, SequentialSampler
from transformers.trainer_pt_utils import LengthGroupedSampler

from layup_hf.progress.ahead import Ahead
from layup_hf.progress.cursor import Cursor, Draw, FixedShares, position_of_shards
from layup_hf.progress.randomness import Checksum
from layup_hf.progress.sharing import SharedLoader
from layup_hf.progress.stream import SharedStream


class Loader:
    """As a `DataLoader` whose processes load `ahead` batches before they are asked for."""

    def __init__(self, batches, dataset, ahead, collate_fn=list):
        self.dataset, self.collate_fn = dataset, collate_fn
        self._batches, self._ahead = batches, ahead

    def __iter__(self):
        places = iter(self._batches)
        loaded = deque(itertools.islice(places, self._ahead))
        while True:
            loaded.extend(itertools.islice(places, 1))
            if not loaded:
                return
            yield self.collate_fn([self.dataset[place] for place in loaded.popleft()])


class Kind(NamedTuple):
    """How a worker takes its batches."""

    batch_size: int = 2
    accumulation: int = 1
    ahead: int = 0


def make_loader(samples, kind=Kind(), *, sampler=None, drop_last=False, seed=0, rank=0, world_size=1, loader=None):  # noqa: B008
    """A shared loader of the numbers below `samples`."""
    dataset = list(range(samples))
    return SharedLoader(
        loader or partial(Loader, dataset=dataset, ahead=kind.ahead),
        SequentialSampler(dataset) if sampler is None else sampler,
        batch_size=kind.batch_size,
        accumulation=kind.accumulation,
        drop_last=drop_last,
        seed=seed,
        rank=rank,
        world_size=world_size,
    )


class Use(NamedTuple):
    """One optimizer step."""

    epoch: int
    rank: int
    batches: list
    is_taken_over: bool


class Late(Executor):
    """Gets every answer at once and has none in time, so that as many are drawn ahead as may be."""

    class Answer(Future):
        def done(self):
            return False

    def submit(self, ask):
        answer = Late.Answer()
        answer.set_result(ask())
        return answer


class Workers:
    """Workers that take batches as the training loop does, moved one by one.

    A move ends in the middle of a step ("batch"), after it ("update"), when there is nothing to do before the others
    have come as far ("waiting"), or when the worker has ended (None).
    """

    def __init__(self, loaders, *, epochs=1, position=None, meets=False, store=None, ahead=False):
        store = store or dist.HashStore()
        position = json.loads(json.dumps(position or {"epoch": 0, "drawn": {}, "not_begun": []}))
        least = min(loader.draw_size for loader in loaders)
        for rank, loader in enumerate(loaders):
            loader.cursor = Cursor(store, rank, len(loaders), position, most=least)
            if ahead:
                loader.cursor.draw_ahead(store, lambda ask: Ahead(ask, Late(), most=3))
        self.loaders = loaders
        self.used = []
        self.epoch = [position["epoch"]] * len(loaders)
        self._epochs, self._meets = epochs, meets
        self._latest = [None] * len(loaders)
        self._work = [self._worker(rank) for rank in range(len(loaders))]

    def move(self, rank):
        self._latest[rank] = next(self._work[rank], None)
        return self._latest[rank]

    def take_step(self, rank):
        """Move a worker to the end of its step, or of its next one."""
        while self.move(rank) == "batch":
            pass

    def stop(self, rank):
        """Move a worker to where it could meet the others."""
        if self._latest[rank] == "batch":
            self.take_step(rank)

    def run(self, *ranks):
        """Move these workers in turn until all have ended or wait."""
        while any([self.move(rank) in ("batch", "update") for rank in ranks]):
            pass

    def run_all(self, schedule, moves=None):
        """Move workers in a random order, `moves` times or until all have ended."""
        running = list(range(len(self.loaders)))
        weights = [schedule.choice([0.02, 1, 1, 5]) for _ in running]
        for _ in range(moves) if moves is not None else itertools.count():
            if not running:
                return
            (rank,) = schedule.choices(running, [weights[rank] for rank in running])
            if self.move(rank) is None:
                running.remove(rank)

    def position(self):
        """Where in the data all are, once they meet."""
        for rank in range(len(self.loaders)):
            self.stop(rank)
        first, last = min(self.epoch), max(self.epoch)
        not_begun = [draw for loader in self.loaders for draw in loader.not_begun()]
        positions = [loader.cursor.position(range(first, last + 1), not_begun) for loader in self.loaders]
        assert positions == positions[:1] * len(positions)
        return {"epoch": first, **positions[0]}

    def samples(self, epoch=0):
        return Counter(sample for use in self.used if use.epoch == epoch for batch in use.batches for sample in batch)

    def _worker(self, rank):
        loader = self.loaders[rank]
        for epoch in range(self.epoch[rank], self._epochs):
            yield from self._use(rank, loader.updates(epoch), False)
            while True:
                is_finished = loader.is_finished(epoch)
                yield from self._use(rank, loader.given_up(epoch), True)
                if is_finished or not (self._meets or epoch + 1 == self._epochs):
                    break
                yield "waiting"
            self.epoch[rank] = epoch + 1

    def _use(self, rank, updates, is_taken_over):
        for update in updates:
            use = Use(self.epoch[rank], rank, [], is_taken_over)
            self.used.append(use)
            for batch in update:
                use.batches.append(batch)
                yield "batch"
            yield "update"


def assert_updates_fit(workers):
    for use in workers.used:
        loader = workers.loaders[use.rank]
        assert use.batches
        assert all(0 < len(batch) <= loader.batch_size for batch in use.batches)
        if not use.is_taken_over:
            assert len(use.batches) <= loader.accumulation


kinds = st.builds(Kind, st.integers(1, 5), st.integers(1, 3), st.integers(0, 7))
fleets = st.lists(kinds, min_size=1, max_size=5)


def like(workers):
    """Workers of one batch size, which draw ahead more or less."""
    return st.builds(
        lambda kind, aheads: [kind._replace(ahead=ahead) for ahead in aheads],
        kinds,
        st.lists(st.integers(0, 7), min_size=1, max_size=workers),
    )


# ---- Exactly once ----


@settings(max_examples=150)
@given(
    fleet=fleets, samples=st.integers(0, 60), epochs=st.integers(1, 3), meets=st.booleans(), seed=st.integers(0, 2**32)
)
def test_every_sample_goes_to_exactly_one_worker(fleet, samples, epochs, meets, seed):
    workers = Workers([make_loader(samples, kind) for kind in fleet], epochs=epochs, meets=meets)
    workers.run_all(random.Random(seed))
    for epoch in range(epochs):
        assert workers.samples(epoch) == Counter(range(samples))
    assert_updates_fit(workers)
    assert not any(loader.not_begun() for loader in workers.loaders)


@settings(max_examples=100)
@given(fleet=like(5), samples=st.integers(0, 60), drop_last=st.booleans(), seed=st.integers(0, 2**32))
def test_workers_with_the_same_batches_cut_an_epoch_as_one_would(fleet, samples, drop_last, seed):
    workers = Workers([make_loader(samples, kind, drop_last=drop_last) for kind in fleet])
    workers.run_all(random.Random(seed))
    batch_size, accumulation, _ = fleet[0]
    batches = [list(range(start, min(start + batch_size, samples))) for start in range(0, samples, batch_size)]
    if drop_last and samples % batch_size:
        batches.pop()
    updates = [batches[start : start + accumulation] for start in range(0, len(batches), accumulation)]
    assert sorted(use.batches for use in workers.used) == updates
    assert max(1, len(updates)) == workers.loaders[0].updates_per_epoch


@settings(max_examples=100)
@given(fleet=fleets, samples=st.integers(0, 60), seed=st.integers(0, 2**32))
def test_no_update_is_larger_than_a_step_of_the_worker_that_uses_it(fleet, samples, seed):
    """The loop takes `accumulation` batches out of an update; more would be lost."""
    workers = Workers([make_loader(samples, kind) for kind in fleet])
    workers.run_all(random.Random(seed))
    for use in workers.used:
        assert len(use.batches) <= workers.loaders[use.rank].accumulation


@settings(max_examples=100)
@given(fleet=fleets, samples=st.integers(0, 60), seed=st.integers(0, 2**32))
def test_no_update_is_empty_and_no_batch_short_where_the_last_are_dropped(fleet, samples, seed):
    workers = Workers([make_loader(samples, kind, drop_last=True) for kind in fleet])
    workers.run_all(random.Random(seed))
    for use in workers.used:
        assert use.batches
        assert all(len(batch) == workers.loaders[use.rank].batch_size for batch in use.batches)
    assert set(workers.samples().values()) <= {1}


def test_what_is_dropped_is_less_than_a_batch_wherever_an_earlier_run_stopped():
    loader = make_loader(15, Kind(4), drop_last=True)
    workers = Workers([loader], position={"epoch": 0, "drawn": {0: 6}, "not_begun": []})
    workers.run(0)
    assert [use.batches for use in workers.used] == [[[6, 7, 8, 9]], [[10, 11, 12, 13]]]


def test_a_worker_that_comes_for_more_often_gets_more():
    workers = Workers([make_loader(20), make_loader(20)])
    for _ in range(3):
        for rank in (0, 0, 0, 0, 1):
            workers.take_step(rank)
    assert Counter(use.rank for use in workers.used) == {0: 8, 1: 2}
    assert workers.samples() == Counter(range(20))


def test_batches_are_handed_out_in_the_order_of_the_epoch():
    workers = Workers([make_loader(12, Kind(2, 2)), make_loader(12, Kind(1, 1))])
    for rank in (0, 1, 1, 0):
        workers.take_step(rank)
    assert [use.batches for use in workers.used] == [[[0, 1], [2, 3]], [[4]], [[5]], [[6, 7], [8, 9]]]


def test_real_threads_share_an_epoch_through_a_real_store():
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    used = [[] for _ in range(3)]

    def work(rank):
        store = dist.TCPStore("127.0.0.1", server.port, is_master=False)
        loader = make_loader(101, Kind(rank + 1, 2, ahead=3 * rank), sampler=RandomSampler(range(101)))
        loader.cursor = Cursor(dist.PrefixStore("run", store), rank, 3)
        for epoch in range(2):
            is_finished = False
            for update in loader.updates(epoch):
                used[rank] += [(epoch, sample) for batch in update for sample in batch]
            while not is_finished:
                is_finished = loader.is_finished(epoch)
                for update in loader.given_up(epoch):
                    used[rank] += [(epoch, sample) for batch in update for sample in batch]

    assert together([partial(work, rank) for rank in range(3)]) == [None] * 3
    assert Counter(itertools.chain(*used)) == Counter(itertools.product(range(2), range(101)))


def test_processes_that_load_ahead_share_an_epoch():
    """Of a real `DataLoader`; the batches it makes are those that it would make anyway."""
    dataset = torch.arange(50)
    loaders = [
        make_loader(50, Kind(3, 2), loader=lambda b: DataLoader(dataset, batch_sampler=b, num_workers=2))
        for _ in range(2)
    ]
    workers = Workers(loaders)
    workers.take_step(0)  # and then stops, with four batches ahead
    workers.run(1)
    assert len(workers.loaders[0].not_begun()) == 2
    workers.run(0, 1)
    assert Counter(int(sample) for sample in workers.samples().elements()) == Counter(range(50))
    assert_updates_fit(workers)


# ---- Slow workers ----


@settings(max_examples=100)
@given(fleet=like(4), samples=st.integers(0, 60), moves=st.integers(0, 20), seed=st.integers(0, 2**32))
def test_what_a_stopped_worker_has_not_drawn_is_used_without_it(fleet, samples, moves, seed):
    """What it has drawn is used once it goes on."""
    stopped, peers = 0, range(1, len(fleet) + 1)
    workers = Workers([make_loader(samples, kind) for kind in (fleet[0], *fleet)])
    workers.run_all(random.Random(seed), moves)
    workers.stop(stopped)
    workers.run(*peers)
    kept = [range(draw.start, draw.stop) for draw in workers.loaders[stopped].not_begun()]
    assert workers.samples() + Counter(itertools.chain(*kept)) == Counter(range(samples))
    workers.run(stopped, *peers)
    assert workers.samples() == Counter(range(samples))


def test_what_a_slow_worker_has_drawn_ahead_is_taken_over_when_all_is_drawn():
    workers = Workers([make_loader(12, Kind(ahead=9)), make_loader(12)])
    workers.take_step(0)
    assert workers.loaders[0].not_begun() == [Draw(0, start, start + 2) for start in (2, 4, 6, 8, 10)]
    workers.run(1)
    assert [use.batches for use in workers.used if use.rank == 1] == [
        [[start, start + 1]] for start in (10, 8, 6, 4, 2)
    ]  # the last first, as its owner begins with the first
    assert workers.loaders[0].not_begun() == []
    workers.run(0, 1)
    assert [use.rank for use in workers.used] == [0, 1, 1, 1, 1, 1]


def test_a_slow_worker_does_not_lose_what_nobody_has_taken_over():
    workers = Workers([make_loader(12, Kind(ahead=9)), make_loader(12)])
    workers.take_step(0)
    workers.take_step(1)
    assert workers.loaders[0].not_begun() == [Draw(0, start, start + 2) for start in (2, 4, 6, 8)]
    workers.run(0)
    assert [use.batches[0][0] for use in workers.used] == [0, 10, 2, 4, 6, 8]


def test_every_given_up_draw_is_taken_by_exactly_one_of_many_threads():
    loaders = [make_loader(150, Kind(1, ahead=ahead)) for ahead in (80, 80, 0, 0, 0)]
    Workers(loaders)  # gives them their cursors
    owners = [loader.updates(0) for loader in loaders[:2]]
    taken = [[] for _ in loaders]
    for rank in (0, 1, 0):  # now all is drawn, and the owners know it
        taken[rank] += itertools.chain(*next(owners[rank]))
    assert [list(loader.updates(0)) for loader in loaders[2:]] == [[]] * 3
    assert loaders[0].is_finished(0)

    def take(rank):
        for update in owners[rank] if rank < 2 else loaders[rank].given_up(0):
            taken[rank] += itertools.chain(*update)

    assert together([partial(take, rank) for rank in range(5)]) == [None] * 5
    assert Counter(itertools.chain(*taken)) == Counter(range(150))


def test_a_draw_is_claimed_once_in_a_real_store():
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    owner, peer, other = (Cursor(server, rank, 3) for rank in range(3))
    draws = [owner.draw(4, 3, 8) for _ in range(4)]
    assert draws == [Draw(4, 0, 3), Draw(4, 3, 6), Draw(4, 6, 8), None]
    assert list(peer.given_up_by_peers(4)) == []
    owner.give_up(4, draws[1:3])
    assert list(peer.given_up_by_peers(4)) == draws[2:0:-1]
    assert list(peer.given_up_by_peers(3)) == list(owner.given_up_by_peers(4)) == []
    assert not other.is_claimed(draws[1])
    assert [cursor.claim(draws[1]) for cursor in (peer, other, owner)] == [True, False, False]
    assert other.is_claimed(draws[1])
    assert not other.is_claimed(draws[2])
    peer.give_up(4, [])
    assert not owner.all_gave_up(4)
    other.give_up(4, [])
    assert owner.all_gave_up(4)
    assert not owner.all_gave_up(5)
    assert peer.require_same("order", "a")
    assert owner.require_same("order", "a")
    assert not other.require_same("order", "b")
    assert other.require_same("another", "b")


# ---- Resuming ----


@settings(max_examples=200)
@given(
    runs=st.lists(st.tuples(fleets, st.integers(0, 60)), min_size=2, max_size=3),
    samples=st.integers(1, 60),
    epochs=st.integers(1, 3),
    meets=st.booleans(),
    ahead=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_resumed_runs_use_together_every_sample_once(runs, samples, epochs, meets, ahead, seed):
    """However many workers each run has, whatever their batch sizes, wherever they stop, whether they draw ahead."""
    schedule, position = random.Random(seed), None
    used = [Counter() for _ in range(epochs)]
    for number, (fleet, moves) in enumerate(runs, start=1):
        loaders = [make_loader(samples, kind, sampler=RandomSampler(range(samples))) for kind in fleet]
        workers = Workers(loaders, epochs=epochs, position=position, meets=meets, ahead=ahead)
        workers.run_all(schedule, None if number == len(runs) else moves)
        position = workers.position()
        for epoch in range(epochs):
            used[epoch] += workers.samples(epoch)
        assert_updates_fit(workers)
    assert used == [Counter(range(samples))] * epochs
    assert position["epoch"] == epochs


@given(
    places=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 12)), min_size=1, max_size=5),
    samples=st.integers(1, 60),
    batch_size=st.integers(1, 4),
    is_known=st.booleans(),
)
def test_what_shards_have_left_over_is_used_once(places, samples, batch_size, is_known):
    """The shards are those of accelerate."""
    if not is_known:
        places = [(places[0][0], number) for _, number in places]
    batches = BatchSampler(SequentialSampler(range(samples)), batch_size, drop_last=False)
    shards = [list(BatchSamplerShard(batches, len(places), rank, even_batches=False)) for rank in range(len(places))]
    position = position_of_shards(places, batch_size, samples if is_known else None)
    cursor, first = Cursor(dist.HashStore(), 0, 1, position), min(epoch for epoch, _ in places)
    for epoch in range(first, 3):
        used = Counter()
        for (at, number), shard in zip(places, shards, strict=True):
            used.update(itertools.chain(*shard[: number if at == epoch else (at > epoch) * samples]))
        while draw := cursor.draw(epoch, batch_size, samples):
            used.update(range(draw.start, min(draw.stop, samples)))
        assert used == Counter(range(samples))


def test_shards_in_two_epochs_of_unknown_length_have_no_position():
    assert position_of_shards([(0, 4), (1, 2)], 2, None) is None


def test_a_position_holds_what_was_drawn_and_not_begun():
    workers = Workers([make_loader(100, Kind(2, ahead=3)), make_loader(100, Kind(4, 2, ahead=1))])
    workers.take_step(0)
    workers.take_step(1)
    not_begun = [(0, 2, 4), (0, 4, 6), (0, 6, 8), (0, 16, 24)]
    assert workers.position() == {"epoch": 0, "drawn": {0: 24}, "not_begun": not_begun}


def test_what_was_not_begun_comes_first_and_in_parts_that_every_worker_can_use():
    position = {"epoch": 0, "drawn": {"0": 16}, "not_begun": [[0, 9, 16], [0, 2, 4]]}
    workers = Workers([make_loader(20, Kind(1, 3)), make_loader(20, Kind(5, 2))], position=position)
    for rank in (1, 1, 0, 1, 0, 1):
        workers.take_step(rank)
    assert [use.batches for use in workers.used] == [
        [[2, 3]],
        [[9, 10, 11]],
        [[12], [13], [14]],
        [[15]],
        [[16], [17], [18]],
        [[19]],
    ]


def test_a_run_that_stopped_while_its_workers_were_in_two_epochs_resumes_in_the_first():
    workers = Workers([make_loader(6), make_loader(6, Kind(ahead=1))], epochs=2)
    workers.take_step(1)
    for _ in range(3):
        workers.take_step(0)
    assert workers.epoch == [1, 0]
    position = workers.position()
    assert position["epoch"] == 0
    resumed = Workers([make_loader(6), make_loader(6)], epochs=2, position=position)
    resumed.run_all(random.Random(0))
    for epoch in range(2):
        assert workers.samples(epoch) + resumed.samples(epoch) == Counter(range(6))


def test_what_was_used_of_a_later_epoch_is_remembered_until_a_worker_comes_there():
    """Stopped with workers in two epochs, resumed, and stopped again in the first."""
    position = {"epoch": 0, "drawn": {0: 4, 1: 6}, "not_begun": [(1, 2, 4)]}
    workers = Workers([make_loader(10)], epochs=2, position=position)
    workers.take_step(0)
    later = Workers([make_loader(10)], epochs=2, position=workers.position())
    later.run(0)
    assert sorted(later.samples(1)) == [2, 3, 6, 7, 8, 9]


# ---- Drawn in advance, over a network ----


@settings(max_examples=100)
@given(fleet=fleets, samples=st.integers(0, 60), epochs=st.integers(1, 3), seed=st.integers(0, 2**32))
def test_every_sample_goes_to_exactly_one_of_workers_that_draw_ahead(fleet, samples, epochs, seed):
    workers = Workers([make_loader(samples, kind) for kind in fleet], epochs=epochs, ahead=True)
    workers.run_all(random.Random(seed))
    for epoch in range(epochs):
        assert workers.samples(epoch) == Counter(range(samples))
    assert_updates_fit(workers)
    assert not any(loader.not_begun() for loader in workers.loaders)


def test_a_position_holds_what_was_drawn_ahead():
    workers = Workers([make_loader(100), make_loader(100, Kind(4))], ahead=True)
    for rank in (0, 1, 0, 0):  # with one draw ahead at first, then with two, then three
        workers.take_step(rank)
    assert [use.batches for use in workers.used] == [[[0, 1]], [[4, 5, 6, 7]], [[2, 3]], [[12, 13]]]
    assert workers.loaders[0].cursor.held() == [Draw(0, start, start + 2) for start in (14, 16, 18)]
    not_begun = [(0, 8, 12), (0, 14, 16), (0, 16, 18), (0, 18, 20)]
    assert workers.position() == {"epoch": 0, "drawn": {0: 20}, "not_begun": not_begun}


def test_what_is_drawn_beyond_the_end_is_not_held():
    workers = Workers([make_loader(8)], ahead=True)
    for _ in range(3):
        workers.take_step(0)
    assert workers.loaders[0].cursor.held() == [Draw(0, 6, 8)]
    workers.run(0)
    assert workers.position()["not_begun"] == []


def test_threads_that_draw_ahead_share_an_epoch_through_a_real_store():
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def connect():
        return dist.PrefixStore("run", dist.TCPStore("127.0.0.1", server.port, is_master=False))

    def work(rank):
        cursor = Cursor(connect(), rank, 3)
        with ThreadPoolExecutor(1) as executor:
            cursor.draw_ahead(connect(), lambda ask: Ahead(ask, executor))
            return [list(iter(partial(cursor.draw, epoch, rank + 1, 301), None)) for epoch in range(2)]

    drawn = together([partial(work, rank) for rank in range(3)])
    for epoch in range(2):
        draws = sorted(itertools.chain(*(mine[epoch] for mine in drawn)))
        assert Counter(place for draw in draws for place in range(draw.start, draw.stop)) == Counter(range(301))


# ---- Workers that come and go ----


def test_who_is_gone_does_not_keep_the_others_waiting_at_the_end_of_an_epoch():
    store, present = dist.HashStore(), ["1", "2", "3"]
    first, second, third = (Cursor(store, 0, 3, members=lambda: present) for _ in range(3))
    first.name, second.name, third.name = present
    for cursor in (first, third):
        cursor.give_up(0, [])
    assert not first.all_gave_up(0)
    present.remove("2")
    assert first.all_gave_up(0)
    present.append("4")  # which has joined, perhaps with the rank of the one that is gone
    assert not first.all_gave_up(0)
    second.name = "4"
    second.give_up(0, [Draw(0, 4, 6)])
    assert first.all_gave_up(0)
    assert list(first.given_up_by_peers(0)) == [Draw(0, 4, 6)]


# ---- The order ----


def order_of(loader, epoch=0):
    return [sample for update in loader.updates(epoch) for batch in update for sample in batch]


@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (42, 0), (42, 3)])
def test_a_random_sampler_gives_the_order_that_ddp_would_use(seed, epoch):
    expected = SeedableRandomSampler(range(40), data_seed=seed)
    expected.set_epoch(epoch)
    order = order_of(make_loader(40, sampler=RandomSampler(range(40)), seed=seed), epoch)
    assert order == list(expected)
    assert order == torch.randperm(40, generator=torch.Generator().manual_seed(seed + epoch)).tolist()


def test_orders_differ_between_epochs_and_can_be_had_again():
    loader = make_loader(40, sampler=RandomSampler(range(40)))
    first, second, again = order_of(loader, 0), order_of(loader, 1), order_of(loader, 0)
    assert first == again
    assert first != second
    assert sorted(second) == list(range(40))


def test_a_random_sampler_of_a_part_of_the_data_gives_a_part():
    loader = make_loader(40, sampler=RandomSampler(range(40), num_samples=10))
    assert len(set(order_of(loader))) == 10


def test_a_sampler_with_replacement_draws_with_replacement():
    loader = make_loader(4, sampler=RandomSampler(range(4), replacement=True, num_samples=50))
    assert len(order_of(loader)) == 50


LENGTHS = random.Random(0).choices(range(1, 100), k=60)


def test_grouping_by_length_gives_one_order_whatever_the_global_generators_have_done():
    orders = []
    for seed in range(3):
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        loader = make_loader(60, sampler=LengthGroupedSampler(4, lengths=LENGTHS), seed=5)
        orders.append((order_of(loader, 0), order_of(loader, 1)))
    assert orders[0] == orders[1] == orders[2]
    assert orders[0][0] != orders[0][1]
    assert sorted(orders[0][0]) == list(range(60))
    torch.manual_seed(5 + 1)
    assert orders[0][1] == list(LengthGroupedSampler(4, lengths=LENGTHS))


def test_workers_group_by_length_alike():
    loaders = [make_loader(60, sampler=LengthGroupedSampler(4, lengths=LENGTHS)) for _ in range(3)]
    workers = Workers(loaders, epochs=2)
    workers.run_all(random.Random(0))
    assert workers.samples(0) == workers.samples(1) == Counter(range(60))


@pytest.mark.parametrize("sampler", [RandomSampler(range(60)), LengthGroupedSampler(4, lengths=LENGTHS)])
def test_an_order_does_not_disturb_the_global_generators(sampler, monkeypatch):
    on_devices = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", on_devices.append)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    order_of(make_loader(60, sampler=sampler))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]
    assert on_devices == [], "dropout would begin anew in every epoch, and not go on after a resume"


class ByEpoch(Sampler):
    """A sampler that is told the epoch."""

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return 4

    def __iter__(self):
        return iter([self.epoch] * 4)


def test_a_sampler_is_told_the_epoch():
    loader = make_loader(9, sampler=ByEpoch())
    assert order_of(loader, 7) == [7] * 4
    assert order_of(loader, 2) == [2] * 4


@pytest.mark.parametrize(
    "other",
    [
        lambda: make_loader(41, sampler=RandomSampler(range(41))),
        lambda: make_loader(40, sampler=RandomSampler(range(40)), seed=1),
        lambda: make_loader(40, sampler=RandomSampler(range(40), generator=torch.Generator().manual_seed(3))),
    ],
    ids=["more data", "another seed", "a generator of its own"],
)
def test_workers_with_different_orders_are_refused(other):
    loaders = [make_loader(40, sampler=RandomSampler(range(40))) for _ in range(2)] + [other()]
    workers = Workers(loaders)
    workers.take_step(0)
    workers.take_step(1)
    with pytest.raises(ValueError, match=r"different orders of epoch 0.*same data and seed.*`shared_batches=False`"):
        workers.take_step(2)


# ---- Outside of training ----


@settings(max_examples=50)
@given(fleet=like(1), samples=st.integers(0, 60), world_size=st.integers(1, 5), drop_last=st.booleans())
def test_the_shares_of_all_ranks_together_are_the_epoch(fleet, samples, world_size, drop_last):
    shares = [
        list(make_loader(samples, fleet[0], drop_last=drop_last, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    size = fleet[0].batch_size
    used = samples - samples % size if drop_last else samples
    assert sorted(itertools.chain(*shares)) == [
        list(range(start, min(start + size, used))) for start in range(0, used, size)
    ]
    steps = [-(-len(share) // fleet[0].accumulation) for share in shares]
    assert max(steps) - min(steps) <= 1


def test_processes_that_load_ahead_can_be_looked_at():
    dataset = torch.arange(14)
    loaders = [
        make_loader(14, rank=rank, world_size=2, loader=lambda b: DataLoader(dataset, batch_sampler=b, num_workers=2))
        for rank in range(2)
    ]
    assert [[batch.tolist() for batch in loader] for loader in loaders] == [
        [[0, 1], [4, 5], [8, 9], [12, 13]],
        [[2, 3], [6, 7], [10, 11]],
    ]


def test_looking_at_a_loader_draws_nothing_from_what_is_shared():
    loader = make_loader(10)
    workers = Workers([loader])
    cursor = loader.cursor
    assert list(itertools.chain(*loader)) == list(range(10))
    assert loader.cursor is cursor
    workers.run(0)
    assert workers.samples() == Counter(range(10))


def test_looking_at_a_loader_in_the_middle_of_an_epoch_does_not_disturb_it():
    """Callbacks are given the loader of the training set."""
    loaders = [make_loader(30, Kind(ahead=2)), make_loader(30)]
    workers = Workers(loaders, epochs=2)
    workers.take_step(0)
    workers.take_step(1)
    looked = iter(loaders[0])
    assert next(looked) == [0, 1]
    workers.take_step(0)
    assert [draw.stop - draw.start for draw in loaders[0].not_begun()] == [2, 2]
    workers.run_all(random.Random(0))
    assert workers.samples(0) == workers.samples(1) == Counter(range(30))


def test_fixed_shares_are_every_nth_part():
    shares = FixedShares(1, 3)
    assert [shares.draw(0, 4, 30) for _ in range(3)] == [Draw(0, 4, 8), Draw(0, 16, 20), Draw(0, 28, 30)]
    assert shares.draw(0, 4, 30) is None


@pytest.mark.parametrize(
    ("samples", "kind", "world_size", "drop_last", "updates", "batches"),
    [
        (10, Kind(2, 1), 1, False, 5, 5),
        (10, Kind(2, 1), 2, False, 5, 3),
        (10, Kind(2, 2), 2, False, 3, 3),
        (11, Kind(2, 1), 1, False, 6, 6),
        (11, Kind(2, 1), 1, True, 5, 5),
        (9, Kind(4, 2), 1, True, 1, 2),
        (1, Kind(2, 1), 4, True, 1, 1),
    ],
)
def test_the_length_is_the_batches_of_one_worker_on_average(samples, kind, world_size, drop_last, updates, batches):
    loader = make_loader(samples, kind, drop_last=drop_last, world_size=world_size)
    assert (loader.updates_per_epoch, len(loader)) == (updates, batches)


def test_the_length_goes_by_the_mean_update_where_workers_differ():
    loader = make_loader(120, Kind(2, 2), world_size=2)
    assert (loader.update_size, loader.mean_update) == (4, 4.0)
    loader.mean_update = 6.0  # the other takes 8
    assert (loader.updates_per_epoch, len(loader)) == (20, 20)


# ---- Streams ----


class Stream(IterableDataset):
    """Numbers that tell their epoch."""

    def __init__(self, samples):
        self.samples, self.epoch = samples, None

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        return iter(range(1000 * self.epoch, 1000 * self.epoch + self.samples))


class StreamOfKnownLength(Stream):
    def __len__(self):
        return self.samples


def make_stream(samples, kind=Kind(), *, rank=0, world_size=1, dataset=Stream, seed=0):  # noqa: B008
    loader = DataLoader(dataset(samples), batch_size=kind.batch_size, collate_fn=list)
    return SharedStream(loader, kind.accumulation, seed, rank, world_size)


def updates_of_stream(samples, kind, epoch=0):
    numbers = range(1000 * epoch, 1000 * epoch + samples)
    batches = [list(numbers[start : start + kind.batch_size]) for start in range(0, samples, kind.batch_size)]
    return [batches[start : start + kind.accumulation] for start in range(0, len(batches), kind.accumulation)]


@settings(max_examples=60)
@given(
    kind=kinds,
    workers=st.integers(1, 5),
    samples=st.integers(1, 60),
    epochs=st.integers(1, 3),
    moves=st.integers(0, 60),
    resumed=st.integers(1, 5),
    seed=st.integers(0, 2**32),
)
def test_every_batch_of_a_stream_goes_to_exactly_one_worker(kind, workers, samples, epochs, moves, resumed, seed):
    """Also when the run stops and is resumed by another number of workers; the last update may be shorter."""
    first = Workers([make_stream(samples, kind) for _ in range(workers)], epochs=epochs)
    first.run_all(random.Random(seed), moves)
    second = Workers([make_stream(samples, kind) for _ in range(resumed)], epochs=epochs, position=first.position())
    second.run_all(random.Random(seed))
    for epoch in range(epochs):
        used = sorted(use.batches for use in first.used + second.used if use.epoch == epoch)
        assert used == updates_of_stream(samples, kind, epoch)


def test_an_empty_stream_is_seen_by_every_worker():
    streams = [make_stream(0), make_stream(0)]
    workers = Workers(streams)
    assert [workers.move(rank) for rank in range(2)] == [None, None]
    assert all(stream.is_empty for stream in streams)


class OnePass(Stream):
    """As a generator that is used up by its first pass."""

    def __iter__(self):
        return iter(range(self.samples if self.epoch == 0 else 0))


def test_a_stream_that_yields_nothing_in_its_second_pass_is_empty_then():
    streams = [make_stream(8, dataset=OnePass), make_stream(8, dataset=OnePass)]
    workers = Workers(streams)
    workers.run(0, 1)
    assert workers.samples() == Counter(range(8))
    assert not any(stream.is_empty for stream in streams)
    assert [list(stream.updates(1)) for stream in streams] == [[], []]
    assert all(stream.is_empty for stream in streams)


# ---- Streams that are random ----


class Shuffled(Stream):
    """Shuffles by a global generator, some of it before it begins and some while it goes."""

    def __iter__(self):
        for start in range(0, self.samples, 5):
            yield from self.mix(list(range(start, min(start + 5, self.samples))))


class ByTorch(Shuffled):
    def mix(self, numbers):
        return [numbers[place] for place in torch.randperm(len(numbers)).tolist()]


class ByNumpy(Shuffled):
    def mix(self, numbers):
        return np.random.permutation(numbers).tolist()


class ByPython(Shuffled):
    def mix(self, numbers):
        random.shuffle(numbers)
        return numbers


def train_a_little(rank):
    """What a step draws from the global generators, on each worker something else."""
    torch.rand(rank + 1), np.random.rand(rank + 1), random.random()


@pytest.mark.parametrize("dataset", [ByTorch, ByNumpy, ByPython])
def test_a_stream_that_a_global_generator_shuffles_goes_to_exactly_one_worker(dataset):
    streams = [make_stream(53, Kind(2), dataset=dataset) for _ in range(3)]
    workers = Workers(streams, epochs=2)
    torch.manual_seed(7), np.random.seed(7), random.seed(7)
    for turn in range(200):
        rank = (0, 1, 0, 2)[turn % 4]
        train_a_little(rank)
        workers.move(rank)
    orders = [[sample for use in workers.used if use.epoch == epoch for sample in use.batches[0]] for epoch in (0, 1)]
    assert [sorted(order) for order in orders] == [list(range(53))] * 2
    assert orders[0] != orders[1]
    assert orders[0] != list(range(53))


def test_a_resumed_stream_is_shuffled_as_before():
    first = Workers([make_stream(53, dataset=ByTorch) for _ in range(2)])
    for rank in (0, 1, 0, 0, 1):
        first.take_step(rank)
    second = Workers([make_stream(53, dataset=ByTorch) for _ in range(3)], position=first.position())
    torch.manual_seed(99)
    second.run(0, 1, 2)
    assert first.samples() + second.samples() == Counter(range(53))


def test_reading_a_stream_draws_nothing_from_what_training_draws_from():
    drawn = []
    for reads in (True, False):
        torch.manual_seed(3), np.random.seed(3), random.seed(3)
        updates = make_stream(20, dataset=ByTorch).updates(0)
        for _ in range(3):
            if reads:
                next(updates)
            drawn.append((torch.rand(1).item(), np.random.rand(), random.random()))
    assert drawn[:3] == drawn[3:]


class ByItself(Stream):
    """With a generator of its own that nobody has seeded."""

    def __iter__(self):
        return iter(np.random.default_rng().permutation(self.samples).tolist())


class TakesOneOfTwo(Stream):
    """With each worker taking a part of it by its rank."""

    taken = itertools.count()

    def __iter__(self):
        return iter(range(next(self.taken) % 2, self.samples, 2))


class CutShort(Stream):
    """Alike as far as it goes, but shorter on one worker."""

    cut = itertools.count()

    def __iter__(self):
        return iter(range(self.samples - 8 * (next(self.cut) % 2)))


@pytest.mark.parametrize("dataset", [ByItself, TakesOneOfTwo, CutShort])
def test_streams_that_differ_between_workers_are_refused(dataset):
    workers = Workers([make_stream(50, dataset=dataset) for _ in range(2)])
    with pytest.raises(ValueError, match=r"read different streams in epoch 0.*`seed=`.*by its rank.*shared_batches"):
        workers.run(0, 1)


@pytest.mark.parametrize(
    ("batch", "other"),
    [
        ({"a": torch.arange(4)}, {"a": torch.arange(1, 5)}),
        ({"a": torch.zeros(100, 1000)}, {"a": torch.ones(100, 1000)}),
        ({"a": ["x", "y"]}, {"a": ["x", "z"]}),
        ([(1, None, 2.5)], [(1, None, 2.0)]),
        ([np.arange(3)], [np.arange(4)]),
        ({"a": torch.tensor([1 + 2j]).conj()}, {"a": torch.tensor([1 + 2j])}),
        ([torch.zeros(2, dtype=torch.bfloat16)], [torch.zeros(2, dtype=torch.half)]),
    ],
)
def test_a_checksum_tells_batches_apart(batch, other):
    def value(*batches):
        checksum = Checksum()
        for each in batches:
            checksum.add(each)
        return checksum.value

    assert value(batch, other) == value(batch, other)
    assert len({value(batch), value(other), value(batch, other), value(other, batch)}) == 4
    assert value(object()) == value(object())


def test_a_stream_that_was_used_up_before_is_no_error():
    workers = Workers([make_stream(4)], position={"epoch": 0, "drawn": {0: 4}, "not_begun": []})
    assert workers.move(0) is None
    assert workers.used == []


@settings(max_examples=30)
@given(kind=kinds, samples=st.integers(1, 60), world_size=st.integers(1, 5))
def test_the_shares_of_a_stream_are_together_the_stream(kind, samples, world_size):
    streams = [make_stream(samples, kind, rank=rank, world_size=world_size) for rank in range(world_size)]
    updates = updates_of_stream(samples, kind)
    for rank, stream in enumerate(streams):
        if rank or updates:
            assert list(stream) == list(itertools.chain(*updates[rank::world_size]))


def test_looking_at_a_stream_draws_nothing_from_what_is_shared():
    stream = make_stream(10)
    workers = Workers([stream])
    assert next(iter(stream)) == [0, 1]
    workers.run(0)
    assert workers.samples() == Counter(range(10))


def test_a_stream_has_the_length_that_its_data_set_knows():
    stream = make_stream(21, Kind(2, 3), world_size=2, dataset=StreamOfKnownLength)
    assert (stream.updates_per_epoch, len(stream)) == (4, 6)
    assert (stream.update_size, stream.mean_update, stream.batch_size) == (6, 6.0, 2)
    with pytest.raises(TypeError):
        len(make_stream(21))


# ---- Samplers and loaders of any kind ----


class Keys(Sampler):
    """In an order that a global generator of Python or numpy makes."""

    def __init__(self, keys, shuffle):
        self.keys, self.shuffle = keys, shuffle

    def __iter__(self):
        keys = list(self.keys)
        self.shuffle(keys)
        return iter(keys)

    def __len__(self):
        return len(self.keys)


@pytest.mark.parametrize(
    "keys",
    [
        [f"name-{number}" for number in range(23)],
        [(number // 5, number % 5) for number in range(23)],
        [np.int32(number) for number in range(23)],
        [torch.tensor(number) for number in range(23)],
        [*range(22), 1 << 40],
    ],
    ids=["names", "tuples", "numpy", "torch", "large"],
)
@pytest.mark.parametrize("shuffle", [random.shuffle, np.random.shuffle])
def test_a_sampler_may_yield_any_keys_and_draw_from_any_global_generator(keys, shuffle):
    plain = [int(key) if hasattr(key, "__index__") else key for key in keys]
    data = {key: number for number, key in enumerate(plain)}

    def loader(batches):
        return DataLoader(data, batch_sampler=batches, collate_fn=list)

    if shuffle is np.random.shuffle and isinstance(keys[0], tuple):
        shuffle = random.shuffle  # numpy would mix the tuples themselves
    workers = Workers(
        [make_loader(23, Kind(2), sampler=Keys(keys, shuffle), loader=loader) for _ in range(2)], epochs=2
    )
    for turn in range(100):
        train_a_little(turn % 2)
        workers.move(turn % 2)
    for epoch in range(2):
        assert workers.samples(epoch) == Counter(range(23))
    assert [u.batches for u in workers.used if u.epoch == 0] != [u.batches for u in workers.used if u.epoch == 1]


def test_a_shared_loader_has_what_a_loader_has():
    data = list(range(21))
    stock = DataLoader(data, batch_size=4, num_workers=2, drop_last=True, collate_fn=sum, prefetch_factor=3)
    shared = SharedLoader(
        lambda batches: DataLoader(data, batch_sampler=batches, num_workers=2, collate_fn=sum, prefetch_factor=3),
        stock.sampler,
        batch_size=4,
        accumulation=1,
        drop_last=True,
        seed=0,
        rank=1,
        world_size=2,
    )
    stream = SharedStream(
        DataLoader(Stream(9), batch_size=4, num_workers=2, collate_fn=sum, prefetch_factor=3), 1, 0, 1, 2
    )
    names = ("batch_size", "num_workers", "collate_fn", "prefetch_factor", "pin_memory", "timeout", "in_order")
    for loader in (shared, stream):
        assert [getattr(loader, name) for name in names] == [getattr(stock, name) for name in names]
        assert loader.total_batch_size == 8
        assert not hasattr(loader, "no_such_thing")
    assert (shared.drop_last, shared.sampler, shared.total_dataset_length) == (True, stock.sampler, 21)
    assert list(shared.batch_sampler) == [[4, 5, 6, 7], [12, 13, 14, 15]]
    assert (shared.batch_sampler.batch_size, shared.batch_sampler.batch_sampler.sampler) == (4, stock.sampler)
    assert pickle.loads(pickle.dumps(copy.copy(stream.sampler))) is not None
