"""What versions of the libraries do differently: all forms are known here, and the rest of the package knows one.

The members that this is about are among those in `seams.py`. What differs in torch's optimizers is in `optim/adam.py`.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import transformers.trainer
from accelerate import Accelerator
from torch import nn
from transformers import Trainer, TrainingArguments


@contextlib.contextmanager
def uploading_by(upload_folder: Callable[..., Any], module: ModuleType = transformers.trainer) -> Iterator[None]:
    """Let what the Trainer uploads go through this function, which gets the arguments of `HfApi.upload_folder`.

    It calls `hf_api().upload_folder`; until transformers 5.9 `upload_folder`, imported from huggingface_hub.
    """
    if hasattr(module, "hf_api"):
        api = SimpleNamespace(upload_folder=upload_folder)
        name, other = "hf_api", lambda: api
    else:
        name, other = "upload_folder", upload_folder
    original = vars(module)[name]
    vars(module)[name] = other
    try:
        yield
    finally:
        vars(module)[name] = original


def steps_averaged(
    global_step: int, initial_step: int, finalize: Callable[..., Any] = Trainer._finalize_training
) -> int:
    """How many steps the Trainer takes the sum of losses to be of, when it makes `train_loss` of it.

    Those of this call of `train()`; until transformers 5.18 all, so that after a resume it is too small.
    """
    names = inspect.unwrap(finalize).__code__.co_names
    return global_step - initial_step if "_initial_global_step" in names else global_step


@contextlib.contextmanager
def prepared_once(accelerator: Accelerator, is_prepared: Callable[[nn.Module], bool]) -> Iterator[None]:
    """Let `accelerator.prepare` give back a model that has been prepared as it is.

    Older versions of accelerate (1.12 does, 1.15 does not) prepare it again, and wrap it in DDP.
    """
    stock = accelerator.prepare_model

    def prepare_model(model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        return model if is_prepared(model) else stock(model, *args, **kwargs)

    vars(accelerator)["prepare_model"] = prepare_model
    try:
        yield
    finally:
        del vars(accelerator)["prepare_model"]


@contextlib.contextmanager
def on_plain_cpu(args: TrainingArguments) -> Iterator[None]:
    """Let the Trainer load onto "cpu" where its device is "cpu:0".

    Until transformers 5.17 it would ask torch to restore tensors to that, which torch refuses.
    """
    device = args.device
    if device.type != "cpu":
        yield
        return
    vars(args)["_setup_devices"] = torch.device("cpu")
    try:
        yield
    finally:
        vars(args)["_setup_devices"] = device
