"""Whether LayUp can train with a model, an optimizer, data, and what has started the workers: else refused at
construction, with the remedy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from ..fleet.started import launches
from ..optim.adam import is_plain_adam
from .checks import check_evaluations, check_sharing
from .muon import is_muon
from .options import Options
from .streams import is_split_by_node

_TORCH_ADAMW = (OptimizerNames.ADAMW_TORCH, OptimizerNames.ADAMW_TORCH_FUSED)


def check_runtime(trainer: Any) -> None:
    """Refuse what only the running process shows: the launcher's settings and the devices.

    Raises:
        ValueError: Naming the setting and the remedy.
    """
    args = trainer.args
    distributed = trainer.accelerator.distributed_type.value
    if distributed in ("DEEPSPEED", "FSDP", "MEGATRON_LM", "XLA", "TP"):
        raise ValueError(
            f"The launcher asks for {distributed}, which LayUp excludes: every worker trains a full replica. Launch "
            "with `accelerate launch --multi_gpu --num_processes N`, without a plugin for sharding."
        )
    if trainer.optimizer is not None:
        check_optimizer(trainer.optimizer, args, trainer.accelerator.scaler)
    elif trainer.optimizer_cls_and_kwargs is None:  # it is made by `optim`, when training begins
        skips = is_muon(args.optim) or args.optim == OptimizerNames.ADAMW_TORCH_FUSED
        is_adamw = is_muon(args.optim) or args.optim in _TORCH_ADAMW
        _refuse_optimizer(f"optim={args.optim.value!r}", args, trainer.accelerator.scaler, skips, is_adamw)
    if getattr(trainer, "is_distributed_loading_by_transformers", False):
        raise ValueError(
            "The model was loaded in shards (`distributed_config`), which LayUp excludes: every worker trains a full "
            "replica. Load it without."
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"One process sees {args.n_gpu} GPUs and would use DataParallel, which LayUp excludes. Start one process "
            f"per GPU: `accelerate launch --multi_gpu --num_processes {args.n_gpu} script.py`."
        )
    if has_several_workers(args):
        _check_several_workers(trainer)


def has_several_workers(args: Any) -> bool:
    """Whether this process is one of several workers, or is about to join some."""
    return args.world_size > 1 or getattr(args, "job_to_join", None) is not None


def _check_several_workers(trainer: Any) -> None:
    """What one process alone may do.

    Raises:
        ValueError: Naming the setting and the remedy.
    """
    args = trainer.args
    check_sharing(args)
    check_evaluations(args, getattr(trainer, "lr_scheduler", None))
    if launches() > 1 and not isinstance(args, Options):
        raise ValueError(
            f"A plain {type(args).__name__} and workers that are started by several launches exclude each other: the "
            "network interface is chosen, and a running job found, when a configuration with LayUp's options is made. "
            "Use `LayupConfig`, or a configuration with `LayupOptions`."
        )
    if args.device.type not in ("cpu", "cuda"):
        raise ValueError(
            f"The device {args.device.type!r} and LayUp with several workers exclude each other: they can read each "
            "other's memory on CPUs and CUDA GPUs only. Set `use_cpu=True`, start one process, or use the stock "
            "`Trainer`."
        )
    losses = getattr(trainer, "loss", None)
    for loss in losses.values() if isinstance(losses, Mapping) else [losses]:
        parts = loss.modules() if isinstance(loss, nn.Module) else [loss]
        gathering = next((part for part in parts if getattr(part, "gather_across_devices", False)), None)
        if gathering is not None:
            raise ValueError(
                f"{type(gathering).__name__}(gather_across_devices=True) and LayUp with several workers exclude each "
                "other: all would wait for each other in every step. Leave `gather_across_devices` at False."
            )


def check_model(model: nn.Module, args: TrainingArguments) -> None:
    """Refuse a model that cannot be trained by block, or not by several workers.

    Raises:
        ValueError: With the remedy.
    """
    if not has_several_workers(args):
        return
    if any(isinstance(module, nn.SyncBatchNorm) for module in model.modules()):
        raise ValueError(
            "SyncBatchNorm and LayUp exclude each other: in every forward all workers would wait for each other. "
            "Use BatchNorm: its running statistics are exchanged with the block that it is in."
        )
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    strange = next((one for one in trained if one[1].device.type not in ("cpu", "cuda")), None)
    if strange is not None:
        raise ValueError(
            f"The parameter {strange[0]} is on a device {strange[1].device.type!r}, which LayUp with several workers "
            "excludes: they can read each other's memory on CPUs and CUDA GPUs only. Load the model onto one of these."
        )


def check_search(args: TrainingArguments) -> None:
    """Refuse a search for hyperparameters with several workers.

    Raises:
        ValueError: With the remedy.
    """
    if args.world_size > 1:
        raise ValueError(
            "hyperparameter_search() and LayUp with several workers exclude each other: a trial that one worker "
            "prunes would leave the others waiting. Search with one process, or start a run for each trial."
        )


def check_optimizer(optimizer: torch.optim.Optimizer, args: TrainingArguments, scaler: Any) -> None:
    """Refuse an optimizer that cannot do what the options ask of it.

    Args:
        optimizer: The user's own, or what the Trainer has made.
        args: The Trainer's.
        scaler: Of the loss, or None.

    Raises:
        ValueError: Naming the option and the remedy.
    """
    skips = getattr(optimizer, "_step_supports_amp_scaling", False)
    _refuse_optimizer(type(optimizer).__name__, args, scaler, skips, is_plain_adam(optimizer))


def _refuse_optimizer(name: str, args: TrainingArguments, scaler: Any, skips: bool, is_adamw: bool) -> None:
    """For an optimizer that there is, and for one that is yet to be made."""
    if scaler is not None and not skips and getattr(args, "clip", "auto") == "estimate":
        raise ValueError(
            f"`fp16` and {name} exclude each other with `clip='estimate'`: it cannot skip a block's step on the "
            "device. Use `optim='adamw_torch_fused'` (or a torch optimizer with `fused=True`), `clip='exact'`, or "
            "`bf16`."
        )
    for option, value in (("second_moment", "mean"), ("nesterov", "on")):
        if getattr(args, option, "auto") == value and not is_adamw:
            raise ValueError(
                f"`{option}={value!r}` and {name} exclude each other: it needs torch's AdamW without `amsgrad` "
                "and `maximize`, with one pair of betas, of which the first is not 0 (or such an Adam without weight "
                f"decay). Use `optim='adamw_torch'`, or leave `{option}` at 'auto'."
            )


def check_data(dataset: Any, args: TrainingArguments) -> None:
    """Refuse a training set that several workers cannot share, or that has fewer steps in an epoch than there are.

    Raises:
        ValueError: With the numbers and the remedy.
    """
    if not has_several_workers(args):
        return
    if is_split_by_node(dataset):
        raise ValueError(
            "`split_dataset_by_node` and LayUp with several workers exclude each other: they share the training set, "
            "or take their shards of it, so parts of it would be left out. Pass the whole, as it is before the split."
        )
    try:
        length = sum(map(len, dataset.values())) if isinstance(dataset, Mapping) else len(dataset)
    except TypeError:  # of no known length
        return
    group = getattr(args, "num_generations", None)
    if group:
        samples = args.per_device_train_batch_size * (getattr(args, "steps_per_generation", None) or 1) // group
        steps, what = length // samples, "rollouts"
    else:
        samples = args.train_batch_size * args.gradient_accumulation_steps
        dropped = length % args.train_batch_size if args.dataloader_drop_last else 0
        steps, what = -(-(length - dropped) // samples), "steps"
    if steps < args.world_size:
        raise ValueError(
            f"The training set has {length} samples, {steps} {what} of {samples}: fewer than the "
            f"{args.world_size} workers. Start at most {max(steps, 1)} workers, lower `per_device_train_batch_size` or "
            "`gradient_accumulation_steps`, or train on more data."
        )
