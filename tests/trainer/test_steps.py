"""Exact clipping, loss scaling and compiled layers, each beside the Trainer."""

import copy

import pytest
import torch
from accelerate.state import AcceleratorState
from stock import arguments, gpt2, same, text
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.optimization import Adafactor, AdafactorSchedule

from layup_hf import LayupConfig, LayupTrainer


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Precision and compiler are kept by accelerate for the whole process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.compiler.reset()


def train(cls, folder, seed=0, callbacks=(), **options):
    args = arguments(folder, LayupConfig if issubclass(cls, LayupTrainer) else TrainingArguments, **options)
    trainer = cls(model=gpt2(seed), args=args, train_dataset=text(), callbacks=list(callbacks))
    trainer.train()
    return trainer


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


# ---- Clipping ----


@pytest.mark.parametrize(
    "options",
    [{}, {"gradient_accumulation_steps": 2}, {"bf16": True}, {"optim": "adafactor"}, {"max_grad_norm": 0.0}],
    ids=str,
)
def test_exact_clipping_is_the_trainers_bit_for_bit(tmp_path, options):
    options = {"max_grad_norm": 0.3, **options}
    ours = train(LayupTrainer, tmp_path, clip="exact", **options)
    theirs = train(Trainer, tmp_path, **options)
    assert same(ours.model, theirs.model)
    assert logged(ours, "grad_norm") == logged(theirs, "grad_norm")
    if options["max_grad_norm"]:
        assert not same(ours.model, train(LayupTrainer, tmp_path, clip="exact", **options, seed=1).model)
        assert not same(ours.model, train(LayupTrainer, tmp_path, **{**options, "max_grad_norm": 0.0}).model)


def test_with_exact_clipping_callbacks_see_the_gradients(tmp_path):
    class Observer(TrainerCallback):
        def __init__(self):
            self.norms = []

        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
            self.norms.append(torch.cat(gradients).norm().item() if gradients else None)

    exact, estimate = Observer(), Observer()
    train(LayupTrainer, tmp_path, callbacks=[exact], clip="exact", max_grad_norm=0.1)
    train(LayupTrainer, tmp_path, callbacks=[estimate], clip="estimate", max_grad_norm=0.1)
    assert exact.norms == pytest.approx([0.1] * 6, rel=1e-3)
    assert estimate.norms == [None] * 6


def with_schedule_of_its_steps(cls, folder, **options):
    """Adafactor with relative steps; its schedule reads from the optimizer what the last step was."""
    config, model = LayupConfig if issubclass(cls, LayupTrainer) else TrainingArguments, gpt2()
    optimizer = Adafactor(model.parameters(), relative_step=True, warmup_init=True, scale_parameter=True)
    optimizers = (optimizer, AdafactorSchedule(optimizer))
    trainer = cls(model=model, args=arguments(folder, config, **options), train_dataset=text(), optimizers=optimizers)
    trainer.train()
    return trainer


def test_with_exact_clipping_gradients_stay_until_they_are_zeroed(tmp_path):
    ours = with_schedule_of_its_steps(LayupTrainer, tmp_path, clip="exact")
    theirs = with_schedule_of_its_steps(Trainer, tmp_path)
    assert logged(ours, "learning_rate") == logged(theirs, "learning_rate")
    assert logged(ours, "learning_rate")[0] > 0
    assert all(parameter.grad is None for parameter in ours.model.parameters())


def test_a_hook_before_the_step_sees_the_whole_gradient_or_is_refused(tmp_path):
    def trainer_of(seen, **options):
        model = gpt2()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer.register_step_pre_hook(lambda *_: seen.append(all(p.grad is not None for p in model.parameters())))
        args = arguments(tmp_path, **options)
        return LayupTrainer(model=model, args=args, train_dataset=text(), optimizers=(optimizer, None))

    trainer_of(seen := [], clip="exact").train()
    assert seen == [True] * 6
    trainer_of(seen := []).train()  # chosen by itself
    assert seen == [True] * 6
    with pytest.raises(ValueError, match=r"`clip='estimate'` and this training exclude each other: a hook of"):
        trainer_of([], clip="estimate").train()


def test_the_estimate_stays_close_to_exact_clipping(tmp_path):
    options = {"max_grad_norm": 0.3, "learning_rate": 1e-3, "max_steps": 20, "logging_steps": 1}
    estimate = logged(train(LayupTrainer, tmp_path, **options), "loss")
    exact = logged(train(LayupTrainer, tmp_path, clip="exact", **options), "loss")
    assert estimate == pytest.approx(exact, rel=2e-3)
    assert estimate != exact


# ---- Loss scaling ----


def scaling(cls, overflows=()):
    """`cls` with fp16 and loss scaling on the CPU, where accelerate leaves the scaling out.

    `overflows` are pairs (step, part of a parameter's name): gradients that become infinite.
    """

    class Scaling(cls):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.accelerator.state._mixed_precision, self.accelerator.native_amp = "fp16", True
            self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=4)

        def training_step(self, model, *args, **kwargs):
            self.scales = [*getattr(self, "scales", []), self.accelerator.scaler.get_scale()]
            handles = [
                parameter.register_hook(lambda gradient: gradient * torch.inf)
                for name, parameter in model.named_parameters()
                if any(self.state.global_step == step and part in name for step, part in overflows)
            ]
            self.before = {name: p.detach().clone() for name, p in model.named_parameters()}
            loss = super().training_step(model, *args, **kwargs)
            for handle in handles:
                handle.remove()
            return loss

    return Scaling


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 2},
        {"optim_args": "weight_decay=0.1"},
        {"clip": "exact", "max_grad_norm": 0.3},
        {"clip": "exact", "max_grad_norm": 0.3, "optim": "adafactor"},
    ],
    ids=str,
)
def test_fp16_is_the_trainers_bit_for_bit(tmp_path, options):
    ours = train(scaling(LayupTrainer), tmp_path, **options)
    theirs = train(scaling(Trainer), tmp_path, **{k: v for k, v in options.items() if k != "clip"})
    assert same(ours.model, theirs.model)
    assert ours.accelerator.scaler.state_dict() == theirs.accelerator.scaler.state_dict()
    assert ours.scales[0] < ours.scales[-1]  # the scale has grown, so it was in the loss and out of the gradients
    assert logged(ours, "grad_norm") == pytest.approx(logged(theirs, "grad_norm"), rel=1e-5)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert not same(ours.model, train(LayupTrainer, tmp_path, **options).model)  # fp32


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.3])
def test_a_block_whose_gradients_are_not_finite_skips_its_own_step(tmp_path, max_grad_norm):
    cls = scaling(LayupTrainer, overflows=[(5, "h.1.attn")])
    trainer = train(cls, tmp_path, max_grad_norm=max_grad_norm, learning_rate=1e-2)
    for name, parameter in trainer.model.named_parameters():
        assert torch.isfinite(parameter).all()
        assert torch.equal(parameter, trainer.before[name]) == ("h.1" in name), name
    assert trainer.scales[5] == 2048  # grown after the fourth step, and halved by the scaler after the last
    assert trainer.accelerator.scaler.get_scale() == 1024


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adafactor"])
def test_with_exact_clipping_an_overflow_skips_the_whole_step_as_in_the_trainer(tmp_path, optim):
    options = {"max_grad_norm": 0.3, "optim": optim}
    ours = train(scaling(LayupTrainer, [(2, "h.1.attn")]), tmp_path, clip="exact", **options)
    theirs = train(scaling(Trainer, [(2, "h.1.attn")]), tmp_path, **options)
    assert same(ours.model, theirs.model)
    assert ours.scales == theirs.scales
    assert ours.scales[3] == ours.scales[2] / 2
    assert logged(ours, "learning_rate") == logged(theirs, "learning_rate")


def test_an_optimizer_that_cannot_skip_on_the_device_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`fp16` and SGD exclude each other with `clip='estimate'`.*clip='exact'"):
        train(scaling(LayupTrainer), tmp_path, optim="sgd", clip="estimate")
    ours = train(scaling(LayupTrainer), tmp_path, optim="sgd")  # exact clipping is chosen by itself
    assert same(ours.model, train(scaling(Trainer), tmp_path, optim="sgd").model)


@pytest.mark.parametrize("clip", ["estimate", "exact"])
def test_the_optimizer_looks_ahead_also_where_the_loss_is_scaled(tmp_path, clip):
    """A gradient that is not finite does not stay in its first moments."""
    options = {"max_grad_norm": 0.0, "nesterov": "on", "clip": clip}
    scaled = train(scaling(LayupTrainer, [(2, "h.1.attn")]), tmp_path, **options)
    plain = train(LayupTrainer, tmp_path, **options)
    moments = [state["exp_avg"] for state in scaled.optimizer.state.values()]
    assert all(bool(torch.isfinite(moment).all()) for moment in moments)
    assert scaled.scales[3] == scaled.scales[2] / 2
    assert not same(scaled.model, plain.model)  # one step less
    once = train(scaling(LayupTrainer), tmp_path, **options)
    assert logged(once, "loss") == pytest.approx(logged(plain, "loss"), rel=1e-3)
    assert logged(once, "grad_norm") == pytest.approx(logged(plain, "grad_norm"), rel=1e-2)


# ---- Compiled layers ----


class Ordered(LayupTrainer):
    """Notes in which order blocks become ready, and how the model is compiled."""

    def _prepare_for_training(self, *args):
        prepared = super()._prepare_for_training(*args)
        self.ready, self.layers = [], len(self.layup.model.layers)
        for block in self.layup.model.blocks:
            for parameter in block.parameters:
                parameter.register_post_accumulate_grad_hook(self.note(block))
        return prepared

    def note(self, block):
        return lambda _: self.ready.append(block.name) if self.ready[-1:] != [block.name] else None


@pytest.mark.parametrize("options", [{}, {"activation_checkpointing": True}, {"bf16": True}], ids=str)
def test_compiled_layers_give_their_gradients_block_by_block(tmp_path, options):
    options = {"torch_compile_backend": "aot_eager", **options}
    ours = train(Ordered, tmp_path, **options)
    assert ours.layers == 2
    assert ours.ready == ["head", "transformer.h.1", "transformer.h.0", "embeddings"] * 6
    assert "forward" not in ours.model.transformer.h[0].__dict__  # given back
    assert type(ours.model_wrapped) is type(ours.model)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert same(ours.model, train(Trainer, tmp_path, **options).model)


def test_layers_are_really_compiled_and_share_the_code(tmp_path):
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    train(LayupTrainer, tmp_path, torch_compile_backend="aot_eager")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_an_evaluation_before_training_leaves_layers_to_be_compiled(tmp_path):
    args = arguments(tmp_path, torch_compile_backend="aot_eager")
    trainer = Ordered(model=gpt2(), args=args, train_dataset=text(), eval_dataset=text(8))
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.ready[:4] == ["head", "transformer.h.1", "transformer.h.0", "embeddings"]
    assert trainer.evaluate()["eval_loss"] < before


def test_a_copy_of_a_compiled_model_is_a_model_of_its_own(tmp_path):
    class Copy(TrainerCallback):
        """As one that averages the weights keeps it."""

        def on_train_begin(self, args, state, control, model, **kwargs):
            self.model = copy.deepcopy(model)

    callback, batch = Copy(), {"input_ids": text()[0]["input_ids"][None]}
    trainer = train(LayupTrainer, tmp_path, callbacks=[callback], torch_compile_backend="aot_eager")
    expected = gpt2()
    assert not same(trainer.model, expected)
    for model in (callback.model, expected):
        model.eval()
    torch.testing.assert_close(callback.model(**batch).logits, expected(**batch).logits)
