"""One process: every kind of model, a second train() and resuming, and what is refused.

That each option gives the trajectory of the stock Trainer is in `test_trajectory.py`.
"""

import os
import signal
from types import SimpleNamespace

import pytest
import torch
from models import TINY
from stock import arguments, gpt2, same, text
from torch.nn.functional import mse_loss
from transformers import (
    GPT2LMHeadModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from layup_hf import LayupConfig, LayupMixin, LayupOptions, LayupTrainer
from layup_hf.optim.optimizer import BlockOptimizer


def test_a_second_train_goes_on_as_the_trainer_does(tmp_path):
    models = []
    for cls, config in ((LayupTrainer, LayupConfig), (Trainer, TrainingArguments)):
        models.append(gpt2())
        trainer = cls(model=models[-1], args=arguments(tmp_path, config), train_dataset=text())
        trainer.train()
        trainer.train()
    assert same(*models)


def test_resuming_gives_the_uninterrupted_run(tmp_path):
    whole, part = gpt2(), gpt2()
    options = {"save_strategy": "steps", "save_steps": 3}
    LayupTrainer(model=whole, args=arguments(tmp_path / "a"), train_dataset=text()).train()
    LayupTrainer(model=part, args=arguments(tmp_path / "b", **options), train_dataset=text()).train()
    fresh = gpt2(seed=1)
    LayupTrainer(model=fresh, args=arguments(tmp_path / "b"), train_dataset=text()).train(
        resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-3")
    )
    assert same(whole, part)
    assert same(whole, fresh)


def test_a_checkpoint_of_the_trainer_can_be_resumed(tmp_path):
    """Groups and state of the optimizer are those that the Trainer saves."""
    theirs = gpt2()
    options = {"save_strategy": "steps", "save_steps": 3}
    stock = Trainer(model=theirs, args=arguments(tmp_path, TrainingArguments, **options), train_dataset=text())
    stock.train()
    ours = gpt2(seed=1)
    trainer = LayupTrainer(model=ours, args=arguments(tmp_path), train_dataset=text())
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same(ours, theirs)


@pytest.mark.parametrize("name", sorted(TINY))
def test_every_kind_of_model(tmp_path, name):
    torch.manual_seed(0)
    ours, batch = TINY[name].build(), TINY[name].batch()
    torch.manual_seed(0)
    theirs = TINY[name].build()
    data = [{key: value[i % len(value)] for key, value in batch.items()} for i in range(8)]
    options = {"max_steps": 3, "per_device_train_batch_size": 2}
    LayupTrainer(model=ours, args=arguments(tmp_path, **options), train_dataset=data).train()
    Trainer(model=theirs, args=arguments(tmp_path, TrainingArguments, **options), train_dataset=data).train()
    assert same(ours, theirs)


def test_optimizer_steps_in_backward(tmp_path):
    """By the time the optimizer is asked to step, no gradient is left."""
    seen = []

    class Observer(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
            seen.append(sum(p.grad is not None for p in model.parameters()))

    trainer = LayupTrainer(
        model=gpt2(), args=arguments(tmp_path, clip="estimate"), train_dataset=text(), callbacks=[Observer()]
    )
    trainer.train()
    assert seen == [0] * 6
    assert isinstance(trainer.optimizer.optimizer, BlockOptimizer)


def test_clipping_bounds_the_gradient(tmp_path):
    """After the first step the estimate has every block's norm; a steady gradient is then clipped exactly."""
    norms = []

    class Observing(LayupTrainer):
        def _prepare_for_training(self, *args):
            prepared = super()._prepare_for_training(*args)
            original = self.layup.steps.clipper.clip_block

            def clip_block(block):
                original(block)
                norms.append(torch.stack([p.grad.norm() for p in block.parameters if p.grad is not None]).norm())

            self.layup.steps.clipper.clip_block = clip_block
            return prepared

    options = {"max_grad_norm": 0.01, "learning_rate": 1e-6, "max_steps": 4}
    Observing(model=gpt2(), args=arguments(tmp_path, **options), train_dataset=text()).train()
    blocks = len(norms) // 4
    assert [torch.stack(norms[k * blocks : (k + 1) * blocks]).norm().item() for k in range(1, 4)] == pytest.approx(
        [0.01] * 3, rel=0.1
    )


def test_plain_training_arguments_get_the_defaults(tmp_path):
    trainer = LayupTrainer(model=gpt2(), args=arguments(tmp_path, TrainingArguments), train_dataset=text())
    assert trainer.train().global_step == 6


def test_mixin_and_options_combine_with_other_trainers(tmp_path):
    from dataclasses import dataclass

    @dataclass
    class Config(LayupOptions, Seq2SeqTrainingArguments):
        pass

    class LayupSeq2SeqTrainer(LayupMixin, Seq2SeqTrainer):
        pass

    model, batch = TINY["t5"].build(), TINY["t5"].batch()
    data = [{key: value[i % len(value)] for key, value in batch.items()} for i in range(8)]
    args = arguments(tmp_path, Config, predict_with_generate=True, peers_per_step=2, max_steps=2)
    trainer = LayupSeq2SeqTrainer(model=model, args=args, train_dataset=data, eval_dataset=data)
    trainer.train()
    assert trainer.evaluate(max_length=6)["eval_loss"] > 0


def test_a_model_changed_after_the_optimizer_is_refused(tmp_path):
    model = gpt2()
    trainer = LayupTrainer(model=model, args=arguments(tmp_path), train_dataset=text())
    trainer.train()
    model.transformer.h[0].extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"in no block, such as 'transformer\.h\.0\.extra\.weight'"):
        trainer.train()


def test_refusals_come_at_construction(tmp_path):
    args = arguments(tmp_path, TrainingArguments)
    args.deepspeed = {"zero_optimization": {"stage": 2}}
    with pytest.raises(ValueError, match="`deepspeed` and LayUp exclude each other"):
        LayupTrainer(model=gpt2(), args=args, train_dataset=text())
    with pytest.raises(ValueError, match="optim='lomo'"):
        arguments(tmp_path, optim="lomo")


def test_a_step_that_memory_ran_out_in_leaves_no_block_out_of_the_next(tmp_path):
    """The first step of an optimizer is where its state is made."""
    model, stepped = gpt2(), []

    class Scarce(torch.optim.SGD):
        def step(self, closure=None):
            stepped.append(sum(len(group["params"]) for group in self.param_groups))
            if len(stepped) == 2:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return super().step(closure)

    optimizer = Scarce(model.parameters(), lr=1e-2)
    args = arguments(tmp_path, clip="exact", max_steps=1, auto_find_batch_size=True)
    LayupTrainer(model=model, args=args, train_dataset=text(), optimizers=(optimizer, None)).train()
    assert sum(stepped[2:]) == len(list(model.parameters()))


def test_hooks_are_removed_after_an_exception(tmp_path):
    model = gpt2()

    class Failing(LayupTrainer):
        def compute_loss(self, *args, **kwargs):
            if self.state.global_step == 2:
                raise ArithmeticError("made on purpose")
            return super().compute_loss(*args, **kwargs)

    trainer = Failing(model=model, args=arguments(tmp_path), train_dataset=text())
    with pytest.raises(ArithmeticError):
        trainer.train()
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    loss = mse_loss(model(input_ids=torch.arange(4)[None]).logits.sum(), torch.tensor(0.0))
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_jit_checkpoint_saves_what_the_step_has_made(tmp_path):
    class Preempted(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    options = {"enable_jit_checkpoint": True, "save_strategy": "steps", "save_steps": 100, "max_steps": 20}
    args = arguments(tmp_path, **options)
    trainer = LayupTrainer(model=gpt2(), args=args, train_dataset=text(), callbacks=[Preempted()])
    assert args.enable_jit_checkpoint
    assert trainer.train().global_step == 3
    assert signal.getsignal(signal.SIGTERM) is before
    saved = GPT2LMHeadModel.from_pretrained(tmp_path / "checkpoint-3")
    stopped = LayupTrainer(model=gpt2(), args=arguments(tmp_path, max_steps=20), train_dataset=text())
    stopped.add_callback(StopAfter(3))
    stopped.train()
    assert same(saved, trainer.model)
    assert same(saved, stopped.model)


class StopAfter(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step
        return control


def test_a_search_with_several_workers_is_refused():
    several = SimpleNamespace(args=SimpleNamespace(world_size=2))
    with pytest.raises(ValueError, match=r"hyperparameter_search\(\) and LayUp with several workers exclude"):
        LayupTrainer.hyperparameter_search(several)
