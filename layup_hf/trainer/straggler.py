"""Delays made on purpose, for the workers of any Trainer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback

from ..trace.clocks import now
from ..trace.events import DELAY
from ..windows.base import PeerWindows
from ..windows.late import LateWindows
from ..windows.straggler import Kind, StragglerConfig, wait
from .tracing import Records


class StragglerCallback(TrainerCallback):
    """Delays workers of any `Trainer`: `Trainer(..., callbacks=[StragglerCallback("rank=0,compute=0.2")])`.

    A computation delay falls between forward and backward, once per optimizer step, so that gradients are taken with
    weights that are as old as a slow worker's. A communication delay falls before the optimizer's step, as DDP cannot
    go on without the message; a trainer that exchanges through windows calls `late_windows` instead. Evaluation is not
    delayed. Steps are counted from 0 at each call of `train`, also when it resumes from a checkpoint.

    Args:
        stragglers: The delays, or text for `StragglerConfig.parse`.
        records: Where delays are recorded, if anywhere.

    Raises:
        ValueError: The text is wrong; or, when training starts, a rank is outside of the run.
    """

    def __init__(self, stragglers: str | Sequence[StragglerConfig], records: Records | None = None) -> None:
        self._records = records
        self.stragglers = StragglerConfig.parse(stragglers) if isinstance(stragglers, str) else list(stragglers)
        self._rank = 0
        self._device = torch.device("cpu")
        self._step = -1
        self._compute_pending = False
        self._windows_are_late = False
        self._hook: RemovableHandle | None = None

    def late_windows(self, windows: PeerWindows, rank: int) -> PeerWindows:
        """`windows` with the communication delays; the callback itself no longer waits for them in this training."""
        self._windows_are_late = True
        return LateWindows(windows, self.stragglers, rank)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._hook is not None:
            self._hook.remove()  # of a training that failed
        for straggler in self.stragglers:
            straggler.check(args.world_size)
        self._rank, self._device, self._step, self._compute_pending = args.process_index, args.device, -1, False
        self._hook = kwargs["model"].register_forward_hook(self._after_forward)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._step += 1
        self._compute_pending = True

    def _after_forward(self, model: nn.Module, inputs: Any, output: Any) -> None:
        if self._compute_pending and model.training and torch.is_grad_enabled():
            self._compute_pending = False
            self._wait("compute")

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self._windows_are_late:
            self._wait("communication")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._windows_are_late = False

    def _wait(self, kind: Kind) -> None:
        for straggler in self.stragglers:
            seconds = straggler.delay(kind, self._rank, self._step)
            if seconds:
                if self._device.type != "cpu":
                    # What the device still has to do would otherwise run during the wait and hide a part of it.
                    torch.accelerator.synchronize(self._device)
                start = now()
                wait(seconds, straggler.busy)
                if self._records is not None and (track := self._records.track) is not None:
                    track.add(DELAY, start)
