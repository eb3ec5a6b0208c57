"""Asking to join a running job."""

from __future__ import annotations

import json
import logging

from torch.distributed import Store

from .network import is_signed, sign

logger = logging.getLogger(__name__)


def ask_to_join(store: Store, token: bytes, member: str) -> None:
    """Leave a request in the store, with a proof that this worker knows the job's secret."""
    proof = sign(token, b"join", member.encode()).hex()
    store.set(f"request/{store.add('requests', 1)}", json.dumps([member, proof]))


def answer(store: Store, member: str, text: str) -> None:
    """Tell a worker that has asked the number of the era that it is in, or why it is refused."""
    store.set(f"admitted/{member}", text)


def answer_to(store: Store, member: str) -> int | None:
    """The number of the era that a worker has been taken into; None while there is no answer.

    Raises:
        ValueError: It is refused; with the reason.
    """
    if not store.check([f"admitted/{member}"]):
        return None
    text = store.get(f"admitted/{member}").decode()
    if not text.isdigit():
        raise ValueError(text)
    return int(text)


class Requests:
    """The requests in the store, as one member reads them, each once.

    Args:
        token: The job's secret.
    """

    def __init__(self, token: bytes) -> None:
        self._token = token
        self._read = 0

    def new(self, store: Store) -> list[str]:
        """Who has asked since the last call and waits; who does not know the secret is refused."""
        members = []
        while self._read < store.add("requests", 0):
            key = f"request/{self._read + 1}"
            if not store.check([key]):
                break  # it is just being written
            self._read += 1
            member = self._proven(store, store.get(key))
            if member is not None and not store.check([f"admitted/{member}"]):
                members.append(member)
        return members

    def _proven(self, store: Store, request: bytes) -> str | None:
        """The member that makes a request, if it is one."""
        try:
            member, proof = json.loads(request)
            if is_signed(self._token, bytes.fromhex(proof), b"join", member.encode()):
                return member
            answer(store, member, "This worker has another secret than the job: set LAYUP_TOKEN to the job's.")
        except (ValueError, TypeError, AttributeError):
            pass
        logger.warning("A request to join was refused: who made it does not know the job's LAYUP_TOKEN.")
        return None
