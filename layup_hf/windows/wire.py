"""What workers on different hosts tell each other: messages in bytes, signed, strictly parsed. Pure functions."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

from ..fleet.secret import is_signed, sign
from ..ledger import REPORT
from .layout import MOST_STEPS

_MAGIC = b"LYUP"
_VERSION = 2
_SIGNATURE_BYTES = 16
_JOB_BYTES = 16
_LONGEST_KEY = 0xFFFF
_HEAD = struct.Struct("<4sBBHH16sQ")  # magic, version, kind, sender, receiver, job, sequence
_REPORT_HEAD = struct.Struct("<IQQdI")  # settled, done, tokens, loss, count
_REQUEST_HEAD = struct.Struct("<QIQIQHH")  # number, block, address, device, seed, number of steps, bytes of the key
_ANSWER = struct.Struct("<QIB")  # number, block, whether it has been written
_STEP = np.dtype("<f4")

LEAST_STEP, LARGEST_STEP = 2.0**-100, 2.0**100
"""By which blocks are coded: fp32 has these numbers and those that they are divided by."""
_KINDS = {"report": 1, "request": 2, "answer": 3}


class RefusedError(Exception):
    """A message that is none of this job's, or not what it should be. Its text is the reason, in a few words."""


@dataclass(frozen=True, eq=False)
class Report:
    """State of the sender: cumulative, so one that is lost or repeated does no harm.

    Attributes:
        settled: How often the sender had settled its ledger.
        done: Optimizer steps of the sender.
        tokens: Tokens that the sender has seen.
        loss: Its latest mean training loss.
        blocks: Array of `ledger.REPORT`, of the blocks that have changed, or of all.
    """

    settled: int
    done: int
    tokens: int
    loss: float
    blocks: np.ndarray


@dataclass(frozen=True)
class Request:
    """Asks the receiver to write a block of its own into the sender's memory.

    Attributes:
        number: Of the request, counted by the sender for this receiver from 1. The same request may come again.
        block: Which one.
        address: Where the memory begins.
        device: Number of the device that it is on; 0 for a CPU.
        key: What NIXL needs to write there.
        seed: Of the factors in sums, if the block is to be coded.
        steps: With which it is to be coded, numbers in fp32 in the order of tensors and parts; none: as it is.
    """

    number: int
    block: int
    address: int
    device: int
    key: bytes
    seed: int = 0
    steps: tuple[float, ...] = ()


@dataclass(frozen=True)
class Answer:
    """Says that the block of a request has been written; or that it has not been, as it cannot be coded."""

    number: int
    block: int
    is_written: bool = True


Content = Report | Request | Answer


@dataclass(frozen=True)
class Message:
    """One that has been found to be of this job, for this worker, and by `sender`."""

    sender: int
    sequence: int
    content: Content


def encode(content: Content, *, token: bytes, job: bytes, sender: int, receiver: int, sequence: int) -> bytes:
    """The message in bytes.

    Args:
        content: What it says.
        token: The job's secret.
        job: 16 bytes that name the job.
        sender: Who sends it.
        receiver: Who alone is to accept it.
        sequence: Larger than that of every message that the sender has sent to this receiver.
    """
    match content:
        case Report():
            kind = "report"
            body = _REPORT_HEAD.pack(content.settled, content.done, content.tokens, content.loss, len(content.blocks))
            body += content.blocks.tobytes()
        case Request():
            kind = "request"
            numbers = (content.number, content.block, content.address, content.device, content.seed)
            body = _REQUEST_HEAD.pack(*numbers, len(content.steps), len(content.key))
            body += np.array(content.steps, dtype=_STEP).tobytes() + content.key
        case Answer():
            kind = "answer"
            body = _ANSWER.pack(content.number, content.block, content.is_written)
    head = _HEAD.pack(_MAGIC, _VERSION, _KINDS[kind], sender, receiver, job, sequence)
    return head + body + sign(token, head, body)


def decode(message: bytes, *, token: bytes, job: bytes, receiver: int, world_size: int, num_blocks: int) -> Message:
    """What a message says, if it is complete, of this job, for this worker, and was signed with the job's secret.

    Raises:
        RefusedError: In any other case, whatever the bytes are.
    """
    longest_request = _REQUEST_HEAD.size + MOST_STEPS * _STEP.itemsize + _LONGEST_KEY
    longest = max(_REPORT_HEAD.size + num_blocks * REPORT.itemsize, longest_request)
    if not _HEAD.size + _SIGNATURE_BYTES <= len(message) <= _HEAD.size + longest + _SIGNATURE_BYTES:
        raise RefusedError("length")
    head, body = message[: _HEAD.size], message[_HEAD.size : -_SIGNATURE_BYTES]
    magic, version, kind, sender, to, of_job, sequence = _HEAD.unpack(head)
    if magic != _MAGIC or version != _VERSION:
        raise RefusedError("format")
    if of_job != job:
        raise RefusedError("job")
    if not is_signed(token, message[-_SIGNATURE_BYTES:], head, body):
        raise RefusedError("signature")
    if to != receiver or sender == receiver or sender >= world_size:
        raise RefusedError("rank")
    if kind == _KINDS["report"]:
        return Message(sender, sequence, _decode_report(body, num_blocks))
    if kind == _KINDS["request"]:
        return Message(sender, sequence, _decode_request(body, num_blocks))
    if kind == _KINDS["answer"]:
        if len(body) != _ANSWER.size:
            raise RefusedError("length")
        number, block, is_written = _ANSWER.unpack(body)
        _require_block(block, num_blocks)
        if is_written > 1:
            raise RefusedError("answer")
        return Message(sender, sequence, Answer(number, block, bool(is_written)))
    raise RefusedError("kind")


def _decode_report(body: bytes, num_blocks: int) -> Report:
    if len(body) < _REPORT_HEAD.size:
        raise RefusedError("length")
    settled, done, tokens, loss, count = _REPORT_HEAD.unpack_from(body)
    if count > num_blocks or len(body) != _REPORT_HEAD.size + count * REPORT.itemsize:
        raise RefusedError("length")
    blocks = np.frombuffer(body, dtype=REPORT, offset=_REPORT_HEAD.size)
    numbers = blocks["block"]
    if count and (int(numbers.max()) >= num_blocks or len(np.unique(numbers)) != count):
        raise RefusedError("block")
    return Report(settled, done, tokens, loss, blocks)


def _decode_request(body: bytes, num_blocks: int) -> Request:
    if len(body) < _REQUEST_HEAD.size:
        raise RefusedError("length")
    number, block, address, device, seed, count, length = _REQUEST_HEAD.unpack_from(body)
    begin_of_key = _REQUEST_HEAD.size + count * _STEP.itemsize
    if count > MOST_STEPS or len(body) != begin_of_key + length:
        raise RefusedError("length")
    _require_block(block, num_blocks)
    steps = np.frombuffer(body, dtype=_STEP, count=count, offset=_REQUEST_HEAD.size)
    if not bool(((steps >= LEAST_STEP) & (steps <= LARGEST_STEP)).all()):
        raise RefusedError("steps")
    return Request(number, block, address, device, body[begin_of_key:], seed, tuple(steps.tolist()))


def _require_block(block: int, num_blocks: int) -> None:
    if block >= num_blocks:
        raise RefusedError("block")
