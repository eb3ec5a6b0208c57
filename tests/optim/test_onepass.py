"""The one pass against what torch's own operations make of the same step, one after the other."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from layup_hf.blocks import split_into_blocks
from layup_hf.gossip.moments import by_row, by_row_of_square
from layup_hf.optim.direction import Direction
from layup_hf.optim.onepass import OnePass, Rows, make_kernel, rows_of
from layup_hf.optim.table import Column, Table

pytest.importorskip("llvmlite", reason="llvmlite makes the pass on a CPU")

SHAPES = ((3, 4), (5,), (), (1, 1), (70, 33), (2, 3, 3, 3), (4, 2, 2, 2, 2), (1000,), (6, 1))


class Model(nn.Module):
    """Parameters of given shapes, and a buffer that training changes."""

    def __init__(self, shapes, layout=torch.contiguous_format):
        super().__init__()
        parameters = (torch.randn(shape) for shape in shapes)
        self.weights = nn.ParameterList(p.to(memory_format=layout) if p.dim() == 4 else p for p in parameters)
        self.norm = nn.BatchNorm1d(3)


class Side:
    """A model with its AdamW, stepped by the one pass or by what it stands for."""

    def __init__(self, model, looks_ahead, groups=1, kind=torch.optim.AdamW, **options):
        self.model = model
        parameters = list(model.parameters())
        parts = [parameters[number::groups] for number in range(groups)]
        self.optimizer = kind(
            [{"params": part, "lr": 1e-2 * (number + 1)} for number, part in enumerate(parts)], **options
        )
        (self.block,) = split_into_blocks(model)
        self.direction = Direction([self.block], self.optimizer, looks_ahead=looks_ahead)
        self.kernel = make_kernel(torch.device("cpu"), self.optimizer)
        self.one_pass = OnePass([self.block], self.optimizer, self.direction, self.kernel)

    def give(self, gradients):
        for parameter, gradient in zip(self.block.parameters, gradients, strict=True):
            parameter.grad = gradient if gradient is None else gradient.clone(memory_format=torch.preserve_format)

    def step_in_parts(self, merges, factor, rows):
        with torch.no_grad():
            for theirs, weight in merges:
                torch._foreach_lerp_(self.block.tensors, theirs, weight)
            gradients = [p.grad for p in self.block.parameters if p.grad is not None]
            if factor is not None:
                torch._foreach_mul_(gradients, factor)
            if rows.theirs is not None:
                squares = [by_row_of_square(m - t).flatten() for m, t in zip(self.state(), rows.theirs, strict=True)]
                rows.squares = torch.cat(squares)
                rows.seconds = torch.cat([by_row(second).flatten() for second in self.state("exp_avg_sq")])
        with self.direction.stepping(self.block, shaped(rows.lengths, self.block.parameters)):
            self.optimizer.step()

    def state(self, name="exp_avg"):
        return [self.optimizer.state[parameter][name] for parameter in self.block.parameters]

    def everything(self):
        return [*self.block.tensors, *self.state(), *self.state("exp_avg_sq"), *self.state("step")]


def shaped(lengths, parameters):
    if lengths is None:
        return None
    parts = lengths.split([rows_of(p) for p in parameters])
    return [
        part.view(-1, *[1] * (p.dim() - 1)) if p.dim() else part[0] for part, p in zip(parts, parameters, strict=True)
    ]


def sides(shapes=SHAPES, looks_ahead=True, layout=torch.contiguous_format, seed=0, **options):
    torch.manual_seed(seed)
    model = Model(shapes, layout)
    return [Side(copy.deepcopy(model), looks_ahead, **options) for _ in range(2)]


def assert_close(one, other):
    for mine, theirs in zip(one, other, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-5, atol=2e-6)


def random_step(side, merges, clips, is_longer, compares):
    """Gradients, and what else `OnePass.step` takes."""
    like = [p.detach() for p in side.block.parameters]
    count = sum(rows_of(p) for p in like)
    rows = Rows(1 + torch.rand(count) if is_longer else None)
    if compares:
        rows.theirs = [torch.randn_like(p) for p in like]
        rows.squares, rows.seconds = torch.full((2, count), torch.nan)
    offers = [([torch.randn_like(t) for t in side.block.tensors], 1 / (2 + number)) for number in range(merges)]
    return [torch.randn_like(p) for p in like], offers, torch.rand(()) if clips else None, rows


@settings(max_examples=60, deadline=None)
@given(
    shapes=st.lists(st.sampled_from(SHAPES), min_size=1, max_size=5),
    layout=st.sampled_from([torch.contiguous_format, torch.channels_last]),
    steps=st.integers(1, 6),
    merges=st.integers(0, 4),
    clips=st.booleans(),
    is_longer=st.booleans(),
    compares=st.booleans(),
    looks_ahead=st.booleans(),
    decay=st.sampled_from([0.0, 0.1]),
    betas=st.sampled_from([(0.9, 0.999), (0.8, 0.95)]),
    groups=st.integers(1, 2),
    options=st.sampled_from([{}, {"fused": True}, {"foreach": False}]),
    threads=st.integers(1, 3),
    seed=st.integers(0, 100),
)
def test_it_is_what_torchs_operations_make_but_for_rounding(
    shapes, layout, steps, merges, clips, is_longer, compares, looks_ahead, decay, betas, groups, options, threads, seed
):
    pair = sides(shapes, looks_ahead, layout, seed, groups=groups, weight_decay=decay, betas=betas, **options)
    by_pass, in_parts = pair
    own = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for _ in range(steps):
            gradients, offers, factor, rows = random_step(by_pass, merges, clips, is_longer, compares)
            others = Rows(rows.lengths, rows.theirs)
            for side in pair:
                side.give(gradients)
            assert by_pass.one_pass.fits(by_pass.block)
            by_pass.one_pass.step(by_pass.block, offers, factor, rows)
            in_parts.step_in_parts(offers, factor, others)
            assert_close(by_pass.everything(), in_parts.everything())
            if compares:
                assert_close([rows.squares, rows.seconds], [others.squares, others.seconds])
            assert all(torch.equal(p.grad, g) for p, g in zip(by_pass.block.parameters, gradients, strict=True))
    finally:
        torch.set_num_threads(own)


def test_many_threads_share_a_large_block():
    by_pass, in_parts = sides(shapes=((700, 300), (3,), (1, 200_000), (9, 20_000)))
    gradients, offers, factor, rows = random_step(by_pass, 1, True, True, True)
    others, own = Rows(rows.lengths, rows.theirs), torch.get_num_threads()
    for side in (by_pass, in_parts):
        side.give(gradients)
    torch.set_num_threads(3)
    try:
        by_pass.one_pass.step(by_pass.block, offers, factor, rows)
    finally:
        torch.set_num_threads(own)
        by_pass.kernel.close()
        by_pass.kernel.close()
    in_parts.step_in_parts(offers, factor, others)
    assert_close(by_pass.everything(), in_parts.everything())
    assert_close([rows.squares, rows.seconds], [others.squares, others.seconds])


@settings(max_examples=50)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=6),
    workers=st.integers(1, 6),
)
def test_work_is_shared_out_whole(shapes, workers):
    """Every row of every parameter is in one part, and no part has much more than its share."""
    addresses, start = np.zeros((len(shapes), Table.columns(1)), dtype=np.int64), 1 << 20
    for number, (rows, width) in enumerate(shapes):
        addresses[number] = start
        addresses[number, [Column.ROWS, Column.WIDTH]] = rows, width
        start += 4 * rows * width
    table = Table(addresses, np.zeros((len(shapes), Table.numbers(1)), dtype=np.float32), 1, True, None, [])
    parts = table.shared_out(workers)
    assert len(parts) <= workers
    seen = sorted(
        (line[column] + 4 * line[Column.WIDTH] * row)
        for part in parts
        for line in part.addresses.tolist()
        for row in range(line[Column.ROWS])
        for column in (Column.VALUE,)
    )
    expected = sorted(line[0] + 4 * line[9] * row for line in addresses.tolist() for row in range(line[8]))
    assert seen == expected
    assert max(part.numel for part in parts) <= table.numel / workers + table.numel / (4 * workers) + 41 + 40


@pytest.mark.parametrize("missing", [[1], [0, 1, 2]])
def test_a_block_in_which_a_gradient_is_missing_is_for_the_optimizer(missing):
    side, _ = sides(shapes=((3, 4), (5,)))
    gradients = [None if number in missing else torch.ones_like(p) for number, p in enumerate(side.block.parameters)]
    side.give([*gradients[:2], *[torch.ones_like(p) for p in side.block.parameters[2:]]])
    assert not side.one_pass.fits(side.block)
    side.give([torch.ones_like(p) for p in side.block.parameters])
    assert side.one_pass.fits(side.block)


def test_the_pass_and_the_optimizer_may_take_turns():
    by_pass, in_parts = sides()
    for step in range(8):
        gradients, offers, factor, rows = random_step(by_pass, 1, True, True, False)
        for side in (by_pass, in_parts):
            side.give(gradients)
            if side is by_pass and step % 3:
                side.one_pass.step(side.block, offers, factor, rows)
            else:
                side.step_in_parts(offers, factor, rows)
        by_pass.one_pass = OnePass([by_pass.block], by_pass.optimizer, by_pass.direction, by_pass.kernel)
    assert_close(by_pass.everything(), in_parts.everything())


@pytest.mark.parametrize("kind", ["bf16", "double", "half of them", "sparse", "transposed", "expanded"])
def test_what_it_does_not_know_is_for_the_optimizer(kind):
    dtypes = {
        "bf16": (torch.bfloat16,) * 2,
        "double": (torch.float64,) * 2,
        "half of them": (torch.float32, torch.half),
    }
    model = nn.ParameterList(torch.ones(4, 4, dtype=d) for d in dtypes.get(kind, (torch.float32,) * 2))
    side = Side(model, looks_ahead=True)
    gradients = {
        "sparse": torch.eye(4).to_sparse(),
        "transposed": torch.randn(4, 4).t(),
        "expanded": torch.ones(1, 4).expand(4, 4),
    }
    for parameter in model:
        parameter.grad = gradients[kind] if kind in gradients else torch.ones_like(parameter)
    assert not side.one_pass.fits(side.block)


def test_a_peers_parameters_that_lie_otherwise_are_merged_before():
    by_pass, in_parts = sides(shapes=((4, 4),))
    gradients, offers, factor, rows = random_step(by_pass, 2, False, False, False)
    offers[0][0][0] = offers[0][0][0].t()
    for side in (by_pass, in_parts):
        side.give(gradients)
    by_pass.one_pass.step(by_pass.block, offers, factor, rows)
    in_parts.step_in_parts(offers, factor, rows)
    assert_close(by_pass.everything(), in_parts.everything())


def test_a_state_that_was_loaded_is_found():
    by_pass, in_parts = sides()
    for number in range(6):
        gradients, offers, factor, rows = random_step(by_pass, 0, False, False, False)
        for side in (by_pass, in_parts):
            side.give(gradients)
            if number == 3:
                side.optimizer.load_state_dict(copy.deepcopy(side.optimizer.state_dict()))
            assert side.one_pass.fits(side.block)
        by_pass.one_pass.step(by_pass.block, offers, factor, rows)
        in_parts.step_in_parts(offers, factor, rows)
    assert_close(by_pass.everything(), in_parts.everything())
    assert float(by_pass.state("step")[0]) == 6


def test_autograd_sees_that_parameters_have_changed():
    side, _ = sides(shapes=((4, 4),))
    weight = side.model.weights[0]
    loss = (weight.square() @ torch.ones(4)).sum()
    side.give([torch.ones_like(p) for p in side.block.parameters])
    side.one_pass.step(side.block)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("options", [{"capturable": True}, {"differentiable": True}, {"lr": torch.tensor(1e-3)}])
def test_options_that_it_does_not_know_are_for_torch(options):
    optimizer = torch.optim.AdamW([nn.Parameter(torch.ones(1))], **options)
    assert "the optimizer is capturable" in make_kernel(torch.device("cpu"), optimizer)


def test_devices_without_a_kernel_are_for_torch():
    assert (
        make_kernel(torch.device("meta"), torch.optim.AdamW([nn.Parameter(torch.ones(1))]))
        == "there is no kernel for meta"
    )
