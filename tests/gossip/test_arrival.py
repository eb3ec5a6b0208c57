"""Merging at any moment: no update lost, mass conserved, and a pause is one."""

import math
import threading
import time

import pytest
import torch
from fleet import FirstPeers, Fleet, closed_at_the_end, wait_until
from launching import run
from torch import nn

from layup_hf.gossip.arrival import ArrivalEngine
from layup_hf.ledger.mixing import UNIT


class Arriving(Fleet):
    """A fleet whose workers merge by threads."""

    def __init__(self, world_size, width=5, leases=None):
        torch.manual_seed(world_size)
        super().__init__([nn.Sequential(*(nn.Linear(width, width) for _ in range(3))) for _ in range(world_size)])
        leases = leases or [lambda: True] * world_size
        self.engines = [
            ArrivalEngine(blocks, windows, FirstPeers(rank, world_size), may_exchange=lease)
            for rank, (blocks, windows, lease) in enumerate(zip(self.blocks, self.windows, leases, strict=True))
        ]

    def pending(self, worker):
        return self.windows[worker].ledger.waiting()

    def mean(self, index):
        masses = self.windows[0].ledger.masses()[index]
        models = [torch.cat([t.flatten().double() for t in blocks[index].tensors]) for blocks in self.blocks]
        return sum(model * (int(mass) / UNIT) for model, mass in zip(models, masses, strict=True))

    def close(self):
        for engine in self.engines:
            engine.close()
        super().close()


@pytest.fixture
def fleet():
    yield from closed_at_the_end(Arriving)


def test_an_offer_is_merged_without_the_training_thread(fleet):
    workers = fleet(2)
    before = [workers.mean(index) for index in range(3)]
    distance = (workers.blocks[0][1].tensors[0] - workers.blocks[1][1].tensors[0]).norm()
    for engine in workers.engines:
        engine.resume()
    workers.engines[0].offer(workers.blocks[0][1])
    wait_until(lambda: not workers.pending(1) and workers.engines[1].counts["merges"], "a merge")
    # A half of the mass of 0 against all of 1: worker 1 has moved by a third, and the weighted mean has stayed.
    moved = (workers.blocks[0][1].tensors[0] - workers.blocks[1][1].tensors[0]).norm()
    assert float(moved / distance) == pytest.approx(2 / 3, rel=1e-5)
    assert torch.allclose(workers.mean(1), before[1], atol=1e-6)
    assert workers.engines[1].figures()["layup/merges"] == 1


def test_backward_goes_on_after_a_merge(fleet):
    workers = fleet(2)
    model = nn.Sequential(*(module for block in workers.blocks[1] for module in block.modules))
    loss = model(torch.randn(4, 5)).square().sum()
    workers.engines[1].resume()
    for block in workers.blocks[0]:
        workers.engines[0].offer(block)
    wait_until(lambda: workers.engines[1].counts["merges"] == 3, "merges")
    loss.backward()  # would raise if the writes were counted


def test_nothing_is_merged_in_a_pause_or_without_a_lease(fleet):
    holds = [True, False]
    workers = fleet(2, leases=[lambda: True, lambda: holds[1]])
    values = workers.blocks[1][0].tensors[0].clone()
    workers.engines[0].offer(workers.blocks[0][0])
    time.sleep(0.1)
    assert workers.pending(1) == [0]  # it begins paused
    workers.engines[1].resume()
    time.sleep(0.1)
    assert workers.pending(1) == [0]  # without a lease
    workers.engines[1].pause()
    holds[1] = True
    time.sleep(0.1)
    assert workers.pending(1) == [0]
    assert torch.equal(values, workers.blocks[1][0].tensors[0])
    workers.engines[1].resume()
    wait_until(lambda: not workers.pending(1), "a merge after the pause")


def test_while_a_block_is_held_it_does_not_change_and_others_do(fleet):
    workers = fleet(2)
    workers.engines[1].resume()
    held, other = workers.blocks[1][1], workers.blocks[1][2]
    with workers.engines[1].holding(held):
        values = held.tensors[0].clone()
        for block in workers.blocks[0]:
            workers.engines[0].offer(block)
        time.sleep(0.1)
        assert torch.equal(values, held.tensors[0])
        assert 1 in workers.pending(1)
    wait_until(lambda: not workers.pending(1), "merges")
    assert not torch.equal(values, held.tensors[0])
    assert workers.engines[1].counts["merges"] == 3
    assert other is not held


def test_no_step_is_lost_and_mass_is_conserved(fleet):
    """Workers step by known amounts while all merge at any moment: the mean moves by what was added, and no more."""
    workers = fleet(3, width=40)
    steps, size = 60, 2.0**-10
    for blocks in workers.blocks:
        for block in blocks:
            for tensor in block.tensors:
                tensor.data.zero_()

    def train(rank):
        engine = workers.engines[rank]
        for _ in range(steps):
            engine.resume()
            time.sleep(0.005)
            for block in reversed(workers.blocks[rank]):
                with engine.holding(block):
                    mass = workers.windows[rank].ledger.own(block.index) + workers.windows[rank].ledger.untaken(
                        block.index
                    )
                    for tensor in block.tensors:
                        tensor.data.add_(size * UNIT / mass)  # so that the weighted mean moves by `size` of one UNIT
                    engine.offer(block)

    threads = [threading.Thread(target=train, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    for engine in workers.engines:
        engine.pause()
    assert sum(engine.counts["merges"] for engine in workers.engines) > 50
    for index in range(3):
        assert int(workers.windows[0].ledger.masses()[index].sum()) == 3 * UNIT
        # A peer is read while it steps: what is read of an element is old or new, so a little is lost or counted twice.
        assert float(workers.mean(index).mean()) == pytest.approx(3 * steps * size, rel=0.1)


def test_a_failure_of_the_thread_reaches_the_training_thread(fleet):
    workers = fleet(2)

    def fail(peer, block):
        raise MemoryError("made on purpose")

    workers.windows[1].read = fail
    workers.engines[1].resume()
    workers.engines[0].offer(workers.blocks[0][0])
    wait_until(lambda: workers.engines[1]._failure, "the failure")
    with pytest.raises(RuntimeError, match="Merging has failed: made on purpose"):
        workers.engines[1].merge(workers.blocks[1][0])


@pytest.mark.parametrize("merge_at", ["arrival", "boundary"])
def test_a_run_of_several_workers_measures_its_bias(merge_at, tmp_path):
    options = ["--max_steps=30", "--per_device_train_batch_size=4", "--learning_rate=1e-2", "--disable_tqdm=True"]
    options += ["--eval_strategy=steps", "--eval_steps=10", "--save_strategy=steps", "--save_steps=10"]
    options += [f"--merge_at={merge_at}", "--bias_every=1", "--logging_steps=5", f"--output_dir={tmp_path}/out"]
    results = run("train.py", 3, options, tmp_path).results()
    for result in results:
        assert result["same_at_end"]
        assert len(result["consensus"]) == 3
        assert all(point["mass_exact"] and point["same"] and point["error"] < 1e-6 for point in result["consensus"])
        assert result["logs"][-1]["eval_loss"] < 4.1
    assert results[0]["saved_is_model"]
    biases = [entry["layup/gradient_bias"] for result in results for entry in result["logs"] if "loss" in entry]
    if merge_at == "boundary":
        assert set(biases) == {0.0}
    else:
        assert max(biases) > 0
        assert all(map(math.isfinite, biases))
        assert any(entry.get("layup/merges", 0) > 0 for entry in results[0]["logs"])
