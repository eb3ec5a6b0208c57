"""One process, and DDP: plain, by Nesterov's momentum, with Muon, and with compressed gradients."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from transformers import Trainer, TrainerCallback

from layup_hf import MuonMixin
from layup_hf.blocks import Block
from layup_hf.optim.direction import Direction

from .method import Method, Setup

POWERSGD_RANK = 4


class GradientBytes(TrainerCallback):
    """Counts what DDP reduces in a step: every gradient once, as it is."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.setup.reduced += sum(p.nbytes for p in kwargs["model"].parameters() if p.requires_grad)


class HookedTrainer(Trainer):
    """The stock Trainer, whose DDP hands its buckets to a communication hook.

    Args:
        hook: Of `torch.distributed.algorithms.ddp_comm_hooks`, and its state.
    """

    def __init__(self, *args: Any, hook: tuple[Any, Callable[..., Any]], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._hook = hook

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)
        self.model_wrapped.register_comm_hook(*self._hook)
        return prepared


def single(setup: Setup) -> Method:
    """The stock Trainer in one process: with the same batch, so as many times the steps as there are workers."""
    return Method(Trainer)


def ddp(setup: Setup) -> Method:
    """The stock Trainer: gradients are averaged in every step."""
    return Method(Trainer, callbacks=(GradientBytes(setup),))


class LookingAhead(TrainerCallback):
    """Lets the Trainer's AdamW step by Nesterov's momentum, as LayUp's does: the whole model at once."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = kwargs["optimizer"]
        if state.global_step == 0:
            parameters = tuple(p for group in optimizer.param_groups for p in group["params"])
            self.model = Block(0, "model", (), parameters, (), ())
            inner = getattr(optimizer, "optimizer", optimizer)
            self.direction = Direction([self.model], inner, looks_ahead=True)
        self.step = self.direction.stepping(self.model)
        self.step.__enter__()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step.__exit__(None, None, None)


def ddp_nesterov(setup: Setup) -> Method:
    """DDP, with the same look ahead as LayUp's optimizer has by default."""
    return Method(Trainer, callbacks=(GradientBytes(setup), LookingAhead()))


class MuonTrainer(MuonMixin, Trainer):
    """The stock Trainer, that knows Muon."""


def ddp_muon(setup: Setup) -> Method:
    """DDP with Muon, and AdamW by Nesterov's momentum on what is no matrix of a layer: the optimizer of LayUp's."""
    return Method(MuonTrainer, {"optim": "muon"}, (GradientBytes(setup), LookingAhead()))


def ddp_bf16(setup: Setup) -> Method:
    """DDP with torch's `bf16_compress_hook`: gradients are rounded to bfloat16, summed in it, and widened again."""

    def hook(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        setup.reduced += 2 * bucket.buffer().numel()
        return bf16_compress_hook(state, bucket)

    return Method(lambda *args, **kwargs: HookedTrainer(*args, hook=(None, hook), **kwargs))


def ddp_powersgd(setup: Setup) -> Method:
    """DDP with torch's `powerSGD_hook` (Vogels et al., arXiv 1905.13727): matrices of gradients are reduced as two
    factors of rank 4, with error feedback. The first tenth of the steps, and two at least, are plain DDP: torch's hook
    needs two, and its documentation recommends more.
    """
    state = PowerSGDState(None, POWERSGD_RANK, start_powerSGD_iter=max(2, setup.steps // 10))

    def hook(state: PowerSGDState, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        before, whole = state.total_numel_after_compression, bucket.buffer().numel()
        size = bucket.buffer().element_size()
        future = powerSGD_hook(state, bucket)
        setup.reduced += size * (state.total_numel_after_compression - before or whole)
        return future

    return Method(lambda *args, **kwargs: HookedTrainer(*args, hook=(state, hook), **kwargs))
