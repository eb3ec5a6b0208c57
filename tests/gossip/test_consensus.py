"""Real workers carry out a known schedule: weights, masses and consensus against the simulation."""

import subprocess
import threading

import numpy as np
import pytest
import torch
from fleet import gather_between_threads, together
from launching import run
from reference import UNIT, Simulation, random_schedule
from torch import nn

from layup_hf.blocks import split_into_blocks
from layup_hf.gossip import consensus
from layup_hf.ledger import Ledger

WORKERS = 4


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run("schedule.py", WORKERS, [], tmp_path_factory.mktemp("schedule")).results()


@pytest.fixture(scope="module")
def simulation():
    models = []
    for rank in range(WORKERS):
        torch.manual_seed(rank)
        models.append([[p.detach() for p in nn.Linear(5, 5).parameters()] for _ in range(3)])
    simulation = Simulation(models)
    for operation in random_schedule(WORKERS, 3, 120, seed=7):
        getattr(simulation, operation[0])(*operation[1:])
    return simulation


def test_real_workers_equal_the_simulation_bitwise(results, simulation):
    for rank, result in enumerate(results):
        for block, tensors in enumerate(result["values"]):
            assert tensors == [t.flatten().tolist() for t in simulation.values[rank][block]]


def test_mass_is_conserved_exactly(results, simulation):
    for result in results:
        for block, masses in enumerate(result["masses"]):
            assert masses == [simulation.effective(worker, block) for worker in range(WORKERS)]
            assert sum(masses) == WORKERS * UNIT
        assert result["masses_after"] == [[UNIT] * WORKERS] * 3
        assert result["mass"] == WORKERS


def test_consensus_is_the_mass_weighted_mean_on_every_worker(results, simulation):
    for block in range(3):
        for k, mean in enumerate(simulation.mean(block)):
            assert results[0]["consensus"][block][k] == pytest.approx([float(x) for x in mean], rel=1e-5, abs=1e-6)
    assert all(result["consensus"] == results[0]["consensus"] for result in results)


def test_consensus_distance_is_that_of_its_definition(results):
    workers = [torch.tensor([x for b in r["values"] for t in b for x in t]).double() for r in results]
    mean = torch.tensor([x for b in results[0]["consensus"] for t in b for x in t]).double()
    deviation = sum((worker - mean).square().sum() for worker in workers) / WORKERS
    expected = float((deviation / mean.square().sum()).sqrt())
    assert [r["distance"] for r in results] == pytest.approx([expected] * WORKERS, rel=1e-5)


def can_mount():
    """Whether this user may have a /dev/shm of its own."""
    return not subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode


@pytest.mark.skipif(not can_mount(), reason="needs the right to mount")
def test_a_full_shared_memory_folder_does_not_matter(tmp_path):
    """Containers often have 64 MB of /dev/shm; here it has one page, and that is full."""
    full = 'mount -t tmpfs -o size=4k tmpfs /dev/shm && head -c 4096 /dev/zero > /dev/shm/full && exec "$@"'
    results = run("schedule.py", 2, [], tmp_path, prefix=["unshare", "--mount", "sh", "-c", full, "sh"]).results()
    assert results[0]["consensus"] == results[1]["consensus"]


# ---- Workers that join or go ----


class Cut(RuntimeError):
    """A collective that cannot be completed."""


class Together:
    """Workers in threads, and what they collect from each other, some of which may be cut off.

    Args:
        monkeypatch: Puts the collectives where `reach_consensus` finds them.
        models: Of each worker, all alike but for the values.
    """

    def __init__(self, monkeypatch, models):
        self.models = models
        self.blocks = [split_into_blocks(model) for model in models]
        memory = np.zeros(Ledger.size(3, len(models)), np.uint64)
        self.ledgers = [Ledger(memory, 3, len(models), rank) for rank in range(len(models))]
        self.present = list(range(len(models)))
        self.cut_at, self.cut_for = None, ()  # which collective, and for whom
        self._local = threading.local()
        monkeypatch.setattr(consensus, "reduce", lambda tensor, how: sum(self._collective(tensor.clone())))

    @property
    def rank(self):
        return self._local.rank

    def gather(self, item):
        return self._collective(item)

    def wait(self):
        self._collective(None)

    def _collective(self, item):
        """Where it is cut, it completes for some, who then find nobody at the next one."""
        self._local.count += 1
        if self.cut_at is not None and self._local.count > self.cut_at:
            raise Cut
        collected = self._local.gather(item)
        if self._local.count == self.cut_at and self.present[self._local.rank] in self.cut_for:
            raise Cut
        return collected

    def reach_consensus(self, new=()):
        """What each present worker finds, or the exception that it gets; those in `new` have just joined."""
        for_rank = gather_between_threads(len(self.present))

        def work(rank):
            worker = self.present[rank]
            self._local.rank, self._local.count, self._local.gather = rank, 0, for_rank(rank)
            ledger = None if worker in new else self.ledgers[worker]
            return consensus.reach_consensus(self.blocks[worker], ledger, self, is_new=worker in new)

        return together([lambda rank=rank: work(rank) for rank in range(len(self.present))])

    def go(self, worker):
        """Let this one be gone, and the others do without it."""
        self.present.remove(worker)
        for other in self.present:
            self.ledgers[other].exclude(worker)

    def values(self, worker):
        return torch.cat([p.detach().flatten() for p in self.models[worker].parameters()])

    def assert_all_hold(self, expected):
        for worker in self.present:
            assert torch.equal(self.values(worker), self.values(self.present[0]))
        torch.testing.assert_close(self.values(self.present[0]), expected)


def three_models():
    models = []
    for rank in range(3):
        torch.manual_seed(rank)
        models.append(nn.Sequential(*(nn.Linear(4, 4) for _ in range(3))))
    return models


def mean_of(workers, shares):
    return sum(share * workers.values(worker) for worker, share in shares.items())


def test_a_worker_that_joins_takes_over_the_mean_and_adds_no_mass(monkeypatch):
    workers = Together(monkeypatch, three_models())
    for block in range(3):
        workers.ledgers[0].offer(block, 1, UNIT // 2)
        workers.ledgers[1].take(block, 0, UNIT // 2)
    workers.go(2)
    workers.present.append(2)  # a new worker in its place: the others do not know it yet
    expected = mean_of(workers, {0: 1 / 4, 1: 3 / 4})
    found = workers.reach_consensus(new={2})
    workers.assert_all_hold(expected)
    assert [one.mass for one in found] == [2.0] * 3
    assert [one.mass_by_worker for one in found] == [(0.5, 1.5, 0.0)] * 3
    assert [ledger.own(0) for ledger in workers.ledgers[:2]] == [UNIT] * 2


def test_a_worker_that_is_gone_is_not_in_the_mean_and_its_mass_is_accounted_for(monkeypatch):
    workers = Together(monkeypatch, three_models())
    workers.ledgers[0].offer(1, 2, UNIT // 2)
    workers.ledgers[2].take(1, 0, UNIT // 4)
    workers.go(2)
    expected = mean_of(workers, {0: 3 / 7, 1: 4 / 7})
    others = mean_of(workers, {0: 1 / 2, 1: 1 / 2})
    (found, _) = workers.reach_consensus()
    block = slice(20, 40)
    expected = torch.cat([others[:20], expected[block], others[40:]])
    workers.assert_all_hold(expected)
    assert found.mass == 2.0  # of the blocks that lost nothing
    assert found.mass_min == 0.75


COLLECTIVES = 1 + 1 + 3 + 1  # all stop, accounts, a mean for each block, how far they were


@pytest.mark.parametrize("cut_for", [(0, 1, 2), (0,), (1, 2)], ids=["all", "first", "others"])
@pytest.mark.parametrize("cut_at", range(1, COLLECTIVES + 1))
@pytest.mark.parametrize("dies", [False, True])
def test_a_consensus_that_was_cut_off_can_be_reached_again(monkeypatch, cut_at, cut_for, dies):
    """Whoever has come how far: all end with one model, a mean of theirs in which each has its part."""
    workers = Together(monkeypatch, three_models())
    for block in range(3):
        workers.ledgers[2].offer(block, 0, UNIT // 2)
        workers.ledgers[1].offer(block, 2, UNIT // 4)
        workers.ledgers[0].take(block, 2, UNIT // 2)
    everybody = torch.stack([workers.values(worker) for worker in range(3)])
    mean = mean_of(workers, {0: 1.5 / 3, 1: 1 / 3, 2: 0.5 / 3})
    workers.cut_at, workers.cut_for = cut_at, cut_for
    outcomes = workers.reach_consensus()
    assert any(isinstance(outcome, Cut) for outcome in outcomes)
    workers.cut_at = None
    if dies:
        workers.go(1)
    found = workers.reach_consensus()
    assert not any(isinstance(one, Exception) for one in found), found
    count = len(workers.present)
    result = workers.values(0)
    if cut_at == COLLECTIVES or (cut_for == (0, 1, 2) and not dies):
        workers.assert_all_hold(mean)
    workers.assert_all_hold(result)
    assert ((result >= everybody.min(dim=0).values - 1e-6) & (result <= everybody.max(dim=0).values + 1e-6)).all()
    assert all(one.mass <= 3 and len(one.mass_by_worker) == count for one in found)


def test_there_are_no_more_collectives_than_were_cut(monkeypatch):
    workers = Together(monkeypatch, three_models())
    workers.cut_at, workers.cut_for = COLLECTIVES + 1, (0, 1, 2)
    assert not any(isinstance(outcome, Exception) for outcome in workers.reach_consensus())
    workers.cut_at = COLLECTIVES
    assert any(isinstance(outcome, Cut) for outcome in workers.reach_consensus())


def test_mass_that_is_not_accounted_for_is_refused(monkeypatch):
    workers = Together(monkeypatch, three_models())
    workers.ledgers[0]._own[1, 0] += np.uint64(1)
    for outcome in workers.reach_consensus():
        assert isinstance(outcome, RuntimeError)
        assert "Mass is not conserved" in str(outcome)
