"""How much a gradient is changed by merges that come between the forward of a block and its gradient."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .split import Block


class GradientBias:
    """Measures, in some steps, the gradient that was taken against the gradient at the weights that forward used.

    With `merge_at="arrival"` weights move during a step: a layer may compute its output with some weights and hand back
    its gradient with others, as do the layers behind it. The LayUp paper (arXiv 2410.05985) assumes that the bias which
    this gives the gradient is bounded (its assumption on the gradient's bias); here it is measured. With `merge_at=
    "boundary"` a block is written only where it is not in use, and the bias is exactly zero on the CPU.

    In a step that is measured, every block is copied when its forward begins, and its gradient when that is complete;
    then forward and backward run once more with the copies, the same batch and the same random numbers.

    Args:
        model: The model, unwrapped.
        every: Measure every so many steps, from the first one on.
    """

    def __init__(self, model: nn.Module, every: int) -> None:
        self._model, self._every = model, every
        self._steps = 0
        self._records = False
        self._found: list[float] = []
        self._used: dict[str, Tensor] = {}
        self._gradients: dict[str, Tensor] = {}
        named = (*model.named_parameters(), *model.named_buffers())
        self._names = {id(tensor): name for name, tensor in named}

    def is_due(self) -> bool:
        """Whether the step that begins is to be measured. Counts it."""
        self._steps += 1
        return (self._steps - 1) % self._every == 0

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Around the step itself."""
        self._random = torch.get_rng_state(), _device_state()
        self._used = {name: buffer.detach().clone() for name, buffer in self._model.named_buffers()}
        self._gradients = {}
        self._records = True
        try:
            yield
        finally:
            self._records = False

    def note_forward(self, block: Block) -> None:
        """The block is about to be used."""
        if self._records:
            for name, parameter in self._named(block):
                self._used[name] = parameter.detach().clone().requires_grad_()

    def note_gradient(self, block: Block) -> None:
        """The block's gradients are complete, and have not been clipped."""
        if self._records:
            for name, parameter in self._named(block):
                if parameter.grad is not None:
                    self._gradients[name] = parameter.grad.clone()

    def _named(self, block: Block) -> Iterator[tuple[str, Tensor]]:
        """Parameters of the block that are the model's, by their names in it."""
        return ((self._names[id(p)], p) for p in block.parameters if id(p) in self._names)

    def measure(self, loss_of: Callable[[nn.Module], Tensor]) -> None:
        """Compare what was recorded with the gradient at the recorded weights.

        Args:
            loss_of: The loss that a model has on the step's batch; in training, with the model's hooks muted.
        """
        names = [name for name in self._gradients if name in self._used]
        if not names:
            return
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices):
            torch.set_rng_state(self._random[0])
            if self._random[1] is not None:
                torch.cuda.set_rng_state(self._random[1])
            loss = loss_of(_WithTensors(self._model, self._used))
            gradients = torch.autograd.grad(loss, [self._used[name] for name in names], allow_unused=True)
        squares = torch.zeros(2)
        for name, exact in zip(names, gradients, strict=True):
            exact = torch.zeros_like(self._used[name]) if exact is None else exact
            exact = _real(exact)
            difference = _real(self._gradients[name]) - exact
            squares += torch.stack([difference.square().sum(), exact.square().sum()]).cpu()
        self._found.append(float((squares[0] / squares[1].clamp(min=torch.finfo(torch.float32).tiny)).sqrt()))
        self._used, self._gradients = {}, {}

    def figures(self) -> dict[str, float]:
        """`layup/gradient_bias`: norm of the difference over norm of the gradient, mean since the last call."""
        found, self._found = self._found, []
        return {"layup/gradient_bias": sum(found) / len(found)} if found else {}


class _WithTensors(nn.Module):
    """A model, called with other parameters and buffers."""

    _called: nn.Module

    def __init__(self, model: nn.Module, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.__dict__["_called"], self._tensors = model, tensors  # not a submodule: its parameters are not used

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return torch.func.functional_call(self._called, self._tensors, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_called"], name)  # what a loss may ask of the model, such as `config`


def _real(tensor: Tensor) -> Tensor:
    """In float32; of complex numbers both parts."""
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).float()


def _device_state() -> Tensor | None:
    return torch.cuda.get_rng_state() if torch.cuda.is_available() else None
