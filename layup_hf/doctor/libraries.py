"""Which versions are installed, and whether they have what the package uses of them."""

from __future__ import annotations

import importlib.metadata
import platform
import re
from collections.abc import Callable, Mapping, Sequence

from .attempt import message_of
from .finding import Finding

_SHOWN = ("layup_hf", "torch", "transformers", "accelerate")


def installed() -> dict[str, str]:
    """Version of each library that matters, and of Python."""
    versions = {}
    for library in (*_SHOWN, "nixl", "llvmlite"):
        try:
            versions[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            versions[library] = "none"
    return {**versions, "Python": platform.python_version()}


def check_libraries(check_seams: Callable[[], None], working: Mapping[str, str]) -> list[Finding]:
    """Whether this worker's libraries are those that work.

    Args:
        check_seams: Raises an `ImportError` with the remedy if a library lacks something that is used.
        working: The versions that work, by library, such as ">=2.13,<3".
    """
    try:
        check_seams()
    except Exception as error:
        remedy = "" if "pip install" in str(error) else "install the tested versions: see the table in README.md"
        return [Finding("versions", message_of(error).removeprefix("ImportError: "), "error", remedy)]
    versions = installed()
    others = [
        f"{name} {versions[name]} ({known})" for name, known in working.items() if not _is_in(versions[name], known)
    ]
    if others:
        text = f"{', '.join(others)}: not of the versions that have been tested, but all that is used of them is there"
        return [Finding("versions", text, "warning", "install the tested versions: see the table in README.md")]
    shown = ", ".join(f"{name} {versions[name]}" for name in (*_SHOWN, "Python"))
    return [Finding("versions", f"{shown}; all that is used of them is there")]


def check_alike(versions: Sequence[Mapping[str, str]]) -> list[Finding]:
    """Whether all workers have the same. Nothing, if so.

    Args:
        versions: What each worker has installed, in the order of ranks.
    """
    differ = []
    for name in versions[0]:
        ranks: dict[str, list[int]] = {}
        for rank, theirs in enumerate(versions):
            ranks.setdefault(theirs.get(name, "none"), []).append(rank)
        if len(ranks) > 1:
            places = (f"{version} on rank {', '.join(map(str, who))}" for version, who in ranks.items())
            differ.append(f"{name} {'; '.join(places)}")
    if not differ:
        return []
    text = f"the workers have different ones: {'. '.join(differ)}"
    return [Finding("versions", text, "warning", "install the same versions for all workers")]


def _is_in(version: str, known: str) -> bool:
    """Whether a version is in a range such as ">=2.13,<3": by its numbers alone, as far as the range gives them."""
    mine = _numbers(version)
    for part in known.split(","):
        bound = _numbers(part)
        first = (mine + (0,) * len(bound))[: len(bound)]
        if (part.startswith(">=") and first < bound) or (part.startswith("<") and first >= bound):
            return False
    return True


def _numbers(text: str) -> tuple[int, ...]:
    match = re.search(r"\d+(\.\d+)*", text)
    return tuple(map(int, match[0].split("."))) if match else ()
