"""When a block's gradients are complete, and when a block is about to be used: told by hooks on the model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .split import Block


class BlockHooks:
    """Calls `on_block_ready(block)` in backward and `before_forward(block)` in forward, each once per step.

    `on_block_ready` comes when the last gradient of the block has been accumulated in a backward that
    synchronises. At that moment autograd holds no copy of the block's parameters that it will still use: a parameter's
    gradient is accumulated after every node that saved the parameter has run. The callback may therefore step and write
    the block, while backward goes on in the blocks before it.

    A block of which some parameter received no gradient (an expert without tokens, an unused head) cannot be known to
    be complete until backward has ended: `finish_backward()` completes it.

    `before_forward` comes right before the first use of the block after its last step, in training only: not in
    evaluation, not in the recomputation of gradient checkpointing, not again inside an accumulation window.

    Args:
        blocks: The model's blocks.
        on_block_ready: Called with each block, in the order in which backward completes them.
        before_forward: Called with a block whose parameters may still be changed before they are used.
        is_synchronizing: Whether the backward pass now running ends an accumulation window.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        *,
        on_block_ready: Callable[[Block], None],
        before_forward: Callable[[Block], None] = lambda block: None,
        is_synchronizing: Callable[[], bool] = lambda: True,
    ) -> None:
        self._blocks = list(blocks)
        self._on_block_ready = on_block_ready
        self._before_forward = before_forward
        self._is_synchronizing = is_synchronizing
        self._expected = [len(block.parameters) + block.completes_late for block in self._blocks]
        self._missing = list(self._expected)
        self._arrived: set[tuple[int, int]] = set()  # (block, parameter) whose gradient is there
        self._in_use = [False] * len(self._blocks)
        self._is_muted = False
        self._handles: list[RemovableHandle] = []

    def install(self) -> BlockHooks:
        """Register the hooks. Installing what is installed is an error: two sets of hooks would step twice."""
        if self._handles:
            raise RuntimeError("These hooks are installed already: call remove() first.")
        for block in self._blocks:
            for number, parameter in enumerate(block.parameters):
                on_gradient = self._gradient_hook(block, number)
                self._handles.append(parameter.register_post_accumulate_grad_hook(on_gradient))
            before_forward = self._forward_hook(block)
            for module in block.modules:
                self._handles.append(module.register_forward_pre_hook(before_forward))
        return self

    def remove(self) -> None:
        """Take every hook off the model. Idempotent."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> BlockHooks:
        return self.install()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def finish_backward(self) -> None:
        """Complete the blocks that backward left incomplete, last block first, and get ready for the next step.

        Does nothing if no gradient has come since the last call.
        """
        if not self._arrived:
            return
        for block in reversed(self._blocks):
            if self._missing[block.index]:
                self._complete(block)
        self._missing[:] = self._expected
        self._arrived.clear()

    @contextlib.contextmanager
    def muted(self) -> Iterator[None]:
        """Call nothing: for a forward with other weights than the model's."""
        self._is_muted = True
        try:
            yield
        finally:
            self._is_muted = False

    def is_free(self, index: int) -> bool:
        """Whether the block may be written now: it has stepped, and its next forward has not begun."""
        return not self._in_use[index]

    def _gradient_hook(self, block: Block, number: int) -> Callable[[Tensor], None]:
        index, key = block.index, (block.index, number)
        missing, arrived, is_synchronizing = self._missing, self._arrived, self._is_synchronizing

        def on_gradient(_: Tensor) -> None:
            if not is_synchronizing():
                return
            if key in arrived:
                raise RuntimeError(
                    f"{block.parameter_names[number]!r} received a second gradient before optimizer.step(). Reentrant "
                    "activation checkpointing may do that: set `activation_checkpointing_kwargs={'use_reentrant': "
                    "False}`. So does a second backward(): accumulate with `gradient_accumulation_steps` instead."
                )
            arrived.add(key)
            missing[index] -= 1
            if missing[index] == 0:
                self._complete(block)

        return on_gradient

    def _forward_hook(self, block: Block) -> Callable[[nn.Module, object], None]:
        index, in_use = block.index, self._in_use

        def before_forward(module: nn.Module, _: object) -> None:
            if in_use[index] or self._is_muted or not module.training or not torch.is_grad_enabled():
                return
            in_use[index] = True
            self._before_forward(block)

        return before_forward

    def _complete(self, block: Block) -> None:
        self._missing[block.index] = 0
        self._on_block_ready(block)
        self._in_use[block.index] = False
