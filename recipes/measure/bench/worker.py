"""One worker of the bench: trains the same model by several methods in turn and says how fast, and how large.

Launched by `run.py`; writes a list with one dict per round and method into `FOLDER/worker-RANK.json`.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from transformers.utils import logging

from layup_hf import LayupConfig, LayupTrainer
from recipes.parts.model import make_config, make_model
from recipes.parts.tokens import collate
from recipes.parts.training import leave_together

from ..common import trainers
from ..common.meters import PeakMemory, Stopwatch
from ..common.text import load_blocks


class MeetingTrainer(LayupTrainer):
    """Notes how long the parts of a meeting take, apart from the wait for the others to come."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seconds: dict[str, list[float]] = {}
        run = self.layup
        ask, agree = run.meetings.what_all_want, run.agreement.agree
        run.meetings.what_all_want = lambda own: self._timed("agreeing", lambda: ask(own))
        run.agreement.agree = lambda: self._timed("consensus", agree) if run.state.is_acting else agree()

    def _timed(self, name: str, function: Callable[[], Any]) -> Any:
        begin = time.perf_counter()
        value = function()
        self.seconds.setdefault(name, []).append(time.perf_counter() - begin)
        return value

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        return self._timed("evaluation", lambda: super(MeetingTrainer, self).evaluation_loop(*args, **kwargs))


METHODS = {**trainers.METHODS, "logging": LayupTrainer, "meeting": MeetingTrainer, "every_peer": LayupTrainer}
ARGUMENTS: dict[str, dict[str, Any]] = {
    "alone": {"nesterov": "off"},  # AdamW as it is with one worker
    "logging": {"logging_steps": 1},
    "every_peer": {"peers_per_step": 7},
    "meeting": {"eval_strategy": "steps", "eval_steps": 5},
}
"""What differs from the common arguments."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--methods", required=True)
    parser.add_argument("--rounds", type=int, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--skipped", type=int, required=True)
    parser.add_argument("--batch_size", type=int, required=True)
    parser.add_argument("--block_size", type=int, required=True)
    parser.add_argument("--config_overrides", default="")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--optim", required=True)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--folder", required=True)
    options = parser.parse_args()

    logging.set_verbosity_error()
    state = PartialState(cpu=options.device == "cpu")
    count = options.steps * options.batch_size * state.num_processes
    tokenizer, blocks = load_blocks(state, options.block_size, count)
    config = make_config(None, options.config_overrides, tokenizer, options.block_size)

    results = []
    for turn in range(options.rounds):
        for method in options.methods.split(","):
            state.wait_for_everyone()
            with PeakMemory(state.device, options.memory) as memory:
                stopwatch = Stopwatch(state.device, options.skipped)
                common = dict(
                    output_dir=options.folder,
                    use_cpu=state.device.type == "cpu",
                    max_steps=options.steps,
                    per_device_train_batch_size=options.batch_size,
                    learning_rate=1e-3,
                    seed=turn,
                    bf16=options.bf16,
                    optim=options.optim,
                    logging_steps=options.steps,
                    save_strategy="no",
                    report_to="none",
                    disable_tqdm=True,
                    log_level="error",
                    ddp_find_unused_parameters=False,
                )
                args = LayupConfig(**{**common, **ARGUMENTS.get(method, {})})
                trainer = METHODS[method](
                    model=make_model(None, config, seed=turn),
                    args=args,
                    train_dataset=blocks,
                    eval_dataset=blocks.select(range(min(32, len(blocks)))),
                    data_collator=collate,
                    callbacks=[stopwatch],
                )
                trainer.train()
            losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
            peers = [e["layup/peers_per_step"] for e in trainer.state.log_history if "layup/peers_per_step" in e]
            times = stopwatch.times[options.skipped :]
            result = {
                "rank": state.process_index,
                "round": turn,
                "method": method,
                "parameters": trainer.model.num_parameters(),
                "tokens_per_second": (len(times) - 1)
                * options.batch_size
                * options.block_size
                / (times[-1] - times[0]),
                "step_seconds": stopwatch.median_step,
                "processor_seconds": stopwatch.processor_step,
                "loss": losses[-1],
                "peers_per_step": peers[-1] if peers else None,
                "peak_bytes": memory.bytes,
                "meeting_seconds": getattr(trainer, "seconds", {}),
            }
            results.append(result)
            del trainer
    Path(options.folder, f"worker-{state.process_index}.json").write_text(json.dumps(results))
    leave_together(state)


if __name__ == "__main__":
    main()
