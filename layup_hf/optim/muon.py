"""Muon for the matrices of layers and AdamW for all else, as one torch optimizer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.adamw import adamw

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the Newton-Schulz iteration, as in torch's Muon."""

_SMALLEST = 1e-7  # norm by which a matrix is divided at least
_AT_ONCE = 8  # parameters that are orthogonalized together at most: no more are in memory twice


class MuonAdamW(torch.optim.Optimizer):
    """Steps matrices by Muon and everything else by AdamW.

    Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/) steps a matrix by its momentum, of which all
    singular values have been made about 1. The step is scaled by `0.2 sqrt(max(rows, columns))` (Liu et al., arXiv
    2502.16982): then its root mean square is about that of AdamW's steps, so that one learning rate and one weight
    decay serve both. Arithmetic, state and defaults are those of `torch.optim.Muon` with
    `adjust_lr_fn="match_rms_adamw"`, but matrices of one shape are orthogonalized together, in bf16 on a GPU and in
    single precision on a CPU. What AdamW steps, it steps as `torch.optim.AdamW` does.

    It is an ordinary optimizer: each parameter is stepped by itself, whichever others are in `param_groups`. Of each
    group, `matrices` says what Muon steps in it, see `as_matrices`; it is None for what AdamW steps.

    Args:
        params: Parameters, or groups of them, as of any optimizer. Each group becomes one for each kind of matrices in
            it, and one of all else.
        matrices: What of them Muon steps, by kind: see `layer_matrices`.
        lr: Of both.
        betas, eps: Of AdamW.
        weight_decay: Of both, decoupled.
        momentum: Of Muon: how much of it a step keeps.
        nesterov: Whether Muon steps by Nesterov's momentum.
        ns_steps: Iterations by which singular values are made about 1.
        fused: By AdamW's fused kernel. None: where all parameters are real numbers on a CPU or a CUDA GPU.

    Raises:
        ValueError: An option is out of its range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        matrices: Mapping[str, Iterable[Tensor]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_steps: int = 5,
        fused: bool | None = None,
    ) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum={momentum}: from 0 to below 1.")
        if not 1 <= ns_steps < 100:
            raise ValueError(f"ns_steps={ns_steps}: from 1 to 99.")
        self._kinds = {id(parameter): kind for kind, members in matrices.items() for parameter in members}
        groups = list(params)
        defaults = {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps}
        defaults |= {"momentum": momentum, "nesterov": nesterov, "ns_steps": ns_steps, "fused": fused}
        super().__init__(groups, defaults)
        if fused is None:
            fused = all(_may_be_fused(p) for group in self.param_groups for p in group["params"])
            for options in (self.defaults, *self.param_groups):
                options["fused"] = fused

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """One for each kind of matrices in it, and one of all else."""
        params = param_group["params"]
        members: dict[str | None, list[Tensor]] = {}
        for parameter in [params] if isinstance(params, Tensor) else params:
            kind = vars(self).get("_kinds", {}).get(id(parameter))  # a copy knows of none
            members.setdefault(kind, []).append(parameter)
        for kind, chosen in members.items():
            super().add_param_group({"matrices": kind, **param_group, "params": chosen})

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """To a GradScaler: steps that overflow are skipped on the device."""
        return all(group["fused"] for group in self.param_groups)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Step every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            members: list[Tensor] = [parameter for parameter in group["params"] if parameter.grad is not None]
            gradients = _gradients_of(members)
            if any(gradient.is_sparse for gradient in gradients):
                raise RuntimeError("MuonAdamW takes no sparse gradients: set `sparse=False` in the embedding.")
            if group["matrices"] is None:
                self._step_by_adamw(members, gradients, group)
            else:
                self._step_by_muon(members, group)
        return loss

    def _step_by_adamw(self, members: list[Tensor], gradients: list[Tensor], group: dict[str, Any]) -> None:
        states = [self._state_of(parameter, group) for parameter in members]
        adamw(
            members,
            gradients,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=group["fused"],
            grad_scale=getattr(self, "grad_scale", None),
            found_inf=getattr(self, "found_inf", None),
            has_complex=any(parameter.is_complex() for parameter in members),
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _state_of(self, parameter: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """Of AdamW, made in the first step."""
        state = self.state[parameter]
        if not state:
            device = parameter.device if group["fused"] else torch.device("cpu")
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state

    def _step_by_muon(self, members: list[Tensor], group: dict[str, Any]) -> None:
        alike: dict[tuple[Any, ...], list[Tensor]] = {}
        for parameter in members:
            _, rows, columns = as_matrices(parameter, group["matrices"]).shape
            shape = (min(rows, columns), max(rows, columns))
            alike.setdefault((shape, parameter.dtype, parameter.device), []).append(parameter)
        for parameters in alike.values():
            for first in range(0, len(parameters), _AT_ONCE):
                self._step_alike(parameters[first : first + _AT_ONCE], group)

    def _step_alike(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Parameters whose matrices have one shape, whichever side is the longer one."""
        kind, kept, rate, decay = (group[name] for name in ("matrices", "momentum", "lr", "weight_decay"))
        momenta, gradients = self._momenta(parameters), self._unscaled(_gradients_of(parameters))
        skips, left = self._skips(parameters[0].device), 1 - rate * decay
        if skips is not None:  # then neither momenta nor parameters are to change
            gradients = [torch.where(skips, m, g) for m, g in zip(momenta, gradients, strict=True)]
            left = torch.where(skips, 1.0, left)
        torch._foreach_lerp_(momenta, gradients, 1 - kept)
        directions = torch._foreach_lerp(gradients, momenta, kept) if group["nesterov"] else momenta
        views = [as_matrices(direction, kind) for direction in directions]
        shape = views[0].shape[-2:]
        wide = orthogonalized(torch.cat([_lying(view) for view in views]), group["ns_steps"]).to(parameters[0].dtype)
        if skips is not None:
            wide = torch.where(skips, 0.0, wide)
        steps = [
            from_matrices(part.mT if view.size(-2) > view.size(-1) else part, parameter, kind)
            for part, view, parameter in zip(wide.split([len(v) for v in views]), views, parameters, strict=True)
        ]
        torch._foreach_mul_(parameters, left)
        torch._foreach_add_(parameters, steps, alpha=-rate * 0.2 * math.sqrt(max(shape)))

    def _momenta(self, parameters: list[Tensor]) -> list[Tensor]:
        states = [self.state[parameter] for parameter in parameters]
        for parameter, state in zip(parameters, states, strict=True):
            if not state:
                state["momentum_buffer"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return [state["momentum_buffer"] for state in states]

    def _unscaled(self, gradients: list[Tensor]) -> list[Tensor]:
        """Without the factor of a GradScaler that has left it to the optimizer to take it out."""
        scale = getattr(self, "grad_scale", None)
        if scale is not None:
            torch._foreach_div_(gradients, scale.to(gradients[0].device))
        return gradients

    def _skips(self, device: torch.device) -> Tensor | None:
        """Whether a GradScaler wants this step to change nothing; None if there is none. Not known to the CPU."""
        found = getattr(self, "found_inf", None)
        return found.to(device) > 0 if isinstance(found, Tensor) else None


def orthogonalized(matrices: Tensor, steps: int) -> Tensor:
    """The matrices with their singular values made about 1, between 0.7 and 1.2, by Newton-Schulz iterations.

    Args:
        matrices: (count, rows, columns), with no more rows than columns.
        steps: Iterations. The more, the smaller are the singular values that still get there.

    Returns:
        (count, rows, columns): in bf16 on a GPU, in single precision on a CPU, but for what is in double precision.
    """
    a, b, c = COEFFICIENTS
    if matrices.dtype != torch.float64:
        matrices = matrices.to(torch.float32 if matrices.device.type == "cpu" else torch.bfloat16)
    x = matrices / torch.linalg.vector_norm(matrices, dim=(-2, -1), keepdim=True).clamp(min=_SMALLEST)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def as_matrices(tensor: Tensor, kind: str) -> Tensor:
    """A parameter, or what is shaped like one, as the matrices that it consists of: (count, rows, columns).

    Args:
        tensor: With two axes or more.
        kind: `whole`: it is one matrix. `stacked`: the last two axes are those of matrices, such as experts'.
            `flattened`: a row for each entry of the first axis, as of a convolution's output channels.
    """
    if kind == "whole":
        return tensor.unsqueeze(0)
    return tensor.flatten(0, -3) if kind == "stacked" else tensor.flatten(1).unsqueeze(0)


def from_matrices(matrices: Tensor, parameter: Tensor, kind: str) -> Tensor:
    """The way back from `as_matrices`: in the shape of the parameter."""
    return matrices.squeeze(0) if kind == "whole" else matrices.reshape(parameter.shape)


def _lying(matrices: Tensor) -> Tensor:
    """With no more rows than columns."""
    return matrices.mT if matrices.size(-2) > matrices.size(-1) else matrices


def _gradients_of(parameters: list[Tensor]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def _may_be_fused(parameter: Tensor) -> bool:
    return parameter.is_floating_point() and parameter.device.type in ("cpu", "cuda")
