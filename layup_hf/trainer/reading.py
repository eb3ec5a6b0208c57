"""Reading files that somebody else may have written: what cannot be read is named, and nothing in it is run."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError, safe_open
from transformers.trainer import safe_globals

_UNREADABLE = (
    *(OSError, EOFError, SafetensorError, UnpicklingError, RecursionError, RuntimeError),
    *(ValueError, TypeError, KeyError, IndexError, AttributeError),  # what is there is something else
)
"""What reading a file raises that is damaged, was edited, or is of another kind. JSON's errors are `ValueError`s."""


@contextlib.contextmanager
def readable(folder: str | Path | None, files: Sequence[str] = ()) -> Iterator[None]:
    """Say which files of the checkpoint cannot be read, where reading them fails.

    Args:
        folder: The checkpoint.
        files: Names or patterns of the files that are read within. Looked at once more, only if reading has failed.

    Raises:
        ValueError: Some cannot; naming each, with the reason.
    """
    try:
        yield
    except _UNREADABLE as error:
        if type(error) is RuntimeError and "PytorchStreamReader" not in str(error):
            raise  # something else: a model of another shape, say
        damaged = {} if folder is None else unreadable(Path(folder), files)
        if not damaged and not isinstance(error, OSError | EOFError | SafetensorError | UnpicklingError):
            raise  # all files are as they should be
        found = "".join(f"\n  {name}: {reason}" for name, reason in damaged.items())
        raise ValueError(
            f"The checkpoint {folder} cannot be read, as it is incomplete or damaged. Resume from another one. "
            + (f"What cannot be read:{found}" if damaged else f"({_in_a_line(error)})")
        ) from error


def unreadable(folder: Path, files: Sequence[str]) -> dict[str, str]:
    """Of these files, by name, those that are there and cannot be read, each with the reason in a line."""
    found = {}
    for file in sorted({path for pattern in files for path in folder.glob(pattern)}):
        try:
            _read(file)
        except UnpicklingError:
            found[file.name] = "it holds something else than tensors and plain values, and nothing of that was run"
        except _UNREADABLE as error:
            found[file.name] = _in_a_line(error)
    return found


def _read(file: Path) -> None:
    """Read a file by what its name says that it is, without running anything in it."""
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 # it is no dict
                tensors.get_tensor(name)
    elif file.suffix == ".json":
        if not isinstance(json.loads(file.read_text(encoding="utf-8")), dict):
            raise ValueError("it is no JSON object")
    else:
        with safe_globals():  # numpy's arrays, which random states are
            torch.load(file, map_location="cpu", weights_only=True)


def _in_a_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"
