"""One torch optimizer to the outside, stepped block by block inside."""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NoReturn, cast, overload

import torch
from torch import Tensor

from ..blocks import Block
from .shares import Share

_HOOKS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks")


class BlockOptimizer(torch.optim.Optimizer):
    """Steps one block at a time with the optimizer that the Trainer would have used for the whole model.

    There is one inner optimizer, with its own class, arguments, parameter groups and state. To step a block, the inner
    optimizer is shown only that block's share of each group for the duration of one `step()` call: one
    foreach or fused call per block. `param_groups`, `state` and `state_dict()` are the inner optimizer's own, so
    schedulers, loggers and checkpoints see exactly what they would see without blocks.

    Args:
        inner: The optimizer over all trainable parameters. Its state, if it has any, is kept.
        blocks: The model's blocks; together they must hold every parameter of `inner`.

    Attributes:
        before_step: Called first by `step()`, if set; completes the blocks that backward left incomplete.
        take_block: What `step()` does with a block that has not been stepped: `step_block`, and what belongs around it.
            Unset, `step_block` alone.
        around_step: What belongs around the inner optimizer's step of a block, if set.
        take_whole: What `step()` does where blocks cannot be stepped one by one: it is given what steps all of them.
            Unset, that alone.
        parts_for_certain: Blocks are known to step one by one, or it cannot be found out.
        steps_whole: Blocks cannot be stepped one by one: the inner optimizer steps all of them whenever it steps.
        keeps_gradients: Whether a block that has been stepped keeps its gradients until `zero_grad()`.
        scaler: Scales the loss. Blocks must then go through `unscale_block` first, and a block with a gradient that is
            not finite does not step; the scaler learns of it. Nothing is synchronised.

    Raises:
        ValueError: `inner` cannot be stepped block by block, or has parameters that are in no block.
    """

    def __init__(self, inner: torch.optim.Optimizer, blocks: Sequence[Block]) -> None:
        # torch.optim.Optimizer.__init__ would create groups and state of its own; both are the inner optimizer's.
        refuse_unsteppable(inner)
        _forget_positions(inner)
        self.inner = inner
        self.before_step: Callable[[], None] | None = None
        self.take_block: Callable[[Block], None] | None = None
        self.around_step: Callable[[Block], AbstractContextManager[None]] | None = None
        self.take_whole: Callable[[Callable[[], None]], None] | None = None
        self.parts_for_certain = False
        self.steps_whole = holds_optimizers(inner)
        self.keeps_gradients = False
        self.scaler: torch.amp.GradScaler | None = None
        self._blocks = list(blocks)
        self._stepped = [False] * len(self._blocks)
        self._shares = self._share_groups()
        scaled = [_ScaledBlock(weakref.proxy(self), block) for block in self._blocks]
        self._scaled = [cast(torch.optim.Optimizer, block) for block in scaled]  # all that a GradScaler wants of one
        # Hooks of the inner optimizer are of a whole step: they come with ours, not with every block's.
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = (
            vars(inner).get(name, OrderedDict()) for name in _HOOKS
        )

    def state_of(self, parameter: Tensor) -> dict[str, Any]:
        """The inner optimizer's state of one parameter, on the CPU; empty before its first step."""
        return {key: value.cpu() if isinstance(value, Tensor) else value for key, value in self._held(parameter)}

    def set_state_of(self, parameter: Tensor, state: dict[str, Any]) -> None:
        """Give a parameter the state that another worker's optimizer has for it."""
        group = next(g for g in self.inner.param_groups if any(parameter is p for p in g["params"]))
        scalars_on_device = bool(group.get("fused") or group.get("capturable"))
        for key, value in state.items():
            if isinstance(value, Tensor) and (value.dim() > 0 or scalars_on_device):
                state[key] = value.to(parameter.device)
        self.inner.state[parameter] = state

    def _held(self, parameter: Tensor) -> list[tuple[str, Any]]:
        return list(self.inner.state[parameter].items()) if parameter in self.inner.state else []

    def _share_groups(self) -> list[list[Share]]:
        """Each block's part of each parameter group."""
        block_of = {id(parameter): block.index for block in self._blocks for parameter in block.parameters}
        shares: list[dict[int, Share]] = [{} for _ in self._blocks]
        for number, group in enumerate(self.inner.param_groups):
            for parameter in group["params"]:
                index = block_of.get(id(parameter))
                if index is None:
                    raise ValueError(
                        f"The optimizer has a parameter of shape {tuple(parameter.shape)} that is in no block: it was "
                        "added after the blocks had been made. Give the optimizer all its parameters before training."
                    )
                shares[index].setdefault(number, Share(number, [])).params.append(parameter)
        return [list(groups.values()) for groups in shares]

    def step_block(self, block: Block, stepping: Callable[[], None] | None = None) -> None:
        """Step the parameters of `block` with their gradients, then free these unless they are to be kept.

        Args:
            block: Its gradients are complete.
            stepping: Makes the step, in the place of the inner optimizer.

        Raises:
            ValueError: At the first step: the optimizer steps other blocks, too, and gradients are not kept for that.
        """
        if stepping is not None:
            stepping()
        else:
            with self._seeing_whether_it_parts(block):
                if self.scaler is None:
                    self.step_share(block)
                else:
                    self.scaler.step(self._scaled[block.index])
        if not self.keeps_gradients:
            # Fused kernels do not count their writes, by which autograd knows that it needs what has been changed.
            torch.autograd.graph.increment_version(block.parameters)
            _free_gradients(block)
        self._stepped[block.index] = True

    @contextlib.contextmanager
    def _seeing_whether_it_parts(self, block: Block) -> Iterator[None]:
        """Around the first step of a block: find out whether it changes another one."""
        if self.parts_for_certain:
            yield
            return
        self.parts_for_certain = True
        others = [p.detach() for other in self._blocks if other is not block for p in other.parameters]
        before = _norms(others)
        yield
        if before is None or torch.equal(before, _norms(others)):  # type: ignore[arg-type] # as of the same tensors
            return
        if not self.keeps_gradients:
            raise ValueError(
                f"{type(self.inner).__name__} steps all parameters whenever it steps, so it cannot be stepped block by "
                "block in backward. Set `clip='exact'`: it is then stepped once, when backward has ended."
            )
        self.steps_whole, self._stepped = True, [True] * len(self._blocks)

    def unscale_block(self, block: Block) -> None:
        """Take the scaler's factor out of the gradients of `block`, and let it see whether they are finite."""
        if self.scaler is not None:
            self.scaler.unscale_(self._scaled[block.index])

    def step_share(self, block: Block) -> None:
        """Step the parameters of `block` with their gradients as they are; the scaler comes here, too, if there is one.

        Not to be called from elsewhere: the block does not count as stepped, and its gradients stay.
        """
        inner, groups, shares = self.inner, self.inner.param_groups, self._shares[block.index]
        views = [share.view(groups[share.group]) for share in shares]
        inner.param_groups = views
        try:
            with contextlib.nullcontext() if self.around_step is None else self.around_step(block):
                self._step_inner()
        finally:
            inner.param_groups = groups
        for share, view in zip(shares, views, strict=True):
            share.keep(groups[share.group], view, type(inner).__name__)

    def _step_inner(self) -> None:
        """Step what the inner optimizer has now, without the hooks of a whole step: they come with ours."""
        inner = self.inner
        hooks = {name: vars(inner)[name] for name in _HOOKS if name in vars(inner)}
        vars(inner).update({name: OrderedDict() for name in hooks})
        try:
            inner.step()
        finally:
            vars(inner).update(hooks)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> NoReturn: ...
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Step every block that has not been stepped since the last call."""
        if closure is not None:
            raise ValueError("A closure would evaluate the model again in the middle of a step: not possible by block.")
        for hook in list(self._optimizer_step_pre_hooks.values()):
            hook(self.inner, (), {})
        if self.before_step is not None:
            self.before_step()
        take_block = self.take_block or self.step_block
        try:
            with self._told_of_overflow():
                if self.steps_whole and self.take_whole is not None:
                    self.take_whole(self._step_inner)
                elif self.steps_whole:
                    self._step_inner()
                for block in reversed(self._blocks) if not self.steps_whole else ():
                    if not self._stepped[block.index]:
                        take_block(block)
        finally:  # if memory has run out here, the next step is a new one
            self._stepped = [False] * len(self._blocks)
        for block in self._blocks:
            if not block.modules:  # beside the model, whose gradients alone the Trainer zeroes
                _free_gradients(block)
        self._keep_counters()
        for hook in list(self._optimizer_step_post_hooks.values()):
            hook(self.inner, (), {})

    def _keep_counters(self) -> None:
        """Put what blocks count for themselves into their groups, now that all have stepped.

        Raises:
            ValueError: The blocks have come to different figures: it is not steps that are counted.
        """
        counters: list[dict[str, Any]] = [{} for _ in self.inner.param_groups]
        for share in itertools.chain.from_iterable(self._shares):
            for name, value in (share.own or {}).items():
                first = counters[share.group].setdefault(name, value)
                if not isinstance(value, Tensor) and value != first:  # to compare tensors would wait for the device
                    raise ValueError(
                        f"{type(self.inner).__name__} takes {name!r} from all parameters of a group together, which "
                        "cannot be stepped block by block. Choose another `optim`, such as adamw_torch."
                    )
        for group, counted in zip(self.inner.param_groups, counters, strict=True):
            group.update(counted)

    @contextlib.contextmanager
    def _told_of_overflow(self) -> Iterator[None]:
        """Pass on what a GradScaler has set on this optimizer for one step, if blocks have not been through it."""
        names = () if self.scaler is not None else ("grad_scale", "found_inf")
        told = {name: vars(self)[name] for name in names if name in vars(self)}
        vars(self.inner).update(told)
        try:
            yield
        finally:
            for name in told:
                delattr(self.inner, name)

    @property
    def sees_gradients(self) -> bool:
        """Whether something is hooked to it that wants to see the whole gradient before the step."""
        return bool(self._optimizer_step_pre_hooks)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.inner.load_state_dict(state_dict)
        for share in itertools.chain.from_iterable(self._shares):
            share.own = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        raise ValueError(
            "A parameter group cannot be added after the blocks have been made. Unfreeze what is to be trained first."
        )

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """To a GradScaler: whether to call `step()` in any case; steps that overflow are skipped inside."""
        return self.scaler is not None or getattr(self.inner, "_step_supports_amp_scaling", False)

    # torch declares these three as attributes that anybody may set. They are the inner optimizer's, to be read here.

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self.inner.param_groups

    @property
    def state(self) -> dict[Tensor, Any]:  # type: ignore[override]
        return self.inner.state

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        return self.inner.defaults

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """A deep copy, or what is unpickled, is a plain optimizer, as the Trainer's would be."""
        return _itself, (self.inner,)

    def __repr__(self) -> str:
        return f"BlockOptimizer({len(self._blocks)} blocks of {self.inner!r})"


class _ScaledBlock:
    """One block, as an optimizer of its own to a GradScaler, which then checks and skips it without the others."""

    _step_supports_amp_scaling = True
    found_inf: Tensor | int = 0  # the scaler sets it for the time of a step

    def __init__(self, optimizer: BlockOptimizer, block: Block) -> None:
        self.param_groups = [{"params": list(block.parameters)}]
        self._optimizer, self._block = optimizer, block

    def step(self) -> None:
        told = vars(self._optimizer.inner)
        told["found_inf"] = self.found_inf  # kernels that support it leave everything as it is if this is not zero
        try:
            self._optimizer.step_share(self._block)
        finally:
            del told["found_inf"]


def holds_optimizers(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it steps others that it holds: they know nothing of the groups that it is shown."""

    def holds(value: Any) -> bool:
        if isinstance(value, dict):
            value = list(value.values())
        return isinstance(value, torch.optim.Optimizer) or (isinstance(value, list | tuple) and any(map(holds, value)))

    return any(holds(value) for value in vars(optimizer).values())


def _free_gradients(block: Block) -> None:
    for parameter in block.parameters:
        parameter.grad = None


def _norms(tensors: list[Tensor]) -> Tensor | None:
    """One number for each tensor, by which a change of it is seen; None of no tensors."""
    tensors = [tensor for tensor in tensors if tensor.numel() and tensor.is_floating_point()]
    if not tensors:
        return None
    return torch.stack([norm.double().cpu() for norm in torch._foreach_norm(tensors)]).nan_to_num(-1.0)


def _itself(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    return optimizer


def _forget_positions(optimizer: Any) -> None:
    """Let an optimizer of bitsandbytes know its special parameters (embeddings in 32 bits) by identity alone.

    It finds them in its groups before its first step, and then also by their position, which in a block is another's.
    """
    if hasattr(optimizer, "check_overrides"):
        optimizer.check_overrides()
        optimizer.mng.index2config.clear()
        optimizer.initialized = True


def refuse_unsteppable(optimizer: torch.optim.Optimizer) -> None:
    """Raise `ValueError` for an optimizer whose step needs the whole model at once."""
    name = type(optimizer).__name__
    whole_model = isinstance(optimizer, torch.optim.LBFGS) or name in {"LOMO", "AdaLOMO", "Lomo", "AdaLomo"}
    if whole_model or name.startswith("LayerWiseDummy") or hasattr(optimizer, "train"):
        raise ValueError(
            f"{name} cannot be stepped block by block: it steps inside backward itself, evaluates the model again, or "
            "switches between training and evaluation weights. Choose another `optim`, such as adamw_torch."
        )
