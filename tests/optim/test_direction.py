"""What AdamW steps by: looking ahead, longer, and that its own moments stay."""

import contextlib
import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from launching import run_cases
from torch import nn

from layup_hf.blocks import split_into_blocks
from layup_hf.optim.direction import Direction

LR, BETA1, BETA2, EPSILON, DECAY = 1e-2, 0.9, 0.99, 1e-8, 0.1


class Worker:
    """A model of two tensors, its AdamW, and the gradients of its steps."""

    def __init__(self, dtype=torch.float32, betas=(BETA1, BETA2), state=None, looks_ahead=True, **options):
        generator = torch.Generator().manual_seed(1)
        shapes = ((3, 4), (5,))
        self.model = nn.ParameterList(torch.randn(s, generator=generator).to(dtype) for s in shapes)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=LR, betas=betas, eps=EPSILON, weight_decay=DECAY, **options
        )
        if state is not None:
            self.optimizer.load_state_dict(copy.deepcopy(state))
        (self.block,) = split_into_blocks(self.model)
        self.direction = Direction([self.block], self.optimizer, looks_ahead=looks_ahead)

    def step(self, gradients, lengths=None, directed=True):
        for parameter, gradient in zip(self.model, gradients, strict=True):
            parameter.grad = None if gradient is None else gradient.clone()
        with self.direction.stepping(self.block, lengths) if directed else contextlib.nullcontext():
            self.optimizer.step()

    def moments(self, name="exp_avg"):
        return [self.optimizer.state[parameter][name] for parameter in self.model]


def gradients_of(worker, steps, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(p.shape, generator=generator).to(p.dtype) for p in worker.model] for _ in range(steps)]


@settings(max_examples=25)
@given(
    steps=st.integers(1, 40),
    beta1=st.sampled_from([0.5, 0.8, 0.9, 0.95]),
    looks_ahead=st.booleans(),
    is_longer=st.booleans(),
    seed=st.integers(0, 100),
)
def test_it_is_adamw_that_steps_by_the_direction(steps, beta1, looks_ahead, is_longer, seed):
    """Against AdamW with the direction written out, in double precision; the lengths of rows change in every step."""
    worker = Worker(torch.float64, betas=(beta1, BETA2), looks_ahead=looks_ahead)
    x = worker.model[0].detach().clone()
    m, v = torch.zeros_like(x), torch.zeros_like(x)
    for step, gradients in enumerate(gradients_of(worker, steps, seed), start=1):
        length = 1 + torch.rand((3, 1), generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        worker.step(gradients, [length, torch.ones(1, dtype=torch.float64)] if is_longer else None)
        g = gradients[0]
        lead = (1 - beta1) * (1 - beta1 ** (step - 1)) if looks_ahead else 0.0
        ahead = beta1 * (m + lead * (g - m)) + (1 - beta1) * g
        m, v = beta1 * m + (1 - beta1) * g, BETA2 * v + (1 - BETA2) * g.square()
        denominator = (v / (1 - BETA2**step)).sqrt() + EPSILON
        change = LR * ahead / (1 - beta1**step) / denominator
        x = x * (1 - LR * DECAY) - (length * change if is_longer else change)
    assert torch.allclose(worker.model[0], x, rtol=1e-9, atol=1e-12)
    assert torch.allclose(worker.moments()[0], m, rtol=1e-9, atol=1e-12)
    # Long after the beginning, that is m + (1 - beta1) (g - m), with the m of after the step.
    if looks_ahead and beta1**steps < 1e-3:
        assert torch.allclose(ahead, m + (1 - beta1) * (g - m), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("lengths", [None, [torch.full((3, 1), 1.4), torch.full((1,), 1.2)]])
@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": False}])
def test_adamw_keeps_its_own_moments(options, lengths):
    ahead, plain = Worker(**options), Worker(**options)
    for gradients in gradients_of(ahead, 50):
        ahead.step(gradients, lengths)
        plain.step(gradients, directed=False)
    for name in ("exp_avg", "exp_avg_sq", "step"):
        for mine, theirs in zip(ahead.moments(name), plain.moments(name), strict=True):
            is_found_again = name == "exp_avg" and lengths is None
            rounding = 1e-6 if is_found_again else 1e-7  # a fused step rounds otherwise, too
            assert torch.allclose(mine, theirs, rtol=1e-5, atol=rounding)
            assert torch.equal(mine, theirs) or is_found_again or options.get("fused")
    assert ahead.optimizer.param_groups[0] | {"params": []} == plain.optimizer.param_groups[0] | {"params": []}
    assert not torch.allclose(ahead.model[0], plain.model[0], rtol=1e-3)


@pytest.mark.parametrize("looks_ahead", [True, False])
def test_the_first_step_and_steps_without_a_direction_are_adamws_own(looks_ahead):
    """Bit for bit."""
    ahead, plain = Worker(looks_ahead=looks_ahead), Worker()
    for gradients in gradients_of(ahead, 1 if looks_ahead else 20):
        ahead.step(gradients)
        plain.step(gradients, directed=False)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(ahead.model, plain.model, strict=True))


def test_a_parameter_without_a_gradient_is_left_alone():
    worker = Worker()
    for gradients in gradients_of(worker, 5):
        worker.step(gradients)
    before = worker.model[1].detach().clone(), worker.moments()[1].clone()
    for lengths in (None, [torch.full((3, 1), 1.2), torch.full((1,), 1.3)]):
        worker.step([torch.ones(3, 4), None], lengths)
        worker.step([None, None], lengths)
    assert torch.equal(worker.model[1], before[0])
    assert torch.equal(worker.moments()[1], before[1])


def test_it_goes_on_from_a_state_that_was_loaded():
    """As if there had been no interruption, bit for bit; also where the state is loaded after it was made."""
    whole = Worker()
    steps = gradients_of(whole, 30)
    for gradients in steps[:20]:
        whole.step(gradients)
    state, weights = (copy.deepcopy(part.state_dict()) for part in (whole.optimizer, whole.model))
    resumed = Worker(state=state)
    resumed.model.load_state_dict(weights)
    for gradients in steps[20:]:
        whole.step(gradients)
        resumed.step(gradients)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(resumed.model, whole.model, strict=True))
    whole.optimizer.load_state_dict(copy.deepcopy(state))  # other tensors than before
    whole.step(steps[0])
    assert not torch.equal(whole.moments()[0], state["state"][0]["exp_avg"])


def test_bf16_keeps_finite_moments_close_to_adamws():
    ahead, plain = Worker(torch.bfloat16), Worker(torch.bfloat16)
    for gradients in gradients_of(ahead, 200):
        ahead.step(gradients)
        plain.step(gradients, directed=False)
    for mine, theirs in zip(ahead.moments(), plain.moments(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("lengths", [None, [torch.full((3, 1), 1.4), torch.full((1,), 1.2)]])
def test_a_step_that_a_scaler_lets_the_optimizer_skip_leaves_everything_as_it_is(lengths):
    worker = Worker(fused=True)
    for gradients in gradients_of(worker, 5):
        worker.step(gradients, lengths)
    names = ("exp_avg", "exp_avg_sq", "step")
    before = [tensor.detach().clone() for tensor in [*worker.model, *(t for n in names for t in worker.moments(n))]]
    worker.optimizer.found_inf = torch.ones(())
    worker.step([torch.full((3, 4), torch.inf), torch.full((5,), torch.nan)], lengths)
    after = [*worker.model, *(t for n in names for t in worker.moments(n))]
    assert all(torch.equal(mine, old) for mine, old in zip(after, before, strict=True))
    worker.optimizer.found_inf = torch.zeros(())
    worker.step([torch.ones(3, 4), torch.ones(5)], lengths)
    assert not torch.equal(worker.model[0], before[0])


def test_gradients_that_are_still_scaled_are_unscaled_first():
    """As torch's fused AdamW would do it."""
    scaled, plain = Worker(fused=True), Worker(fused=True)
    for gradients in gradients_of(plain, 10):
        plain.step(gradients)
        scaled.optimizer.grad_scale, scaled.optimizer.found_inf = torch.full((), 1024.0), torch.zeros(())
        scaled.step([1024 * gradient for gradient in gradients])
        assert float(scaled.optimizer.grad_scale) == 1024
    for mine, theirs in zip([*scaled.model, *scaled.moments()], [*plain.model, *plain.moments()], strict=True):
        assert torch.equal(mine, theirs)


def test_a_step_that_fails_leaves_adamws_moments_in_their_place():
    worker = Worker()
    worker.step([torch.ones(3, 4), torch.ones(5)])
    before = worker.moments()
    with pytest.raises(MemoryError), worker.direction.stepping(worker.block):
        raise MemoryError
    assert all(mine is old for mine, old in zip(worker.moments(), before, strict=True))


def test_layouts_of_memory_are_kept():
    """Else a fused step takes a slow way, or refuses."""
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    (block,) = split_into_blocks(model)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    direction = Direction([block], optimizer, looks_ahead=True)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    with direction.stepping(block):
        optimizer.step()
    with direction.stepping(block):
        assert optimizer.state[model.weight]["exp_avg"].stride() == model.weight.stride() != (27, 9, 3, 1)
        optimizer.step()


def largest_root(speed, lead):
    """Of the recursion by which a worker of a quadratic goes whose gradients are one step late; stable below 1.

    Args:
        speed: Rate times curvature.
        lead: How far the first moment looks ahead.
    """
    gradient = np.array([0.0, 1.0, 0.0])  # of (x, x one step ago, m one step ago)
    moment = BETA1 * np.array([0.0, 0.0, 1.0]) + (1 - BETA1) * gradient
    change = speed * (moment + lead * (gradient - moment))
    return max(abs(np.linalg.eigvals([[1, 0, 0] - change, [1, 0, 0], moment])))


@pytest.mark.parametrize("speed", [0.9, 1.8, 2.8])
@pytest.mark.parametrize("looks_ahead", [False, True])
def test_rates_are_stable_at_which_late_gradients_make_momentum_overshoot(speed, looks_ahead):
    """Up to 2.5 over the curvature instead of 1: as theory says, where second moments do not change."""
    worker = Worker(betas=(BETA1, 1 - 1e-12), looks_ahead=looks_ahead)
    worker.optimizer.param_groups[0].update(lr=speed, weight_decay=0.0, eps=0.0)
    for state in worker.optimizer.state.values():
        state["step"].fill_(1e15)
        state["exp_avg_sq"].fill_(1.0)
    worker.direction = Direction([worker.block], worker.optimizer, looks_ahead=looks_ahead)
    late = [parameter.detach().clone() for parameter in worker.model]  # gradients of x^2 / 2
    for _ in range(100):
        now = [parameter.detach().clone() for parameter in worker.model]
        worker.step(late)
        late = now
    is_stable = largest_root(speed, 1 - BETA1 if looks_ahead else 0.0) < 1
    assert is_stable == (speed < (2.5 if looks_ahead else 1.0))
    assert (float(worker.model[0].detach().norm()) < 3.0) == is_stable


CASES = {
    "auto": [],
    "on": ["--nesterov=on"],
    "exact": ["--clip=exact"],
    "off": ["--nesterov=off"],
    "another": ["--optim=adafactor"],
    "refused": ["--nesterov=on", "--optimizer=sgd"],
    "refused by name": ["--nesterov=on", "--optim=adafactor"],
}


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """What each worker has to say of each case, by the number of workers."""
    return {
        workers: run_cases("moments.py", workers, CASES, tmp_path_factory.mktemp(f"direction-{workers}"))
        for workers in (1, 2)
    }


@pytest.mark.parametrize(
    ("workers", "case", "looks_ahead"),
    [
        (2, "auto", True),
        (2, "on", True),
        (2, "exact", True),
        (2, "off", False),
        (2, "another", False),
        (1, "auto", False),
        (1, "on", True),
    ],
)
def test_who_looks_ahead(real, workers, case, looks_ahead):
    """Several workers by default, where the optimizer can; one worker if it is asked to."""
    for mine in real[workers][case]:
        assert mine["failure"] is None
        assert mine["looks_ahead"] == looks_ahead
        assert mine["ahead_in_card"] == looks_ahead
        assert mine["same"]


def test_one_worker_trains_otherwise_if_it_is_asked_to(real):
    (auto,), (on,), (off,) = (real[1][case] for case in ("auto", "on", "off"))
    assert auto["loss"] == off["loss"]
    assert on["loss"] != off["loss"]


@pytest.mark.parametrize("workers", [1, 2])
def test_an_optimizer_that_cannot_is_refused_where_it_is_asked_to(real, workers):
    for mine in real[workers]["refused"]:
        assert "`nesterov='on'` and SGD exclude each other" in mine["failure"]
        assert "leave `nesterov` at 'auto'" in mine["failure"]
    for mine in real[workers]["refused by name"]:
        assert "`nesterov='on'` and optim='adafactor' exclude each other" in mine["failure"]
