"""What workers say to each other, as bytes and back: data of known types, and never code.

Numbers, text, bytes, lists, tuples, sets, dictionaries, arrays, tensors, and classes that are named here (`travels`).
Bytes that say anything else are refused. In bytes: a text in JSON, and what it refers to by number.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import safetensors.numpy
import safetensors.torch
import torch

from . import channel

_KINDS: dict[str, type] = {}
"""Classes that travel, by name."""

_C = TypeVar("_C", bound=type)


def travels(kind: _C) -> _C:
    """Let objects of a class be said to other workers: a dataclass or a `NamedTuple` whose fields are data."""
    assert _KINDS.setdefault(_name_of(kind), kind) is kind, kind
    return kind


def is_data(item: Any) -> bool:
    """Whether it can be said to other workers."""
    try:
        _plain(item, None)
    except TypeError:
        return False
    return True


def encode(item: Any) -> bytes:
    """Data as bytes.

    Raises:
        TypeError: There is something in it that is not data, with its type.
    """
    attached: list[bytes] = []
    text = json.dumps(_plain(item, attached)).encode()
    return channel.pack([text, *attached])


def decode(data: bytes) -> Any:
    """The data that the bytes say.

    Raises:
        ValueError: They say none.
    """
    try:
        text, *attached = channel.unpack(data)
        return _made(json.loads(text), attached)
    except (ValueError, TypeError, KeyError, IndexError, RecursionError, channel.Refused, *_UNREADABLE) as error:
        raise ValueError(f"This is not what workers say to each other: {error}") from error


_UNREADABLE = (safetensors.SafetensorError,)


def _plain(item: Any, attached: list[bytes] | None) -> Any:
    """What JSON can say of it; what it cannot, packed, at the end of `attached`, unless that is None."""
    if item is None or type(item) in (bool, int, float, str):
        return item
    if isinstance(item, np.generic):
        return _plain(item.item(), attached)
    if type(item) is list:
        return [_plain(part, attached) for part in item]
    name = _name_of(type(item))
    if _KINDS.get(name) is type(item):
        values = (
            item
            if isinstance(item, tuple)
            else [getattr(item, field.name) for field in dataclasses.fields(_KINDS[name])]
        )
        return {"object": [name, *(_plain(value, attached) for value in values)]}
    if type(item) in (tuple, set):
        return {type(item).__name__: [_plain(part, attached) for part in item]}
    if isinstance(item, Mapping):
        return {"dict": [[_plain(key, attached), _plain(value, attached)] for key, value in item.items()]}
    for kind, (types, pack, _) in _ATTACHED.items():
        if type(item) in types and getattr(item, "layout", torch.strided) == torch.strided and not _holds_objects(item):
            if attached is not None:
                attached.append(pack(item))
            return {kind: len(attached or ()) - 1}
    if isinstance(item, int | float | str):  # of a subclass, as enumerations are
        return next(kind(item) for kind in (bool, int, float, str) if isinstance(item, kind))
    raise TypeError(f"What workers say to each other is data, and a {type(item).__name__} is none.")


def _made(plain: Any, attached: Sequence[bytes]) -> Any:
    if isinstance(plain, list):
        return [_made(part, attached) for part in plain]
    if not isinstance(plain, dict):
        return plain
    ((kind, content),) = plain.items()
    if kind in _ATTACHED:
        return _ATTACHED[kind][2](attached[content])
    if kind == "object":
        name, *values = content
        return _KINDS[name](*(_made(value, attached) for value in values))
    if kind in ("tuple", "set"):
        return (tuple if kind == "tuple" else set)(_made(part, attached) for part in content)
    if kind == "dict":
        return {_made(key, attached): _made(value, attached) for key, value in content}
    raise ValueError(f"unknown kind {kind!r}")


def _holds_objects(item: Any) -> bool:
    return isinstance(item, np.ndarray) and item.dtype.kind not in "biuf"


def _name_of(kind: type) -> str:
    return f"{kind.__module__.rpartition('.')[2]}.{kind.__qualname__}"


def _pack_array(array: np.ndarray) -> bytes:
    return safetensors.numpy.save({"": np.ascontiguousarray(array).reshape(array.shape)})


def _pack_tensor(tensor: torch.Tensor) -> bytes:
    return safetensors.torch.save({"": tensor.detach().cpu().contiguous()})


_ATTACHED: dict[str, tuple[tuple[type, ...], Callable[[Any], bytes], Callable[[bytes], Any]]] = {
    "bytes": ((bytes, bytearray), bytes, bytes),
    "array": ((np.ndarray,), _pack_array, lambda data: safetensors.numpy.load(data)[""]),
    "tensor": ((torch.Tensor, torch.nn.Parameter), _pack_tensor, lambda data: safetensors.torch.load(data)[""]),
}
