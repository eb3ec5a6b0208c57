"""Ending cleanly when the machine is taken away."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

logger = logging.get_logger(__name__)


class PreemptionCallback(TrainerCallback):
    """On SIGTERM, lets the workers finish their steps, save a consensus checkpoint and end, instead of dying at once.

    The signal may come to one worker or to all. Nothing is saved with `save_strategy="no"`. A second SIGTERM ends the
    process at once. Python delivers signals to the main thread only; training in another one is not protected.

    Args:
        ends_process: Whether the process ends after that; otherwise `train()` returns, as transformers' own callback
            (`enable_jit_checkpoint`) has it.

    Attributes:
        is_requested: Whether the signal has come.
        has_stopped: Whether training ends for that, and not because it was complete.
    """

    def __init__(self, ends_process: bool = True) -> None:
        self.ends_process = ends_process
        self.is_requested = self.has_stopped = False
        self._previous: Any = None

    @staticmethod
    @contextlib.contextmanager
    def instead_of_transformers(args: TrainingArguments | None) -> Iterator[None]:
        """Keep the Trainer from adding its own callback for SIGTERM: that one saves in the middle of a step."""
        if args is None or not args.enable_jit_checkpoint:
            yield
            return
        args.enable_jit_checkpoint = False
        try:
            yield
        finally:
            args.enable_jit_checkpoint = True

    def install(self) -> None:
        """Begin to watch for the signal. Idempotent."""
        if self._previous is None and threading.current_thread() is threading.main_thread():
            self.is_requested = self.has_stopped = False
            self._previous = signal.signal(signal.SIGTERM, self._on_signal) or signal.SIG_DFL

    def remove(self) -> None:
        """Give the signal back to whoever had it. Idempotent."""
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
            self._previous = None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.is_requested = True
        signal.signal(number, signal.SIG_DFL)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        if self.is_requested and not control.should_training_stop:
            saves = args.save_strategy != "no"
            outcome = "saving a checkpoint" if saves else "saving nothing, as `save_strategy` is 'no'"
            logger.warning(
                f"Rank {args.process_index} got SIGTERM: all workers end after step {state.global_step}, {outcome}."
            )
            control.should_save = saves
            control.should_training_stop = self.has_stopped = True
        return control
