"""Steps by Nesterov's momentum: what AdamW does with them, and that its own moments stay."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from launching import run_cases
from torch import nn

from layup_hf.blocks import split_into_blocks
from layup_hf.nesterov import Nesterov, can_look_ahead

LR, BETA1, BETA2, EPSILON, DECAY = 1e-2, 0.9, 0.99, 1e-8, 0.1


class Worker:
    """A model of two tensors, its AdamW, and the gradients of its steps."""

    def __init__(self, dtype=torch.float32, betas=(BETA1, BETA2), state=None, **options):
        generator = torch.Generator().manual_seed(1)
        shapes = ((3, 4), (5,))
        self.model = nn.ParameterList(torch.randn(s, generator=generator).to(dtype) for s in shapes)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=LR, betas=betas, eps=EPSILON, weight_decay=DECAY, **options
        )
        if state is not None:
            self.optimizer.load_state_dict(copy.deepcopy(state))
        (self.block,) = split_into_blocks(self.model)
        self.nesterov = Nesterov([self.block], self.optimizer)

    def step(self, gradients, looks_ahead=True):
        for parameter, gradient in zip(self.model, gradients, strict=True):
            parameter.grad = None if gradient is None else gradient.clone()
        if not looks_ahead:
            self.optimizer.step()
            return
        with self.nesterov.stepping(self.block):
            self.optimizer.step()

    def moments(self, name="exp_avg"):
        return [self.optimizer.state[parameter][name] for parameter in self.model]


def gradients_of(worker, steps, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(p.shape, generator=generator).to(p.dtype) for p in worker.model] for _ in range(steps)]


@settings(deadline=None, max_examples=25)
@given(steps=st.integers(1, 40), beta1=st.sampled_from([0.5, 0.8, 0.9, 0.95]), seed=st.integers(0, 100))
def test_it_is_adamw_with_a_first_moment_that_looks_ahead(steps, beta1, seed):
    """Against AdamW with the look ahead written out, in double precision."""
    worker = Worker(torch.float64, betas=(beta1, BETA2))
    x = worker.model[0].detach().clone()
    m, v = torch.zeros_like(x), torch.zeros_like(x)
    for step, gradients in enumerate(gradients_of(worker, steps, seed), start=1):
        worker.step(gradients)
        g = gradients[0]
        lead = (1 - beta1) * (1 - beta1 ** (step - 1))
        ahead = beta1 * (m + lead * (g - m)) + (1 - beta1) * g
        m, v = beta1 * m + (1 - beta1) * g, BETA2 * v + (1 - BETA2) * g.square()
        denominator = (v / (1 - BETA2**step)).sqrt() + EPSILON
        x = x * (1 - LR * DECAY) - LR * ahead / (1 - beta1**step) / denominator
    assert torch.allclose(worker.model[0], x, rtol=1e-9, atol=1e-12)
    assert torch.allclose(worker.moments()[0], m, rtol=1e-9, atol=1e-12)
    # Long after the beginning, that is m + (1 - beta1) (g - m), with the m of after the step.
    if beta1**steps < 1e-3:
        assert torch.allclose(ahead, m + (1 - beta1) * (g - m), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("options", [{}, {"fused": True}, {"foreach": False}])
def test_adamw_keeps_its_own_moments(options):
    ahead, plain = Worker(**options), Worker(**options)
    for gradients in gradients_of(ahead, 50):
        ahead.step(gradients)
        plain.step(gradients, looks_ahead=False)
    for name in ("exp_avg", "exp_avg_sq", "step"):
        for mine, theirs in zip(ahead.moments(name), plain.moments(name), strict=True):
            assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(ahead.model[0], plain.model[0], rtol=1e-3)


@pytest.mark.parametrize("betas", [(BETA1, BETA2), (0.0, BETA2)])
def test_the_first_step_and_steps_without_momentum_are_adamws_own(betas):
    """Bit for bit."""
    ahead, plain = Worker(betas=betas), Worker(betas=betas)
    for gradients in gradients_of(ahead, 1 if betas[0] else 20):
        ahead.step(gradients)
        plain.step(gradients, looks_ahead=False)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(ahead.model, plain.model, strict=True))


def test_a_parameter_without_a_gradient_is_left_alone():
    worker = Worker()
    for gradients in gradients_of(worker, 5):
        worker.step(gradients)
    before = worker.model[1].detach().clone(), worker.moments()[1].clone()
    worker.step([torch.ones(3, 4), None])
    worker.step([None, None])
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
        plain.step(gradients, looks_ahead=False)
    for mine, theirs in zip(ahead.moments(), plain.moments(), strict=True):
        assert torch.allclose(mine.float(), theirs.float(), atol=0.02)


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
    worker = Worker(betas=(BETA1, 1 - 1e-12))
    worker.optimizer.param_groups[0].update(lr=speed, weight_decay=0.0, eps=0.0)
    for state in worker.optimizer.state.values():
        state["step"].fill_(1e15)
        state["exp_avg_sq"].fill_(1.0)
    worker.nesterov = Nesterov([worker.block], worker.optimizer)
    late = [parameter.detach().clone() for parameter in worker.model]  # gradients of x^2 / 2
    for _ in range(100):
        now = [parameter.detach().clone() for parameter in worker.model]
        worker.step(late, looks_ahead)
        late = now
    is_stable = largest_root(speed, 1 - BETA1 if looks_ahead else 0.0) < 1
    assert is_stable == (speed < (2.5 if looks_ahead else 1.0))
    assert (float(worker.model[0].detach().norm()) < 3.0) == is_stable


@pytest.mark.parametrize(
    ("optimizer", "options", "can"),
    [
        (torch.optim.AdamW, {}, True),
        (torch.optim.AdamW, {"weight_decay": 0.1, "betas": (0.8, 0.99)}, True),
        (torch.optim.Adam, {}, True),
        (torch.optim.Adam, {"weight_decay": 0.1}, False),
        (torch.optim.Adam, {"weight_decay": 0.1, "decoupled_weight_decay": True}, True),
        (torch.optim.AdamW, {"maximize": True}, False),
        (torch.optim.AdamW, {"amsgrad": True}, False),
        (torch.optim.AdamW, {"betas": (torch.tensor(0.9), torch.tensor(0.99)), "foreach": False}, False),
        (torch.optim.SGD, {"lr": 0.1}, False),
        (torch.optim.NAdam, {}, False),
    ],
)
def test_which_optimizers_can(optimizer, options, can):
    assert can_look_ahead(optimizer(nn.Linear(2, 2).parameters(), **options)) == can


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
        workers: run_cases("moments.py", workers, CASES, tmp_path_factory.mktemp(f"nesterov-{workers}"))
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
