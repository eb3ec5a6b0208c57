"""What is known of torch's AdamW and its state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def is_plain_adam(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it is torch's AdamW without `amsgrad` and `maximize`, with one pair of betas (numbers, the first not 0).

    Or such an Adam without weight decay, which would go into the moments.
    """
    groups = optimizer.param_groups
    is_adamw = isinstance(optimizer, torch.optim.AdamW)  # old states and torch before 2.8 do not say it by group
    return (
        type(optimizer) in (torch.optim.Adam, torch.optim.AdamW)
        and not any(group["amsgrad"] or group["maximize"] for group in groups)
        and all(group.get("decoupled_weight_decay", is_adamw) or not group["weight_decay"] for group in groups)
        and all(isinstance(beta, float) for beta in groups[0]["betas"])
        and groups[0]["betas"][0] > 0
        and all(group["betas"] == groups[0]["betas"] for group in groups)
    )


def make_states(optimizer: torch.optim.Optimizer) -> None:
    """Give every parameter the state that the optimizer would make for it in its first step, unless it has one."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state: dict[str, Any] = optimizer.state[parameter]
            if state:
                continue
            counts_on_device = group["fused"] or group["capturable"]
            device = parameter.device if counts_on_device else torch.device("cpu")
            state["step"] = torch.zeros((), dtype=torch.float32, device=device)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)


def age_of(optimizer: torch.optim.Optimizer, parameter: Tensor) -> int:
    """Steps that its moments are means of. Waits for the device where they are counted there."""
    return int(optimizer.state[parameter]["step"])
