"""`torch.compile` for a model whose gradients are to become ready block by block."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from types import MethodType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend
from torch import nn

from .split import Block


class CompiledLayers:
    """Compiles the layers one by one, in place, until `remove()`.

    A model that is compiled as a whole gives all its gradients at the end of one backward function. Compiled layer by
    layer it gives them as each layer's backward ends; layers of one class share the compiled code. Only `forward` is
    compiled, so hooks on the layers stay ordinary Python, and the model's structure and the names of its parameters do
    not change. What is in no layer (embeddings, head) is left as it is.

    Args:
        blocks: The model's blocks.
        options: For `torch.compile`.
    """

    def __init__(self, blocks: Sequence[Block], options: dict[str, Any]) -> None:
        self._layers: list[tuple[nn.Module, Any]] = []
        for block in blocks:
            if (layer := block.layer) is not None:
                self._layers.append((layer, layer.__dict__.get("forward")))
                layer.forward = _compiled(layer.forward, options)

    def __len__(self) -> int:
        return len(self._layers)

    def remove(self) -> None:
        """Give every layer its own `forward` back."""
        for layer, previous in self._layers:
            del layer.forward
            if previous is not None:  # somebody had replaced it before, on this instance
                layer.forward = previous


def _compiled(forward: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    """A method stays a method, so that a deep copy of its layer has the copy's own."""
    if isinstance(forward, MethodType):
        return MethodType(torch.compile(forward.__func__, **options), forward.__self__)
    return torch.compile(forward, **options)


def compile_options(accelerator: Accelerator) -> dict[str, Any] | None:
    """What `torch_compile` or the launcher asks for, as arguments of `torch.compile`; None if nothing."""
    plugin = accelerator.state.dynamo_plugin
    return None if plugin.backend == DynamoBackend.NO else plugin.to_kwargs()


@contextlib.contextmanager
def nothing_compiled(accelerator: Accelerator) -> Iterator[None]:
    """Keep accelerate from compiling the model as a whole while it prepares it."""
    plugin = accelerator.state.dynamo_plugin
    before, plugin.backend = plugin.backend, DynamoBackend.NO
    try:
        yield
    finally:
        plugin.backend = before
