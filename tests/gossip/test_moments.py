"""Second moments of the mean gradient: the noise is found, and steps are longer by as much."""

import copy
from types import SimpleNamespace

import pytest
import torch
from fleet import closed_at_the_end, gather_between_threads, together
from launching import run_cases
from torch import nn

import layup_hf.gossip.moments
from layup_hf.blocks import split_into_blocks
from layup_hf.gossip.moments import MEASURE_EVERY, MeanMoments
from layup_hf.optim.direction import Direction
from layup_hf.trainer.exchange import Exchange
from layup_hf.trainer.options import Options
from layup_hf.trainer.state import RunState
from layup_hf.trainer.tracing import Tracing

ROWS, WIDTH = 4, 200
SIGNAL = torch.tensor([1.0, 1.0, 1.0, 0.0])[:, None]
NOISE = torch.tensor([0.0, 1.0, 3.0, 1.0])[:, None]


class Rows(nn.Module):
    """One matrix, whose gradients have another share of noise in every row, and a vector without noise."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.zeros(ROWS, WIDTH))
        self.vector = nn.Parameter(torch.zeros(WIDTH))


class Workers:
    """Workers that each step a model of their own, with gradients that share their signal and not their noise."""

    def __init__(self, count, optimizer=torch.optim.AdamW, near=True, states=(), model=Rows, **options):
        self.models = [model() for _ in range(count)]
        self.blocks = [split_into_blocks(model) for model in self.models]
        self.optimizers = [optimizer(model.parameters(), lr=1e-3, **options) for model in self.models]
        for mine, state in zip(self.optimizers, states, strict=False):
            mine.load_state_dict(copy.deepcopy(state))
        for_rank = gather_between_threads(count)

        def opening(rank):
            peers = [peer for peer in range(count) if peer != rank] if near else []
            return lambda: MeanMoments.open(self.blocks[rank], self.optimizers[rank], rank, peers, for_rank(rank))

        self.moments = together([opening(rank) for rank in range(count)])
        if None not in self.moments:
            parts = zip(self.blocks, self.optimizers, strict=True)
            self.directions = [Direction(blocks, optimizer, looks_ahead=False) for blocks, optimizer in parts]
        self.generator = torch.Generator().manual_seed(0)

    def draw(self):
        noise = torch.randn(ROWS, WIDTH, generator=self.generator)
        return SIGNAL + NOISE * noise, torch.ones(WIDTH)

    def step(self, rank):
        """Returns the gradient of the matrix."""
        model, moments = self.models[rank], self.moments[rank]
        model.matrix.grad, model.vector.grad = self.draw()
        (block,) = self.blocks[rank]
        with self.directions[rank].stepping(block, moments.lengths(block)):
            self.optimizers[rank].step()
        return model.matrix.grad

    def kept(self, rank=0):
        """Of the second moments, as the lengths of steps have it."""
        return [length.flatten() ** -2 for length in self.moments[rank]._parts[0].lengths]

    def close(self):
        for moments in self.moments:
            if isinstance(moments, MeanMoments):
                moments.close()


@pytest.fixture
def workers():
    yield from closed_at_the_end(Workers)


@pytest.mark.parametrize("count", [2, 4])
def test_what_is_kept_is_the_second_moment_of_the_mean_gradient(workers, count):
    """By row: `(s^2 + n^2 / M) / (s^2 + n^2)`."""
    fleet = workers(count)
    for _ in range(600):
        for rank in range(count):
            fleet.step(rank)
    square = NOISE.square().flatten()
    expected = (SIGNAL.flatten().square() + square / count) / (SIGNAL.flatten().square() + square)
    matrix, vector = fleet.kept()
    assert matrix == pytest.approx(expected, abs=0.06)
    assert vector == pytest.approx(1.0, abs=1e-6)


def test_measurements_are_frequent_at_first(workers, monkeypatch):
    """And all weigh as much as the steps that they stand for."""
    monkeypatch.setattr(layup_hf.gossip.moments, "MEASURED_AT_FIRST", 10)
    fleet, seen = workers(2), []
    for step in range(40):
        before = fleet.moments[0]._parts[0].covered
        fleet.step(0)
        seen += [step] * (fleet.moments[0]._parts[0].covered > before)
        fleet.step(1)
    assert seen == [*range(1, 10), 16, 24, 32]
    assert fleet.moments[0]._parts[0].covered == 32


def test_moments_that_take_their_time_to_come_are_asked_for_until_they_have_been_used(workers, monkeypatch):
    """As copies between GPUs do."""
    monkeypatch.setattr(layup_hf.gossip.moments, "MEASURED_AT_FIRST", 0)
    fleet, log = workers(3), []
    moments, (block,) = fleet.moments[0], fleet.blocks[0]
    windows, read = moments._windows, moments._windows.read

    def comes_at_the_third(peer, index):
        log.append(("read", peer))
        return read(peer, index) if len(log) == 4 else None

    monkeypatch.setattr(windows, "publish", lambda index: log.append("publish"))
    monkeypatch.setattr(windows, "read", comes_at_the_third)
    monkeypatch.setattr(windows, "release", lambda peer, index: log.append(("release", peer)))
    for _ in range(MEASURE_EVERY + 2):
        fleet.step(0)
    with moments.noting(block) as rows:
        assert rows.theirs is not None
        rows.squares.fill_(1.0)
        rows.seconds.fill_(1.0)
        read_at_last = list(log)
    fleet.step(0)
    _, (_, peer), *_ = log
    assert read_at_last == ["publish", *[("read", peer)] * 3]
    assert log == [*read_at_last, ("release", peer)]
    assert moments._parts[0].covered == MEASURE_EVERY + 2


def test_adamw_keeps_its_own_moments(workers):
    """Bit for bit."""
    fleet = workers(2)
    plain = torch.zeros(ROWS, WIDTH, requires_grad=True)
    optimizer = torch.optim.AdamW([plain], lr=1e-3)
    for _ in range(60):
        plain.grad = fleet.step(0).clone()
        optimizer.step()
        fleet.step(1)
    assert fleet.kept()[0].min() < 0.8
    mine = fleet.optimizers[0].state[fleet.models[0].matrix]
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(mine[name], optimizer.state[plain][name])
    assert not torch.allclose(fleet.models[0].matrix, plain, rtol=0.1)


def test_steps_are_longer_by_the_root_of_what_is_kept(workers, monkeypatch):
    monkeypatch.setattr(layup_hf.gossip.moments, "MEASURED_AT_FIRST", 0)
    fleet = workers(4, weight_decay=0.0, eps=0.0)
    for _ in range(4 * MEASURE_EVERY + 1):
        for rank in range(4):
            fleet.step(rank)
    before = fleet.models[0].matrix.detach().clone()
    fleet.step(0)  # no measurement falls on it
    state, steps = fleet.optimizers[0].state[fleet.models[0].matrix], 4 * MEASURE_EVERY + 2
    second = fleet.kept()[0][:, None] * state["exp_avg_sq"] / (1 - 0.999**steps)
    expected = -1e-3 * state["exp_avg"] / (1 - 0.9**steps) / second.sqrt()
    assert torch.allclose(fleet.models[0].matrix.detach() - before, expected, rtol=1e-3, atol=1e-7)


def test_without_peers_on_this_host_nothing_is_changed(workers):
    """Bit for bit."""
    fleet = workers(2, near=False)
    plain = torch.zeros(ROWS, WIDTH, requires_grad=True)
    optimizer = torch.optim.AdamW([plain], lr=1e-3)
    for _ in range(3 * MEASURE_EVERY):
        plain.grad = fleet.step(0).clone()
        optimizer.step()
    assert torch.equal(fleet.models[0].matrix, plain)


def test_a_peer_that_is_excluded_is_not_read_any_more(workers):
    fleet = workers(3)
    for _ in range(2 * MEASURE_EVERY):
        for rank in range(3):
            fleet.step(rank)
    for moments, peers in ((fleet.moments[0], (1, 1)), (fleet.moments[2], (1, 0))):
        for peer in peers:
            moments.exclude(peer)
    fleet.moments[1].close()
    for _ in range(3 * MEASURE_EVERY):
        fleet.step(0)  # with two workers left, a half is taken out at most
    assert fleet.kept()[0].min() >= 0.5
    second = fleet.optimizers[2].state[fleet.models[2].matrix]["exp_avg_sq"].clone()
    gradient = fleet.step(2)
    mine = fleet.optimizers[2].state[fleet.models[2].matrix]["exp_avg_sq"]
    assert torch.allclose(mine, 0.999 * second + 0.001 * gradient.square())  # nobody is left


def test_it_goes_on_from_a_state_that_was_loaded(workers):
    """The moments are as old as the state says, and their age decides what they show."""
    first = workers(2)
    for _ in range(600):
        for rank in range(2):
            first.step(rank)
    second = workers(2, states=[optimizer.state_dict() for optimizer in first.optimizers])
    for _ in range(10 * MEASURE_EVERY):
        for rank in range(2):
            second.step(rank)
    assert second.moments[0]._parts[0].age == 600 + 10 * MEASURE_EVERY
    assert second.kept()[0] == pytest.approx(first.kept()[0], abs=0.1)


def test_a_state_that_is_replaced_during_training_is_an_error(workers):
    fleet = workers(2)
    for rank in range(2):
        fleet.step(rank)
    fleet.moments[0].require_same_memory(fleet.optimizers[0])
    fleet.optimizers[0].load_state_dict(copy.deepcopy(fleet.optimizers[0].state_dict()))
    with pytest.raises(RuntimeError, match=r"state was replaced during training.*second_moment='own'"):
        fleet.moments[0].require_same_memory(fleet.optimizers[0])


def test_if_one_worker_cannot_none_does(workers):
    kinds = iter([torch.optim.AdamW, torch.optim.SGD])
    fleet = workers(2, optimizer=lambda parameters, lr: next(kinds)(parameters, lr=lr))
    assert fleet.moments == [None, None]


@pytest.mark.parametrize("fused", [True, False])
def test_a_state_that_is_made_in_advance_is_what_adamw_would_make(fused):
    """So the first step is bit by bit what it would be."""
    parameters = [nn.Parameter(torch.ones(3, 3)) for _ in range(2)]
    optimizers = [torch.optim.AdamW([parameter], lr=0.1, fused=fused) for parameter in parameters]
    model = nn.ParameterList(parameters[:1])
    moments = MeanMoments.open(split_into_blocks(model), optimizers[0], 0, [], lambda item: [item])
    for parameter, optimizer in zip(parameters, optimizers, strict=True):
        parameter.grad = torch.arange(9.0).view(3, 3)
        optimizer.step()
    moments.close()
    mine, stock = (optimizer.state_dict()["state"][0] for optimizer in optimizers)
    assert mine.keys() == stock.keys()
    for name in stock:
        assert torch.equal(mine[name], stock[name])
        assert mine[name].dtype == stock[name].dtype
    assert torch.equal(*parameters)


@pytest.mark.parametrize("kind", ["conv", "half", "scalar"])
def test_parameters_of_any_shape_and_precision(workers, kind):
    class Odd(Rows):
        def __init__(self):
            super().__init__()
            shapes = {"conv": (3, 2, 3, 3), "half": (4, 5), "scalar": ()}
            dtype = torch.bfloat16 if kind == "half" else torch.float32
            self.odd = nn.Parameter(torch.zeros(shapes[kind], dtype=dtype))

    fleet = workers(2, model=Odd)
    for _ in range(3 * MEASURE_EVERY):
        for rank, model in enumerate(fleet.models):
            model.odd.grad = torch.randn(model.odd.shape, generator=fleet.generator).to(model.odd.dtype)
            fleet.step(rank)
    length = fleet.moments[0]._parts[0].lengths[2]
    assert length.dtype == fleet.models[0].odd.dtype
    assert length.shape == {"conv": (3, 1, 1, 1), "half": (4, 1), "scalar": ()}[kind]
    assert bool(((length >= 1) & (length <= 1.4143)).all())
    assert bool(torch.isfinite(fleet.models[0].odd).all())


CASES = {
    "auto": ["--second_moment=auto"],
    "mean": ["--second_moment=mean"],
    "own": ["--second_moment=own"],
    "exact": ["--clip=exact"],
    "arrival": ["--merge_at=arrival"],
    "another": ["--optim=adafactor"],
    "refused": ["--second_moment=mean", "--optimizer=sgd"],
    "refused by name": ["--second_moment=mean", "--optim=adafactor"],
}


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """What each of two real workers has to say of each case."""
    return run_cases("moments.py", 2, CASES, tmp_path_factory.mktemp("moments"))


@pytest.mark.parametrize("case", ["auto", "mean", "exact", "arrival"])
def test_real_workers_find_noise_and_see_each_other(real, case):
    for mine, other in zip(real[case], reversed(real[case]), strict=True):
        assert mine["failure"] is None
        assert 1.03 < mine["length"] < 1.41  # batches of four random texts share little
        assert sum(mine["theirs"]) == pytest.approx(sum(other["first"]), rel=0.5)  # at about the same time
        assert mine["theirs"] != mine["first"]
        assert mine["same"]
        assert mine["closed"]
        assert mine["state"] == ["exp_avg", "exp_avg_sq", "step"]


@pytest.mark.parametrize("case", ["own", "another"])
def test_otherwise_second_moments_are_each_workers_own(real, case):
    for mine in real[case]:
        assert mine["failure"] is None
        assert mine["length"] is None
        assert mine["same"]


def test_another_workers_optimizer_is_no_reason_to_do_without_the_mean_silently(monkeypatch):
    monkeypatch.setattr(MeanMoments, "open", lambda *given, **options: None)  # as where a peer has another optimizer
    options, args = Options(second_moment="mean"), SimpleNamespace(seed=0)
    host = SimpleNamespace(options=options, args=args, rank=0, world_size=2)
    model = SimpleNamespace(blocks=[], optimizer=SimpleNamespace(inner=None))
    talk = SimpleNamespace(gather=lambda item: [item])
    exchange = Exchange(
        host,
        RunState(),
        members=SimpleNamespace(membership=None, talk=talk),
        model=model,
        tracing=Tracing(host),
    )
    with pytest.raises(ValueError, match=r"`second_moment='mean'` and the optimizer of another worker .*'auto'"):
        exchange._share_moments(SimpleNamespace(remote=()))


def test_an_optimizer_that_cannot_is_refused_where_the_mean_is_asked_for(real):
    for mine in real["refused"]:
        assert "`second_moment='mean'` and SGD exclude each other" in mine["failure"]
        assert "leave `second_moment` at 'auto'" in mine["failure"]
    for mine in real["refused by name"]:
        assert "`second_moment='mean'` and optim='adafactor' exclude each other" in mine["failure"]
