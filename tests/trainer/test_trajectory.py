"""One process: whatever is switched on, the weights are those of the stock Trainer bit for bit.

Gradients are not clipped (`max_grad_norm=0`), or with `clip="exact"`: clipping by an estimate is the one thing in which
one process differs.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from datasets import Dataset
from stock import BOTH, arguments, gpt2, same, text
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedTokenizerFast
from transformers.trainer_utils import SchedulerType


@dataclass
class Case:
    """What is switched on: options of the configuration, and arguments of the trainer, made anew for each."""

    options: dict[str, Any] = field(default_factory=dict)
    inputs: Callable[[torch.nn.Module], dict[str, Any]] = lambda model: {}
    build: Callable[[], torch.nn.Module] = gpt2
    subclass: Callable[[type], type] = lambda cls: cls
    ours: dict[str, Any] = field(default_factory=dict)
    """Options that only LayupConfig has."""


def half():
    return gpt2().to(torch.bfloat16)


def double():
    return gpt2().double()


def nadam(model):
    optimizer = torch.optim.NAdam(model.parameters(), lr=3e-3)
    return {"optimizers": (optimizer, torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.5))}


def loss_of_tokens(outputs, labels, num_items_in_batch=None):
    return cross_entropy(outputs.logits.flatten(0, 1), labels.flatten(), reduction="sum") / num_items_in_batch


def loss_of_three(outputs, labels, num_items_in_batch=None):
    """For which batches of more than three samples are too large."""
    if len(labels) > 3:
        raise torch.OutOfMemoryError("CUDA out of memory.")
    return loss_of_tokens(outputs, labels, num_items_in_batch)


def sometimes_no_number():
    """A loss whose every third value is not a number, while its gradient is one."""
    calls = itertools.count(1)

    def loss(outputs, labels, num_items_in_batch=None):
        value = loss_of_tokens(outputs, labels, num_items_in_batch)
        return value + torch.nan if next(calls) % 3 == 0 else value

    return loss


def tokenizer():
    words = Tokenizer(WordLevel({str(number): number for number in range(50)}, unk_token="0"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0")


def ragged():
    """Rows of different lengths, as a data set of its own library, to be padded."""
    rows = [row["input_ids"][: 3 + number % 6].tolist() for number, row in enumerate(text())]
    return Dataset.from_dict({"input_ids": rows, "length": [len(row) for row in rows], "unused": [0] * len(rows)})


def pad_with_labels(rows):
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row["input_ids"]) for row in rows], batch_first=True)
    return {"input_ids": ids, "attention_mask": ids.ne(0).long(), "labels": ids.masked_fill(ids.eq(0), -100)}


def of_ragged_rows(model):
    return {"train_dataset": ragged(), "data_collator": pad_with_labels, "processing_class": tokenizer()}


class Stream(IterableDataset):
    def __iter__(self):
        yield from text()


def own_loader(cls):
    class Own(cls):
        def get_train_dataloader(self):
            return DataLoader(self.train_dataset, batch_size=3, collate_fn=self.data_collator)

    return Own


def own_optimizer(cls):
    class Own(cls):
        def create_optimizer(self, model=None):
            if self.optimizer is None:
                self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
            return self.optimizer

    return Own


def own_schedule(cls):
    class Own(cls):
        def create_scheduler(self, num_training_steps, optimizer=None):
            self.lr_scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.9)
            return self.lr_scheduler

    return Own


EVALUATION = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss", "max_steps": 8}
CHECKPOINTING = {"activation_checkpointing": True}
ACCUMULATION = {"gradient_accumulation_steps": 3}
GREEDY = {"patience": 1, "min_lr": 1e-4, "factor": 0.5}

SCHEDULES = {
    "constant": {},
    "constant_with_warmup": {"warmup_steps": 2},
    "cosine": {"warmup_steps": 2},
    "cosine_warmup_with_min_lr": {"lr_scheduler_kwargs": {"min_lr": 1e-3, "warmup_lr_rate": 0.1}, "warmup_steps": 2},
    "cosine_with_min_lr": {"lr_scheduler_kwargs": {"min_lr_rate": 0.1}, "warmup_steps": 2},
    "cosine_with_restarts": {"lr_scheduler_kwargs": {"num_cycles": 2}},
    "greedy": {**EVALUATION, "lr_scheduler_kwargs": GREEDY},
    "inverse_sqrt": {"warmup_steps": 2},
    "linear": {"warmup_steps": 0.3},
    "polynomial": {"lr_scheduler_kwargs": {"power": 2.0, "lr_end": 1e-4}},
    "reduce_lr_on_plateau": {**EVALUATION, "lr_scheduler_kwargs": {"patience": 0, "factor": 0.5, "threshold": 0.5}},
    "warmup_stable_decay": {"lr_scheduler_kwargs": {"num_decay_steps": 2}, "warmup_steps": 2},
}

CASES = {
    "defaults": Case(),
    "adamw": Case({"optim": "adamw_torch", "weight_decay": 0.1, "adam_beta2": 0.9}),
    "sgd": Case({"optim": "sgd", "optim_args": "momentum=0.9"}),
    "adafactor": Case({"optim": "adafactor"}),
    "adagrad": Case({"optim": "adagrad"}),
    "rmsprop": Case({"optim": "rmsprop"}),
    "optimizers": Case(inputs=nadam),
    "optimizer class": Case(inputs=lambda model: {"optimizer_cls_and_kwargs": (torch.optim.Adamax, {"lr": 3e-3})}),
    "optimizer of a subclass": Case(subclass=own_optimizer),
    "schedule of a subclass": Case(subclass=own_schedule),
    "accumulation": Case(ACCUMULATION),
    "accumulation over epochs": Case({**ACCUMULATION, "max_steps": -1, "num_train_epochs": 2.0}),
    "part of an epoch": Case({"max_steps": -1, "num_train_epochs": 1.4}),
    "checkpointing": Case(CHECKPOINTING),
    "checkpointing of every other layer": Case(
        {**CHECKPOINTING, "activation_checkpointing_kwargs": {"use_reentrant": False, "every_n_layers": 2}}
    ),
    "bf16": Case({"bf16": True}),
    "model in bf16": Case(build=half),
    "model in double precision": Case(build=double),
    "label smoothing": Case({"label_smoothing_factor": 0.1}),
    "neftune": Case({"neftune_noise_alpha": 5.0}),
    "loss function": Case(ACCUMULATION, lambda model: {"compute_loss_func": loss_of_tokens}),
    "model_init": Case(inputs=lambda model: {"model": None, "model_init": lambda: gpt2(seed=3)}),
    "batch size found": Case(
        {"auto_find_batch_size": True, "bf16": True}, lambda model: {"compute_loss_func": loss_of_three}
    ),
    "cache emptied": Case({"torch_empty_cache_steps": 2}),
    "losses that are not numbers": Case({"max_steps": 8}, lambda model: {"compute_loss_func": sometimes_no_number()}),
    "all tokens counted": Case({"include_num_input_tokens_seen": "all"}, of_ragged_rows),
    "tokens counted": Case({"include_num_input_tokens_seen": "non_padding", **ACCUMULATION}, of_ragged_rows),
    "stream": Case(ACCUMULATION, lambda model: {"train_dataset": Stream()}),
    "loader processes": Case({"dataloader_num_workers": 2}),
    "loader of one's own": Case(subclass=own_loader),
    "last batch dropped": Case({"dataloader_drop_last": True, "per_device_train_batch_size": 5, "max_steps": 8}),
    "seed of the data": Case({"data_seed": 7}),
    "no seedable sampler": Case({"accelerator_config": {"use_seedable_sampler": False}}),
    "sequential": Case({"train_sampling_strategy": "sequential"}),
    "by length": Case({"train_sampling_strategy": "group_by_length"}, of_ragged_rows),
    "rebalanced": Case(
        {"train_sampling_strategy": "batch_rebalance", **ACCUMULATION}, of_ragged_rows, ours={"shared_batches": False}
    ),
    **{
        f"schedule {name}": Case({"lr_scheduler_type": name, **options}, lambda model: {"eval_dataset": text(4)})
        for name, options in SCHEDULES.items()
    },
    "bf16, accumulation, checkpointing": Case({"bf16": True, **ACCUMULATION, **CHECKPOINTING}),
    "model in bf16, accumulation, neftune": Case({**ACCUMULATION, "neftune_noise_alpha": 5.0}, build=half),
    "checkpointing, smoothing, cosine": Case(
        {**CHECKPOINTING, "label_smoothing_factor": 0.1, "lr_scheduler_type": "cosine", "warmup_steps": 2}
    ),
    "clipped exactly, bf16, accumulation, checkpointing": Case(
        {"max_grad_norm": 0.3, "bf16": True, **ACCUMULATION, **CHECKPOINTING}, ours={"clip": "exact"}
    ),
    "adafactor, model in bf16, checkpointing": Case({"optim": "adafactor", **CHECKPOINTING}, build=half),
    "loader processes, by length, accumulation": Case(
        {"dataloader_num_workers": 1, "train_sampling_strategy": "group_by_length", **ACCUMULATION}, of_ragged_rows
    ),
}


def build(case, folder, kind, **more):
    cls, config = kind
    model = case.build()
    options = {**case.options, **(case.ours if kind is BOTH[0] else {}), **more}
    inputs = {"model": model, "train_dataset": text(), **case.inputs(model)}
    return case.subclass(cls)(args=arguments(folder, config, **options), **inputs)


def assert_same_run(ours, theirs):
    precision = 2**-7 if ours.model.dtype == torch.bfloat16 else 1e-5  # the Trainer's norm has the gradient's precision
    assert same(ours.model, theirs.model)
    for entry, other in zip(ours.state.log_history, theirs.state.log_history, strict=True):
        assert entry.keys() == other.keys()
        for figure in ("loss", "learning_rate", "train_loss", "eval_loss", "num_input_tokens_seen", "epoch", "step"):
            assert entry.get(figure) == other.get(figure)
        norms = [one.get("grad_norm", 0.0) for one in (entry, other)]
        assert norms[0] == pytest.approx(norms[1], rel=precision, nan_ok=True)
    assert ours.state.train_batch_size == theirs.state.train_batch_size


@pytest.mark.parametrize("name", CASES)
def test_trajectory(name, tmp_path):
    case = CASES[name]
    trainers = []
    for kind in BOTH:  # one after the other: each seeds the generators that its own dropout draws from
        trainers.append(build(case, tmp_path, kind))
        trainers[-1].train()
    assert_same_run(*trainers)
    assert not same(trainers[0].model, case.build())


SAVING = {"save_strategy": "steps", "save_steps": 3}
RESUMED = {
    "defaults": Case(SAVING),
    "bf16, accumulation, checkpointing": Case({**SAVING, "bf16": True, **ACCUMULATION, **CHECKPOINTING}),
    "model in bf16, neftune, the last checkpoint alone": Case(
        {**SAVING, "neftune_noise_alpha": 5.0, "save_total_limit": 1, "save_steps": 2}, build=half
    ),
    "data not skipped, accumulation": Case({**SAVING, **ACCUMULATION, "ignore_data_skip": True}),
    "model alone, sgd": Case({**SAVING, "save_only_model": True, "optim": "sgd"}),
    "plateau, smoothing": Case(
        {**SAVING, **EVALUATION, **SCHEDULES["reduce_lr_on_plateau"], "lr_scheduler_type": "reduce_lr_on_plateau"},
        lambda model: {"eval_dataset": text(4)},
    ),
    "loader processes, by length, tokens counted": Case(
        {
            **SAVING,
            "dataloader_num_workers": 1,
            "train_sampling_strategy": "group_by_length",
            "include_num_input_tokens_seen": "non_padding",
        },
        of_ragged_rows,
    ),
    "clipped exactly, accumulation": Case({**SAVING, **ACCUMULATION, "max_grad_norm": 0.3}, ours={"clip": "exact"}),
    "stream": Case(SAVING, lambda model: {"train_dataset": Stream()}),
}


@pytest.mark.parametrize("name", RESUMED)
def test_trajectory_after_resuming(name, tmp_path):
    case = RESUMED[name]
    trainers = []
    for kind in BOTH:
        folder = tmp_path / kind[0].__name__
        build(case, folder, kind, max_steps=4).train()
        trainers.append(build(case, folder, kind, max_steps=7))
        trainers[-1].train(resume_from_checkpoint=True)
        assert trainers[-1].state.global_step == 7
    assert_same_run(*trainers)


@pytest.mark.parametrize("name", ["accumulation", "model_init", "optimizer of a subclass"])
def test_trajectory_of_a_second_training_after_a_failed_one(name, tmp_path):
    """The first one fails in the middle of a step, where nothing has been stepped yet."""
    case = CASES[name]
    trainers = []
    for kind in BOTH:
        trainer = build(case, tmp_path, kind)
        compute_loss, calls = trainer.compute_loss, itertools.count()

        def failing(*args, compute_loss=compute_loss, calls=calls, **kwargs):
            if next(calls) == 4:
                raise ArithmeticError("made on purpose")
            return compute_loss(*args, **kwargs)

        trainer.compute_loss = failing
        with pytest.raises(ArithmeticError):
            trainer.train()
        trainer.train()
        trainers.append(trainer)
    assert_same_run(*trainers)


def test_every_schedule_is_tried():
    assert set(SCHEDULES) == {kind.value for kind in SchedulerType}
