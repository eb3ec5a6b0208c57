"""Whether what a checkpoint has is of this run's model and optimizer: else that is said, with the file's name."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

_AS_THE_PARAMETER = (
    *("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer"),
    *("square_avg", "grad_avg", "acc_delta", "sum"),
)
"""What optimizers keep in the parameter's own shape. `load_state_dict` does not compare it, and a kernel reads on."""


def require_model(folder: Path, model: torch.nn.Module) -> None:
    """Make sure that the weights in a checkpoint are those of this model, before any of them are loaded.

    Looks at names, shapes and types, and reads no weights. Of adapters, which libraries load in their own way, and of
    weights in older formats, nothing is known.

    Raises:
        ValueError: They are not, naming the file.
    """
    own = model.state_dict()
    found = False
    files = _weights_in(folder)
    for file in files:
        with safe_open(file, framework="pt") as weights:
            for name in sorted(own.keys() & weights.keys()):
                found = True
                piece = weights.get_slice(name)
                shape, numbers = tuple(piece.get_shape()), piece.get_dtype()
                if shape != tuple(own[name].shape):
                    raise _other(file, f"{name!r} has the shape {shape} there, and {tuple(own[name].shape)} here")
                if own[name].is_floating_point() and numbers[0] in "IUB" and not numbers.startswith("BF"):
                    raise _other(file, f"{name!r} is of whole numbers there ({numbers}), and of {own[name].dtype} here")
    if files and own and not found:
        raise _other(files[0], "it has none of this model's weights")


def _weights_in(folder: Path) -> list[Path]:
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        return [folder / Path(name).name for name in names]
    return [folder / SAFE_WEIGHTS_NAME] if (folder / SAFE_WEIGHTS_NAME).is_file() else []


def _other(file: Path, why: str) -> ValueError:
    return ValueError(
        f"{file} is of another model than this run's: {why}. Resume from a checkpoint of this model, or leave out "
        "`resume_from_checkpoint`."
    )


@contextlib.contextmanager
def fitting_optimizer(file: Path, optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Around what loads an optimizer's state: make sure that it is of this optimizer, over this model.

    Raises:
        ValueError: It is not, naming the file.
    """
    said = [set(group) & optimizer.defaults.keys() for group in optimizer.param_groups]
    try:
        yield
    except (ValueError, KeyError, TypeError) as error:  # as torch says it
        raise _other_state(file, f"{error}".removesuffix(".")) from error
    for group, names in zip(optimizer.param_groups, said, strict=True):  # torch adds to the defaults while it loads
        missing = sorted(names - group.keys())
        if missing:
            raise _other_state(file, f"nothing is said there of {', '.join(map(repr, missing))}")
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    for number, parameter in enumerate(parameters):
        for name in _AS_THE_PARAMETER:
            value = optimizer.state.get(parameter, {}).get(name)
            if isinstance(value, torch.Tensor) and value.shape != parameter.shape:
                shapes = f"the shape {tuple(value.shape)}, and the parameter {tuple(parameter.shape)}"
                raise _other_state(file, f"{name!r} of parameter {number} has {shapes}")


def _other_state(file: Path, why: str) -> ValueError:
    return ValueError(
        f"{file} is of another optimizer than this run's, or of another model's: {why}. Resume from another "
        "checkpoint; or remove the file, to go on with rank 0's optimizer state, or without that, with a new one."
    )
