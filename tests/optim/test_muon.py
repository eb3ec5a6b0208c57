"""Muon on matrices and AdamW on all else, as one optimizer: against torch's, and against the formula written out."""

import copy
import itertools
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from layup_hf.optim.muon import COEFFICIENTS, MuonAdamW, as_matrices, from_matrices, orthogonalized

LR, DECAY, MOMENTUM = 0.02, 0.1, 0.95
SHAPES = {"whole": [(6, 4), (4, 6), (4, 4)], "stacked": [(3, 6, 4), (2, 4, 6)], "flattened": [(6, 2, 3, 3), (4, 3, 2)]}
"""Of each kind, some that are orthogonalized together."""


def parameters(shapes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes]


def give_gradients(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in params:
        gradient = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.grad = gradient.to(parameter.dtype)


def of_all_kinds(dtype=torch.float32):
    """Parameters of each kind, and vectors; with the former as `MuonAdamW` takes them."""
    shapes = [*itertools.chain.from_iterable(SHAPES.values()), (5,), (7, 1)]
    params, kinds = parameters(shapes, dtype), [kind for kind, members in SHAPES.items() for _ in members]
    matrices = {kind: [p for p, own in zip(params, kinds, strict=False) if own == kind] for kind in SHAPES}
    return params, matrices


def make(params, matrices, **options):
    return MuonAdamW(params, matrices, **{"lr": LR, "weight_decay": DECAY, "momentum": MOMENTUM, **options})


def made_orthogonal(matrix, steps=5):
    """The iteration of torch's Muon for one matrix, in its own precision."""
    a, b, c = COEFFICIENTS
    x = matrix / matrix.norm().clamp(min=1e-7)
    x = x.T if len(matrix) > len(matrix.T) else x
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if len(matrix) > len(matrix.T) else x


def matrices_of(tensor, kind):
    """Written out anew: views of the parameter that can be stepped one by one."""
    if kind == "whole":
        return [tensor]
    return list(tensor) if kind == "stacked" else [tensor.view(len(tensor), -1)]


# ---- The step ----


@settings(max_examples=25)
@given(
    kind=st.sampled_from(sorted(SHAPES)),
    nesterov=st.booleans(),
    momentum=st.sampled_from([0.0, 0.5, 0.95]),
    ns_steps=st.integers(1, 6),
    steps=st.integers(1, 4),
    decay=st.sampled_from([0.0, 0.1]),
)
def test_matrices_step_by_the_formula(kind, nesterov, momentum, ns_steps, steps, decay):
    """In double precision, each matrix by itself."""
    params = parameters(SHAPES[kind], torch.float64)
    expected = [p.detach().clone() for p in params]
    momenta = [torch.zeros_like(p) for p in expected]
    options = {"momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps, "weight_decay": decay}
    optimizer = make(params, {kind: params}, **options)
    for step in range(steps):
        give_gradients(params, step)
        for x, m, p in zip(expected, momenta, params, strict=True):
            m.copy_(momentum * m + (1 - momentum) * p.grad)
            direction = (1 - momentum) * p.grad + momentum * m if nesterov else m.clone()
            for matrix, towards in zip(matrices_of(x, kind), matrices_of(direction, kind), strict=True):
                scale = 0.2 * math.sqrt(max(matrix.shape))
                matrix.mul_(1 - LR * decay).sub_(LR * scale * made_orthogonal(towards, ns_steps))
        optimizer.step()
    for parameter, x, m in zip(params, expected, momenta, strict=True):
        assert torch.allclose(parameter, x, rtol=1e-9, atol=1e-12)
        assert torch.allclose(optimizer.state[parameter]["momentum_buffer"], m, rtol=1e-9, atol=1e-12)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has it since 2.9")
@pytest.mark.parametrize("nesterov", [True, False])
def test_it_is_torchs_muon_with_more_precision(nesterov):
    ours, theirs = parameters(SHAPES["whole"]), parameters(SHAPES["whole"])
    options = {"lr": LR, "weight_decay": DECAY, "momentum": MOMENTUM, "nesterov": nesterov}
    mine = MuonAdamW(ours, {"whole": ours}, **options)
    torchs = torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **options)
    before = [p.detach().clone() for p in ours]
    for step in range(5):
        for params, optimizer in ((ours, mine), (theirs, torchs)):
            give_gradients(params, step)
            optimizer.step()
    for one, other, old in zip(ours, theirs, before, strict=True):
        assert float((one - other).detach().norm()) < 0.08 * float((one - old).detach().norm())  # it iterates in bf16
        assert torch.equal(mine.state[one]["momentum_buffer"], torchs.state[other]["momentum_buffer"])


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_no_matrix_steps_as_torchs_adamw_bit_for_bit(fused, dtype):
    ours, theirs = parameters([(5,), (3, 4)], dtype), parameters([(5,), (3, 4)], dtype)
    options = {"lr": LR, "weight_decay": DECAY, "betas": (0.8, 0.99), "eps": 1e-6, "fused": fused}
    mine, torchs = MuonAdamW(ours, {}, **options), torch.optim.AdamW(theirs, **options)
    for step in range(5):
        for params, optimizer in ((ours, mine), (theirs, torchs)):
            give_gradients(params, step)
            optimizer.step()
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)
        assert mine.state[one].keys() == torchs.state[other].keys()
        assert all(torch.equal(mine.state[one][name], torchs.state[other][name]) for name in mine.state[one])


@given(
    rows=st.integers(2, 12), more=st.integers(0, 30), count=st.integers(1, 3), seed=st.integers(0, 1000),
    scale=st.sampled_from([1e-12, 1.0, 1e12]),
)  # fmt: skip
@settings(max_examples=30)
def test_singular_values_come_close_to_one(rows, more, count, seed, scale):
    generator = torch.Generator().manual_seed(seed)
    matrices = scale * torch.randn(count, rows, rows + more, generator=generator)
    values = torch.linalg.svdvals(matrices.double())
    made = torch.linalg.svdvals(orthogonalized(matrices, 5).double())
    share = values / torch.linalg.vector_norm(values, dim=-1, keepdim=True)
    if scale * rows**0.5 > 1e-7:  # a norm that counts as one
        assert (made[share > 5e-3] > 0.6).all()
    assert (made < 1.3).all()
    assert torch.isfinite(orthogonalized(torch.zeros(1, 3, 3), 5)).all()


def test_steps_are_about_as_long_as_adamws():
    """So that one learning rate serves both: root mean squares, whatever the shape."""
    for shape in [(64, 64), (32, 128), (128, 32), (64, 8)]:
        ours, theirs = parameters([shape]), parameters([shape])
        before = ours[0].detach().clone()
        mine, torchs = MuonAdamW(ours, {"whole": ours}, lr=1.0), torch.optim.AdamW(theirs, lr=1.0, weight_decay=0.0)
        lengths = []
        for params, optimizer in ((ours, mine), (theirs, torchs)):
            for step in range(20):
                give_gradients(params, step)
                optimizer.step()
            lengths.append(float((params[0] - before).detach().square().mean().sqrt()))
        assert 0.3 < lengths[0] / lengths[1] < 1.2


# ---- One optimizer, whatever is stepped together ----


def test_a_matrix_steps_alike_whichever_others_step_with_it():
    """Bit for bit: also where those of one shape are orthogonalized together, and where they are too many for that."""
    shapes = [(8, 24), (24, 8)] * 12 + [(8, 8)] * 3
    together, alone = parameters(shapes), parameters(shapes)
    whole, parts = make(together, {"whole": together}), [make([p], {"whole": [p]}) for p in alone]
    for step in range(3):
        give_gradients(together, step)
        give_gradients(alone, step)
        whole.step()
        for part in parts:
            part.step()
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


def test_groups_stay_what_they_were_given():
    params, matrices = of_all_kinds()
    groups = [{"params": params[:4], "weight_decay": 0.3}, {"params": iter(params[4:]), "lr": 0.5}]
    optimizer = MuonAdamW(groups, matrices, lr=LR)
    made = [
        (group["matrices"], group["lr"], group["weight_decay"], len(group["params"]))
        for group in optimizer.param_groups
    ]
    first = [("whole", LR, 0.3, 3), ("stacked", LR, 0.3, 1)]
    assert made == [*first, ("stacked", 0.5, 0.0, 1), ("flattened", 0.5, 0.0, 2), (None, 0.5, 0.0, 2)]
    optimizer.add_param_group({"params": nn.Parameter(torch.zeros(3, 3)), "lr": 0.7})
    assert (optimizer.param_groups[-1]["matrices"], optimizer.param_groups[-1]["lr"]) == (None, 0.7)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
@pytest.mark.parametrize("fused", [None, False])
def test_it_goes_on_from_a_copy_and_from_its_state(duplicate, fused):
    """Bit for bit."""
    params, matrices = of_all_kinds()
    optimizer = make(params, matrices, fused=fused)
    for step in range(3):
        give_gradients(params, step)
        optimizer.step()
    again, other = duplicate((params, optimizer))
    fresh, own = of_all_kinds()
    loaded = make(fresh, own, fused=fused)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with torch.no_grad():
        for parameter, value in zip(fresh, params, strict=True):
            parameter.copy_(value)
    for step in range(3, 6):
        for members, each in ((params, optimizer), (again, other), (fresh, loaded)):
            give_gradients(members, step)
            each.step()
    for one, two, three in zip(params, again, fresh, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)
    assert other._step_supports_amp_scaling == (fused is None)


def test_a_closure_is_called_once_with_gradients_switched_on():
    params, matrices = of_all_kinds()
    optimizer = make(params, matrices)

    def closure():
        loss = sum(parameter.square().sum() for parameter in params)
        loss.backward()
        return loss

    assert float(optimizer.step(closure)) > 0
    assert all(optimizer.state[parameter] for parameter in params)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_parameters_keep_their_type_and_layout(dtype):
    convolution = nn.Conv2d(3, 4, 3).to(dtype).to(memory_format=torch.channels_last)
    optimizer = make(convolution.parameters(), {"flattened": [convolution.weight]})
    give_gradients(list(convolution.parameters()), 0)
    optimizer.step()
    strides = [
        tensor.stride() for tensor in (convolution.weight, optimizer.state[convolution.weight]["momentum_buffer"])
    ]
    assert strides == [(27, 1, 9, 3)] * 2
    assert convolution.weight.dtype == dtype
    assert torch.isfinite(convolution.weight).all()


# ---- Loss scaling ----


def tensors_of(optimizer, params):
    states = [value for parameter in params for value in optimizer.state[parameter].values()]
    return [tensor.detach().clone() for tensor in [*params, *states]]


def test_a_step_that_a_scaler_lets_it_skip_leaves_everything_as_it_is():
    params, matrices = of_all_kinds()
    optimizer = make(params, matrices)
    for step in range(3):
        give_gradients(params, step)
        optimizer.step()
    before = tensors_of(optimizer, params)
    optimizer.grad_scale, optimizer.found_inf = None, torch.ones(())
    give_gradients(params, 3)
    for parameter in params:
        parameter.grad.view(-1)[0] = torch.inf
    optimizer.step()
    after = tensors_of(optimizer, params)
    assert all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def test_gradients_that_are_still_scaled_are_unscaled_first():
    """As torch's fused AdamW does it; by a power of two, so bit for bit."""
    (scaled, of_scaled), (plain, of_plain) = of_all_kinds(), of_all_kinds()
    one, other = make(scaled, of_scaled), make(plain, of_plain)
    for step in range(3):
        give_gradients(plain, step)
        other.step()
        give_gradients(scaled, step)
        for parameter in scaled:
            parameter.grad *= 1024
        one.grad_scale, one.found_inf = torch.full((), 1024.0), torch.zeros(())
        one.step()
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(one, scaled), tensors_of(other, plain), strict=True))


def test_torchs_scaler_steps_it():
    """The real one: a step that overflows is skipped without waiting for the device, and the next one is made."""
    (params, matrices), scaler = of_all_kinds(), torch.amp.GradScaler("cpu", init_scale=256.0)
    optimizer, before = make(params, matrices), None
    for factor in (1.0, torch.inf, 1.0):
        before = [parameter.detach().clone() for parameter in params]
        loss = sum(parameter.square().sum() for parameter in params) * factor
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        moved = [not torch.equal(parameter, old) for parameter, old in zip(params, before, strict=True)]
        assert moved == [factor == 1.0] * len(params)


# ---- Kinds, and what is refused ----


@pytest.mark.parametrize("kind", sorted(SHAPES))
def test_a_parameter_is_its_matrices(kind):
    for parameter in parameters(SHAPES[kind]):
        matrices = as_matrices(parameter, kind)
        assert [tuple(m.shape) for m in matrices] == [tuple(m.shape) for m in matrices_of(parameter, kind)]
        assert all(torch.equal(a, b) for a, b in zip(matrices, matrices_of(parameter, kind), strict=True))
        assert torch.equal(from_matrices(matrices, parameter, kind), parameter)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"momentum": 1.0}, "momentum=1.0: from 0"), ({"ns_steps": 0}, "ns_steps=0: from 1"), ({"ns_steps": 100}, "99")],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MuonAdamW(parameters([(2, 2)]), {}, **options)


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(4, 3, sparse=True)
    optimizer = MuonAdamW(embedding.parameters(), {})
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="takes no sparse gradients: set `sparse=False`"):
        optimizer.step()
