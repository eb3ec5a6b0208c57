"""Clipping by what is known of the global norm, block by block."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import gpt2, loss_of, text_batch
from torch import nn
from torch.nn.utils import clip_grad_norm_, get_total_norm

from layup_hf.blocks import Block, split_into_blocks
from layup_hf.blocks.hooks import BlockHooks
from layup_hf.optim.clipping import BlockClipper, DeviceEstimate, HostEstimate

SHAPES = [[(3, 2), (3,)], [(4, 4)], [(5,), (2, 2), (1,)]]


@pytest.fixture
def blocks():
    torch.manual_seed(0)
    members = [[nn.Parameter(torch.zeros(shape)) for shape in shapes] for shapes in SHAPES]
    return [Block(index, str(index), (), tuple(parameters), (), ()) for index, parameters in enumerate(members)]


def clipper_of(blocks, max_norm):
    return BlockClipper(blocks, max_norm, torch.device("cpu"))


def parameters_of(blocks):
    return [parameter for block in blocks for parameter in block.parameters]


def set_gradients(blocks, seed=0):
    """Random gradients, and a copy of them."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters_of(blocks):
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return [parameter.grad.clone() for parameter in parameters_of(blocks)]


def gradients_of(blocks):
    return [parameter.grad for parameter in parameters_of(blocks)]


def clip(clipper, blocks):
    for block in reversed(blocks):
        clipper.clip_block(block)


def norm_of(block):
    return get_total_norm([parameter.grad for parameter in block.parameters]).item()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_gradients_count_with_both_parts_beside_real_ones(dtype):
    torch.manual_seed(0)
    kinds = [(torch.float32, dtype), (torch.float32,), (dtype,)]
    members = [[nn.Parameter(torch.zeros(3, 2, dtype=kind)) for kind in some] for some in kinds]
    blocks = [Block(index, str(index), (), tuple(parameters), (), ()) for index, parameters in enumerate(members)]
    clipper = clipper_of(blocks, 0.5)
    for _ in range(2):
        before = set_gradients(blocks)
        clip(clipper, blocks)
    norm = sum(gradient.abs().double().square().sum() for gradient in before).sqrt()
    torch.testing.assert_close(clipper.total_norm().double(), norm, rtol=1e-5, atol=0)
    for found, gradient in zip(gradients_of(blocks), before, strict=True):
        torch.testing.assert_close(found, gradient * (0.5 / norm).item(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("max_norm", [0.1, 1.0, 100.0])
def test_constant_gradients_are_clipped_as_by_torch_after_the_first_step(blocks, max_norm):
    clipper = clipper_of(blocks, max_norm)
    set_gradients(blocks)
    clip(clipper, blocks)
    for _ in range(2):
        set_gradients(blocks)
        clip(clipper, blocks)
        ours = gradients_of(blocks)
        set_gradients(blocks)
        clip_grad_norm_(parameters_of(blocks), max_norm)
        torch.testing.assert_close(ours, gradients_of(blocks), rtol=1e-6, atol=0)


def test_in_the_first_step_a_block_counts_from_its_completion_on(blocks):
    clipper = clipper_of(blocks, 0.5)
    originals = set_gradients(blocks)
    norms = [norm_of(block) for block in blocks]
    clip(clipper, blocks)
    for block in blocks:
        known = math.hypot(*norms[block.index :])
        assert norm_of(block) == pytest.approx(norms[block.index] * 0.5 / known, rel=1e-4)
    assert not any(torch.equal(ours, original) for ours, original in zip(gradients_of(blocks), originals, strict=True))


def test_a_block_still_to_come_counts_with_its_norm_of_the_last_step_and_what_others_have_grown(blocks):
    clipper = clipper_of(blocks, 0.5)
    set_gradients(blocks, seed=1)
    earlier = [norm_of(block) for block in blocks]
    clip(clipper, blocks)
    set_gradients(blocks, seed=2)
    now = [norm_of(block) for block in blocks]
    clip(clipper, blocks)
    for block in blocks:
        completed = math.hypot(*now[block.index :])
        growth = completed / math.hypot(*earlier[block.index :])
        estimate = math.hypot(completed, growth * math.hypot(*earlier[: block.index]))
        assert norm_of(block) == pytest.approx(now[block.index] * min(1, 0.5 / estimate), rel=1e-4)


@pytest.mark.parametrize("factor", [50.0, 1e-2])
def test_a_gradient_that_grows_or_shrinks_as_a_whole_is_clipped_exactly_and_so_is_the_next(blocks, factor):
    clipper = clipper_of(blocks, 0.5)
    for scale in (1.0, factor, 1.0):
        set_gradients(blocks)
        for parameter in parameters_of(blocks):
            parameter.grad *= scale
        norm = get_total_norm(gradients_of(blocks)).item()
        first = scale == 1.0 and clipper.total_norm() == 0
        clip(clipper, blocks)
        if not first:
            assert get_total_norm(gradients_of(blocks)).item() == pytest.approx(min(norm, 0.5), rel=1e-4)


def test_one_block_that_had_next_to_no_gradient_does_not_clip_everything_away(blocks):
    clipper = clipper_of(blocks, 0.5)
    set_gradients(blocks)
    for parameter in blocks[2].parameters:
        parameter.grad *= 1e-12
    clip(clipper, blocks)
    set_gradients(blocks)
    total = get_total_norm(gradients_of(blocks)).item()
    first = norm_of(blocks[2])
    clip(clipper, blocks)
    assert norm_of(blocks[2]) >= first * 0.5 / (101 * total)


def test_gradients_in_half_precision_are_measured_in_fp32(blocks):
    clipper = clipper_of(blocks, 0.0)
    for parameter in parameters_of(blocks):
        parameter.data = parameter.data.bfloat16()
        parameter.grad = torch.full_like(parameter, 0.1)
    clip(clipper, blocks)
    values = torch.cat([gradient.float().flatten() for gradient in gradients_of(blocks)])
    assert clipper.total_norm().item() == pytest.approx(values.norm().item(), rel=1e-6)


def test_gradients_below_the_limit_are_unchanged(blocks):
    clipper = clipper_of(blocks, 1000.0)
    originals = set_gradients(blocks)
    clip(clipper, blocks)
    assert all(torch.equal(ours, original) for ours, original in zip(gradients_of(blocks), originals, strict=True))


def test_without_limit_gradients_are_measured_and_bitwise_unchanged(blocks):
    clipper = clipper_of(blocks, 0.0)
    originals = set_gradients(blocks)
    clip(clipper, blocks)
    assert all(torch.equal(ours, original) for ours, original in zip(gradients_of(blocks), originals, strict=True))
    assert clipper.total_norm().item() == pytest.approx(get_total_norm(originals).item(), rel=1e-6)


@pytest.mark.parametrize("max_norm", [0.0, 0.1, 100.0])
def test_after_backward_the_total_is_the_exact_norm_before_clipping(blocks, max_norm):
    clipper = clipper_of(blocks, max_norm)
    for seed in range(3):
        originals = set_gradients(blocks, seed)
        clip(clipper, blocks)
        assert clipper.total_norm().dim() == 0
        assert clipper.total_norm().item() == pytest.approx(get_total_norm(originals).item(), rel=1e-6)


def test_the_total_is_exact_in_a_real_backward():
    model = gpt2().train()
    loss_of(model, text_batch()).backward()
    expected = get_total_norm([p.grad for p in model.parameters()]).item()
    model.zero_grad()
    clipper = clipper_of(blocks := split_into_blocks(model), 0.1)
    with BlockHooks(blocks, on_block_ready=clipper.clip_block):
        loss_of(model, text_batch()).backward()
    assert clipper.total_norm().item() == pytest.approx(expected, rel=1e-6)
    assert get_total_norm([p.grad for p in model.parameters()]).item() < expected


def test_a_block_without_gradient_counts_nothing(blocks):
    clipper = clipper_of(blocks, 1.0)
    set_gradients(blocks)
    clip(clipper, blocks)
    set_gradients(blocks, seed=1)
    for parameter in blocks[1].parameters:
        parameter.grad = None
    expected = math.hypot(norm_of(blocks[0]), norm_of(blocks[2]))
    clip(clipper, blocks)
    assert clipper.total_norm().item() == pytest.approx(expected, rel=1e-6)


def test_a_parameter_without_gradient_is_left_out(blocks):
    clipper = clipper_of(blocks, 0.5)
    set_gradients(blocks)
    first, *_ = blocks[2].parameters
    first.grad = None
    others = [parameter.grad for parameter in blocks[2].parameters if parameter is not first]
    expected = get_total_norm(others).item()
    clipper.clip_block(blocks[2])
    assert first.grad is None
    assert clipper.total_norm().item() == pytest.approx(expected, rel=1e-6)
    assert get_total_norm(others).item() == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("value", [1e25, torch.inf, torch.nan])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_norm_that_is_not_finite_concerns_the_step_that_it_is_in_alone(blocks, number, value):
    clipper = clipper_of(blocks, 0.5)
    set_gradients(blocks)
    clip(clipper, blocks)
    set_gradients(blocks)
    for parameter in blocks[number].parameters:
        parameter.grad.fill_(value)
    clip(clipper, blocks)
    assert not math.isfinite(clipper.total_norm())
    for _ in range(2):
        set_gradients(blocks)
        clip(clipper, blocks)
        norm = get_total_norm(gradients_of(blocks)).item()
        assert 0.2 < norm < 1.0
    assert norm == pytest.approx(0.5, rel=1e-4)


def test_gradients_in_double_precision_are_measured_and_clipped_so(blocks):
    for parameter in parameters_of(blocks):
        parameter.data = parameter.data.double()
    clipper = clipper_of(blocks, 0.5)
    for _ in range(2):
        originals = set_gradients(blocks)
        clip(clipper, blocks)
    assert clipper.total_norm().item() == pytest.approx(get_total_norm(originals).item(), rel=1e-14)
    assert get_total_norm(gradients_of(blocks)).item() == pytest.approx(0.5, rel=1e-5)


FIGURES = st.one_of(st.floats(0.25, 4, width=32), st.sampled_from([0.0, math.inf, math.nan]))


@settings(deadline=None)
@given(st.lists(st.lists(FIGURES, min_size=3, max_size=3), min_size=1, max_size=4), st.booleans(), st.data())
def test_a_cpu_and_a_device_estimate_alike(steps, skips, data):
    host, device = HostEstimate(3, torch.float32), DeviceEstimate(3, torch.float32, torch.device("cpu"))
    for figures in steps:
        order = data.draw(st.permutations(range(3)))
        for estimate in (host, device):
            estimate.begin_step()
        for index in order:
            norms = [torch.tensor(figures[index])] * (1 + index) if figures[index] else []
            for estimate in (host, device):
                estimate.add(index, norms, skips)
            torch.testing.assert_close(host.norms, device.norms, rtol=1e-4, atol=0, equal_nan=True)
            theirs = float(device.factor(1.0))
            assert host.factor(1.0) == pytest.approx(theirs, rel=2e-3, abs=1e-30, nan_ok=True)
