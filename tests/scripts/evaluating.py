"""Evaluates in the background: rank 0 goes on when the other has made steps meanwhile."""

import dataclasses
import os
import sys
import time
from pathlib import Path

import torch
from evaluations import EVEN, ODD, accuracy
from stock import gpt2
from transformers import EarlyStoppingCallback, GPT2LMHeadModel, HfArgumentParser
from worker import leave, same_everywhere, write_result

from layup_hf import LayupConfig, LayupTrainer

config = HfArgumentParser(LayupConfig).parse_args_into_dataclasses(sys.argv[1:])[0]
rank, folder = config.process_index, Path(os.environ["LAYUP_TEST_RESULTS"])
result = {}


def values(model):
    return torch.cat([tensor.flatten().double() for tensor in model.state_dict().values()])


class Watching(LayupTrainer):
    """Overrides `evaluate`, as users do."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.evaluations, self.rows = [], []

    def evaluate(self, *args, **kwargs):
        exchange, run = self.layup.exchange, self.layup.state
        is_training = exchange.engine is not None
        before = run.steps_of_all - run.steps_done  # of the other, when both met; it may have come further
        weights = values(self.model)
        metrics = super().evaluate(*args, **kwargs)
        is_alone = is_training and self.accelerator.num_processes == 1
        end = time.monotonic() + 60
        while is_alone and exchange.ledger.done[1] == before and time.monotonic() < end:
            time.sleep(0.01)
        seen = {
            "step": self.state.global_step,
            "is_alone": is_alone,
            "others_train": is_alone and int(exchange.ledger.done[1]) > before,
            "model_stays": torch.equal(values(self.model), weights),
            "rows": self.rows[-1],
        }
        self.evaluations.append(seen)
        return metrics


def train(name, worths, callbacks=(), **options):
    worth = iter(worths)

    def measure(prediction):
        metrics = accuracy(prediction)
        trainer.rows.append(metrics["rows"])
        return {**metrics, "worth": next(worth)}

    trainer = Watching(
        model=gpt2(seed=rank),
        args=dataclasses.replace(config, output_dir=str(folder / name), **options),
        train_dataset=EVEN,
        eval_dataset=ODD,
        compute_metrics=measure,
        callbacks=list(callbacks),
    )
    trainer.train()
    state = trainer.state
    weights = values(trainer.model)
    result[name] = {
        "step": state.global_step,
        "best": Path(state.best_model_checkpoint).name,
        "worth": state.best_metric,
        "is_best": torch.equal(weights, values(GPT2LMHeadModel.from_pretrained(state.best_model_checkpoint))),
        "same": same_everywhere(weights),
        "evaluations": trainer.evaluations,
        "logs": state.log_history,
    }


# The first two evaluations are rank 0's alone; the last one is of both, which see the same metrics.
WORTHS = [0.1, 0.9, 0.5] if rank == 0 else [0.5]
BY_EPOCHS = {"max_steps": -1, "num_train_epochs": 3, "eval_strategy": "epoch", "save_strategy": "epoch"}
LOADING = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}
train("to the end", WORTHS)
train("in the background", WORTHS, checkpoints="background")
train("by epochs", WORTHS, **BY_EPOCHS, **LOADING)
# Where both evaluate at the end, both see the third.
train("stopped", [0.9, 0.5, 0.4], [EarlyStoppingCallback(early_stopping_patience=1)], max_steps=200)
write_result(rank, result)
leave()
