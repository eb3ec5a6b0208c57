"""Asking to join a running job. Only who knows its secret can write into its store, so a request needs no proof."""

from __future__ import annotations

from torch.distributed import Store


def ask_to_join(store: Store, member: str) -> None:
    """Leave a request in the store."""
    store.set(f"request/{store.add('requests', 1)}", member)


def answer(store: Store, member: str, era: int) -> None:
    """Tell a worker that has asked the number of the era that it is in."""
    store.set(f"admitted/{member}", str(era))


def answer_to(store: Store, member: str) -> int | None:
    """The number of the era that a worker has been taken into; None while there is no answer."""
    return int(store.get(f"admitted/{member}")) if store.check([f"admitted/{member}"]) else None


class Requests:
    """The requests in the store, as one member reads them, each once."""

    def __init__(self) -> None:
        self._read = 0

    def new(self, store: Store) -> list[str]:
        """Who has asked since the last call and waits."""
        members = []
        while self._read < store.add("requests", 0):
            key = f"request/{self._read + 1}"
            if not store.check([key]):
                break  # it is just being written
            self._read += 1
            member = store.get(key).decode()
            if not store.check([f"admitted/{member}"]):
                members.append(member)
        return members
