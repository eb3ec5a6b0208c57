"""What workers say to each other: the same comes out as went in, and bytes that say anything else are refused."""

import dataclasses
import enum
import io
import pickle
from collections import OrderedDict
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from layup_hf.fleet import channel, data
from layup_hf.fleet.data import decode, encode, is_data, travels


@travels
class Place(NamedTuple):
    name: str
    numbers: tuple[int, ...]


@travels
@dataclasses.dataclass(frozen=True)
class Parcel:
    place: Place | None
    content: bytes


class Untold(NamedTuple):
    number: int


class Level(enum.IntEnum):
    LOW = 1


scalars = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**200), 2**200), st.floats(allow_nan=False), st.text(), st.binary()
)
places = st.builds(Place, st.text(), st.lists(st.integers()).map(tuple))
items = st.recursive(
    st.one_of(scalars, places, st.builds(Parcel, st.none() | places, st.binary())),
    lambda part: st.one_of(
        st.sets(st.integers() | st.text()),
        st.lists(part),
        st.lists(part).map(tuple),
        st.dictionaries(st.text() | st.integers() | st.tuples(scalars), part),
    ),
    max_leaves=20,
)


def same(one, other):
    """Equal, and of one type throughout."""
    if type(one) is not type(other):
        return False
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return same(list(one.items()), list(other.items()))
    return one == other


@given(items)
def test_the_same_comes_out_as_went_in(item):
    assert same(decode(encode(item)), item)
    assert is_data(item)


@pytest.mark.parametrize(
    "array",
    [np.arange(6, dtype=np.uint64).reshape(2, 3) + 2**63, np.zeros((0, 4)), np.array(1.5, np.float32), np.ones(5)[::2]],
    ids=["uint64", "empty", "scalar", "strided"],
)
def test_arrays(array):
    found = decode(encode({"array": array}))["array"]
    assert found.dtype == array.dtype
    assert found.shape == array.shape
    np.testing.assert_array_equal(found, array)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.uint8])
@pytest.mark.parametrize("shape", [(), (3, 4), (0,)])
def test_tensors(dtype, shape):
    tensor = torch.arange(12).to(dtype)[: int(np.prod(shape))].reshape(shape)
    for item in (tensor, torch.stack([tensor, tensor], dim=-1)[..., 0]):
        found = decode(encode([item, "and"]))[0]
        assert found.dtype == dtype
        assert found.shape == torch.Size(shape)
        assert torch.equal(found, tensor)
        assert found.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr()


def test_what_is_like_something_plain_is_said_as_that():
    assert same(decode(encode([np.float32(0.5), np.int64(3), np.bool_(True)])), [0.5, 3, True])
    assert same(decode(encode(OrderedDict(a=1))), {"a": 1})
    assert same(decode(encode(Level.LOW)), 1)
    assert torch.equal(decode(encode(torch.nn.Parameter(torch.ones(2)))), torch.ones(2))


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize(
    "item",
    [object(), print, range(3), Untold(1), torch.ones(2).as_subclass(Subclass), np.array([object()]), 1 + 2j],
    ids=["object", "function", "range", "unknown class", "tensor subclass", "array of objects", "complex"],
)
def test_what_is_no_data_is_not_said(item):
    with pytest.raises(TypeError, match="What workers say to each other is data"):
        encode({"deep": [item]})
    assert not is_data((item,))


class Evil:
    def __reduce__(self):
        return (pytest.fail, ("code of another worker was run",))


def saved():
    buffer = io.BytesIO()
    torch.save(Evil(), buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"\0",
        pickle.dumps(Evil()),
        saved(),
        channel.pack([b"no json"]),
        channel.pack([b"[" * 100000]),
        channel.pack([b'{"a": 1, "b": 2}']),
        channel.pack([b'{"unknown": 1}']),
        channel.pack([b'{"bytes": 0}']),
        channel.pack([b'{"bytes": "x"}', b""]),
        channel.pack([b'{"tensor": 0}', pickle.dumps(Evil())]),
        channel.pack([b'{"array": 0}', b"short"]),
        channel.pack([b'{"array": 0}', (2**60).to_bytes(8, "little") + b"{}"]),
        channel.pack([b'{"object": ["os.system", "true"]}']),
        channel.pack([b'{"object": ["test_said.Place", "few"]}']),
        channel.pack([b'{"dict": [[[], 1]]}']),
        channel.pack([b'{"dict": 5}']),
        channel.pack([b"1"])[:-1],
    ],
)
def test_what_says_anything_else_is_refused(message):
    with pytest.raises(ValueError, match="This is not what workers say to each other"):
        decode(message)


@given(st.binary(max_size=100))
def test_random_bytes_are_refused_or_data(message):
    try:
        item = decode(message)
    except ValueError:
        return
    assert is_data(item)


@given(items, st.data())
def test_a_message_that_is_cut_off_is_refused(item, drawn):
    message = encode(item)
    with pytest.raises(ValueError, match="This is not what workers say"):
        decode(message[: drawn.draw(st.integers(0, len(message) - 1))] or b"\0")


def test_two_classes_cannot_have_one_name():
    other = type("Place", (), {"__module__": Place.__module__})
    with pytest.raises(AssertionError):
        travels(other)
    assert data.travels(Place) is Place
