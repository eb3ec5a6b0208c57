"""Asking in advance, so that nobody waits for an answer over the network."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from concurrent.futures import TimeoutError as NotYet
from typing import Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """Answers to one question that is asked again and again, each asked before it is needed.

    How many are asked in advance grows whenever the next answer is not there in time: over a fast network one, over a
    slow one as many as it takes, up to `most`.

    Args:
        ask: Gets one answer; called by the executor's thread.
        executor: Asks one after the other.
        while_waiting: Called every second while an answer does not come; may raise.
        most: Answers that are asked for in advance at most.
    """

    def __init__(
        self,
        ask: Callable[[], T],
        executor: Executor,
        while_waiting: Callable[[], None] = lambda: None,
        most: int = 8,
    ) -> None:
        self._ask = ask
        self._executor = executor
        self._while_waiting = while_waiting
        self._most = most
        self._depth = 1
        self._asked: deque[Future[T]] = deque()

    def take(self) -> T:
        """The next answer; the one after it is on its way."""
        if not self._asked:
            self._refill()
        elif not self._asked[0].done():
            self._depth = min(self._depth + 1, self._most)
        answer = self._wait(self._asked.popleft())
        self._refill()
        return answer

    def held(self) -> list[T]:
        """The answers that have been asked for and not been taken."""
        return [self._wait(future) for future in self._asked]

    def _refill(self) -> None:
        while len(self._asked) < self._depth:
            self._asked.append(self._executor.submit(self._ask))

    def _wait(self, future: Future[T]) -> T:
        while True:
            try:
                return future.result(timeout=1)
            except NotYet:
                if future.done():
                    raise
                self._while_waiting()
