"""A tiny language model, its data and its options: for LayupTrainer and the stock Trainer beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from layup_hf import LayupConfig, LayupTrainer

BOTH = ((LayupTrainer, LayupConfig), (Trainer, TrainingArguments))
"""Ours, then theirs: a trainer and its configuration."""

CHECKPOINTING = (
    "activation_checkpointing" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient_checkpointing"
)
"""What transformers calls it: the second until 5.22."""


def gpt2(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=16))


def text(count: int = 32) -> list[dict[str, torch.Tensor]]:
    tokens = torch.randint(0, 50, (count, 8), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in tokens]


def arguments(folder: Path, cls: type = LayupConfig, **options: Any) -> Any:
    fixed = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "log_level": "error"}
    chosen = {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "max_grad_norm": 0.0}
    return cls(output_dir=str(folder), **{**fixed, **chosen, "logging_steps": 2, **options})


def same(model: nn.Module, other: nn.Module) -> bool:
    """Whether all weights and buffers are equal bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
