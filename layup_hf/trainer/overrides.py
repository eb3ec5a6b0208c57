"""What a subclass of ours overrides below us: it finds one model, too."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

ONE_MODEL = {
    "evaluate": "evaluate()",
    "predict": "predict()",
    "evaluation_loop": "evaluation_loop()",
    "prediction_loop": "prediction_loop()",
    "save_model": "save_model()",
    "_save_checkpoint": "a checkpoint",
}
"""Methods of the Trainer that need all workers and one model, and what the workers then come together for."""


def gather_for_overrides(cls: type, base: type) -> None:
    """Let methods that a subclass defines below `base` be called at a consensus point, as those of `base` are.

    Without this a subclass with an `evaluate` of its own, as in transformers' example of question answering, would
    evaluate weights that differ between workers.

    Args:
        cls: The subclass; its methods are replaced.
        base: `LayupMixin`.
    """
    for name, purpose in ONE_MODEL.items():
        kinds = cls.__mro__[: cls.__mro__.index(base)]
        kind = next((kind for kind in kinds if name in vars(kind)), None)
        if kind is cls and inspect.isfunction(vars(cls)[name]):
            setattr(cls, name, _with_all(vars(cls)[name], purpose))
        elif kind is not None and kind is not cls and not issubclass(kind, base):  # what is mixed in before us
            setattr(cls, name, _with_all(_inherited(cls, name), purpose))


def _inherited(cls: type, name: str) -> Callable[..., Any]:
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return getattr(super(cls, self), name)(*args, **kwargs)

    return functools.wraps(getattr(cls, name))(method)


def _with_all(method: Callable[..., Any], purpose: str) -> Callable[..., Any]:
    @functools.wraps(method)
    def together(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.layup.state.is_outside and method.__name__ == "evaluate":
            return {}  # `eval_on_start`, and the others are in the middle of training
        return self.layup.points.with_all(purpose, functools.partial(method, self, *args, **kwargs))

    return together
