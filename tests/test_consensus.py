"""Real workers carry out a known schedule: weights, masses and consensus against the simulation."""

import subprocess

import pytest
import torch
from launching import run
from reference import UNIT, Simulation, random_schedule
from torch import nn

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
