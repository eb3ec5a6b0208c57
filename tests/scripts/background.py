"""Trains a tiny GPT-2 whose checkpoints are written in the background, slowly, and writes down what was saved.

Several cases, with `--then` between their options, run one after the other in the same processes.
"""

import hashlib
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from stock import gpt2, text
from transformers import HfArgumentParser, TrainerCallback
from worker import run_cases

from layup_hf import LayupConfig, LayupTrainer
from layup_hf.blocks import snapshot
from layup_hf.trainer import hollow

hollow._SMALL, snapshot._LEAST, snapshot.PIECE = 1, 64, 512  # as if the model were large
write = hollow._write


@dataclass
class BackgroundConfig(LayupConfig):
    """`LayupConfig` with a pace and with faults."""

    slow: float = 0.001
    """Seconds that each write takes longer."""
    pause: float = 0.02
    """Seconds that each step takes longer."""
    fault: str = ""
    """What happens at rank 1's second checkpoint: full, error or sigterm."""


def digest(tensors):
    return hashlib.sha256(
        b"".join(t.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes() for t in tensors)
    ).hexdigest()


def moments(optimizer_state):
    return digest(state[name] for _, state in sorted(optimizer_state.items()) for name in ("exp_avg", "exp_avg_sq"))


class Saving(LayupTrainer):
    saves = 0

    def _save_rng_state(self, output_dir):
        """While the workers stand still: what there is to be saved."""
        super()._save_rng_state(output_dir)
        self.saves += 1
        self.result["saved"][self.state.global_step] = {
            "model": digest(self.model.state_dict().values()),
            "moments": moments(self.optimizer.state_dict()["state"]),
            "steps": len(self.result["times"]),
        }


class Pace(TrainerCallback):
    def __init__(self, config, result):
        self.config, self.result, self.rank = config, result, result["rank"]

    def on_train_begin(self, args, state, control, optimizer, **kwargs):
        self.result["begins"] = moments(optimizer.state_dict()["state"])
        layup = self.trainer.layup
        if self.config.merge_at == "arrival":
            locks, snapshots = layup.exchange.engine._locks, layup.model.snapshots
            before_step = snapshots.before_step

            def watched(block):
                self.result["alone"].append(locks[block]._is_owned())
                before_step(block)

            snapshots.before_step = watched

    def on_step_begin(self, args, state, control, **kwargs):
        self.result["times"].append(time.time())
        if len(self.result["times"]) == 3:
            print(f"rank {self.rank} is under way", flush=True)
        time.sleep(self.config.pause)
        self.result["unfinished"] += Path(args.output_dir, "_unfinished").is_dir()
        if self.rank == 1 and self.trainer.saves == 2 and not self.result["done"]:
            if self.config.fault == "error":
                raise ArithmeticError("made on purpose")
            if self.config.fault == "sigterm":
                os.kill(os.getpid(), signal.SIGTERM)
            self.result["done"] = True


def run_case(options):
    common = ["--use_cpu", "--report_to=none", "--disable_tqdm=True", "--save_strategy=steps", "--logging_steps=4"]
    common += ["--per_device_train_batch_size=4", "--checkpoints=background"]
    config = HfArgumentParser(BackgroundConfig).parse_args_into_dataclasses([*common, *options])[0]
    result = {
        "rank": config.process_index,
        "saved": {},
        "times": [],
        "unfinished": 0,
        "done": False,
        "error": "",
        "alone": [],
    }

    def slowly(file, piece):
        time.sleep(config.slow)
        if config.fault == "full" and config.process_index == 1 and trainer.saves == 2:
            raise OSError(28, "No space left on device")
        write(file, piece)

    hollow._write = slowly
    pace = Pace(config, result)
    trainer = Saving(model=gpt2(), args=config, train_dataset=text(256), eval_dataset=text(8), callbacks=[pace])
    trainer.result, pace.trainer = result, trainer
    try:
        trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    except (RuntimeError, ArithmeticError, SystemExit) as error:
        result["error"] = f"{type(error).__name__}: {error}"
    result["left"] = Path(config.output_dir, "_unfinished").exists()
    result["logs"] = trainer.state.log_history
    trainer.accelerator.wait_for_everyone()
    return result


run_cases(run_case)
