"""How one process lets another one use the memory of a GPU."""

from __future__ import annotations

import contextlib
import inspect
import os
import warnings
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor


class Ipc(Protocol):
    """How one process lets another one use memory of a device."""

    def allocate(self, num_bytes: int, device: torch.device) -> Tensor:
        """Bytes that can be exported."""

    def export(self, buffer: Tensor) -> Any:
        """What another process needs to open a buffer that has been allocated here."""

    def open(self, exported: Any, device: torch.device) -> Tensor:
        """The buffer of another process, as memory of this device of this process."""

    def name(self, device: torch.device) -> str:
        """Of a device, the same in every process of a host, whatever each of them sees."""


_HANDLE = (
    "storage_handle",
    "storage_size_bytes",
    "storage_offset_bytes",
    "ref_counter_handle",
    "ref_counter_offset",
    "event_handle",
)


class CudaIpc:
    """CUDA's own, by way of torch.

    torch notes with a handle which number the device has in the process that exports, and enters that device to open
    it. The number means another GPU, or none, in a process with another `CUDA_VISIBLE_DEVICES`; and a context on each
    peer's GPU takes half a gigabyte of it, which a GPU in exclusive mode refuses. Opened on the device of the process
    that reads, a handle needs neither: the GPU need not even be visible (`cudaIpcOpenMemHandle`; in torch,
    `THPStorage_newSharedCuda` in `StorageSharing.cpp`).
    """

    def allocate(self, num_bytes: int, device: torch.device) -> Tensor:
        """From a segment of a kind that can be exported to any process of the host."""
        with _fixed_segments():
            return torch.empty(num_bytes, dtype=torch.uint8, device=device)

    def export(self, buffer: Tensor) -> dict[str, Any]:
        """A handle of the whole buffer: of what torch would pickle, what another process cannot know by itself."""
        from torch.multiprocessing.reductions import reduce_tensor

        rebuild, arguments = reduce_tensor(buffer)
        named = inspect.signature(rebuild).bind(*arguments).arguments
        return {name: named[name] for name in _HANDLE}

    def open(self, exported: dict[str, Any], device: torch.device) -> Tensor:
        """On this device, and without the producer's event, as it has waited for what it queued."""
        from torch.multiprocessing.reductions import rebuild_cuda_tensor

        return rebuild_cuda_tensor(
            tensor_cls=Tensor,
            tensor_size=torch.Size([exported["storage_size_bytes"]]),
            tensor_stride=(1,),
            tensor_offset=0,
            storage_cls=torch.storage.TypedStorage,
            dtype=torch.uint8,
            requires_grad=False,
            **{**exported, "storage_device": device.index or 0, "event_sync_required": False},
        )

    def name(self, device: torch.device) -> str:
        """Its UUID."""
        return str(torch.cuda.get_device_properties(device).uuid)


@contextlib.contextmanager
def _fixed_segments() -> Iterator[None]:
    """Allocate as without `expandable_segments:True`: such a segment is exported by `pidfd_getfd`, which containers and
    `ptrace_scope` forbid among siblings, and each opening of one reserves more addresses than the GPU has memory.

    The setting is for what is allocated meanwhile. Some versions of torch set all that is not named to its default, so
    all of it is named.
    """
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    settings = next((os.environ[name] for name in names if os.environ.get(name)), "")
    parts = [part for part in settings.split(",") if part.strip()]
    others = [part for part in parts if part.partition(":")[0].strip() != "expandable_segments"]
    if len(others) == len(parts):
        yield
        return
    _set_allocator(",".join([*others, "expandable_segments:False"]))
    try:
        yield
    finally:
        _set_allocator(settings)


def _set_allocator(settings: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # what is to take its place has no name that all versions know
        torch.cuda.memory._set_allocator_settings(settings)
