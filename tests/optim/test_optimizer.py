"""Stepping block by block is the plain optimizer, to the bit."""

import contextlib
import copy
import itertools
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import gpt2, loss_of, text_batch
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, RMSprop
from torch.optim.lr_scheduler import LambdaLR
from transformers.optimization import Adafactor

from layup_hf.blocks import Block, split_into_blocks
from layup_hf.blocks.hooks import BlockHooks
from layup_hf.optim.muon import MuonAdamW
from layup_hf.optim.optimizer import BlockOptimizer

OPTIMIZERS = {
    "sgd": lambda groups: SGD(groups, lr=0.1, momentum=0.9, nesterov=True),
    "sgd_foreach": lambda groups: SGD(groups, lr=0.1, momentum=0.9, foreach=True),
    "adam": lambda groups: Adam(groups, lr=0.01, amsgrad=True),
    "adamw_single": lambda groups: AdamW(groups, lr=0.01, foreach=False),
    "adamw_foreach": lambda groups: AdamW(groups, lr=0.01, foreach=True),
    "adamw_fused": lambda groups: AdamW(groups, lr=0.01, fused=True),
    "adagrad": lambda groups: Adagrad(groups, lr=0.01),
    "rmsprop": lambda groups: RMSprop(groups, lr=0.01, momentum=0.9, centered=True),
    "adafactor": lambda groups: Adafactor(groups, lr=0.01, relative_step=False, scale_parameter=False),
    "adafactor_relative": lambda groups: Adafactor(groups, relative_step=True, scale_parameter=True, warmup_init=True),
}
OPTIMIZERS["muon"] = lambda groups: MuonAdamW(groups, {"whole": matrices_in(groups)}, lr=0.01)
STEPS = 3


def matrices_in(groups):
    """All that have two axes."""
    members = itertools.chain.from_iterable(g["params"] if isinstance(g, dict) else [g] for g in groups)
    return [parameter for parameter in members if parameter.dim() == 2]


def groups_of(model, decay):
    """One group, or two as the Trainer makes them."""
    parameters = list(model.parameters())
    if not decay:
        return [{"params": parameters}]
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def twins(name, decay=True):
    """The same model twice: with the plain optimizer, and with the one that steps blocks."""
    torch.manual_seed(1)
    model = gpt2().train()
    other = copy.deepcopy(model)
    plain = OPTIMIZERS[name](groups_of(model, decay))
    blocks = split_into_blocks(other)
    return model, plain, other, BlockOptimizer(OPTIMIZERS[name](groups_of(other, decay)), blocks), blocks


def plain_step(model, optimizer):
    loss_of(model, text_batch()).backward()
    optimizer.step()
    optimizer.zero_grad()


def block_step(model, optimizer, blocks, left_to_step=1):
    """A step in the order of backward, in which `step()` finds the first `left_to_step` blocks not yet stepped."""
    loss_of(model, text_batch()).backward()
    for block in reversed(blocks[left_to_step:]):
        optimizer.step_block(block)
    optimizer.step()


def assert_same_parameters(model, other):
    for (name, ours), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def assert_same_state(state, other):
    """Bitwise equality of two state dicts, in keys, types and values."""
    assert type(state) is type(other)
    if isinstance(state, dict):
        assert state.keys() == other.keys()
        for key in state:
            assert_same_state(state[key], other[key])
    elif isinstance(state, (list, tuple)):
        assert len(state) == len(other)
        for ours, theirs in zip(state, other, strict=True):
            assert_same_state(ours, theirs)
    elif isinstance(state, torch.Tensor):
        assert state.dtype == other.dtype
        assert torch.equal(state, other)
    else:
        assert state == other


def make_blocks(*members):
    """Blocks by hand of the given lists of parameters."""
    return [
        Block(index, f"block.{index}", tuple(map(str, range(len(params)))), tuple(params), (), ())
        for index, params in enumerate(members)
    ]


def parameter(*shape):
    return nn.Parameter(torch.randn(*shape))


# ---- Equality with the plain optimizer ----


@pytest.mark.parametrize("decay", [False, True], ids=["one_group", "decay_groups"])
@pytest.mark.parametrize("left_to_step", [0, 1, 4])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_by_block_equal_the_plain_steps_bitwise(name, left_to_step, decay):
    model, plain, other, optimizer, blocks = twins(name, decay)
    initial = copy.deepcopy(model)
    for _ in range(STEPS):
        plain_step(model, plain)
        block_step(other, optimizer, blocks, left_to_step)
    assert_same_parameters(model, other)
    assert_same_state(optimizer.state_dict(), plain.state_dict())
    with pytest.raises(AssertionError):
        assert_same_parameters(model, initial)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_inside_backward_equal_the_plain_steps_bitwise(name):
    model, plain, other, optimizer, blocks = twins(name)
    with BlockHooks(blocks, on_block_ready=optimizer.step_block) as hooks:
        optimizer.before_step = hooks.finish_backward
        for _ in range(STEPS):
            plain_step(model, plain)
            loss_of(other, text_batch()).backward()
            assert all(p.grad is None for p in other.parameters())
            optimizer.step()
    assert_same_parameters(model, other)


@st.composite
def assignments(draw):
    """For each of some parameters: its block, its group, and whether it has a gradient in each step."""
    has_gradient = st.lists(st.booleans(), min_size=STEPS, max_size=STEPS)
    return draw(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 2), has_gradient), min_size=1, max_size=8))


@given(
    assignment=assignments(),
    stepped_in_backward=st.lists(st.sampled_from(range(4)), unique=True),
    name=st.sampled_from(sorted(OPTIMIZERS)),
)
@settings(max_examples=60)
def test_any_assignment_to_blocks_and_groups_equals_the_plain_optimizer(assignment, stepped_in_backward, name):
    torch.manual_seed(0)
    parameters = [parameter(3, 2) for _ in assignment]
    copies = copy.deepcopy(parameters)

    def groups(params):
        by_group = {group: [] for _, group, _ in assignment}
        for param, (_, group, _) in zip(params, assignment, strict=True):
            by_group[group].append(param)
        return [{"params": members, "lr": 0.01 * (group + 1)} for group, members in by_group.items()]

    plain = OPTIMIZERS[name](groups(parameters))
    blocks = make_blocks(
        *([p for p, (block, _, _) in zip(copies, assignment, strict=True) if block == index] for index in range(4))
    )
    optimizer = BlockOptimizer(OPTIMIZERS[name](groups(copies)), blocks)
    for step in range(STEPS):
        for ours, theirs, (_, _, has_gradient) in zip(copies, parameters, assignment, strict=True):
            if has_gradient[step]:
                theirs.grad = torch.randn(3, 2)
                ours.grad = theirs.grad.clone()
        plain.step()
        plain.zero_grad()
        for index in stepped_in_backward:
            optimizer.step_block(blocks[index])
        optimizer.step()
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(copies, parameters, strict=True))
    assert_same_state(optimizer.state_dict(), plain.state_dict())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_parameter_without_gradient_is_skipped_as_the_plain_optimizer_does(name):
    parameters = [parameter(2, 2), parameter(2, 2)]
    copies = copy.deepcopy(parameters)
    plain = OPTIMIZERS[name](parameters)
    optimizer = BlockOptimizer(OPTIMIZERS[name](copies), blocks := make_blocks(copies))
    for used, unused in (parameters, copies):
        used.grad = torch.ones(2, 2)
        assert unused.grad is None
    plain.step()
    optimizer.step_block(blocks[0])
    assert torch.equal(copies[0], parameters[0])
    assert torch.equal(copies[1], parameters[1])
    assert_same_state(optimizer.state_dict(), plain.state_dict())


# ---- What others see ----


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_dict_loads_in_both_directions(name):
    """A checkpoint of either continues with the other as if nothing had happened."""
    model, plain, other, optimizer, blocks = twins(name)
    for _ in range(STEPS):
        plain_step(model, plain)
    other.load_state_dict(model.state_dict())
    optimizer.load_state_dict(copy.deepcopy(plain.state_dict()))
    plain_step(model, plain)
    block_step(other, optimizer, blocks)
    assert_same_parameters(model, other)
    assert_same_state(optimizer.state_dict(), plain.state_dict())

    block_step(other, optimizer, blocks)
    third = copy.deepcopy(other)
    resumed = OPTIMIZERS[name](groups_of(third, decay=True))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    plain_step(third, resumed)
    block_step(other, optimizer, blocks)
    assert_same_parameters(third, other)


def test_groups_and_state_are_those_of_the_inner_optimizer():
    _, _, other, optimizer, blocks = twins("adamw_foreach")
    groups = optimizer.inner.param_groups
    block_step(other, optimizer, blocks)
    assert optimizer.param_groups is optimizer.inner.param_groups is groups
    assert optimizer.state is optimizer.inner.state
    assert optimizer.defaults is optimizer.inner.defaults
    assert sum(len(group["params"]) for group in groups) == len(list(other.parameters()))


def test_a_scheduler_sets_the_rate_of_the_inner_optimizer():
    model, plain, other, optimizer, blocks = twins("adamw_foreach")
    schedules = [LambdaLR(each, lambda step: 1 / (1 + step)) for each in (plain, optimizer)]
    for step in range(STEPS):
        plain_step(model, plain)
        block_step(other, optimizer, blocks)
        for schedule in schedules:
            schedule.step()
        assert [group["lr"] for group in optimizer.inner.param_groups] == pytest.approx([0.01 / (2 + step)] * 2)
    assert_same_parameters(model, other)


def test_groups_come_back_after_an_error_in_the_step():
    param = parameter(2)
    optimizer = BlockOptimizer(StateInGroup([param], None, lambda _: 1 / 0), blocks := make_blocks([param]))
    groups = optimizer.param_groups
    with pytest.raises(ZeroDivisionError):
        optimizer.step_block(blocks[0])
    assert optimizer.param_groups is groups


def test_a_step_after_one_that_failed_steps_every_block():
    one, other = parameter(2), parameter(2)
    calls = itertools.count(1)
    inner = StateInGroup([one, other], None, lambda _: 1 / 0 if next(calls) == 2 else None)
    optimizer = BlockOptimizer(inner, make_blocks([one], [other]))
    for fails in (True, False):
        before = [one.clone(), other.clone()]
        one.grad, other.grad = torch.ones(2), torch.ones(2)
        with pytest.raises(ZeroDivisionError) if fails else contextlib.nullcontext():
            optimizer.step()
    assert not torch.equal(one, before[0])
    assert not torch.equal(other, before[1])


@pytest.mark.parametrize("registered_before", [True, False])
def test_hooks_come_once_with_a_step_and_see_the_whole_optimizer(registered_before):
    one, other = parameter(2), parameter(2)
    inner, seen = SGD([one, other], lr=0.1), []
    optimizer = None if registered_before else BlockOptimizer(inner, make_blocks([one], [other]))
    inner.register_step_pre_hook(lambda owner, *_: seen.append(("pre", owner, len(owner.param_groups[0]["params"]))))
    inner.register_step_post_hook(lambda owner, *_: seen.append(("post", owner, len(owner.param_groups[0]["params"]))))
    optimizer = optimizer or BlockOptimizer(inner, make_blocks([one], [other]))
    for _ in range(2):
        one.grad, other.grad = torch.ones(2), torch.ones(2)
        optimizer.step()
    assert seen == [("pre", inner, 2), ("post", inner, 2)] * 2


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))])
def test_a_copy_is_a_plain_optimizer(duplicate):
    _, _, other, optimizer, blocks = twins("adamw_foreach")
    block_step(other, optimizer, blocks)
    again = duplicate(optimizer)
    assert type(again) is AdamW
    assert_same_state(again.state_dict(), optimizer.state_dict())


def test_zero_grad_reaches_every_parameter():
    one, other = parameter(2), parameter(2)
    optimizer = BlockOptimizer(SGD([one, other], lr=0.1), make_blocks([one], [other]))
    one.grad, other.grad = torch.ones(2), torch.ones(2)
    optimizer.zero_grad()
    assert one.grad is None
    assert other.grad is None


# ---- Gradients ----


def test_gradients_are_freed_by_step_block_and_by_step():
    _, _, other, optimizer, blocks = twins("sgd")
    loss_of(other, text_batch()).backward()
    for block in reversed(blocks[1:]):
        assert all(p.grad is not None for p in block.parameters)
        optimizer.step_block(block)
        assert all(p.grad is None for p in block.parameters)
    assert all(p.grad is not None for p in blocks[0].parameters)
    optimizer.step()
    assert all(p.grad is None for p in blocks[0].parameters)


@pytest.mark.parametrize(("stepped", "most"), [(True, 2), (False, 6)])
def test_a_stepped_backward_holds_gradients_of_two_blocks_at_most(stepped, most):
    model = gpt2(layers=4).train()
    blocks = split_into_blocks(model)
    optimizer = BlockOptimizer(AdamW(model.parameters()), blocks)
    held = []
    for param in model.parameters():  # before the hooks that step
        param.register_post_accumulate_grad_hook(
            lambda _: held.append(sum(any(p.grad is not None for p in block.parameters) for block in blocks))
        )
    with BlockHooks(blocks, on_block_ready=optimizer.step_block if stepped else lambda block: None):
        loss_of(model, text_batch()).backward()
    assert len(held) == len(list(model.parameters()))
    assert (max(held) <= most) if stepped else (max(held) == most)


def test_before_step_comes_before_the_remaining_blocks_are_stepped():
    one, other = parameter(2), parameter(2)
    optimizer = BlockOptimizer(SGD([one, other], lr=0.1), blocks := make_blocks([one], [other]))
    one.grad = torch.ones(2)
    seen = []
    optimizer.before_step = lambda: seen.append(one.grad) or optimizer.step_block(blocks[1])
    optimizer.step()
    assert torch.equal(seen[0], torch.ones(2))
    assert one.grad is None


# ---- Refusals ----


class StateInGroup(SGD):
    """Counts its steps in the group, in the way that is asked for."""

    def __init__(self, params, start, count):
        super().__init__(params, lr=0.1)
        self.count = count
        if start is not None:
            self.param_groups[0]["k"] = start

    def step(self, closure=None):
        for group in self.param_groups:
            self.count(group)
        return super().step(closure)


def count_in_new_key(group):
    group["k"] = group.get("k", 0) + 1


def count_in_tensor(group):
    group["k"] += 1


@pytest.mark.parametrize(
    ("start", "count"),
    [
        pytest.param(None, count_in_new_key, id="new_key"),
        pytest.param(0, count_in_new_key, id="number"),
        pytest.param(torch.zeros(()), count_in_tensor, id="tensor_in_place"),
    ],
)
def test_steps_counted_in_a_group_are_counted_once_per_step(start, count):
    one, other = parameter(2), parameter(2)
    optimizer = BlockOptimizer(StateInGroup([one, other], start, count), make_blocks([one], [other]))
    for step in range(1, 4):
        one.grad, other.grad = torch.ones(2), torch.ones(2)
        optimizer.param_groups[0]["lr"] = 0.1 * step  # as a scheduler does
        before = one.detach().clone()
        optimizer.step()
        assert optimizer.state_dict()["param_groups"][0]["k"] == step
        torch.testing.assert_close(before - one, torch.full((2,), 0.1 * step))
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.step()
    optimizer.load_state_dict(saved)
    optimizer.step()
    assert optimizer.param_groups[0]["k"] == 4


def test_state_of_parameters_in_a_group_is_refused_by_its_name():
    one, other = parameter(2), parameter(2)
    inner = StateInGroup([one, other], None, lambda group: group.update(state={}))
    optimizer = BlockOptimizer(inner, blocks := make_blocks([one], [other]))
    one.grad = torch.ones(2)
    with pytest.raises(ValueError, match=r"StateInGroup keeps the state of its parameters.*\(state\).*adamw_torch"):
        optimizer.step_block(blocks[0])


def test_a_figure_of_all_parameters_together_is_refused_by_its_name():
    """Such as Prodigy's estimate of the distance to the solution."""
    one, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.full((2,), 2.0))
    estimate = lambda group: group.update(d=sum(float(p.detach().norm()) for p in group["params"]))  # noqa: E731
    optimizer = BlockOptimizer(StateInGroup([one, other], 1.0, estimate), make_blocks([one], [other]))
    one.grad, other.grad = torch.ones(2), torch.ones(2)
    with pytest.raises(ValueError, match=r"StateInGroup takes 'd' from all parameters.*adamw_torch"):
        optimizer.step()


def test_a_closure_is_refused():
    param = parameter(2)
    optimizer = BlockOptimizer(SGD([param], lr=0.1), make_blocks([param]))
    with pytest.raises(ValueError, match="closure"):
        optimizer.step(lambda: 0.0)


def test_a_parameter_in_no_block_is_refused():
    known, unknown = parameter(2), parameter(3, 5)
    with pytest.raises(ValueError, match=r"shape \(3, 5\) that is in no block.*all its parameters before"):
        BlockOptimizer(SGD([known, unknown], lr=0.1), make_blocks([known]))


def test_a_frozen_parameter_that_it_holds_belongs_to_its_block():
    model = gpt2()
    model.transformer.wpe.requires_grad_(False)
    inner = SGD(model.parameters(), lr=0.1)
    blocks = split_into_blocks(model, inner.param_groups[0]["params"])
    BlockOptimizer(inner, blocks)
    assert "transformer.wpe.weight" in blocks[0].parameter_names


def test_an_added_group_is_refused():
    param = parameter(2)
    optimizer = BlockOptimizer(SGD([param], lr=0.1), make_blocks([param]))
    with pytest.raises(ValueError, match="Unfreeze what is to be trained first"):
        optimizer.add_param_group({"params": [parameter(2)]})
    assert len(optimizer.param_groups) == 1


class ScheduleFree(SGD):
    def train(self):
        pass


class AdaLomo(SGD):
    pass


class LayerWiseDummyOptimizer(SGD):
    pass


@pytest.mark.parametrize("kind", [torch.optim.LBFGS, ScheduleFree, AdaLomo, LayerWiseDummyOptimizer])
def test_an_optimizer_that_needs_the_whole_model_is_refused(kind):
    param = parameter(2)
    with pytest.raises(ValueError, match=rf"{kind.__name__} cannot be stepped block by block.*adamw_torch"):
        BlockOptimizer(kind([param], lr=0.1), make_blocks([param]))
