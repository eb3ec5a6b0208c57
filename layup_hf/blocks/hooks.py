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
    the block, while backward goes on in the blocks before it. Where something else has been hooked to that parameter
    since, it comes with the next gradient of another one, so that the other hook sees the gradient first.

    A block of which some parameter received no gradient (an expert without tokens, an unused head) cannot be known to
    be complete until backward has ended: `finish_backward()` completes it.

    `before_forward` comes right before the first use of the block after its last step, in training only: not in
    evaluation, not in the recomputation of gradient checkpointing, not again inside an accumulation window. A forward
    without a gradient is a use, too: what it computes may meet what the same weights compute later in the step, as in
    gradient caching.

    Args:
        blocks: The model's blocks.
        on_block_ready: Called with each block, in the order in which backward completes them.
        before_forward: Called with a block whose parameters may still be changed before they are used.
        is_synchronizing: Whether the backward pass now running ends an accumulation window.
        stays_outside: Code of the model is compiled: the hooks on modules are then to be no part of it.
        steps_in_backward: Blocks step when they are complete. Otherwise they step after `finish_backward()`: then there
            may be several backward passes in a step.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        *,
        on_block_ready: Callable[[Block], None],
        before_forward: Callable[[Block], None] = lambda block: None,
        is_synchronizing: Callable[[], bool] = lambda: True,
        steps_in_backward: bool = True,
        stays_outside: bool = False,
    ) -> None:
        self._blocks = list(blocks)
        self._on_block_ready = on_block_ready
        self._before_forward = before_forward
        self._is_synchronizing = is_synchronizing
        self._steps_in_backward = steps_in_backward
        self._stays_outside = stays_outside
        self._expected = [int(block.completes_late) for block in self._blocks]
        self._frozen: list[tuple[Block, int]] = []  # parameters without a hook so far
        self._late = {block.index for block in self._blocks if block.completes_late}
        self._never_free = {block.index for block in self._blocks if not block.modules}
        self._missing = list(self._expected)
        self._arrived: set[tuple[int, int]] = set()  # (block, parameter) whose gradient is there
        self._pending: Block | None = None  # complete, and not told of yet
        self._in_use = [False] * len(self._blocks)
        self._is_muted = False
        self._is_learning = False
        self._handles: list[RemovableHandle] = []

    # ---- On the model ----

    def install(self) -> BlockHooks:
        """Register the hooks. Installing what is installed is an error: two sets of hooks would step twice."""
        if self._handles:
            raise RuntimeError("These hooks are installed already: call remove() first.")
        for block in self._blocks:
            self._frozen += [(block, number) for number, _ in enumerate(block.parameters)]
            before_forward = self._forward_hook(block)
            for module in block.modules:  # first: another hook of the module may compute a weight from parameters
                self._handles.append(module.register_forward_pre_hook(before_forward, prepend=True))
        self._expected[:] = self._missing[:] = [int(block.index in self._late) for block in self._blocks]
        self.begin_backward()
        return self

    def remove(self) -> None:
        """Take every hook off the model. Idempotent."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._frozen.clear()

    def __enter__(self) -> BlockHooks:
        return self.install()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    # ---- In a step ----

    def begin_backward(self) -> None:
        """A forward begins: parameters that have been unfrozen since the last one take part from here on."""
        if not self._frozen:
            return
        frozen, self._frozen = self._frozen, []
        for block, number in frozen:
            parameter = block.parameters[number]
            if not parameter.requires_grad:
                self._frozen.append((block, number))
                continue
            handle = parameter.register_post_accumulate_grad_hook(
                self._gradient_hook(block, number, len(self._handles))
            )
            self._handles.append(handle)
            self._expected[block.index] += 1
            self._missing[block.index] += 1

    def begin_use(self) -> None:
        """Let all blocks be used from here on: `before_forward` comes now, for those for which it has not come yet."""
        for block in self._blocks:
            self._begin_use_of(block)

    def finish_backward(self) -> None:
        """Complete the blocks that backward left incomplete, last block first, and get ready for the next step.

        Does nothing if no gradient has come since the last call.
        """
        if not self._arrived:
            return
        self._tell_pending()
        for block in reversed(self._blocks):
            if self._missing[block.index]:
                self._complete(block)
        self._missing[:] = self._expected
        self._arrived.clear()
        if not self._steps_in_backward:
            self._in_use[:] = [False] * len(self._blocks)

    @contextlib.contextmanager
    def muted(self) -> Iterator[None]:
        """Call nothing: for a forward with other weights than the model's."""
        self._is_muted = True
        try:
            yield
        finally:
            self._is_muted = False

    @contextlib.contextmanager
    def learning(self) -> Iterator[None]:
        """No block is free: for a step in which it is yet to be seen what is used before its module."""
        self._is_learning = True
        try:
            yield
        finally:
            self._is_learning = False

    # ---- What is known of a block ----

    @property
    def is_learning(self) -> bool:
        """Whether it is yet to be seen what is used before its module."""
        return self._is_learning

    def is_in_use(self, index: int) -> bool:
        """Whether the block's use in this step's forward has begun, as far as its modules tell."""
        return self._in_use[index]

    def is_free(self, index: int) -> bool:
        """Whether the block may be written now: it has stepped, and its next forward has not begun."""
        return not (self._in_use[index] or self._is_learning or index in self._never_free)

    def expect_early_use(self, index: int) -> bool:
        """The block is used before its modules tell: from here on nothing may be changed before its forward.

        Returns:
            Whether that is news.
        """
        is_new = index not in self._never_free
        self._never_free.add(index)
        return is_new

    def expect_late_use(self, index: int) -> bool:
        """Backward may need the block's values when its gradients are complete: it is complete when backward ends.

        Returns:
            Whether that is news.
        """
        is_new = index not in self._late
        self._late.add(index)
        self._expected[index] += is_new
        self._missing[index] += is_new
        return is_new

    def _gradient_hook(self, block: Block, number: int, place: int) -> Callable[[Tensor], None]:
        """For one parameter.

        Args:
            block, number: The parameter's block, and its number in it.
            place: Of the hook's handle, which is made with it.
        """
        index, key, handles = block.index, (block.index, number), self._handles
        missing, arrived, is_synchronizing = self._missing, self._arrived, self._is_synchronizing

        def on_gradient(parameter: Tensor) -> None:
            if not is_synchronizing():
                return
            if self._pending is not None:
                self._tell_pending()
            if key in arrived:
                if self._steps_in_backward:
                    raise RuntimeError(_SECOND_GRADIENT.format(block.parameter_names[number]))
                return  # of another backward pass of this step
            arrived.add(key)
            missing[index] -= 1
            if missing[index] == 0:
                self._pending = block
                if next(reversed(parameter._post_accumulate_grad_hooks)) == handles[place].id:
                    self._tell_pending()

        return on_gradient

    def _forward_hook(self, block: Block) -> Callable[[nn.Module, object], None]:
        index, in_use = block.index, self._in_use

        def before_forward(module: nn.Module, _: object) -> None:
            if in_use[index] or self._is_muted or not module.training:
                return
            if self._is_learning and not torch.is_grad_enabled():
                return  # which later steps may do without
            self._begin_use_of(block)

        return torch.compiler.disable(before_forward) if self._stays_outside else before_forward

    def _begin_use_of(self, block: Block) -> None:
        if self._in_use[block.index]:
            return
        self._in_use[block.index] = True
        if block.index not in self._never_free:
            self._before_forward(block)

    def _tell_pending(self) -> None:
        block, self._pending = self._pending, None
        if block is not None:
            self._complete(block)

    def _complete(self, block: Block) -> None:
        self._missing[block.index] = 0
        self._on_block_ready(block)
        if self._steps_in_backward:
            self._in_use[block.index] = False


_SECOND_GRADIENT = (
    "{0!r} received a second gradient before optimizer.step(), and its block has been stepped with the first. Several "
    "backward passes in one step need `clip='exact'`: blocks then step when all of them have ended. (Reentrant "
    "activation checkpointing may do that, too: set `activation_checkpointing_kwargs={{'use_reentrant': False}}`. To "
    "accumulate over batches, set `gradient_accumulation_steps`.)"
)
