"""What all workers are to read alike: random numbers while they read, and a checksum of what they have read."""

from __future__ import annotations

import contextlib
import random
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

_SAMPLED = 512
"""Numbers of a tensor that a checksum looks at: a batch of images is large, and two that differ do so in many."""


class Randomness:
    """The global generators (of `random`, numpy and torch on the CPU) as a reader of data finds them.

    They go on where the reader has left them, whatever is drawn from them in between, and what is drawn in between
    does not depend on the reader.

    Args:
        seed: What they begin with.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._states: tuple[Any, ...] | None = None

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Let what is done here draw from them."""
        outside = _states()
        if self._states is None:
            random.seed(self._seed)
            np.random.seed(self._seed % (1 << 32))
            torch.default_generator.manual_seed(self._seed)  # torch.manual_seed would reseed the GPUs, too
        else:
            _restore(self._states)
        try:
            yield
        finally:
            self._states = _states()
            _restore(outside)


def _states() -> tuple[Any, ...]:
    return random.getstate(), np.random.get_state(), torch.default_generator.get_state()


def _restore(states: tuple[Any, ...]) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.default_generator.set_state(states[2])


class Checksum:
    """Of batches, one after the other; of large tensors a part of the numbers.

    Attributes:
        value: Of all that have been added.
    """

    def __init__(self) -> None:
        self.value = 0

    def add(self, item: Any) -> None:
        """Take a batch, or a part of one, into account. What is not known (an object of a user's) counts by its type,
        and what is on a device by its shape: nothing waits for the device.
        """
        if isinstance(item, torch.Tensor):
            self._add(f"{item.dtype}{tuple(item.shape)}".encode())
            if item.device.type == "cpu" and item.layout == torch.strided and not item.is_quantized:
                flat = item.detach().reshape(-1)
                sampled = flat[:: max(1, flat.numel() // _SAMPLED)].resolve_conj().resolve_neg().contiguous()
                self._add(sampled.view(torch.uint8).numpy().tobytes() if sampled.numel() else b"")
        elif isinstance(item, np.ndarray) and not item.dtype.hasobject:
            self._add(f"{item.dtype}{item.shape}".encode())
            flat_array = item.reshape(-1)
            self._add(flat_array[:: max(1, flat_array.size // _SAMPLED)].tobytes())
        elif isinstance(item, Mapping):
            for key in item:
                self.add(str(key))
                self.add(item[key])
        elif isinstance(item, str | bytes | int | float | complex | None | np.generic):
            self._add(repr(item).encode())
        elif isinstance(item, list | tuple | np.ndarray):
            self._add(str(len(item)).encode())
            for part in item:
                self.add(part)
        else:
            self._add(type(item).__qualname__.encode())

    def _add(self, part: bytes) -> None:
        self.value = zlib.crc32(part, self.value)
