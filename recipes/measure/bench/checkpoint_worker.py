"""One worker of `checkpoints.py`; writes `FOLDER/worker-RANK.json`."""

import argparse
import json
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback
from transformers.utils import logging

from layup_hf import LayupConfig, LayupTrainer
from recipes.parts.model import make_config, make_model
from recipes.parts.tokens import collate
from recipes.parts.training import leave_together

from ..common.meters import PeakMemory, Stopwatch
from ..common.text import load_blocks


class Watch(TrainerCallback):
    """Notes what each checkpoint has taken, when the trainer knows it."""

    def __init__(self) -> None:
        self.trainer: LayupTrainer | None = None
        self.written: dict[str, dict[str, float]] = {}

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.look()

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        self.look()  # right after a checkpoint has been begun, the one before it is known

    def look(self) -> None:
        assert self.trainer is not None
        latest = self.trainer.layup.checkpoints.latest
        if latest is not None:
            self.written[latest.name] = {"standing": latest.standing, "writing": latest.writing}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch_size", type=int, required=True)
    parser.add_argument("--block_size", type=int, required=True)
    parser.add_argument("--config_overrides", required=True)
    parser.add_argument("--ways", required=True)
    parser.add_argument("--memory", action="store_true")
    options = parser.parse_args()

    logging.set_verbosity_error()
    state = PartialState(cpu=True)
    tokenizer, blocks = load_blocks(state, options.block_size, options.steps * options.batch_size * state.num_processes)
    config = make_config(None, options.config_overrides, tokenizer, options.block_size)
    results, size = [], 0
    for turn in range(options.rounds):
        for way in options.ways.split(","):
            state.wait_for_everyone()
            output, stopwatch, watch = options.folder / "out", Stopwatch(state.device, 2), Watch()
            args = LayupConfig(
                output_dir=str(output),
                use_cpu=True,
                max_steps=options.steps,
                per_device_train_batch_size=options.batch_size,
                save_strategy="no" if way == "none" else "steps",
                save_steps=options.steps // 2,
                save_total_limit=1,
                checkpoints="background" if way == "background" else "wait",
                seed=turn,
                logging_steps=options.steps,
                report_to="none",
                disable_tqdm=True,
                log_level="error",
            )
            with PeakMemory(state.device, options.memory) as memory:
                trainer = LayupTrainer(
                    model=make_model(None, config, seed=turn),
                    args=args,
                    train_dataset=blocks,
                    data_collator=collate,
                    callbacks=[stopwatch, watch],
                )
                watch.trainer = trainer
                begin = time.perf_counter()
                trainer.train()
                seconds = time.perf_counter() - begin
            watch.look()
            size = max([size, sum(file.stat().st_size for file in output.rglob("*") if file.is_file())])
            steps = [b - a for a, b in zip(stopwatch.times[2:], stopwatch.times[3:], strict=False)]
            results.append(
                {
                    "rank": state.process_index,
                    "round": turn,
                    "way": way,
                    "parameters": trainer.model.num_parameters(),
                    "bytes": size,
                    "written": list(watch.written.values()),
                    "step_seconds": statistics.median(steps),
                    "seconds": seconds,
                    "peak_bytes": memory.bytes,
                }
            )
            watch.trainer = None
            del trainer
            state.wait_for_everyone()
            if state.is_main_process:
                shutil.rmtree(output, ignore_errors=True)
    (options.folder / f"worker-{state.process_index}.json").write_text(json.dumps(results))
    leave_together(state)


if __name__ == "__main__":
    main()
