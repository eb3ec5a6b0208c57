"""The command line of what is run as a module."""

import argparse


def command_line(module: str, about: str | None) -> argparse.ArgumentParser:
    """A parser whose help shows the command as it is typed.

    Args:
        module: What is run, by its full name.
        about: Its docstring, shown as it stands there.
    """
    return argparse.ArgumentParser(
        prog=f"python -m {module}", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
