"""`python -m layup_hf.trace FILE`: joins what workers have written aside, where a run has failed."""

from __future__ import annotations

import sys

from .file import join

USAGE = "Usage: python -m layup_hf.trace FILE, the file that the option `trace` names."

if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(USAGE)
    try:
        parts = join(sys.argv[1])
    except FileNotFoundError as error:
        sys.exit(str(error))
    print(f"{sys.argv[1]} has what was in {', '.join(part.name for part in parts)}.")
