"""`python -m layup_hf.trace FILE`: joins what workers have written aside, where a run has failed."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from .file import join


def main(arguments: Sequence[str]) -> None:
    """The command.

    Raises:
        SystemExit: With what is wrong.
    """
    if len(arguments) != 1 or arguments[0].startswith("-"):
        sys.exit("Usage: python -m layup_hf.trace FILE, the file that the option `trace` names.")
    try:
        parts = join(arguments[0])
    except OSError as error:
        sys.exit(str(error))
    print(f"{arguments[0]} has what was in {', '.join(part.name for part in parts)}.")


if __name__ == "__main__":
    main(sys.argv[1:])
