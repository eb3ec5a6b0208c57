"""One worker of `check.py`: a real `LayupTrainer` whose model is the quadratic of the simulation.

Launched by it; writes a list with one dict per case into `FOLDER/worker-RANK.json`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.utils import logging

from layup_hf import LayupConfig
from recipes.parts.training import leave_together

from ..common.trainers import CountingTrainer
from .settings import Settings


class SlowBackward(torch.autograd.Function):
    """Nothing in forward; takes time in backward."""

    @staticmethod
    def forward(ctx: Any, carry: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        return carry.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        time.sleep(ctx.seconds)
        return gradient, None


class Layer(nn.Module):
    """One block: adds its part of the loss to what it is given, and takes the time that a block takes."""

    def __init__(self, curvature: Tensor, settings: Settings) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.full_like(curvature, settings.start))
        self._curvature, self._settings = curvature, settings

    def forward(self, carry: Tensor, seconds: float, noise: Tensor) -> Tensor:
        """`carry` is a scalar, `seconds` the length of the whole step, `noise` of the gradient, of shape (c,)."""
        s = self._settings
        time.sleep(s.forward_share * seconds / s.blocks)
        part = (0.5 * self._curvature * (self.values - 1).square() + noise * self.values).sum()
        return SlowBackward.apply(carry + part, (1 - s.forward_share) * seconds / s.blocks)


class Quadratic(nn.Module):
    """The model. Every step takes another time, drawn by rank."""

    def __init__(self, settings: Settings, mean_seconds: float, slower: float, rank: int) -> None:
        super().__init__()
        curvatures = torch.tensor(settings.curvature(), dtype=torch.float32).view(settings.blocks, -1)
        self.layers = nn.ModuleList(Layer(curvature, settings) for curvature in curvatures)
        self._noise, self._shape = settings.noise, curvatures.shape
        self._seconds = mean_seconds * slower
        self._random = np.random.default_rng([settings.seed, rank])
        self._generator = torch.Generator().manual_seed(1000 * settings.seed + rank)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """The loss of one step; `x` is not used."""
        seconds = self._seconds * self._random.uniform(0.5, 1.5)
        noise = self._noise * torch.randn(self._shape, generator=self._generator)
        loss = torch.zeros(())
        for layer, part in zip(self.layers, noise, strict=True):
            loss = layer(loss, seconds, part)
        return {"loss": loss}


class Stopwatch(TrainerCallback):
    """When each own step began, and when the last one ended; all processes of a machine have one such clock."""

    def __init__(self) -> None:
        self.begun: list[float] = []
        self.ended = 0.0

    def on_step_begin(self, *args: object, **kwargs: object) -> None:
        self.begun.append(time.monotonic())

    def on_step_end(self, *args: object, **kwargs: object) -> None:
        self.ended = time.monotonic()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--cases", type=json.loads, required=True)
    options = parser.parse_args()
    state = PartialState(cpu=True)
    logging.set_verbosity_error()
    results = []
    for case in options.cases:
        settings = Settings(workers=state.num_processes, **case["settings"])
        slower = case["slower"] if state.process_index == state.num_processes - 1 else 1.0
        watch = Stopwatch()
        trainer = CountingTrainer(
            model=Quadratic(settings, case["mean_seconds"], slower, state.process_index),
            args=LayupConfig(
                output_dir=str(options.folder / "model"),
                use_cpu=True,
                max_steps=settings.steps,
                per_device_train_batch_size=1,
                learning_rate=settings.learning_rate,
                lr_scheduler_type="constant",
                optim="sgd",
                max_grad_norm=0.0,
                peers_per_step=settings.peers,
                offer_every=settings.offer_every,
                logging_strategy="no",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=[{"x": torch.zeros(1)}] * 64,
            callbacks=[watch],
        )
        trainer.train()
        logged = next(e for e in reversed(trainer.state.log_history) if "layup/consensus_distance" in e)
        results.append(
            {
                "rank": state.process_index,
                "times": [*watch.begun, watch.ended],
                "staleness": sorted(trainer.layup.staleness.items()),
                "consensus_distance": logged["layup/consensus_distance"],
                "mass": logged["layup/mass"],
            }
        )
    (options.folder / f"worker-{state.process_index}.json").write_text(json.dumps(results))
    leave_together(state)


if __name__ == "__main__":
    main()
