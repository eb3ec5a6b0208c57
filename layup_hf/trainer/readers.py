"""Who looks into a checkpoint as soon as it has been saved: it has to be complete then."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers import TrainerCallback

from .authors import KNOWN, method_of

_UPLOADING = ("_log_model", "_log_artifacts", "_log_checkpoints", "sync_checkpoints")
"""By what the callbacks of transformers that report to somebody know whether they upload checkpoints."""


def who_reads(trainer: type, callbacks: Iterable[TrainerCallback]) -> str | None:
    """Who may read a checkpoint right after it has been saved, for people; None if nobody does.

    Args:
        trainer: Its class.
        callbacks: Of the trainer.
    """
    if method_of(trainer, "_save_checkpoint")[1] not in KNOWN:  # whose trainers save, and look at nothing after that
        return f"{trainer.__name__} has its own `_save_checkpoint`"
    for callback in callbacks:
        kind = type(callback)
        _, package = method_of(kind, "on_save")
        if kind.on_save is TrainerCallback.on_save or package == "layup_hf":
            continue
        if package != "transformers" or any(_is_on(getattr(callback, name, None)) for name in _UPLOADING):
            return f"callback {kind.__name__} has an `on_save`"
    return None


def _is_on(value: Any) -> bool:
    return bool(getattr(value, "is_enabled", value))
