"""Decent-DP, the nearest library to LayUp, from its own package."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from transformers import Trainer, TrainerCallback, get_scheduler

from .ddp import GradientBytes
from .local import LOCAL
from .method import Method, Setup

TOPOLOGY = "complete"  # the package's default; the others need an even number of workers, or a power of two
PACKAGE = "pip install decent-dp==0.2.3"


def is_installed() -> bool:
    """Whether the package is there."""
    return importlib.util.find_spec("decent_dp") is not None


class Together(TrainerCallback):
    """Makes all replicas equal at the end.

    Args:
        model: Decent-DP's wrapper.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.model.global_avg(will_revert=False)


class DecentTrainer(Trainer):
    """The Trainer, whose model is Decent-DP's `DecentralizedDataParallel`: it steps and exchanges in backward.

    The wrapper has an optimizer and a schedule for each bucket of 25 MB, and clips each bucket by itself; they are made
    as the Trainer makes its own. Its first step falls into the second forward.
    """

    decent: Any = None  # the wrapper, once there is one

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """One that does nothing, as the wrapper's step."""
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0)
        return self.optimizer

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        if not training or self.decent is not None:
            return model
        from decent_dp.ddp import DecentralizedDataParallel

        self.decent = DecentralizedDataParallel(
            model,
            self._optimizer_of,
            self._schedule_of,
            topology=TOPOLOGY,
            grad_clip_norm=self.args.max_grad_norm,
            param_as_bucket_view=False,  # an evaluation moves parameters, and buckets would be averaged without them
        )
        self.decent.zero_grad = lambda set_to_none=True: (
            None
        )  # it does so itself; the first step's are still to be used
        self.add_callback(Together(self.decent))
        return self.decent

    def _optimizer_of(self, named: list[tuple[str, Tensor]]) -> torch.optim.Optimizer:
        kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        decayed = set(self.get_decay_parameter_names(self.model))
        groups = [
            {"params": [p for name, p in named if (name in decayed) is decays], "weight_decay": decay}
            for decays, decay in ((True, self.args.weight_decay), (False, 0.0))
        ]
        return kind([group for group in groups if group["params"]], **options)

    def _schedule_of(self, optimizer: torch.optim.Optimizer) -> LRScheduler:
        steps = self.state.max_steps
        return get_scheduler(
            self.args.lr_scheduler_type,
            optimizer=optimizer,
            num_warmup_steps=self.args.get_warmup_steps(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=self.args.lr_scheduler_kwargs,
        )

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """On the mean of all workers, after which each goes on from its own weights."""
        self.decent.global_avg()
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            self.decent.revert_global_avg()


def decent(setup: Setup) -> Method:
    """Decent-DP (Wang et al., ICLR 2025, "From Promise to Practice"): a worker averages its model with the others' of
    the step before, which arrives while it computes, and then steps by a gradient from before averaging.

    With the package's default topology all workers average with all; with two, every topology does. Evaluated as it
    recommends: on the mean, after which workers go on as they were.
    """
    return Method(DecentTrainer, LOCAL, (GradientBytes(setup),))  # it sends weights, which are as many
