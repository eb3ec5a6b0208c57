"""Who looks into a checkpoint as soon as it has been saved: it has to be complete then."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from transformers import TrainerCallback

_OURS = ("layup_hf", "transformers", "trl", "accelerate", "peft")
"""Packages whose trainers save and look at nothing after that."""

_UPLOADING = ("_log_model", "_log_artifacts", "_log_checkpoints", "sync_checkpoints")
"""By what the callbacks of transformers that report to somebody know whether they upload checkpoints."""


def who_reads(trainer: type, callbacks: Iterable[TrainerCallback]) -> str | None:
    """Who may read a checkpoint right after it has been saved, for people; None if nobody does.

    Args:
        trainer: Its class.
        callbacks: Of the trainer.
    """
    if _package(trainer, "_save_checkpoint") not in _OURS:
        return f"{trainer.__name__} has its own `_save_checkpoint`"
    for callback in callbacks:
        package, kind = _package(type(callback), "on_save"), type(callback)
        if kind.on_save is TrainerCallback.on_save or package == "layup_hf":
            continue
        if package != "transformers" or any(_is_on(getattr(callback, name, None)) for name in _UPLOADING):
            return f"callback {kind.__name__} has an `on_save`"
    return None


def _package(kind: type, name: str) -> str:
    function = inspect.unwrap(getattr(kind, name))
    return (getattr(function, "__module__", None) or "").partition(".")[0]


def _is_on(value: Any) -> bool:
    return bool(getattr(value, "is_enabled", value))
