"""Options that are not possible, or not together: refused at construction, with the remedy."""

from __future__ import annotations

import importlib.util
import math
import os
from pathlib import Path
from typing import Any

from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers.optimization import GreedyLR
from transformers.trainer_utils import SaveStrategy, SchedulerType

from ..disk import errno_of_writing, nearest, remedy
from ..windows.straggler import StragglerConfig
from .muon import is_muon, muon_options
from .options import CHOICES, Options, require_types

_UNSTEPPABLE = {
    "layerwise": "it steps inside backward itself",
    "lomo": "it steps inside backward itself",
    "schedule_free": "it switches between training and evaluation weights",
    "grokadamw": "it keeps the state of all its parameters together",
}
"""Parts of the names of optimizers that cannot be stepped block by block, and why."""

_REFUSED = {
    "deepspeed": "DeepSpeed shards the model or its optimizer over the workers, LayUp trains a full replica on each",
    "fsdp": "FSDP shards the model over the workers, LayUp trains a full replica on each",
    "parallelism_config": "tensor and context parallelism split one model over the workers, LayUp trains a full "
    "replica on each",
}

_CHECKPOINTING = ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs")
"""The option's name, and the one until transformers 5.22, which newer versions still take."""


def check_options(args: Any) -> None:
    """Refuse values of LayUp's own options, and combinations that the arguments alone show to be impossible.

    Raises:
        ValueError: Naming the options and the remedy.
    """
    if isinstance(args, Options):
        require_types(args)
    _check_choices(args)
    peers = getattr(args, "peers_per_step", None)
    if peers is not None and peers < 1:
        raise ValueError(
            f"peers_per_step={peers}: a worker must offer to at least one peer. Leave it unset for the default."
        )
    _check_trace(getattr(args, "trace", None))
    if getattr(args, "straggler", None):
        StragglerConfig.parse(args.straggler)
    windows = getattr(args, "windows", "auto")
    if windows == "nixl" and importlib.util.find_spec("nixl") is None:
        raise ValueError("windows='nixl' needs the package nixl: pip install 'layup_hf[nixl]'.")
    checkpoints = getattr(args, "checkpoints", "wait")
    if checkpoints == "background" and args.save_on_each_node:
        raise ValueError(
            "checkpoints='background' and `save_on_each_node` exclude each other: one worker completes a checkpoint. "
            "Leave one of them out."
        )
    wire_dtype = getattr(args, "wire_dtype", "fp32")
    if wire_dtype != "fp32" and windows == "shared":
        raise ValueError(
            f"`wire_dtype={wire_dtype!r}` and `windows='shared'` exclude each other: shared memory is read in place. "
            "Leave `wire_dtype` unset, or use windows='auto' or 'nixl'."
        )
    if getattr(args, "offer_every", 1) < 1:
        raise ValueError(
            f"offer_every={args.offer_every}: it counts own steps from one offer of a block to the next. Use 1 or more."
        )
    second_moment = getattr(args, "second_moment", "auto")
    if second_moment == "mean" and windows == "nixl":
        raise ValueError(
            "`second_moment='mean'` and `windows='nixl'` exclude each other: moments of peers are read in shared "
            "memory. Leave one of the two at 'auto'."
        )
    _check_bias_options(args)
    lease = getattr(args, "lease_seconds", None)
    if lease is not None and not 1 <= lease < math.inf:
        raise ValueError(
            f"lease_seconds={lease}: workers renew their lease several times within it. Use at least 1 second."
        )

    for option, what in _REFUSED.items():
        if getattr(args, option, None):
            raise ValueError(
                f"`{option}` and LayUp exclude each other: {what}. Remove `{option}`, or train with the stock "
                "`Trainer`."
            )
    for option in _CHECKPOINTING:
        values = getattr(args, option, None)
        if isinstance(values, dict) and values.get("use_reentrant"):
            raise ValueError(
                f"`{option}={{'use_reentrant': True}}` and LayUp exclude each other: reentrant checkpointing runs "
                "backward inside backward, so a block would be stepped twice. Set `use_reentrant` to False."
            )
    optim = getattr(args, "optim", None) or ""
    if is_muon(optim):
        muon_options(args)  # refuses what it does not understand
    name = getattr(optim, "value", optim)
    for part, why in _UNSTEPPABLE.items():
        if part in name:
            raise ValueError(
                f"`optim={name!r}` and LayUp exclude each other: it cannot be stepped block by block, as {why}. Choose "
                "another one, such as 'adamw_torch'."
            )


def _check_choices(args: Any) -> None:
    """Refuse a value that is none of an option's."""
    for name, choices in CHOICES.items():
        value = getattr(args, name, choices[0])
        if value not in choices:
            *others, last = map(repr, choices)
            more = " To switch clipping off, set max_grad_norm=0." if name == "clip" else ""
            raise ValueError(f"{name}={value!r} is unknown: use {', '.join(others)} or {last}.{more}")


def _check_trace(file: str | None) -> None:
    """Refuse a file that could not be written when training has ended."""
    if file is None:
        return
    place = Path(file)
    if place.suffix != ".json":
        raise ValueError(f"trace={file!r}: viewers tell a trace by its ending. Name a file that ends with .json.")
    if place.is_dir():
        raise ValueError(f"trace={file!r} is a folder. Name a file in it, such as {str(place / 'trace.json')!r}.")
    above = nearest(place.absolute().parent)
    if not above.is_dir() or not os.access(above, os.W_OK):
        why = remedy(errno_of_writing(above))
        reason = f", as {why}" if why else ""
        raise ValueError(
            f"trace={file!r}: nothing can be written in {str(above)!r}{reason}. Name a file in another folder."
        )


def _check_bias_options(args: Any) -> None:
    """What the measurement of the gradient's bias cannot take apart."""
    every = getattr(args, "bias_every", 0)
    if every < 0:
        raise ValueError(f"bias_every={every}: measure in every so many steps, or never (0).")
    for option, usual, why in (
        ("gradient_accumulation_steps", 1, "the gradient is then of several forwards"),
        ("fp16", False, "the gradient is then scaled; use `bf16`"),
        ("torch_compile", False, "compiled layers have their parameters built in"),
    ):
        if every and getattr(args, option, usual) != usual:
            raise ValueError(
                f"`bias_every` and `{option}` exclude each other: {why}. Leave `{option}` at {usual!r} to measure."
            )


def check_sharing(args: Any) -> None:
    """Refuse ways to hand out batches that would make several workers wait for each other, or that they cannot share.

    Raises:
        ValueError: Naming the options and the remedy.
    """
    config = getattr(args, "accelerator_config", None) or {}
    values = config if isinstance(config, dict) else getattr(config, "__dict__", {})  # a dict, or a file, at first
    for option, instead in (
        ("dispatch_batches", "leave it unset, and every worker reads the data set itself"),
        ("split_batches", "set `per_device_train_batch_size` to what one worker is to take"),
    ):
        if values.get(option):
            raise ValueError(
                f"`accelerator_config={{'{option}': True}}` and LayUp with several workers exclude each other: all "
                f"would take each batch together. Remove `{option}`: {instead}."
            )
    shares = getattr(args, "shared_batches", True)
    if not shares and not values.get("use_seedable_sampler", True):
        raise ValueError(
            "`accelerator_config={'use_seedable_sampler': False}` and `shared_batches=False` exclude each other with "
            "several workers: they would wait for rank 0's random numbers in every epoch. Remove one of the two."
        )
    if shares and not getattr(args, "dataloader_in_order", True):
        raise ValueError(
            "`dataloader_in_order=False` and `shared_batches=True` exclude each other with several workers: each must "
            "know which batch it has got. Remove one of the two."
        )
    if shares and getattr(args, "train_sampling_strategy", None) == "batch_rebalance":
        raise ValueError(
            "`train_sampling_strategy='batch_rebalance'` and `shared_batches=True` exclude each other with several "
            "workers: it makes a shard for each in advance. Use 'group_by_length', or set `shared_batches=False`."
        )


def check_evaluations(args: Any, scheduler: Any = None) -> None:
    """Refuse what needs the metrics of a step before the next one, where they come later.

    Args:
        args: The Trainer's.
        scheduler: The user's own of the learning rate, if there is one.

    Raises:
        ValueError: Naming the options and the remedy.
    """
    if getattr(args, "evaluations", "wait") != "background":
        return
    needing = {}
    if isinstance(scheduler, ReduceLROnPlateau | GreedyLR):
        needing[type(scheduler).__name__] = "it sets the learning rate of all workers by the metrics"
    if args.lr_scheduler_type in (SchedulerType.REDUCE_ON_PLATEAU, SchedulerType.GREEDY):
        needing[f"lr_scheduler_type='{args.lr_scheduler_type.value}'"] = (
            "it sets the learning rate of all workers by the metrics"
        )
    if args.save_strategy == SaveStrategy.BEST:
        needing["save_strategy='best'"] = "it saves the model that has just been evaluated"
    for what, why in needing.items():
        raise ValueError(
            f"`evaluations='background'` and `{what}` exclude each other with several workers: {why}, and they train "
            "on before the metrics are there. Use another one, or `evaluations='wait'`."
        )
