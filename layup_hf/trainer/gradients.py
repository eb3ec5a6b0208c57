"""Who wants the whole gradient, after backward and before the step: then blocks cannot step inside backward."""

from __future__ import annotations

import dis
import inspect
from collections.abc import Callable, Iterable, Iterator
from types import CodeType
from typing import Any

from torch import nn
from transformers import TrainerCallback

from ..optim.optimizer import BlockOptimizer
from .authors import KNOWN, method_of

_OF_GRADIENTS = {"grad", "clip_grad_norm_", "clip_grad_value_", "clip_grads_with_norm_", "update_and_allocate"}
"""Names that code has which reads or changes gradients; the last one is AdaLoRA's."""

_BACKWARD = {"backward", "register_hook"}
"""Names that the code of a loss has which runs backward itself, there or (gradient caching) when it is reached."""


def reasons_for_all(optimizer: BlockOptimizer, scaler: Any) -> Iterator[str]:
    """What cannot work at all but with the whole gradient.

    Args:
        optimizer: Steps the blocks.
        scaler: Of the loss, or None.
    """
    name = type(optimizer.inner).__name__
    if optimizer.steps_whole:
        yield f"{name} steps other optimizers that it holds, all at once"
    if optimizer.sees_gradients:
        yield "a hook of `register_step_pre_hook` is to see all gradients before the step"
    if scaler is not None and not getattr(optimizer.inner, "_step_supports_amp_scaling", False):
        yield f"{name} cannot skip the step of a block on the device, as `fp16` needs"


def reasons_of_users(
    callbacks: Iterable[TrainerCallback], trainer: type, losses: Iterable[Callable[..., Any]] = ()
) -> Iterator[str]:
    """What of the user's own code may want the whole gradient, as far as the code tells.

    Args:
        callbacks: Of the trainer.
        trainer: Its class.
        losses: Functions and modules that compute the loss from what the model gives.
    """
    for callback in callbacks:
        before, after = (_own(type(callback), name) for name in ("on_pre_optimizer_step", "on_optimizer_step"))
        name = type(callback).__name__
        if before is not None:
            yield f"callback {name} has an `on_pre_optimizer_step`, which gradients are for"
        elif after is not None and _OF_GRADIENTS & set(_names(after.__code__)):
            yield f"callback {name} reads gradients in `on_optimizer_step`"
    for loss in losses:
        parts = loss.modules() if isinstance(loss, nn.Module) else [loss]  # of the model, too, which does no such thing
        for part in parts:
            if any(_BACKWARD & set(_names(code)) for code in _code_of(part)):
                name = getattr(part, "__name__", type(part).__name__)
                yield f"the loss {name} runs backward itself, once for each part of a batch"
    for method in ("training_step", "compute_loss", "_clip_grad_norm", "_get_grad_norm"):
        function = _own(trainer, method)
        if function is None:
            continue
        names = list(_names(function.__code__))
        if _OF_GRADIENTS & set(names):
            yield f"{trainer.__name__}.{method} reads gradients"
        elif "backward" in names or names.count("training_step") > 1:
            yield f"{trainer.__name__}.{method} runs backward itself"


def _own(kind: type, name: str) -> Any:
    """The function of this name that an object of a class has, if the user has written it."""
    function, package = method_of(kind, name)
    if (
        not inspect.isfunction(function) or function.__name__ == "<lambda>" or package in KNOWN
    ):  # which want no gradient
        return None
    return function


def _code_of(loss: Callable[..., Any]) -> Iterator[CodeType]:
    """The code of a function, or of all methods of a module, but for those that every module has."""
    of_all = set(nn.Module.__mro__)
    methods = (
        [loss]
        if not isinstance(loss, nn.Module)
        else [method for kind in type(loss).__mro__ if kind not in of_all for method in vars(kind).values()]
    )
    for method in methods:
        code = getattr(inspect.unwrap(method) if callable(method) else method, "__code__", None)
        if code is not None:
            yield code


def _names(code: CodeType) -> Iterator[str]:
    """The attributes, methods and globals that code uses, each as often as it stands there; of inner functions, too."""
    for instruction in dis.get_instructions(code):
        if instruction.opname.startswith("LOAD_") and isinstance(instruction.argval, str):
            yield instruction.argval
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
