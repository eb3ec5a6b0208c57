"""Doing something that may fail, or may never end."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import TypeVar

from .finding import Finding

T = TypeVar("T")


class NoAnswer(Exception):
    """Other workers have not done their part in time. Its text says which."""


def within(seconds: float, action: Callable[[], T]) -> T:
    """What `action` returns or raises, if that is in time.

    It runs in a thread of its own. If it does not end, it is left behind: nothing waits for it, not even the end of
    the process.

    Raises:
        TimeoutError: It was not.
    """
    results: list[T] = []
    failures: list[BaseException] = []

    def run() -> None:
        try:
            results.append(action())
        except BaseException as failure:
            failures.append(failure)

    thread = threading.Thread(target=run, name="layup-doctor", daemon=True)
    thread.start()
    thread.join(seconds)
    if failures:
        raise failures[0]
    if not results:
        raise TimeoutError(f"This did not end within {seconds:g} s.")
    return results[0]


def look(name: str, check: Callable[[], Sequence[Finding]], seconds: float, remedy: str = "") -> list[Finding]:
    """What a check finds; whatever else happens to it is a finding, too.

    Args:
        name: Of the check.
        check: Looks, and returns what it has found.
        seconds: How long it may take.
        remedy: What to do if it fails or does not end.
    """
    try:
        return list(within(seconds, check))
    except NoAnswer as missing:
        return [Finding(name, f"not looked at: {missing}", "skipped")]
    except Exception as error:
        return [Finding(name, message_of(error), "error", remedy)]


def message_of(error: BaseException) -> str:
    """The error in one line; with its kind, unless that says nothing."""
    text = " ".join(str(error).split())
    return (
        text
        if isinstance(error, ValueError | MemoryError | TimeoutError) and text
        else f"{type(error).__name__}: {text}"
    )
