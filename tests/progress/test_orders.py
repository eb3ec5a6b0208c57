"""The order of an epoch, whatever was asked for before; and prompts that are repeated: together, and by one worker."""

from collections import Counter
from functools import partial
from random import Random

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from test_sharing import Kind, Loader, Workers
from torch.utils.data import RandomSampler, SequentialSampler
from trl.trainer.utils import RepeatSampler

from layup_hf.progress.orders import Order, Repeats
from layup_hf.progress.sharing import SharedLoader


def with_generator(samples=20, seed=3):
    return RandomSampler(range(samples), generator=torch.Generator().manual_seed(seed))


def test_a_sampler_with_a_generator_gives_its_orders_whatever_was_asked_for_before():
    sampler, order = with_generator(), Order(with_generator(), seed=0)
    expected = [list(sampler) for _ in range(4)]
    assert len({tuple(one) for one in expected}) == 4
    for epoch in (2, 0, 3, 1, 1):
        assert order.of(epoch).tolist() == expected[epoch]


def test_a_random_sampler_without_one_goes_by_the_seed_and_the_epoch():
    orders = [Order(RandomSampler(range(20)), seed) for seed in (0, 0, 1)]
    assert orders[0].of(1).tolist() == orders[1].of(1).tolist() != orders[2].of(1).tolist()
    assert orders[0].of(0).tolist() != orders[0].of(1).tolist()


def test_prompts_that_are_repeated_are_in_the_order_once():
    sampler = RepeatSampler(range(10), mini_repeat_count=3, batch_size=4, repeat_count=2, seed=5)
    order = Order(sampler, seed=0)
    assert order.repeats == Repeats(3, 2)
    assert len(order) == 10
    expected = [list(dict.fromkeys(sampler)) for _ in range(3)]
    for epoch in (2, 0, 1):
        assert order.of(epoch).tolist()[:8] == expected[epoch]  # TRL leaves out what does not fill a batch
        assert sorted(order.of(epoch)) == list(range(10))
    assert (sampler.mini_repeat_count, sampler.repeat_count, sampler.batch_size) == (3, 2, 4)
    assert Order(SequentialSampler(range(10)), seed=0).repeats == Repeats()


def make_loader(prompts, kind, group, uses, rank, world_size):
    dataset = list(range(prompts))
    sampler = RepeatSampler(dataset, mini_repeat_count=group, batch_size=7, repeat_count=uses, seed=1)
    return SharedLoader(
        partial(Loader, dataset=dataset, ahead=kind.ahead),
        sampler,
        batch_size=kind.batch_size * group,
        accumulation=kind.accumulation,
        drop_last=False,
        seed=0,
        rank=rank,
        world_size=world_size,
    )


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 60),
    st.lists(st.integers(0, 7), min_size=1, max_size=4),
    st.builds(Kind, st.integers(1, 4), st.integers(1, 4)),
    st.integers(2, 4),
    st.integers(1, 5),
    st.randoms(use_true_random=False),
)
def test_all_uses_of_a_rollout_are_one_workers_and_each_prompt_has_one(prompts, aheads, kind, group, uses, schedule):
    kinds = [kind._replace(ahead=ahead) for ahead in aheads]
    loaders = [make_loader(prompts, one, group, uses, rank, len(kinds)) for rank, one in enumerate(kinds)]
    workers = Workers(loaders)
    workers.run_all(schedule)
    rollouts = []
    for rank in range(len(kinds)):
        batches = [batch for use in workers.used if use.rank == rank for batch in use.batches]
        assert len(batches) % uses == 0
        for start in range(0, len(batches), uses):
            assert batches[start : start + uses] == batches[start : start + 1] * uses
            rollouts.append(batches[start])
    for rollout in rollouts:
        assert len(rollout) == kind.batch_size * group
        assert all(
            rollout[place : place + group] == rollout[place : place + 1] * group
            for place in range(0, len(rollout), group)
        )
    used = Counter(prompt for rollout in rollouts for prompt in set(rollout))
    assert set(used.values()) <= {1}
    assert len(used) == prompts - prompts % kind.batch_size
    for use in workers.used:
        assert len(use.batches) <= kind.accumulation


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 3), st.integers(2, 4), st.integers(0, 30), st.randoms(use_true_random=False))
def test_a_resumed_run_generates_for_no_prompt_again(prompts, workers, uses, moves, schedule):
    kind, group = Kind(2, 1), 2
    first = Workers([make_loader(prompts, kind, group, uses, rank, workers) for rank in range(workers)])
    first.run_all(schedule, moves)
    position = first.position()
    then = schedule.randint(1, 3)
    second = Workers(
        [make_loader(prompts, kind, group, uses, rank, then) for rank in range(then)],
        position=position,
        store=dist.HashStore(),
    )
    second.run_all(Random(0))
    begun = {prompt for use in first.used for batch in use.batches for prompt in batch}
    left = {prompt for use in second.used for batch in use.batches for prompt in batch}
    assert not begun & left
    assert len(begun | left) == prompts - prompts % 2


def test_a_look_takes_nothing_from_training():
    loader = make_loader(12, Kind(2, 1), 2, 2, 0, 1)
    looked = [batch for batch in loader]
    trained = [batch for update in loader.updates(0) for batch in update]
    assert looked == trained
    assert len(trained) == 12
    assert (loader.draw_size, loader.update_size, loader.updates_per_epoch) == (2, 1.0, 12)


@pytest.mark.parametrize(("accumulation", "uses", "draw_size", "steps"), [(4, 2, 4, 1), (1, 4, 2, 4), (4, 6, 4, 3)])
def test_as_many_rollouts_are_drawn_at_once_as_make_whole_steps(accumulation, uses, draw_size, steps):
    loader = make_loader(48, Kind(2, accumulation), 2, uses, 0, 1)
    assert loader.draw_size == draw_size
    assert loader.update_size == draw_size / steps
    assert [len(list(update)) for update in loader.updates(0)] == [accumulation] * (24 * uses // accumulation)
