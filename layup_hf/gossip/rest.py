"""What training changes and nobody exchanges: at a consensus point the workers agree on it, too."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate.utils import broadcast, reduce
from torch import Tensor

Gather = Callable[[Any], list[Any]]
"""Collects one object from every worker."""


@torch.no_grad()
def agree_on_rest(tensors: Mapping[str, Tensor], gather: Gather) -> list[str]:
    """Make all workers hold the same of what differs between them. Collective.

    What floats becomes the mean of all, each counted alike; anything else (counters, masks, quantized weights) becomes
    rank 0's. What has another shape on some worker stays as it is. What is the same on all costs a checksum; memory is
    needed for a few copies of the largest tensor that is not.

    Args:
        tensors: By name; all workers should have the same.
        gather: Collects one object from every worker.

    Returns:
        The names of those that differed.
    """
    forms = [(name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in tensors.items()]
    digest, sums = zlib.crc32(repr(forms).encode()), [_checksum(tensor) for tensor in tensors.values()]
    reports: list[tuple[int, list[int]]] = gather((digest, sums))
    if len({other for other, _ in reports}) == 1:
        columns = zip(forms, zip(*(others for _, others in reports), strict=True), strict=True)
        differing = [form[0] for form, column in columns if len(set(column)) > 1]
    else:
        known: list[dict[Any, int]] = gather(dict(zip(forms, sums, strict=True)))
        common = [form for form in known[0] if all(form in other for other in known)]
        differing = [form[0] for form in common if len({other[form] for other in known}) > 1]
    for name in differing:
        _agree_on(tensors[name], len(reports))
    return differing


def _agree_on(tensor: Tensor, workers: int) -> None:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        tensor.copy_(broadcast(tensor.clone()))
        return
    own = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    precision = torch.float64 if own.dtype == torch.float64 else torch.float32
    own.copy_(reduce(own.to(precision) / workers, "sum"))


def _checksum(tensor: Tensor) -> int:
    """Of the bytes; on a device their sum, as to read them here would take too long."""
    if tensor.numel() == 0:
        return 0
    content = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    if content.device.type == "cpu":
        return zlib.crc32(content.numpy().data)
    if content.storage_offset() % 8:
        content = content.clone()
    whole = content.numel() // 8 * 8
    return int(content[:whole].view(torch.int64).sum() + content[whole:].sum(dtype=torch.int64))
