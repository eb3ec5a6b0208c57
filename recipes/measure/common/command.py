"""The command line of what is run as a module."""

import argparse
from pathlib import Path


def command_line(module: str, about: str | None) -> argparse.ArgumentParser:
    """A parser whose help shows the command as it is typed.

    Args:
        module: What is run, by its full name.
        about: Its docstring, shown as it stands there.
    """
    return argparse.ArgumentParser(
        prog=f"python -m {module}", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_worker_arguments(parser: argparse.ArgumentParser) -> None:
    """Of what launches itself as its workers, which write what they have measured into a folder."""
    parser.add_argument("--folder", type=Path, default=Path("bench-output"))
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)


def passed_on(options: argparse.Namespace, *names: str) -> list[str]:
    """Options with one value each, as arguments for the workers."""
    return [f"--{name}={getattr(options, name)}" for name in names]
