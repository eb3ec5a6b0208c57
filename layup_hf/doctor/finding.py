"""What a check has found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..fleet.data import travels

Level = Literal["ok", "skipped", "warning", "error"]
"""`error`: training would not work; `warning`: it would, but not as well; `skipped`: something else is in the way."""


@travels
@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        name: Of the check, in one word.
        text: What has been found.
        level: How bad it is.
        remedy: What to do, if anything is to be done.
        score: How good what has been measured is, where the text has numbers that differ on every worker: if all are
            well, the one with the lowest score speaks for all.
    """

    name: str
    text: str
    level: Level = "ok"
    remedy: str = ""
    score: float | None = None
