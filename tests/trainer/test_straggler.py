"""Delays: how they are written, drawn, and where in a step they fall. No test depends on how long anything takes."""

import dataclasses
import statistics
from types import SimpleNamespace

import pytest
import torch
from fleet import Fleet
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import UNIT, random_schedule
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from layup_hf.gossip.engine import GossipEngine
from layup_hf.trainer import straggler as callback_module
from layup_hf.trainer.straggler import StragglerCallback
from layup_hf.windows import straggler
from layup_hf.windows.late import LateWindows
from layup_hf.windows.straggler import StragglerConfig, total_delay

KINDS = ("compute", "communication")
SECONDS = st.floats(0, 1e6)


@st.composite
def configs(draw):
    first = draw(st.integers(0, 1000))
    return StragglerConfig(
        rank=draw(st.none() | st.integers(0, 100)),
        compute=draw(SECONDS),
        communication=draw(SECONDS),
        distribution=draw(st.sampled_from(["constant", "exponential", "uniform"])),
        first=first,
        last=draw(st.none() | st.integers(first + 1, 2000)),
        seed=draw(st.integers(-5, 2**64)),
        busy=draw(st.booleans()),
    )


# ---- Text ----


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rank=3,compute=0.4", [StragglerConfig(3, 0.4)]),
        ("compute=1", [StragglerConfig(None, 1.0)]),
        ("rank=all,communication=5e-2", [StragglerConfig(None, communication=0.05)]),
        (
            "rank=0, compute=.2 ; seed=4,distribution=uniform,communication=1,first=10,last=20,busy=True",
            [StragglerConfig(0, 0.2), StragglerConfig(None, 0.0, 1.0, "uniform", 10, 20, 4, True)],
        ),
        (" \n rank = 1 , busy = false ", [StragglerConfig(1)]),
    ],
)
def test_text_is_read(text, expected):
    assert StragglerConfig.parse(text) == expected


@given(st.lists(configs(), min_size=1, max_size=4), st.sampled_from([";", " ; ", ";\n"]))
def test_parsing_formatted_delays_gives_them_back(delays, separator):
    assert StragglerConfig.parse(separator.join(map(str, delays))) == delays


@pytest.mark.parametrize(
    ("text", "bad", "allowed"),
    [
        ("rank=1,delay=2", "delay=2", "rank, compute, communication, distribution, first, last, seed, busy"),
        ("rank=1,compute", "compute", "name=value"),
        ("", "", "name=value"),
        ("rank=1;", "", "name=value"),
        ("rank=1; ;rank=2", "", "name=value"),
        ("rank=1,,compute=2", "", "name=value"),
        ("rank=1,compute=", "compute=", "seconds"),
        ("rank=1,compute=slow", "compute=slow", "seconds"),
        ("rank=1,compute=-0.1", "compute=-0.1", "not negative"),
        ("rank=1,communication=-1", "communication=-1.0", "not negative"),
        ("rank=1,compute=nan", "compute=nan", "finite"),
        ("rank=1,communication=inf", "communication=inf", "finite"),
        ("rank=1,compute=1e999", "compute=inf", "finite"),
        ("rank=one", "rank=one", "`all` or a rank"),
        ("rank=1.5", "rank=1.5", "`all` or a rank"),
        ("rank=-1", "rank=-1", "`all` or a rank"),
        ("rank=1,rank=2", "rank=2", "once"),
        ("distribution=normal", "distribution=normal", "constant, exponential, uniform"),
        ("first=-1", "first=-1", "from 0"),
        ("first=5,last=5", "last=5", "after `first`"),
        ("last=0", "last=0", "after `first`"),
        ("seed=x", "seed=x", "an integer"),
        ("busy=1", "busy=1", "`true` or `false`"),
    ],
)
def test_bad_text_is_refused_with_the_part_what_is_allowed_and_an_example(text, bad, allowed):
    with pytest.raises(ValueError, match="Straggler") as caught:
        StragglerConfig.parse(text)
    message = str(caught.value)
    assert f"Straggler {bad!r}:" in message
    assert allowed in message
    assert StragglerConfig.parse(message.split("Example: ")[1].strip("'."))


def test_bad_values_are_refused_without_text_too():
    with pytest.raises(ValueError, match=r"'compute=-1'.*not negative"):
        StragglerConfig(compute=-1)


def test_a_rank_must_be_in_the_run():
    StragglerConfig(3).check(4)
    StragglerConfig(None).check(1)
    with pytest.raises(ValueError, match=r"'rank=4'.*4 worker\(s\), ranks 0 to 3"):
        StragglerConfig(4).check(4)


# ---- Draws ----


@pytest.mark.parametrize("distribution", ["constant", "exponential", "uniform"])
@pytest.mark.parametrize("kind", KINDS)
def test_means_are_the_numbers_given(distribution, kind):
    config = StragglerConfig(compute=0.5, communication=0.25, distribution=distribution)
    mean = getattr(config, kind)
    delays = [config.delay(kind, rank, step) for rank in range(4) for step in range(2000)]
    spread = {"constant": 0.0, "exponential": mean, "uniform": mean / 3**0.5}[distribution]
    assert statistics.mean(delays) == pytest.approx(mean, rel=0.03)
    assert statistics.pstdev(delays) == pytest.approx(spread, rel=0.05)
    assert min(delays) >= 0
    if distribution == "uniform":
        assert max(delays) <= 2 * mean


@given(configs(), st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 9), st.integers(0, 2000)), max_size=20))
def test_delays_do_not_depend_on_what_was_asked_before(config, questions):
    forwards = [config.delay(*question) for question in questions]
    backwards = [dataclasses.replace(config).delay(*question) for question in reversed(questions)]
    assert forwards == backwards[::-1]


def test_delays_are_the_same_in_every_process():
    """Python's own hashes differ between processes; these numbers do not."""
    config = StragglerConfig(None, 1.0, 1.0, "exponential", seed=7)
    assert config.delay("compute", 2, 3) == pytest.approx(0.021790508311164032)
    assert config.delay("communication", 2, 3) == pytest.approx(0.7355395338470375)


def test_draws_differ_between_seeds_kinds_ranks_and_steps():
    def draw(seed=0, kind="compute", rank=0, step=0):
        return StragglerConfig(None, 1.0, 1.0, "uniform", seed=seed).delay(kind, rank, step)

    assert len({draw(), draw(seed=1), draw(kind="communication"), draw(rank=1), draw(step=1)}) == 5


def test_only_the_given_rank_and_span_are_delayed():
    config = StragglerConfig(1, 0.5, first=2, last=4)
    assert [config.delay("compute", 1, step) for step in range(6)] == [0, 0, 0.5, 0.5, 0, 0]
    assert [config.delay("compute", 0, step) for step in range(6)] == [0] * 6
    assert StragglerConfig(0, 0.5).delay("compute", 0, 10**9) == 0.5
    assert StragglerConfig(0, 0.5).delay("communication", 0, 0) == 0


def test_several_delays_add_up():
    several = StragglerConfig.parse("rank=1,compute=1;compute=0.25,first=3;rank=0,compute=8;communication=16")
    assert [total_delay(several, "compute", 1, step) for step in (2, 3)] == [1, 1.25]
    assert total_delay([], "compute", 0, 0) == 0


def test_waiting_ends(monkeypatch):
    slept = []
    monkeypatch.setattr(straggler.time, "sleep", slept.append)
    straggler.wait(0.001, busy=True)
    assert slept == []
    straggler.wait(0.25)
    assert slept == [0.25]


# ---- Callback ----


class Scene:
    """A tiny model with the stock Trainer; `events` says what happened in which order."""

    def __init__(self, folder, monkeypatch, stragglers, **options):
        self.events = events = []
        monkeypatch.setattr(callback_module, "wait", lambda seconds, busy=False: events.append((seconds, busy)))
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=16)
        self.model = GPT2LMHeadModel(config)
        self.model.lm_head.register_forward_hook(lambda *_: events.append("forward"))
        self.model.transformer.h[0].mlp.c_fc.bias.register_hook(lambda _: events.append("backward"))

        class Updates(TrainerCallback):
            def on_optimizer_step(self, args, state, control, **kwargs):
                events.append("update")

        self.callback = StragglerCallback(stragglers)
        tokens = torch.randint(0, 50, (12, 8), generator=torch.Generator().manual_seed(1))
        data = [{"input_ids": row, "labels": row} for row in tokens]
        fixed = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "max_steps": 2}
        arguments = TrainingArguments(str(folder), per_device_train_batch_size=2, **{**fixed, **options})
        self.trainer = Trainer(
            self.model, arguments, train_dataset=data, eval_dataset=data[:4], callbacks=[self.callback, Updates()]
        )

    def train(self):
        self.events.clear()
        self.trainer.train()
        return self.events

    @property
    def hooks(self):
        return len(self.model._forward_hooks)


STEP = ["forward", (0.5, False), "backward", "update"]


@pytest.fixture
def scene(tmp_path, monkeypatch):
    return lambda stragglers="rank=0,compute=0.5", **options: Scene(tmp_path, monkeypatch, stragglers, **options)


def test_computation_waits_between_forward_and_backward(scene):
    assert scene().train() == STEP * 2


def test_a_delay_given_as_object_and_a_busy_one(scene):
    stragglers = [StragglerConfig(0, 0.5), StragglerConfig(None, 0.25, busy=True, first=1)]
    assert scene(stragglers).train() == [*STEP, "forward", (0.5, False), (0.25, True), "backward", "update"]


def test_computation_waits_once_a_step_with_accumulated_gradients(scene):
    first = ["forward", (0.5, False), "backward"]
    assert scene(gradient_accumulation_steps=2).train() == [*first, "forward", "backward", "update"] * 2


def test_computation_waits_once_a_step_with_checkpointed_activations(scene):
    assert scene(activation_checkpointing=True).train() == STEP * 2


def test_evaluation_is_not_delayed(scene):
    made = scene(eval_strategy="steps", eval_steps=1, eval_on_start=True, per_device_eval_batch_size=4)
    assert made.train() == ["forward", *STEP, "forward", *STEP, "forward"]
    made.events.clear()
    made.trainer.evaluate()
    assert made.events == ["forward"]


@pytest.mark.parametrize(("training", "grad"), [(True, False), (False, True)])
def test_other_calls_of_the_model_are_not_delayed_and_do_not_use_up_the_delay(scene, training, grad):
    made = scene()
    made.trainer.add_callback(CallsModel(training, grad))
    assert made.train() == ["forward", *STEP] * 2


class CallsModel(TrainerCallback):
    def __init__(self, training, grad):
        self.training, self.grad = training, grad

    def on_step_begin(self, args, state, control, model, **kwargs):
        with torch.set_grad_enabled(self.grad):
            model.train(self.training)(torch.zeros(1, 4, dtype=torch.long))


def test_other_ranks_and_steps_are_not_delayed(scene):
    assert scene("rank=0,compute=0.5,first=1").train() == ["forward", "backward", "update", *STEP]


def test_another_training_is_delayed_from_its_first_step_and_leaves_no_hook(scene):
    made = scene("rank=0,compute=0.5,last=1")
    for _ in range(2):
        assert made.train() == [*STEP, "forward", "backward", "update"]
        assert made.hooks == 0


def test_a_training_after_a_failed_one_is_delayed_once_a_step(scene):
    made = scene()
    failing = Fails()
    made.trainer.add_callback(failing)
    with pytest.raises(ArithmeticError):
        made.train()
    assert made.hooks == 1
    made.trainer.remove_callback(failing)
    assert made.train() == STEP * 2
    assert made.hooks == 0


class Fails(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        raise ArithmeticError


def test_training_with_a_rank_outside_of_the_run_is_refused(scene):
    made = scene("compute=1;rank=1,compute=0.5")
    with pytest.raises(ValueError, match=r"'rank=1'.*1 worker\(s\)"):
        made.train()
    assert made.hooks == 0


def test_the_rank_is_that_of_the_world():
    model = nn.Linear(1, 1)
    callback = StragglerCallback("rank=5,compute=0.5")
    arguments = SimpleNamespace(world_size=8, process_index=5, local_process_index=1, device=torch.device("cpu"))
    waited = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(callback_module, "wait", lambda seconds, busy: waited.append(seconds))
        callback.on_train_begin(arguments, None, None, model=model)
        callback.on_step_begin(arguments, None, None)
        model(torch.ones(1, 1))
    assert waited == [0.5]


def test_communication_waits_before_the_update(scene):
    made = scene("rank=0,communication=0.5", gradient_accumulation_steps=2)
    half = ["forward", "backward"]
    assert made.train() == [*half, *half, (0.5, False), "update"] * 2


def test_late_windows_wait_instead_of_the_callback(scene):
    made = scene("rank=0,communication=0.5,compute=0.25")
    windows = made.callback.late_windows(Windows(), rank=0)
    assert isinstance(windows, LateWindows)
    assert made.train() == ["forward", (0.25, False), "backward", "update"] * 2
    assert windows.read(1, 0) is None
    assert made.events.count((0.5, False)) == 0
    assert made.train().count((0.5, False)) == 2  # the next training has no windows


def test_bad_text_is_refused_at_once():
    with pytest.raises(ValueError, match="'speed=1'"):
        StragglerCallback("speed=1")


# ---- Windows ----


class Windows:
    """Inner windows that say what was read."""

    def __init__(self):
        self.ledger, self.extra = object(), "extra"
        self.closed, self.ready, self.reads = False, True, []

    def read(self, peer, block):
        self.reads.append((peer, block))
        return [torch.tensor([float(len(self.reads))])] if self.ready else None

    def close(self):
        self.closed = True


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def inner():
    return Windows()


def test_a_read_is_late_then_live_then_late_again(inner, clock):
    windows = LateWindows(inner, StragglerConfig.parse("rank=0,communication=2"), 0, clock)
    for reads in (1, 2):
        for passed in (0.0, 1.0, 0.75):
            clock.now += passed
            assert windows.read(1, 0) is None
        assert len(inner.reads) == reads - 1
        clock.now += 0.25
        assert windows.read(1, 0)[0].item() == reads


def test_the_delays_of_both_ends_add_up(inner, clock):
    stragglers = StragglerConfig.parse("rank=0,communication=1;rank=2,communication=4;rank=1,compute=9")
    windows = LateWindows(inner, stragglers, 0, clock)
    assert windows.read(1, 0) is windows.read(2, 0) is None
    clock.now += 1
    assert windows.read(1, 0) is not None
    clock.now += 3.9
    assert windows.read(2, 0) is None
    clock.now += 0.1
    assert windows.read(2, 0) is not None


def test_reads_between_workers_without_delay_are_never_late(inner, clock):
    windows = LateWindows(inner, StragglerConfig.parse("rank=3,communication=1"), 0, clock)
    assert all(windows.read(peer, 0) is not None for peer in (1, 2, 1, 2))
    assert windows.read(3, 0) is None


def test_peers_and_blocks_are_late_each_for_themselves(inner, clock):
    windows = LateWindows(inner, StragglerConfig.parse("rank=0,communication=1"), 0, clock)
    assert windows.read(1, 0) is None
    clock.now += 1
    assert windows.read(1, 1) is windows.read(2, 0) is None
    assert windows.read(1, 0) is not None


def test_delays_are_drawn_by_the_number_of_the_read(inner, clock):
    (config,) = StragglerConfig.parse("communication=1,distribution=exponential,first=1,seed=3")
    windows = LateWindows(inner, [config], 0, clock)
    assert windows.read(1, 0) is not None  # number 0: before the span
    for number in range(1, 5):
        start = clock.now
        assert windows.read(1, 0) is None
        due = start + config.delay("communication", 0, number) + config.delay("communication", 1, number)
        clock.now = due - 1e-6
        assert windows.read(1, 0) is None
        clock.now = due + 1e-6
        assert windows.read(1, 0) is not None


def test_a_peer_that_is_not_ready_when_due_is_asked_again_without_another_delay(inner, clock):
    windows = LateWindows(inner, StragglerConfig.parse("communication=1"), 0, clock)
    windows.read(1, 0)
    inner.ready = False
    clock.now += 2
    assert windows.read(1, 0) is None
    inner.ready = True
    assert windows.read(1, 0) is not None
    assert windows.read(1, 0) is None


def test_everything_else_comes_from_the_inner_windows(inner):
    windows = LateWindows(inner, [], 0)
    assert windows.ledger is inner.ledger
    assert windows.extra == "extra"
    with pytest.raises(AttributeError, match="missing"):
        windows.missing  # noqa: B018
    windows.close()
    assert inner.closed


# ---- Engine ----


def late_fleet(text, clock):
    """Three workers with late windows."""
    torch.manual_seed(0)
    fleet = Fleet([nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)) for _ in range(3)])
    late = StragglerConfig.parse(text)
    fleet.windows = [LateWindows(windows, late, rank, clock) for rank, windows in enumerate(fleet.windows)]
    fleet.engines = [GossipEngine(*parts) for parts in zip(fleet.blocks, fleet.windows, fleet.samplers, strict=True)]
    return fleet


@pytest.fixture
def fleet(clock):
    fleet = late_fleet("rank=1,communication=2", clock)
    yield fleet
    fleet.close()


def test_the_engine_takes_no_mass_before_it_is_due(fleet, clock):
    ledger, mine = fleet.windows[0].ledger, fleet.blocks[0][0].tensors[0]
    before = mine.clone()
    fleet.run(("offer", 1, 0, 1))
    for _ in range(3):
        fleet.run(("merge", 0, 0))
        clock.now += 0.5
    assert torch.equal(mine, before)
    assert ledger.own(0) == UNIT
    assert [peer for peer, _ in ledger.pending(0)] == [1]
    clock.now += 0.5
    fleet.run(("merge", 0, 0))
    assert not torch.equal(mine, before)
    assert ledger.own(0) == UNIT + UNIT // 2
    assert ledger.pending(0) == []


def test_offers_of_others_are_taken_meanwhile(fleet):
    fleet.run(("offer", 1, 0, 1))
    fleet.run(("offer", 2, 0, 1))
    fleet.run(("merge", 0, 0))
    assert [peer for peer, _ in fleet.windows[0].ledger.pending(0)] == [1]
    assert fleet.engines[0].counts["merges"] == 1


@given(seed=st.integers(0, 2**31))
@settings(max_examples=10)
def test_mass_is_conserved(seed):
    clock = Clock()
    fleet = late_fleet("communication=2,distribution=exponential", clock)
    for operation in random_schedule(3, 2, 60, seed):
        fleet.run(operation)
        clock.now += 0.5
        assert [int(units) for units in fleet.windows[0].ledger.masses().sum(axis=1)] == [3 * UNIT] * 2
    fleet.close()
