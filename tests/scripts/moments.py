"""Trains with every way to keep and use moments, one after the other, and writes what workers made of them.

Cases are options of LayupConfig, with `optimizer=sgd` for one that the Trainer makes when training begins.
"""

import os

import torch
from stock import arguments, gpt2, text
from transformers import TrainerCallback
from worker import run_cases, same_everywhere

from layup_hf import LayupTrainer


class Watch(TrainerCallback):
    """Sees by what steps are longer, and what a peer shows of its first moments."""

    def on_optimizer_step(self, args, state, control, **kwargs):
        moments = self.trainer.layup.exchange.moments
        if moments is not None:
            parts = moments._parts.values()
            lengths = [float(length.mean()) for part in parts for length in part.lengths or ()]
            self.length = sum(lengths) / len(lengths) if lengths else None
            self.first = [float(tensor.norm()) for part in parts for tensor in part.first]
            read = [moments._windows.read(moments._peers[0], part.theirs) for part in parts]
            self.theirs = [float(tensor.norm()) for tensors in read for tensor in tensors]


def run_case(options):
    named = dict(option.removeprefix("--").split("=") for option in options)
    own = named.pop("optimizer", None)
    config = arguments(os.environ["LAYUP_TEST_RESULTS"], max_steps=40, warmup_steps=10, **named)
    model, watch = gpt2(), Watch()
    made_later = (torch.optim.SGD, {"lr": 0.1}) if own else None
    result = {"rank": config.process_index, "failure": None}
    try:
        watch.trainer = trainer = LayupTrainer(
            model=model,
            args=config,
            train_dataset=text(320),
            callbacks=[watch],
            optimizer_cls_and_kwargs=made_later,
        )
        result["loss"] = trainer.train().training_loss
    except ValueError as error:
        return {**result, "failure": str(error)}
    names = {name for state in trainer.optimizer.state.values() for name in state}
    result["looks_ahead"] = (direction := trainer.layup.steps.direction) is not None and direction.looks_ahead
    result["ahead_in_card"] = trainer.layup.state.facts.looks_ahead
    result["same"] = same_everywhere(torch.cat([p.detach().flatten() for p in model.parameters()]))
    return {**result, "state": sorted(names), "closed": trainer.layup.exchange.moments is None} | {
        name: getattr(watch, name, None) for name in ("length", "first", "theirs")
    }


run_cases(run_case)
