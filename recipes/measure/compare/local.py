"""Local steps, and a synchronisation after every `period` of them: Local SGD, DiLoCo, CO2."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from transformers import Trainer, TrainerCallback

from layup_hf import MuonMixin

from .method import Method, Setup


class LocalTrainer(MuonMixin, Trainer):
    """The stock Trainer without DDP: every worker for itself, on its shard of the data.

    Evaluations must fall on steps after which a callback has made all replicas equal: each worker evaluates its own.
    """

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        model = super()._wrap_model(model, training, dataloader)
        return self.accelerator.prepare_model(model, evaluation_mode=True) if training else model


LOCAL = {"average_tokens_across_devices": False}  # that would be a collective in every step


class Averaging(TrainerCallback):
    """Averages the weights of all workers after every `period` steps, by torch's `PeriodicModelAverager`."""

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.averager = PeriodicModelAverager(period=setup.period)
        self.averager.step = 1  # it would average after the first step, too

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # Not at the end of the step: the averager leaves out parameters without a gradient.
        parameters = list(kwargs["model"].parameters())
        if self.averager.step % self.averager.period == 0:
            self.setup.reduced += sum(p.nbytes for p in parameters if p.grad is not None)
        self.averager.average_parameters(parameters)


class OuterSteps(TrainerCallback):
    """Takes an outer step of SGD with the mean of what the workers changed in `period` steps as its gradient, after
    which all go on from the same weights. AdamW's state stays each worker's own.

    Args:
        setup: Of the run.
        overlaps: The mean is computed during the next `period` steps, and used one synchronisation later.
        outer: Options of `torch.optim.SGD`.
    """

    def __init__(self, setup: Setup, overlaps: bool, **outer: Any) -> None:
        self.setup, self.overlaps, self.outer = setup, overlaps, outer
        self._pending: tuple[dist.Work, Tensor] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.inner = [p for p in kwargs["model"].parameters() if p.requires_grad]
        self.anchor = [nn.Parameter(p.detach().clone()) for p in self.inner]  # where the present local steps began
        self.optimizer = torch.optim.SGD(self.anchor, **self.outer)

    @torch.no_grad()
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        is_last = state.global_step == state.max_steps
        if state.global_step % self.setup.period and not is_last:
            return
        change = torch.cat([(a - p).flatten() for a, p in zip(self.anchor, self.inner, strict=True)])
        change /= args.world_size
        self.setup.reduced += change.nbytes
        arriving, self._pending = self._pending, (dist.all_reduce(change, async_op=True), change)
        if arriving is not None:
            self._step(*arriving)
        if is_last or not self.overlaps:
            self._step(*self._pending)
            self._pending = None
        for parameter, anchor in zip(self.inner, self.anchor, strict=True):
            parameter.copy_(anchor)

    def _step(self, work: dist.Work, change: Tensor) -> None:
        work.wait()
        parts = change.split([a.numel() for a in self.anchor])
        for anchor, part in zip(self.anchor, parts, strict=True):
            anchor.grad = part.view_as(anchor)
        self.optimizer.step()
        self.optimizer.zero_grad()


def localsgd(setup: Setup) -> Method:
    """Local SGD (Stich, arXiv 1805.09767), with AdamW, whose state stays each worker's own. It is evaluated right after
    an average, when all replicas are equal.
    """
    return Method(LocalTrainer, LOCAL, (Averaging(setup),))


def localsgd_muon(setup: Setup) -> Method:
    """Local SGD with Muon, whose momentum stays each worker's own."""
    return Method(LocalTrainer, {**LOCAL, "optim": "muon"}, (Averaging(setup),))


def diloco(setup: Setup) -> Method:
    """DiLoCo (Douillard et al., arXiv 2311.08105): AdamW inside, SGD with Nesterov momentum outside, of the family of
    SlowMo (Wang et al., arXiv 1910.00643). The outer rate of 0.7 and momentum of 0.9 are the paper's, the periods here
    are much shorter than its 500 steps. It is evaluated right after an outer step, when all replicas are equal.
    """
    return Method(LocalTrainer, LOCAL, (OuterSteps(setup, overlaps=False, lr=0.7, momentum=0.9, nesterov=True),))


def co2(setup: Setup) -> Method:
    """After CO2 (Sun et al., arXiv 2401.16265): the workers' changes are averaged in the background during the next
    local steps, so that the outer step of SGD with momentum uses a mean that is one synchronisation old. After it all
    workers go on from the outer weights; what they changed in the latest steps comes with the next outer step.

    Written after the paper's description, not after its code. Not as there: no penalty for the staleness and no
    clipping of the outer momentum, but a small outer rate of 0.5 and momentum of 0.2; and the last mean is waited for
    at the end of training, so that no step is lost. (If local steps go a share c of the way to a minimum, outer steps
    with a mean that is one old have the characteristic polynomial z² - (1 + momentum) z + momentum + rate c: stable
    where momentum + rate c < 1. With 1 and 0.5 it diverged.) It is evaluated right after an outer step, when all
    replicas are equal.
    """
    return Method(LocalTrainer, LOCAL, (OuterSteps(setup, overlaps=True, lr=0.5, momentum=0.2),))
