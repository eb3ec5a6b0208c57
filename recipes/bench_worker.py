"""One worker of `bench.py`: trains the same model by several methods in turn and says how fast, and how large.

Launched by `bench.py`; writes a list with one dict per round and method into `FOLDER/worker-RANK.json`.
"""

import argparse
import itertools
import json
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from corpus import load_corpus
from datasets import Dataset
from model import make_config, make_model
from tokens import VOCABULARY, cache_folder, cached_tokenizer, collate, make_blocks
from training import leave_together
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.utils import logging

from layup_hf import LayupConfig, LayupTrainer


class AloneTrainer(LayupTrainer):
    """Every worker for itself, with the Trainer's loop: what LayUp would be if communication cost nothing."""

    _shares_batches = False

    def _start_gossip(self) -> None:
        pass


class CountingTrainer(LayupTrainer):
    """Keeps what the engine has counted: `counts` and `staleness`, as of `GossipEngine`."""

    def _conclude(self) -> None:
        self.counts, self.staleness = self._engine.counts.copy(), self._engine.staleness.copy()
        super()._conclude()


class MeetingTrainer(LayupTrainer):
    """Notes how long the parts of a meeting take, apart from the wait for the others to come."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seconds: dict[str, list[float]] = {}

    def _timed(self, name: str, function: Callable[[], Any]) -> Any:
        begin = time.perf_counter()
        value = function()
        self.seconds.setdefault(name, []).append(time.perf_counter() - begin)
        return value

    def _what_all_want(self, own: Any) -> Any:
        return self._timed("agreeing", lambda: super(MeetingTrainer, self)._what_all_want(own))

    def _reach_consensus(self, purpose: str) -> None:
        if self._is_acting and self._agreed_at != self._steps_of_all:
            self._timed("consensus", lambda: super(MeetingTrainer, self)._reach_consensus(purpose))
        else:
            super()._reach_consensus(purpose)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        return self._timed("evaluation", lambda: super(MeetingTrainer, self).evaluation_loop(*args, **kwargs))


METHODS = {
    "layup": LayupTrainer,
    "ddp": Trainer,
    "alone": AloneTrainer,
    "logging": LayupTrainer,
    "meeting": MeetingTrainer,
}
ARGUMENTS: dict[str, dict[str, Any]] = {
    "alone": {"nesterov": "off"},  # AdamW as it is with one worker
    "logging": {"logging_steps": 1},
    "meeting": {"eval_strategy": "steps", "eval_steps": 5},
}
"""What differs from the common arguments."""


class Stopwatch(TrainerCallback):
    """Notes when each of this worker's own steps ended.

    Args:
        device: On which the steps are made.
        skipped: Steps at the beginning that do not count: allocator, caches, the optimizer's first state.
    """

    def __init__(self, device: torch.device, skipped: int = 5) -> None:
        self.times: list[float] = []
        self.device, self.skipped = device, skipped

    def on_optimizer_step(self, *args: object, **kwargs: object) -> None:
        if len(self.times) in (0, self.skipped) and self.device.type == "cuda":
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())

    def on_train_end(self, *args: object, **kwargs: object) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            self.times[-1] = time.perf_counter()

    @property
    def median_step(self) -> float:
        """Seconds from one step to the next, without the first steps."""
        return statistics.median(b - a for a, b in itertools.pairwise(self.times[self.skipped :]))


class PeakMemory:
    """Largest memory of this process in bytes, over what it was at the start.

    On CUDA, what the allocator handed out. On the CPU, the proportional set size, sampled by a thread: a page shared by
    several workers counts for each of them by its share, so that the sum over workers is what they really take.
    """

    def __init__(self, device: torch.device, sample: bool) -> None:
        self.device, self.sample = device, sample and device.type == "cpu"

    def __enter__(self) -> "PeakMemory":
        self.peak = self.start = self._proportional_set_size() if self.sample else 0
        if self.device.type == "cuda":
            self.start = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        if self.sample:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        if self.sample:
            self._thread.join()
        if self.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated()
        self.bytes = self.peak - self.start

    def _watch(self) -> None:
        while not self._stop.wait(0.01):
            self.peak = max(self.peak, self._proportional_set_size())

    @staticmethod
    def _proportional_set_size() -> int:
        lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def load_blocks(
    state: PartialState,
    block_size: int,
    count: int,
    vocab_size: int = VOCABULARY,
    train_file: str | None = None,
) -> tuple[PreTrainedTokenizerBase, Dataset]:
    """A tokenizer of the text, and `count` blocks of it. The default text if no file is given. Collective."""
    corpus, cache = load_corpus(train_file=train_file), cache_folder()
    with state.main_process_first():
        tokenizer = cached_tokenizer(corpus.train, corpus.column, vocab_size, cache)
        rows = (corpus.train, corpus.column, tokenizer, corpus.rows_are_documents)
        return tokenizer, make_blocks(*rows, block_size=block_size, most=count, name="training", cache=cache)


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
                "loss": losses[-1],
                "peak_bytes": memory.bytes,
                "meeting_seconds": getattr(trainer, "seconds", {}),
            }
            results.append(result)
            del trainer
    Path(options.folder, f"worker-{state.process_index}.json").write_text(json.dumps(results))
    leave_together(state)


if __name__ == "__main__":
    main()
