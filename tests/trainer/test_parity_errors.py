"""What is wrong with a training is told as the stock Trainer tells it: the same exception, the same words."""

import pytest
import torch
from stock import BOTH, arguments, gpt2, text
from torch.utils.data import IterableDataset
from transformers import GPT2Model, TrainerCallback


def trainer(kind, folder, *, model=gpt2, data=text, options=None, **inputs):
    cls, config = kind
    args = arguments(folder, config, **(options or {}))
    return cls(model=model and model(), args=args, train_dataset=data and data(), **inputs)


def assert_same_error(action):
    """`action(kind)` raises the same for both kinds of trainers."""
    raised = []
    for kind in BOTH:
        with pytest.raises(Exception) as error:  # noqa: PT011 - which one, the stock Trainer says
            action(kind)
        raised.append((error.type, str(error.value).replace("LayupConfig", "TrainingArguments")))
    assert raised[0] == raised[1]


def changed(**columns):
    """The data with columns computed from the row, or without them."""

    def build():
        rows = [{**row, **{name: column and column(row) for name, column in columns.items()}} for row in text()]
        return [{name: value for name, value in row.items() if value is not None} for row in rows]

    return build


def optimizer():
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)


def fail(*args, **kwargs):
    raise ArithmeticError("made on purpose")


def run_out_of_memory(*args, **kwargs):
    raise torch.OutOfMemoryError("CUDA out of memory.")


class Failing(TrainerCallback):
    on_optimizer_step = fail


class Uncallable:
    collate_batch = list


class Stream(IterableDataset):
    def __iter__(self):
        return iter(text())


EVALUATION = {"eval_strategy": "steps", "eval_steps": 2}
PLATEAU = {"lr_scheduler_type": "reduce_lr_on_plateau"}

NOT_BUILT = {
    "evaluation strategy without a set": {"options": EVALUATION},
    "best of no metric": {"options": {**EVALUATION, "save_strategy": "best"}, "eval_dataset": text(4)},
    "saving and evaluating apart": {
        "options": {**EVALUATION, "save_strategy": "epoch", "load_best_model_at_end": True}
    },
    "no model": {"model": None},
    "two models": {"model_init": gpt2},
    "optimizer beside model_init": {"model": None, "model_init": gpt2, "optimizers": (optimizer(), None)},
    "two optimizers": {"optimizers": (optimizer(), None), "optimizer_cls_and_kwargs": (torch.optim.SGD, {})},
    "unknown argument": {"tokenizer": None},
    "no steps between logs": {"options": {"logging_steps": 0}},
    "unknown option": {"options": {"learning_rates": 1.0}},
    "unknown optimizer": {"options": {"optim": "adam"}},
    "stream without max_steps": {"data": Stream, "options": {"max_steps": -1}},
    "collator that cannot be called": {"data_collator": Uncallable()},
    "metrics not by batch": {"options": {"batch_eval_metrics": True}, "compute_metrics": lambda prediction: {}},
}

NOT_TRAINED = {
    "no training set": {"data": None},
    "empty training set": {"data": list},
    "no head": {"model": lambda: GPT2Model(gpt2().config)},
    "no labels": {"data": changed(labels=None)},
    "no inputs": {"data": lambda: [{"text": "a"}] * 8},
    "labels of another length": {"data": changed(labels=lambda row: row["labels"][:3])},
    "tokens beyond the vocabulary": {"data": changed(input_ids=lambda row: row["input_ids"] + 50)},
    "unknown metric": {"options": {**EVALUATION, "metric_for_best_model": "bleu"}, "eval_dataset": text(4)},
    "plateau of an unknown metric": {
        "options": {**EVALUATION, **PLATEAU, "metric_for_best_model": "bleu"},
        "eval_dataset": text(4),
    },
    "unknown argument of the schedule": {
        "options": {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"speed": 1}},
    },
    "loss that fails": {"compute_loss_func": fail},
    "metrics that fail": {"options": EVALUATION, "eval_dataset": text(4), "compute_metrics": fail},
    "callback that fails": {"callbacks": [Failing()]},
    "out of memory at any batch size": {
        "options": {"auto_find_batch_size": True, "per_device_train_batch_size": 1},
        "compute_loss_func": run_out_of_memory,
    },
    "out of memory in evaluation": {
        "options": {**EVALUATION, "auto_find_batch_size": True},
        "eval_dataset": text(4),
        "compute_metrics": run_out_of_memory,
    },
}


@pytest.mark.parametrize("name", NOT_BUILT)
def test_when_it_is_built(name, tmp_path):
    assert_same_error(lambda kind: trainer(kind, tmp_path, **NOT_BUILT[name]))


@pytest.mark.parametrize("name", NOT_TRAINED)
def test_when_it_trains(name, tmp_path):
    built = []

    def train(kind):
        built.append(trainer(kind, tmp_path, **NOT_TRAINED[name]))
        built[-1].train()

    assert_same_error(train)
    assert len(built) == 2


@pytest.mark.parametrize("checkpoint", [True, "missing"])
def test_resuming_from_no_checkpoint(checkpoint, tmp_path):
    assert_same_error(lambda kind: trainer(kind, tmp_path).train(resume_from_checkpoint=checkpoint))


def test_evaluating_without_a_set(tmp_path):
    assert_same_error(lambda kind: trainer(kind, tmp_path).evaluate())
    assert_same_error(lambda kind: trainer(kind, tmp_path, eval_dataset={"one": text(4)}).evaluate("other"))


def test_no_arguments_at_all():
    assert_same_error(lambda kind: kind[0]())
