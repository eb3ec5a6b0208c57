"""What opening windows of any kind takes: all workers agree, or all raise."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TypeVar

from ..blocks import Block
from .base import Gather

Specification = list[tuple[str, tuple[int, ...], str, str]]
"""Block, shape, dtype and kind of device of every tensor: what must be the same for all workers."""

_T = TypeVar("_T")


def host() -> str:
    """Names this machine and, within it, this container and its network."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        boot = file.read().strip()[:8]
    spaces = ", ".join(os.readlink(f"/proc/self/ns/{kind}") for kind in ("pid", "net"))
    return f"{os.uname().nodename} ({boot}, {spaces})"


def process() -> int:
    """This process, to others in the container."""
    return os.getpid()


def specification(blocks: Sequence[Block]) -> Specification:
    """What this worker's model looks like to the others."""
    return [
        (block.name, tuple(tensor.shape), str(tensor.dtype), tensor.device.type)
        for block in blocks
        for tensor in block.tensors
    ]


def require_one_model(specifications: Sequence[Specification]) -> None:
    """Make sure that blocks of any two workers can be merged.

    Raises:
        ValueError: Naming the first tensor that differs.
    """
    for rank, other in enumerate(specifications):
        if other == specifications[0]:
            continue
        pairs = zip(specifications[0], other, strict=False)
        first = next(((mine, its) for mine, its in pairs if mine != its), (len(specifications[0]), len(other)))
        raise ValueError(
            f"Worker {rank} has a different model than worker 0: {first[1]} instead of {first[0]}. All workers must "
            "build the model from the same configuration, with the same parameters frozen."
        )


def together(action: Callable[[], _T], gather: Gather, what: str = "open its windows") -> _T:
    """Do `action` on every worker; if it fails on one, raise on all, so that none is left waiting.

    Args:
        action: Collective or not.
        gather: Collects one object from every worker.
        what: What it does, for the others' message.

    Raises:
        Exception: As `action` raised it here.
        RuntimeError: It has raised on another worker; with its rank and the reason.
    """
    failure: Exception | None = None
    try:
        result = action()
    except Exception as error:
        failure = error
    failures = gather(None if failure is None else f"{type(failure).__name__}: {failure}")
    if failure is not None:
        raise failure
    for rank, message in enumerate(failures):
        if message is not None:
            raise RuntimeError(f"Worker {rank} could not {what}: {message}")
    return result
