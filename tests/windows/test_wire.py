"""Messages between hosts: read back as they were written, refused whatever else they are."""

import math
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from layup_hf.fleet.secret import sign
from layup_hf.ledger import REPORT
from layup_hf.windows import wire
from layup_hf.windows.layout import MOST_STEPS

TOKEN, JOB = b"t" * 32, b"j" * 16
PLACE = {"token": TOKEN, "job": JOB, "receiver": 1, "world_size": 3, "num_blocks": 4}


def report(*blocks, count=None):
    rows = np.zeros(len(blocks), dtype=REPORT)
    rows["block"], rows["offered"], rows["mass"] = blocks, 2**63 + 5, 7
    return wire.Report(settled=2, done=10, tokens=2**40, loss=1.5, blocks=rows)


def encode(content, **changes):
    return wire.encode(content, **{"token": TOKEN, "job": JOB, "sender": 2, "receiver": 1, "sequence": 9, **changes})


REQUEST = wire.Request(number=5, block=3, address=2**47, device=1, key=b"key of any length")
CODED = wire.Request(5, 3, 2**47, 1, b"key", seed=2**64 - 1, steps=(0.5, wire.LEAST_STEP, wire.LARGEST_STEP))
ANSWERS = (wire.Answer(number=5, block=3), wire.Answer(5, 0, is_written=False))


@pytest.mark.parametrize("content", [REQUEST, CODED, *ANSWERS, wire.Request(1, 0, 0, 0, b"")])
def test_a_message_is_read_as_it_was_written(content):
    assert wire.decode(encode(content), **PLACE) == wire.Message(2, 9, content)


@pytest.mark.parametrize("blocks", [(), (3,), (0, 1, 2, 3)])
def test_a_report_is_read_as_it_was_written(blocks):
    message = wire.decode(encode(report(*blocks)), **PLACE)
    content = message.content
    assert (content.settled, content.done, content.tokens, content.loss) == (2, 10, 2**40, 1.5)
    assert np.array_equal(content.blocks, report(*blocks).blocks)


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (b"", "length"),
        (encode(REQUEST)[:-1], "signature"),
        (encode(REQUEST) + b"x", "signature"),
        (encode(REQUEST)[:40], "length"),
        (b"SPAM" + encode(REQUEST)[4:], "format"),
        (encode(REQUEST, job=b"k" * 16), "job"),
        (encode(REQUEST, token=b"other"), "signature"),
        (encode(REQUEST, receiver=0), "rank"),
        (encode(REQUEST, sender=1), "rank"),
        (encode(REQUEST, sender=3), "rank"),
        (encode(wire.Answer(1, 4)), "block"),
        (encode(wire.Request(1, 4, 0, 0, b"")), "block"),
        *((encode(wire.Request(1, 0, 0, 0, b"", 0, (1.0, step))), "steps") for step in (0.0, -1.0, 1e-31, 1e31)),
        *((encode(wire.Request(1, 0, 0, 0, b"", 0, (1.0, step))), "steps") for step in (math.inf, math.nan)),
        (encode(wire.Request(1, 0, 0, 0, b"", 0, (1.0,) * (MOST_STEPS + 1))), "length"),
        (encode(wire.Answer(1, 0, is_written=2)), "answer"),
        (encode(report(4)), "block"),
        (encode(report(2, 2)), "block"),
        (encode(report(0, 1, 2, 3, 0)), "length"),
    ],
)
def test_everything_else_is_refused_with_its_reason(message, reason):
    with pytest.raises(wire.RefusedError, match=f"^{reason}$"):
        wire.decode(message, **PLACE)


def signed(body, kind):
    """A message of any body by somebody who knows the token."""
    head = struct.pack("<4sBBHH16sQ", b"LYUP", 2, kind, 2, 1, JOB, 9)
    return head + body + sign(TOKEN, head, body)


@given(body=st.binary(max_size=300), kind=st.integers(0, 255))
def test_any_signed_body_is_read_or_refused(body, kind):
    try:
        content = wire.decode(signed(body, kind), **PLACE).content
    except wire.RefusedError:
        return
    assert kind in (1, 2, 3)
    if isinstance(content, wire.Report):
        assert set(content.blocks["block"].tolist()) <= set(range(4))
    else:
        assert content.block < 4


@given(st.binary(max_size=400))
def test_random_bytes_are_refused(message):
    with pytest.raises(wire.RefusedError):
        wire.decode(message, **PLACE)


@given(st.data())
def test_a_flipped_bit_is_refused(data):
    message = bytearray(encode(report(0, 2)))
    bit = data.draw(st.integers(0, 8 * len(message) - 1))
    message[bit // 8] ^= 1 << bit % 8
    with pytest.raises(wire.RefusedError):
        wire.decode(bytes(message), **PLACE)
