"""The files that runs across hosts leave behind."""

import json
from pathlib import Path
from typing import Any

from recipes.parts.curve import write_results

Results = list[dict[str, Any]]

UNPACED = "unpaced"
"""Once it is in a run's folder, steps take no longer than they must, whatever `--pace` says."""


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The lines of JSON in a file that may be missing, or may end in the middle of a line."""
    entries = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            entries.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return entries


def write(folder: Path, name: str, results: Any) -> None:
    """Write results; the file appears whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    write_results(folder / f"{name}.json", results)
