"""Whose code a method is."""

from __future__ import annotations

import inspect
from typing import Any

KNOWN = ("transformers", "layup_hf", "trl", "accelerate", "peft")
"""Packages of which it is known what their callbacks and trainers do; everything else is the user's own."""


def method_of(kind: type, name: str) -> tuple[Any, str]:
    """The function of this name that an object of a class has, without what is wrapped around it, and its package.

    Returns:
        None and "" where there is none.
    """
    function = inspect.unwrap(getattr(kind, name, None) or _nothing)
    if function is _nothing:
        return None, ""
    return function, (getattr(function, "__module__", None) or "").partition(".")[0]


def _nothing() -> None: ...
