"""What people bring: with one process it trains as with the stock Trainer, bit for bit; with several it trains."""

import logging

import pytest
import torch
from brought import BROUGHT, COMPILED, OLD, OVERRIDING, Brought, ByHeart, MaskInCallback, Net
from launching import run_cases
from stock import BOTH, arguments, gpt2, same, text
from transformers import TrainerCallback

from layup_hf.optim.optimizer import BlockOptimizer


def train(folder, make, cls, config, **options):
    brought = make()
    args = arguments(folder, config, **{**brought.options, **options})
    trainer = brought.trainer(cls, args, text())
    return brought, trainer, trainer.train()


@pytest.mark.parametrize("name", BROUGHT)
def test_with_one_process_it_is_the_stock_trainer_bit_for_bit(tmp_path, name):
    (ours, trainer, output), (theirs, stock, expected) = (train(tmp_path, BROUGHT[name], *kind) for kind in BOTH)
    assert same(ours.model, theirs.model)
    assert output.training_loss == expected.training_loss
    assert output.global_step == expected.global_step > 0
    for mine, its in zip(ours.callbacks, theirs.callbacks, strict=True):
        assert getattr(mine, "norms", None) == getattr(its, "norms", None)
    if hasattr(stock, "weight"):
        assert torch.equal(trainer.weight, stock.weight)


WITH_TWO = [name for name in BROUGHT if name not in ("two optimizers, accumulating", "parametrized", "frozen later")]


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    names = [*WITH_TWO, *OVERRIDING]
    return run_cases("inputs.py", 2, {name: name.split() for name in names}, tmp_path_factory.mktemp("inputs"))


@pytest.mark.parametrize("name", WITH_TWO)
def test_two_workers_train_it_and_agree_on_it(real, name):
    for mine in real[name]:
        assert mine["global_step"] == (16 if name == "unfrozen later" else 6)
        assert mine["same"]
        assert set(mine["mass"]) == {2.0}
        assert 0 < mine["loss"] < 8
        assert mine["moved"] > 0.1
    assert len({mine["loss"] for mine in real[name]}) == 1


@pytest.mark.parametrize("name", OVERRIDING)
def test_methods_of_the_users_own_find_one_model(real, name):
    """Whatever evaluates, predicts or saves; between these the workers' weights differ."""
    mine, its = real[name][0]["noted"]
    steps = [[weights for where, weights in noted if where == "step"] for noted in (mine, its)]
    assert set(steps[0]) & set(steps[1]) != set(steps[0])
    found = [[entry for entry in noted if entry[0] != "step"] for noted in (mine, its)]
    assert found[0] == found[1]
    assert {where for where, _ in found[0]} == OVERRIDING[name][1]
    assert len({weights for _, weights in found[0]}) > 2  # at more than one moment


@pytest.mark.parametrize("name", ["mask in the step", "mask in a callback"])
def test_masked_gradients_are_masked_for_all(real, name):
    for mine in real[name]:  # but for rounding: all have the same there, and take means of it
        assert mine["old"] < 1e-7
        assert mine["moved"] == 1.0


def test_each_parameter_is_stepped_once_a_step(real):
    """Not once for each block."""
    for mine in real["two optimizers behind one"]:
        assert mine["optimizer_steps"] in ([], [mine["own_steps"]])


def test_what_is_beside_the_model_is_agreed_on(real):
    for name in ("a loss with a parameter", "a loss with a temperature"):
        for mine in real[name]:
            assert mine["beside_same"]
            assert mine["beside"] != 0.0


def test_all_layers_move_once_they_are_unfrozen(real):
    assert all(mine["moved"] == 1.0 for mine in real["unfrozen later"])


@pytest.mark.parametrize("how", COMPILED)
def test_what_the_user_has_compiled_stays_compiled(tmp_path, how):
    """And hooks stay outside of it."""
    torch.compiler.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    before = graphs["unique_graphs"]
    (ours, trainer, output), (theirs, _, expected) = (train(tmp_path, COMPILED[how], *kind) for kind in BOTH)
    assert graphs["unique_graphs"] > before
    assert output.training_loss == pytest.approx(expected.training_loss, rel=1e-5)
    assert type(trainer.model_wrapped) is type(ours.model) is type(theirs.model)
    for mine, its in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-3, atol=1e-4)


# ---- What is said ----


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.WARNING, logger="layup_hf")
    return lambda: [record.getMessage() for record in caplog.records if record.name.startswith("layup_hf")]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("two optimizers behind one", "Chained steps other optimizers that it holds, all at once"),
        ("mask in a callback", "callback MaskInCallback has an `on_pre_optimizer_step`, which gradients are for"),
        ("norms after the step", "callback NormsAfterStep reads gradients in `on_optimizer_step`"),
        ("mask in the step", "Brought.training_step reads gradients"),
        ("two halves", "Brought.training_step runs backward itself"),
        ("backward in the loss", "Brought.compute_loss runs backward itself"),
        ("cached gradients", "the loss CachedLoss runs backward itself, once for each part of a batch"),
        ("adversarial", "Brought.training_step reads gradients"),
    ],
)
def test_exact_clipping_is_chosen_with_a_reason(tmp_path, said, name, reason):
    train(tmp_path, BROUGHT[name], *BOTH[0])
    (line,) = [line for line in said() if "clip='exact'" in line]
    assert line.startswith(f"LayUp: blocks step when backward has ended (`clip='exact'`), as {reason}. ")
    assert "set `clip='estimate'`" in line


def test_where_nothing_needs_it_blocks_step_in_backward_and_nothing_is_said(tmp_path, said):
    class Weights(TrainerCallback):
        """Looks at weights, not at gradients."""

        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            self.norm = sum(float(p.norm()) for p in model.parameters())

    class Looking:
        def training_step(self, model, inputs, num_items_in_batch=None):
            return super().training_step(model, inputs, num_items_in_batch)

    _, trainer, _ = train(tmp_path, lambda: Brought(gpt2(), (Looking,), callbacks=[Weights()]), *BOTH[0])
    assert not trainer.optimizer.optimizer.keeps_gradients
    assert said() == []


def test_what_may_be_in_vain_is_said(tmp_path, said):
    make = lambda: Brought(gpt2(), callbacks=[NoGradients()])  # noqa: E731
    train(tmp_path, make, *BOTH[0], clip="estimate")
    (line,) = said()
    assert "gradients are gone after it, but callback NoGradients has an `on_pre_optimizer_step`" in line
    assert "set `clip='exact'`" in line


class NoGradients(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        assert all(p.grad is None for p in model.parameters())


def test_an_optimizer_that_steps_others_is_refused_with_the_estimate(tmp_path):
    with pytest.raises(ValueError, match=r"`clip='estimate'` and this training exclude each other: Chained .*'exact'"):
        train(tmp_path, BROUGHT["two optimizers behind one"], *BOTH[0], clip="estimate")


def by_heart():
    model = gpt2()
    return Brought(model, optimizer=ByHeart(model.parameters(), lr=0.05))


def test_an_optimizer_that_is_seen_to_step_other_blocks_is_named_with_the_remedy(tmp_path):
    """Other blocks have gradients when one is complete: of earlier batches, here."""
    with pytest.raises(ValueError, match=r"ByHeart steps all parameters whenever it steps.*Set `clip='exact'`"):
        train(tmp_path, by_heart, *BOTH[0], gradient_accumulation_steps=2)


def test_with_exact_clipping_it_is_stepped_once(tmp_path):
    (ours, trainer, _), (theirs, _, _) = (
        train(tmp_path, by_heart, *kind, **({"clip": "exact"} if kind is BOTH[0] else {})) for kind in BOTH
    )
    assert same(ours.model, theirs.model)
    assert isinstance(trainer.optimizer.optimizer, BlockOptimizer)
    assert trainer.optimizer.optimizer.steps_whole


def test_several_backward_passes_with_the_estimate_name_the_remedy(tmp_path):
    with pytest.raises(RuntimeError, match=r"received a second gradient.*need `clip='exact'`"):
        train(tmp_path, BROUGHT["two halves"], *BOTH[0], clip="estimate")


def test_how_a_weight_is_used_is_said_once(tmp_path, said):
    train(tmp_path, BROUGHT["detached head"], *BOTH[0])
    lines = [line for line in said() if "is used" in line]
    assert lines == [
        "LayUp: a weight of block 'head' is used before the module that has it in 'DetachedHead', so the block is "
        "merged with peers' in backward only.",
        "LayUp: a weight of block 'head' is used without a gradient in 'DetachedHead', so the block steps when "
        "backward has ended.",
    ]


@pytest.mark.parametrize(
    ("name", "uses"),
    [
        ("own function", ["before"]),
        ("own function, detached", ["before", "without a gradient"]),
        ("own function that keeps", ["before"]),
        ("own layers", []),
    ],
)
def test_what_functions_of_the_users_own_take_is_seen(tmp_path, said, name, uses):
    train(tmp_path, BROUGHT[name], *BOTH[0])
    lines = [line for line in said() if "is used" in line]
    assert len(lines) == len(uses)
    for line, how in zip(lines, uses, strict=True):
        assert line.startswith(f"LayUp: a weight of block 'head' is used {how}")


class LateDetached(Net):
    """Begins to use a weight without a gradient in a later step than the first."""

    steps = 0

    def extra(self, h, labels, number):
        self.steps += number == 0
        return 0.0 if self.steps < 4 else torch.nn.functional.linear(h, self.head.weight.detach()).square().mean()


def test_what_comes_later_is_explained(tmp_path):
    with pytest.raises(
        RuntimeError, match=r"a weight of block .*'head' \(head.weight\).*`clip='exact'` and `merge_at="
    ):
        train(tmp_path, lambda: Brought(LateDetached()), *BOTH[0])
    ours, theirs = (
        train(tmp_path, lambda: Brought(LateDetached()), *kind, **({"clip": "exact"} if kind is BOTH[0] else {}))[0]
        for kind in BOTH
    )
    assert same(ours.model, theirs.model)


def test_a_plain_model_is_watched_without_a_word(tmp_path, said):
    train(tmp_path, lambda: Brought(gpt2()), *BOTH[0])
    train(tmp_path, lambda: Brought(Net()), *BOTH[0])
    assert said() == []


def test_old_rows_stay_where_they_are(tmp_path):
    brought, _, _ = train(tmp_path, lambda: Brought(gpt2(), callbacks=[MaskInCallback()]), *BOTH[0], weight_decay=0.0)
    assert torch.equal(brought.model.get_input_embeddings().weight[:OLD], gpt2().get_input_embeddings().weight[:OLD])
