"""Which blocks a model uses at other moments than its modules tell: seen once, in a first step."""

from __future__ import annotations

import bisect
import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from .hooks import BlockHooks
from .split import Block

logger = logging.getLogger(__name__)


class UseWatch(TorchFunctionMode):
    """Sees every operation on a block's parameters in one forward, and tells the hooks what they cannot know.

    A block's modules tell when it is used, and its gradients when backward is through with it. Two habits break that:

    - A parameter is used *before* the forward of the module that has it: an auxiliary loss through the head's weight, a
      weight that another module borrows. A merge at that forward would change what autograd has saved already. From
      the first step on such a block is merged at its own boundary only.
    - A parameter is used *without a gradient* (`weight.detach()`) in something that has one. Autograd saves it, but no
      gradient tells when it is no longer needed. Such a block is complete when backward has ended.

    What functions of the user's own (`torch.autograd.Function`) take and save is seen when their result is used; so no
    block is merged before its forward meanwhile. What is used otherwise in a later step is not seen: see `explain`.

    Args:
        model: The model.
        blocks: Its blocks, where their tensors are during training.
        hooks: Told of what is found.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[Block], hooks: BlockHooks) -> None:
        super().__init__()
        self._hooks, self._blocks = hooks, blocks
        self._names = {id(module): name or type(module).__name__ for name, module in model.named_modules()}
        parameters = [(p, block.index) for block in blocks for p in block.parameters if p.requires_grad and p.nbytes]
        self._places = sorted((p.data_ptr(), p.nbytes, index) for p, index in parameters)
        self._starts = [start for start, _, _ in self._places]
        self._running: list[str] = []  # modules whose forward has begun

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Around a forward and its backward."""
        handles = [
            register_module_forward_pre_hook(self._enter_module),
            register_module_forward_hook(self._leave_module, always_call=True),
        ]
        try:
            with self._hooks.learning(), self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter_module(self, module: nn.Module, _: object) -> None:
        self._running.append(self._names.get(id(module), type(module).__name__))

    def _leave_module(self, *_: object) -> None:
        if self._running:
            self._running.pop()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not torch.is_grad_enabled():
            return func(*args, **(kwargs or {}))
        taken = list(_tensors((*args, *(kwargs or {}).values())))
        for tensor in taken:  # before the call: it may be `backward`
            if isinstance(tensor.grad_fn, BackwardCFunction):
                self._note_all(_taken_by(tensor.grad_fn))
        result = func(*args, **(kwargs or {}))
        if any(tensor.requires_grad for tensor in _tensors((result,))):
            self._note_all(taken)
        return result

    def _note_all(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            index = self._block_of(tensor)
            if index is not None:
                self._note(index, is_detached=not tensor.requires_grad)

    def _block_of(self, tensor: Tensor) -> int | None:
        """The block in whose memory a tensor lies."""
        try:
            place = tensor.data_ptr()
        except (RuntimeError, NotImplementedError):
            return None  # a tensor without memory of its own
        number = bisect.bisect_right(self._starts, place) - 1
        if number < 0:
            return None
        start, size, index = self._places[number]
        return index if place < start + size else None

    def _note(self, index: int, is_detached: bool) -> None:
        if not self._hooks.is_in_use(index) and self._hooks.expect_early_use(index):
            self._say(index, "before the module that has it", "is merged with peers' in backward only")
        if is_detached and self._hooks.expect_late_use(index):
            self._say(index, "without a gradient", "steps when backward has ended")

    def _say(self, index: int, how: str, what_follows: str) -> None:
        where = f" in {self._running[-1]!r}" if self._running else ""
        logger.warning(
            f"LayUp: a weight of block {self._blocks[index].name!r} is used {how}{where}, so the block {what_follows}."
        )


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _taken_by(node: Any) -> Iterator[Tensor]:
    """The parameters that a function of the user's own has been called with, and what it has saved for backward."""
    for before, _ in node.next_functions:
        if isinstance(variable := getattr(before, "variable", None), Tensor):
            yield variable
    with contextlib.suppress(RuntimeError):  # backward has freed it
        yield from _tensors(node.saved_tensors)


def explain(error: RuntimeError, blocks: Sequence[Block]) -> RuntimeError | None:
    """What to say in the place of autograd's complaint that a tensor was changed in place; None for another error.

    Args:
        error: From backward.
        blocks: Of the model.
    """
    if "modified by an inplace operation" not in str(error):
        return None
    shape = str(error).partition("Tensor [")[2].partition("]")[0]
    sizes = sorted(int(size) for size in shape.split(",") if size.strip().isdigit())
    likely = [
        f"{block.name!r} ({name})"
        for block in blocks
        for name, parameter in zip(block.parameter_names, block.parameters, strict=True)
        if sorted(parameter.shape) == sizes
    ]
    names = ", ".join(likely[:4]) + (", ..." if len(likely) > 4 else "")
    return RuntimeError(
        "Backward needs weights as they were in forward, and a merge with a peer's or the step of their block has "
        f"changed them since. By its shape it is a weight of block {names or 'unknown'}. It is used outside of the "
        "forward of the module that has it, in a way that the first step did not show. Set `clip='exact'` and "
        "`merge_at='backward'`: blocks are then neither stepped nor merged before backward has ended."
    )


def is_compiled(model: nn.Module) -> bool:
    """Whether code of the model is compiled by `torch.compile`, through which nothing can be watched."""
    return any(
        isinstance(module, torch._dynamo.OptimizedModule)
        or vars(module).get("_compiled_call_impl") is not None
        or hasattr(vars(module).get("forward"), "get_compiler_config")
        for module in model.modules()
    )
