"""The methods that `compare.py` sets side by side: which Trainer, with which arguments and callbacks.

Every method trains with the Trainer's own AdamW, schedule and clipping, on the same batches per worker and step.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from compare_gossip import AdPsgdTrainer, GoSgdTrainer
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from transformers import Trainer, TrainerCallback

from layup_hf import LayupTrainer
from layup_hf.blocks import Block
from layup_hf.optim.direction import Direction

POWERSGD_RANK = 4


@dataclass
class Setup:
    """What a method is told about a run.

    Attributes:
        steps: Of every worker on average.
        period: Local steps between two synchronisations, for methods that have such.
        reduced: Bytes that this worker has handed to all-reduce so far, as they are sent; counted by the method.
    """

    steps: int
    period: int
    reduced: float = 0.0


@dataclass(frozen=True)
class Method:
    """How a run is made.

    Attributes:
        trainer: Makes the trainer; takes the arguments of `Trainer`.
        arguments: Of `LayupConfig`, that differ from those of all methods.
        callbacks: Of this method.
    """

    trainer: Callable[..., Trainer]
    arguments: dict[str, Any] = field(default_factory=dict)
    callbacks: tuple[TrainerCallback, ...] = ()


# ---- One process, and DDP ----


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


# ---- Local steps, and a synchronisation after every `period` of them ----


class LocalTrainer(Trainer):
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


# ---- Gossip ----

PLAIN = {"second_moment": "own", "nesterov": "off"}  # AdamW as the Trainer makes it


def gosgd(setup: Setup) -> Method:
    """See `GoSgdTrainer`."""
    return Method(GoSgdTrainer, {"clip": "exact", "peers_per_step": 1, **PLAIN})


def adpsgd(setup: Setup) -> Method:
    """See `AdPsgdTrainer`."""
    return Method(AdPsgdTrainer, {"clip": "exact", "peers_per_step": 1, **PLAIN})


def layup(setup: Setup) -> Method:
    """LayUp as it is without any option: layer by layer, merging at a block's boundary and before its forward."""
    return Method(LayupTrainer)


def layup_arrival(setup: Setup) -> Method:
    """LayUp that merges whenever something arrives, as its paper does (arXiv 2410.05985)."""
    return Method(LayupTrainer, {"merge_at": "arrival"})


def layup_straight(setup: Setup) -> Method:
    """LayUp without Nesterov's momentum."""
    return Method(LayupTrainer, {"nesterov": "off"})


def layup_own(setup: Setup) -> Method:
    """LayUp with second moments of each worker's own, as it is where every worker has a host to itself."""
    return Method(LayupTrainer, {"second_moment": "own"})


def layup_plain(setup: Setup) -> Method:
    """LayUp with plain AdamWs, which know nothing of each other's gradients."""
    return Method(LayupTrainer, PLAIN)


METHODS: dict[str, Callable[[Setup], Method]] = {
    "single": single,
    "ddp": ddp,
    "ddp-nesterov": ddp_nesterov,
    "ddp-bf16": ddp_bf16,
    "ddp-powersgd": ddp_powersgd,
    "localsgd": localsgd,
    "diloco": diloco,
    "co2": co2,
    "gosgd": gosgd,
    "adpsgd": adpsgd,
    "layup": layup,
    "layup-arrival": layup_arrival,
    "layup-straight": layup_straight,
    "layup-own": layup_own,
    "layup-plain": layup_plain,
}


def ring_bytes(reduced: float, workers: int) -> float:
    """Bytes that one worker sends and receives when `reduced` bytes are all-reduced among `workers` in a ring.

    It sends `(M - 1) / M` of them to sum them up and as many to spread the sum, and receives the same (Patarasuk and
    Yuan, 2009); that is what gloo and NCCL do with large buffers, and least of what any all-reduce needs.
    """
    return 4 * (workers - 1) / workers * reduced
