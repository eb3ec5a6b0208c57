"""What a check has found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "skipped", "warning", "error"]
"""`error`: training would not work; `warning`: it would, but not as well; `skipped`: something else is in the way."""


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        name: Of the check, in one word.
        text: What has been found.
        level: How bad it is.
        remedy: What to do, if anything is to be done.
        is_measured: Whether the text has numbers that differ a little on every worker: where all are well, one of
            them speaks for all.
    """

    name: str
    text: str
    level: Level = "ok"
    remedy: str = ""
    is_measured: bool = False
