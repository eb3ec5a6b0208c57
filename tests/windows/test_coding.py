"""Numbers in a few bits, by those that the receiver has: found again to a step, or known not to have been."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from layup_hf.windows.coders import TorchCoder, make_coder
from layup_hf.windows.coding import LARGEST, PIECE, Coded, Plan, compare, factors, reach

CODERS = {"torch": TorchCoder(torch.device("cpu"), 1), "native": make_coder(torch.device("cpu"), 2)}
FACTORS = factors(5)

plans = st.builds(
    Plan.of,
    st.one_of(st.integers(1, 9), st.integers(PIECE - 2, PIECE + 2), st.integers(1, 5 * PIECE)),
    st.sampled_from([4, 8]),
    st.integers(1, 4),
)


def room(plan):
    return Coded(torch.zeros(plan.pieces, dtype=torch.int64), torch.zeros(plan.word_bytes, dtype=torch.uint8))


def pair(plan, seed, apart=0.99):
    """Numbers of a sender and of a receiver, nearly as far apart as each part's step allows, and the steps."""
    random = torch.Generator().manual_seed(seed)
    steps = (torch.rand(plan.parts, generator=random) + 0.1).numpy()
    theirs, mine = torch.randn(plan.numel, generator=random) * 30, torch.empty(plan.numel)
    for part, step in enumerate(steps):
        numbers = plan.numbers(part)
        shape = theirs[numbers].shape
        away = (torch.rand(shape, generator=random) * 2 - 1) * apart * reach(plan.bits) * float(step)
        mine[numbers] = theirs[numbers] + away
    return theirs, mine, steps


def step_of_each(plan, steps):
    return torch.from_numpy(np.repeat(steps, PIECE * plan.pieces_each)[: plan.numel])


@pytest.fixture(params=list(CODERS))
def coder(request):
    return CODERS[request.param]


def test_llvm_makes_the_code_where_it_is_installed():
    pytest.importorskip("llvmlite")
    assert type(CODERS["native"]).__name__ == "NativeCoder"


@settings(max_examples=40, deadline=None)
@given(plan=plans, seed=st.integers(0, 2**32), names=st.permutations(list(CODERS)))
def test_what_is_near_is_found_to_a_step_and_the_same_by_every_coder(plan, seed, names):
    theirs, mine, steps = pair(plan, seed)
    coded, found = room(plan), []
    assert CODERS[names[0]].encode(plan, theirs, steps, FACTORS, coded)
    for name in names:
        into = torch.full_like(theirs, 7.0)
        seen = CODERS[name].decode(plan, coded, steps, FACTORS, mine, into)
        assert not seen.wrong.any()
        compared = compare(plan, into, mine)
        assert np.array_equal(seen.farthest, compared.farthest)
        assert np.array_equal(seen.largest, compared.largest)
        found.append(into)
    assert bool(((found[0] - theirs).abs() <= step_of_each(plan, steps) * (1 + 1e-4)).all())
    assert torch.equal(*found)


@settings(max_examples=30, deadline=None)
@given(plan=plans, seed=st.integers(0, 2**32), data=st.data())
def test_what_is_too_far_away_is_noticed_where_it_is(plan, seed, data):
    theirs, mine, steps = pair(plan, seed, apart=0.5)
    place = data.draw(st.integers(0, plan.numel - 1))
    part = place // (PIECE * plan.pieces_each)
    away = data.draw(st.sampled_from([-1e9, -40.0, -1.2, 1.2, 3.0, 1e9]))  # a wrap-around begins between 0.5 and 1
    mine[place] = theirs[place] + away * 2**plan.bits * float(steps[part])
    for name, coder in CODERS.items():
        coded = room(plan)
        assert coder.encode(plan, theirs, steps, FACTORS, coded)
        wrong = coder.decode(plan, coded, steps, FACTORS, mine, torch.empty_like(theirs)).wrong
        assert (wrong.sum(), wrong[part]) == (1, 1), name


@settings(max_examples=30, deadline=None)
@given(plan=plans, seed=st.integers(0, 2**32), data=st.data())
def test_a_changed_bit_and_other_factors_are_noticed(plan, seed, data):
    theirs, mine, steps = pair(plan, seed)
    coded = room(plan)
    assert CODERS["native"].encode(plan, theirs, steps, FACTORS, coded)
    changed = data.draw(st.sampled_from([coded.sums.view(torch.uint8), coded.words]))
    place = data.draw(st.integers(0, len(changed) - 1))
    if plan.bits == 8 or changed is not coded.words or place + 1 < len(changed):  # a last half may mean nothing
        changed[place] ^= 1 << data.draw(st.integers(0, 7))
        for coder in CODERS.values():
            assert coder.decode(plan, coded, steps, FACTORS, mine, torch.empty_like(theirs)).wrong.sum() == 1
    assert CODERS["native"].encode(plan, theirs, steps, FACTORS, coded)
    others = factors(6)
    for coder in CODERS.values():
        wrong = coder.decode(plan, coded, steps, others, mine, torch.empty_like(theirs)).wrong
        assert wrong.sum() >= plan.pieces - 1  # a last piece may have counts of 0 alone


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), float(LARGEST), -2.0 * LARGEST, 1e30])
def test_what_does_not_fit_is_not_encoded(coder, bad):
    for bits in (4, 8):
        plan = Plan.of(PIECE + 5, bits, 1)
        values = torch.ones(plan.numel)
        values[PIECE + 3] = bad
        assert not coder.encode(plan, values, np.ones(1, np.float32), FACTORS, room(plan))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_next_to_what_is_no_number_nothing_is_found(coder, bad):
    plan = Plan.of(9, 8, 1)
    coded, mine = room(plan), torch.ones(9)
    assert coder.encode(plan, mine, np.ones(1, np.float32), FACTORS, coded)
    mine[4] = bad
    assert coder.decode(plan, coded, np.ones(1, np.float32), FACTORS, mine, torch.empty(9)).wrong.sum() == 1


@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_is_right_in_the_mean(coder, bits):
    """Of numbers at every place between two counts: within Bernstein's bound, which fails once in a million runs, and
    their mean within five standard deviations.
    """
    plan, repeats = Plan.of(2000, bits, 1), 200
    values, steps, total = torch.linspace(-3, 3, 2000), np.array([0.5], np.float32), torch.zeros(2000)
    for _ in range(repeats):
        coded, into = room(plan), torch.empty(2000)
        assert coder.encode(plan, values, steps, FACTORS, coded)
        coder.decode(plan, coded, steps, FACTORS, values, into)
        total += into
    scaled = values / 0.5
    rest = scaled - scaled.floor()
    errors = total / repeats - values
    doubt = math.log(2 * len(values) / 1e-6) / repeats
    bounds = (2 * doubt * rest * (1 - rest)).sqrt() + doubt / 3
    assert bool((errors.abs() <= 0.5 * bounds + 1e-6).all())
    assert abs(float(errors.mean())) <= 0.5 * 5 * float((rest * (1 - rest)).sum() / repeats) ** 0.5 / 2000


def test_factors_are_the_same_everywhere():
    assert factors(5)[:4].tolist() == [444499528, 1575707441, 113014052, 1268133428]
    assert factors(5).dtype == np.int32
    assert len(factors(2**64 - 1)) == PIECE
    assert factors(7).min() >= 0


@given(numel=st.integers(1, 10**9), most=st.integers(1, 16))
def test_parts_hold_every_number_once(numel, most):
    plan = Plan.of(numel, 8, most)
    assert plan.parts <= min(most, plan.pieces)
    ends = [plan.numbers(part) for part in range(plan.parts)]
    assert [part.start for part in ends] == [0, *(part.stop for part in ends[:-1])]
    assert ends[-1].stop == numel
    assert all(part.stop > part.start for part in ends)
