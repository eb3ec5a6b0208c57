"""How the workers of a process group speak to each other: in data that is signed, over gloo."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from . import data
from .secret import SIGNATURE_BYTES, TOKEN_VARIABLE, is_signed, sign

MOST_BYTES = 1 << 28
"""That a worker may say at once, in `gather`."""

_FIRST = 1024  # bytes that travel with the length; what is longer takes a second round
_LENGTH = 8

_T = TypeVar("_T")

Gather = Callable[[Any], list[Any]]
"""Collects one object from every worker. Collective."""


class Unproven(torch.distributed.DistError):
    """What a worker of this group says is not signed with the job's secret, or does not belong here."""


class Talk:
    """The workers of one process group, as one of them speaks to them.

    Nothing that comes is looked at before its signature, which says who speaks to whom, in which group, and how many
    times it has done so before. Then it is read as data (`data.decode`): what workers say is never run.

    Tensors of the model do not travel here, as they are what collectives are for; objects of any kind, and waiting for
    each other, do, so a group of NCCL has one of gloo beside it: nothing is lost when a wait is broken off.

    Args:
        token: The job's secret.
        name: Of the group, another one for each.
        group: Of gloo; None: there is one worker.
    """

    def __init__(self, token: bytes, name: bytes, group: ProcessGroup | None) -> None:
        self._token, self._name = token, name
        # Not to keep it: torch ends the threads of a group of gloo with the last reference to it.
        self._weak_group = weakref.ref(group) if group is not None else None
        self._count = 0
        self.rank = 0 if group is None else torch.distributed.get_rank(group)
        self.size = 1 if group is None else torch.distributed.get_world_size(group)

    @property
    def _group(self) -> ProcessGroup:
        group = self._weak_group() if self._weak_group is not None else None
        if group is None:
            raise torch.distributed.DistError("The process group of these workers has ended.")
        return group

    def gather(self, item: _T) -> list[_T]:
        """One object of every worker, in the order of ranks. Collective.

        Raises:
            TypeError: It is not data, or too much.
            Unproven: Somebody has said what cannot be.
            RuntimeError: The group has lost a worker.
        """
        if self._weak_group is None:
            return [item]
        message = self._signed(data.encode(item), self.rank)
        if len(message) > MOST_BYTES:
            raise TypeError(f"{len(message)} bytes are too many for workers to say at once.")
        length = len(message).to_bytes(_LENGTH, "big")
        beginnings = self._all_gather(_tensor(length + message[:_FIRST], _LENGTH + _FIRST))
        lengths = [int.from_bytes(beginning[:_LENGTH], "big") for beginning in beginnings]
        if max(lengths) > MOST_BYTES:
            raise Unproven(
                f"Rank {lengths.index(max(lengths))} of this group wants to say {max(lengths)} bytes at once."
            )
        messages = [beginning[_LENGTH:] for beginning in beginnings]
        if max(lengths) > _FIRST:
            rests = self._all_gather(_tensor(message[_FIRST:], max(lengths) - _FIRST))
            messages = [first + rest for first, rest in zip(messages, rests, strict=True)]
        said = [
            self._checked(message[:length], rank)
            for rank, (message, length) in enumerate(zip(messages, lengths, strict=True))
        ]
        self._count += 1
        return [data.decode(one) for one in said]

    def wait(self) -> None:
        """Wait until all workers have come here. Collective."""
        self.gather(None)

    def send(self, item: Any, to: int) -> None:
        """Say something to one worker, which must `receive` it.

        Raises:
            TypeError: It is not data.
        """
        message = self._signed(data.encode(item), self.rank, to)
        torch.distributed.send(torch.tensor([len(message)]), group=self._group, group_dst=to)
        torch.distributed.send(_tensor(message, len(message)), group=self._group, group_dst=to)

    def receive(self, sender: int, most: int) -> Any:
        """What one worker has to say, of at most so many bytes.

        Raises:
            Unproven: It did not say it, or it is too long.
        """
        length = torch.zeros(1, dtype=torch.int64)
        torch.distributed.recv(length, group=self._group, group_src=sender)
        if not 0 <= int(length) <= most:
            raise Unproven(f"Rank {sender} wants to say {int(length)} bytes, where at most {most} can be.")
        message = torch.zeros(int(length), dtype=torch.uint8)
        torch.distributed.recv(message, group=self._group, group_src=sender)
        return data.decode(self._checked(message.numpy().tobytes(), sender, self.rank))

    def prove(self) -> None:
        """Make sure that each connection of the group leads to the worker that it should. Collective.

        In `gather`, what a worker says may come by way of others.

        Raises:
            Unproven: One does not.
        """
        if self._weak_group is None:
            return
        others = [rank for rank in range(self.size) if rank != self.rank]
        mine = {rank: _tensor(self._signed(b"", self.rank, rank), SIGNATURE_BYTES) for rank in others}
        theirs = {rank: torch.zeros(SIGNATURE_BYTES, dtype=torch.uint8) for rank in others}
        works = [torch.distributed.isend(mine[rank], group=self._group, group_dst=rank) for rank in others]
        works += [torch.distributed.irecv(theirs[rank], group=self._group, group_src=rank) for rank in others]
        for work in works:
            assert work is not None
            work.wait()
        for rank in others:
            self._checked(theirs[rank].numpy().tobytes(), rank, self.rank)

    def _signed(self, content: bytes, *speaker_and_listener: int) -> bytes:
        return sign(self._token, *self._place(*speaker_and_listener), content) + content

    def _checked(self, message: bytes, *speaker_and_listener: int) -> bytes:
        signature, content = message[:SIGNATURE_BYTES], message[SIGNATURE_BYTES:]
        if not is_signed(self._token, signature, *self._place(*speaker_and_listener), content):
            raise Unproven(
                f"What rank {speaker_and_listener[0]} says is not signed with the job's secret ({TOKEN_VARIABLE}): it "
                "has another one, is somebody else, or has not come to the same place of the program."
            )
        return content

    def _place(self, *speaker_and_listener: int) -> tuple[bytes, ...]:
        numbers = (self._count, *speaker_and_listener)
        return (b"talk", self._name, *(number.to_bytes(8, "big") for number in numbers))

    def _all_gather(self, mine: Tensor) -> list[bytes]:
        theirs = [torch.empty_like(mine) for _ in range(self.size)]
        torch.distributed.all_gather(theirs, mine, group=self._group)
        return [tensor.numpy().tobytes() for tensor in theirs]


def _tensor(content: bytes, size: int) -> Tensor:
    """Bytes as a tensor, with zeros up to a size."""
    return torch.frombuffer(bytearray(content.ljust(size, b"\0")), dtype=torch.uint8)
