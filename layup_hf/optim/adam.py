"""What is known of torch's AdamW and its state, also where Muon steps some parameters in its place."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .muon import MuonAdamW


def adam_groups(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The groups that it steps by AdamW: all, but for those of Muon."""
    return [group for group in optimizer.param_groups if group.get("matrices") is None]


def stepped_by_adam(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Those of the parameters that are not stepped by Muon."""
    others = {id(p) for group in optimizer.param_groups if group.get("matrices") is not None for p in group["params"]}
    return [parameter for parameter in parameters if id(parameter) not in others]


def is_plain_adam(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it is torch's AdamW without `amsgrad` and `maximize`, with one pair of betas (numbers, the first not 0).

    Or such an Adam without weight decay, which would go into the moments; or Muon with such an AdamW for all else.
    """
    groups = adam_groups(optimizer)
    # Old states and torch before 2.8 do not say it by group.
    is_adamw = isinstance(optimizer, torch.optim.AdamW | MuonAdamW)
    return (
        type(optimizer) in (torch.optim.Adam, torch.optim.AdamW, MuonAdamW)
        and bool(groups)
        and not any(group.get("amsgrad") or group.get("maximize") for group in groups)
        and all(group.get("decoupled_weight_decay", is_adamw) or not group["weight_decay"] for group in groups)
        and all(isinstance(beta, float) for beta in groups[0]["betas"])
        and groups[0]["betas"][0] > 0
        and all(group["betas"] == groups[0]["betas"] for group in groups)
    )


def make_states(optimizer: torch.optim.Optimizer) -> None:
    """Give every parameter the state that AdamW would make for it in its first step, unless it has one."""
    for group in adam_groups(optimizer):
        for parameter in group["params"]:
            state: dict[str, Any] = optimizer.state[parameter]
            if state:
                continue
            counts_on_device = group["fused"] or group.get("capturable")
            device = parameter.device if counts_on_device else torch.device("cpu")
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)


def age_of(optimizer: torch.optim.Optimizer, parameter: Tensor) -> int:
    """Steps that its moments are means of. Waits for the device where they are counted there."""
    return int(optimizer.state[parameter]["step"])
