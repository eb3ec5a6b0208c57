"""The measured bias of a gradient against one that is computed by hand."""

import pytest
import torch
from torch import nn

from layup_hf.blocks import split_into_blocks
from layup_hf.blocks.bias import GradientBias
from layup_hf.blocks.hooks import BlockHooks


def step(model, batch, bias, move=None):
    """One step that is measured, with what a merge does to the blocks right after forward."""
    blocks = split_into_blocks(model)
    with BlockHooks(blocks, on_block_ready=bias.note_gradient, before_forward=bias.note_forward) as hooks:
        assert bias.is_due()
        with bias.recording():
            loss = model(batch).square().sum()
            if move is not None:
                for block in blocks:
                    for tensor in block.tensors:
                        move(tensor.data)
            loss.backward()
            hooks.finish_backward()

        def loss_of(other):
            with hooks.muted():
                return other(batch).square().sum()

        bias.measure(loss_of)
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    return gradients


def make_model():
    torch.manual_seed(0)
    layers = nn.Sequential(*(nn.Linear(6, 6, bias=False) for _ in range(3)))
    return nn.Sequential(layers, nn.Dropout(0.5), nn.BatchNorm1d(6)).train()


def test_no_bias_where_weights_stay():
    model, bias = make_model(), GradientBias(make_model(), 1)
    bias = GradientBias(model, 1)
    before = [buffer.clone() for buffer in model.buffers()]
    step(model, torch.randn(8, 6), bias)  # dropout: the same numbers are drawn again
    assert bias.figures() == {"layup/gradient_bias": 0.0}
    assert bias.figures() == {}
    counted = [buffer for buffer in model.buffers() if buffer.dtype == torch.int64]
    assert [int(buffer) for buffer in counted] == [1]  # the second forward has left the statistics alone
    assert not any(torch.equal(old, new) for old, new in zip(before, model.buffers(), strict=True))


def test_the_bias_is_what_moved_weights_make_it():
    model = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    with torch.no_grad():
        model[0].weight.fill_(2.0)
        model[1].weight.fill_(3.0)
    bias = GradientBias(model, 1)
    # y = b*a*x and loss = y^2. The gradient of b sees the stored a*x; that of a passes through b, which has moved to 6.
    used = step(model, torch.ones(1, 1), bias, move=lambda tensor: tensor.mul_(2))
    exact = {"a": 2 * 6 * 3, "b": 2 * 6 * 2}
    assert [float(gradient) for gradient in used] == [2 * 6 * 6, exact["b"]]
    norm = (exact["a"] ** 2 + exact["b"] ** 2) ** 0.5
    assert bias.figures()["layup/gradient_bias"] == pytest.approx((2 * 6 * 6 - exact["a"]) / norm)


def test_steps_between_are_not_measured():
    model, batch = make_model(), torch.randn(8, 6)
    bias = GradientBias(model, 3)
    due = []
    for _ in range(7):
        due.append(bias.is_due())
        model(batch)
    assert due == [True, False, False, True, False, False, True]
    assert bias.figures() == {}
