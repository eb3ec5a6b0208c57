"""Trains with evaluation, early stopping and the best model, then evaluates in many ways beside the stock Trainer."""

import dataclasses
import gc
import os
import sys
import time
import weakref
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import gather_object
from evaluations import EVALUATIONS, EVEN, ODD, accuracy, results
from stock import gpt2
from transformers import EarlyStoppingCallback, GPT2LMHeadModel, HfArgumentParser, Trainer, TrainingArguments
from worker import leave, same_everywhere, write_result

from layup_hf import LayupConfig, LayupTrainer

config = HfArgumentParser(LayupConfig).parse_args_into_dataclasses(sys.argv[1:])[0]
rank, folder = config.process_index, Path(os.environ["LAYUP_TEST_RESULTS"])
result = {}


def values(model):
    return torch.cat([tensor.flatten().double() for tensor in model.state_dict().values()])


class SlowlySaving(LayupTrainer):
    """Rank 0 takes its time to write, so that the others would be the first to read."""

    def _save(self, *args, **kwargs):
        time.sleep(0.5)
        super()._save(*args, **kwargs)

    def _load_best_model(self):
        self.before_loading = values(self.model)
        self.has_been_written = Path(self.state.best_model_checkpoint, "trainer_state.json").is_file()
        super()._load_best_model()


def train(name, worths, **options):
    """What is best is said in advance: the own metric of each evaluation."""
    worth = iter(worths)
    trainer = SlowlySaving(
        model=gpt2(seed=rank),
        args=dataclasses.replace(config, output_dir=str(folder / name), **options),
        train_dataset=EVEN,
        eval_dataset=ODD,
        compute_metrics=lambda prediction: {**accuracy(prediction), "worth": next(worth)},
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
    )
    trainer.train()
    best = trainer.state.best_model_checkpoint
    weights = values(trainer.model)
    result[name] = {
        "step": trainer.state.global_step,
        "best": Path(best).name,
        "has_been_written": trainer.has_been_written,
        "is_best": torch.equal(weights, values(GPT2LMHeadModel.from_pretrained(best))),
        "changed": not torch.equal(weights, trainer.before_loading),
        "same": same_everywhere(weights),
        "learning_rate": trainer.optimizer.param_groups[0]["lr"],
        "logs": trainer.state.log_history,
    }
    model, left = trainer.model, weakref.ref(trainer)
    gc.disable()
    del trainer
    result[name]["is_freed"] = left() is None
    gc.enable()
    return model


def identical(one, other):
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(identical(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(identical, one, other))
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    return one == other


plateau = {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": {"patience": 0, "factor": 0.5}}
train("last", [0.0, 0.1, 0.2, 0.3, 0.4, 0.5], eval_on_start=True, save_strategy="best", **plateau)
model = train("second", [0.1, 0.9, 0.5, 0.2])
for name, evaluation in EVALUATIONS.items():
    ours = results(LayupTrainer, LayupConfig, model, folder, evaluation)
    theirs = results(Trainer, TrainingArguments, model, folder, evaluation)
    everywhere = gather_object([ours])
    result[name] = {"like_stock": identical(ours, theirs), "same": all(identical(ours, other) for other in everywhere)}
    if rank == 0:
        torch.save(ours, folder / f"{name}.pt")
if rank == 0:
    model.save_pretrained(folder / "model")
write_result(rank, result)
leave()
