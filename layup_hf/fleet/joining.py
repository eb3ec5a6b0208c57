"""Asking to join a running job. Only who knows its secret can write into its store, so a request needs no proof."""

from __future__ import annotations

import logging

from torch.distributed import Store

logger = logging.getLogger(__name__)

_MOST_DIGITS = 18  # of a member's name, which is a number


def ask_to_join(store: Store, member: str) -> None:
    """Leave a request in the store."""
    store.set(f"request/{store.add('requests', 1)}", member)


def answer(store: Store, member: str, era: int) -> None:
    """Tell a worker that has asked the number of the era that it is in."""
    store.set(f"admitted/{member}", str(era))


def answer_to(store: Store, member: str) -> int | None:
    """The number of the era that a worker has been taken into; None while there is no answer."""
    number = store.get(f"admitted/{member}") if store.check([f"admitted/{member}"]) else b""
    return int(number) if _is_number(number) else None


class Requests:
    """The requests in the store, as one member reads them, each once."""

    def __init__(self) -> None:
        self._read = 0
        self._has_warned = False

    def new(self, store: Store) -> list[str]:
        """Who has asked since the last call and waits. Asks of what is no request, or of nobody, are passed over."""
        members = []
        while self._read < store.add("requests", 0):
            key = f"request/{self._read + 1}"
            if not store.check([key]):
                break  # it is just being written
            self._read += 1
            name = store.get(key)
            member = name.decode() if _is_number(name) else ""
            if not store.check([f"state/{member}", f"beat/{member}"]):
                self._warn()
            elif not store.check([f"admitted/{member}"]):
                members.append(member)
        return members

    def _warn(self) -> None:
        if not self._has_warned:
            self._has_warned = True
            logger.warning("LayUp: what asks to join this job is no worker, and is not listened to.")


def _is_number(text: bytes) -> bool:
    return text.isdigit() and len(text) <= _MOST_DIGITS
