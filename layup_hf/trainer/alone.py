"""One process that trains alone where several were probably meant."""

from __future__ import annotations

import os

import torch
from transformers import TrainingArguments


def why_alone(args: TrainingArguments) -> str | None:
    """What speaks for several workers, and how to start them; None where one process was meant, or there are several.

    Args:
        args: The Trainer's.
    """
    if args.world_size > 1 or getattr(args, "job_to_join", None) is not None:
        return None
    if _was_asked_for_several():
        return (
            "accelerate was asked for several processes and has started one, as it does with `--cpu` or where it sees "
            "no GPU. Launch with `accelerate launch --multi_gpu --num_processes N`, also on CPUs (with `use_cpu=True`)"
        )
    gpus = torch.cuda.device_count() if args.device.type == "cuda" else 0
    if gpus > 1:
        return f"{gpus} GPUs are visible. Launch with `accelerate launch --multi_gpu --num_processes {gpus}`"
    return None


def _was_asked_for_several() -> bool:
    """accelerate's launcher of one process says where several would meet if it was asked for them."""
    by_accelerate = "ACCELERATE_MIXED_PRECISION" in os.environ
    return by_accelerate and "MASTER_PORT" in os.environ and "WORLD_SIZE" not in os.environ
