"""Whether this process is the doctor. Imports nothing, as it is asked before anything else is imported."""

from __future__ import annotations

import sys


def is_called() -> bool:
    """Whether `python -m layup_hf` is just importing the package: what it lacks is then reported, with all else.

    While Python looks for a module that is to be run, `sys.argv[0]` is "-m".
    """
    if sys.argv[:1] != ["-m"]:
        return False
    name = sys.orig_argv[-len(sys.argv)]
    return name.removeprefix("-m").removesuffix(".__main__") == __name__.partition(".")[0]
