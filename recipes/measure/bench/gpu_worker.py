"""One worker of `gpu.py`, where several share a device; writes `FOLDER/worker-RANK.json`."""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback
from transformers.utils import logging

from layup_hf import LayupConfig
from recipes.parts.model import make_config, make_model
from recipes.parts.tokens import collate
from recipes.parts.training import leave_together

from ..common.text import load_blocks
from ..common.trainers import CountingTrainer
from .gpu import WAITING

STEPS, FIRST, PROFILED = 40, 10, 10


class Profile(TrainerCallback):
    """Notes what the CUDA runtime was asked for in some steps, logging and meetings not among them."""

    def __init__(self) -> None:
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        self.profiler = profile(activities=activities)
        self.own_steps = 0

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.own_steps += 1
        if self.own_steps == FIRST:
            self.profiler.start()

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        if self.own_steps == FIRST + PROFILED - 1:
            self.profiler.stop()

    def waits(self) -> dict[str, int]:
        return {event.key: event.count for event in self.profiler.key_averages() if event.key in WAITING}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--batch_size", type=int, required=True)
    parser.add_argument("--block_size", type=int, required=True)
    parser.add_argument("--config_overrides", required=True)
    options = parser.parse_args()

    logging.set_verbosity_error()
    args = LayupConfig(
        output_dir=str(options.folder),
        use_cpu=options.device == "cpu",
        ddp_backend="gloo",
        max_steps=STEPS,
        per_device_train_batch_size=options.batch_size,
        bf16=True,
        logging_steps=10**6,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        log_level="error",
    )
    state = PartialState()
    count = STEPS * options.batch_size * state.num_processes
    tokenizer, blocks = load_blocks(state, options.block_size, count)
    config = make_config(None, options.config_overrides, tokenizer, options.block_size)
    watch = Profile()
    trainer = CountingTrainer(
        model=make_model(None, config, seed=1),
        args=args,
        train_dataset=blocks,
        data_collator=collate,
        callbacks=[watch],
    )
    trainer.train()
    result = {
        "rank": state.process_index,
        "digest": sum(float(parameter.detach().double().sum()) for parameter in trainer.model.parameters()),
        "mass": next(entry["layup/mass"] for entry in trainer.state.log_history[::-1] if "layup/mass" in entry),
        "merges": trainer.layup.counts["merges"],
        "profiled": PROFILED,
        "waits": watch.waits(),
    }
    (options.folder / f"worker-{state.process_index}.json").write_text(json.dumps([result]))
    leave_together(state)


if __name__ == "__main__":
    main()
