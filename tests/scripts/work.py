"""Trains a tiny GPT-2 on numbered samples and writes down who did what, when.

Several cases, with `--then` between their options, run one after the other in the same processes.
"""

import time
from dataclasses import dataclass

import torch
from torch.utils.data import Dataset, IterableDataset
from transformers import GPT2Config, GPT2LMHeadModel, HfArgumentParser, TrainerCallback
from worker import run_cases

from layup_hf import LayupConfig, LayupTrainer


@dataclass
class WorkConfig(LayupConfig):
    """`LayupConfig` with a choice of data and of faults."""

    samples: int = 64
    iterable: bool = False
    pace: float = 0.02
    """Seconds that each step takes at least, so that shares depend on delays and not on the machine."""
    slow: float = 0.0
    """Seconds that each step of rank 1 takes longer."""
    batch_sizes: str = ""
    """Batch size of each rank, as in `4/2`."""
    wish: str = ""
    """What rank 1's callback asks for after its 5th own step: evaluate, save, stop_epoch or stop_training."""
    evaluate_in_step: bool = False
    """Whether rank 0 calls evaluate() in on_step_end."""
    evaluate_at_epoch: bool = False
    """Whether every rank calls evaluate() in on_epoch_end."""
    evaluate_on_rank: int = -1
    """The only rank that calls evaluate() in on_epoch_end."""
    memory_for: int = 0
    """Samples of a batch that rank 1 has memory for; it runs out in its third step."""
    raise_on: str = ""
    """Rank that fails after its 5th step, and how: `1/memory` or `0/error`; or `1/evaluation` or `1/save`, in these."""


def number(index):
    tokens = (torch.arange(16) + index) % 64
    return {"input_ids": tokens, "labels": tokens, "index": torch.tensor(index)}


class Numbers(Dataset):
    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index >= self.count:
            raise IndexError(index)  # what ends a plain loop over the samples
        return number(index)


class Stream(IterableDataset):
    def __init__(self, count):
        self.count, self.epoch = count, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        for place in range(self.count):
            yield number((place + 7 * self.epoch) % self.count)


class NumberedTrainer(LayupTrainer):
    def training_step(self, model, inputs, *args, **kwargs):
        self.result["samples"].append(inputs.pop("index").tolist())
        memory, batch = self.args.memory_for, len(inputs["input_ids"])
        if self.args.process_index == 1 and 0 < memory < batch and len(self.result["samples"]) >= 3:
            raise torch.OutOfMemoryError(f"CUDA out of memory. No room for {batch} samples.")
        return super().training_step(model, inputs, *args, **kwargs)

    def prediction_step(self, model, inputs, *args, **kwargs):
        inputs.pop("index")
        if self.args.raise_on == f"{self.args.process_index}/evaluation":
            raise ArithmeticError("made on purpose")
        return super().prediction_step(model, inputs, *args, **kwargs)

    def _save_rng_state(self, output_dir):
        if self.args.raise_on == f"{self.args.process_index}/save":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        super()._save_rng_state(output_dir)


class Observer(TrainerCallback):
    def __init__(self, config, result):
        self.config, self.result, self.rank = config, result, result["rank"]

    def on_train_begin(self, args, state, control, optimizer, **kwargs):
        self.result["moments"] = sum(float(s["exp_avg"].abs().sum()) for s in optimizer.state.values())

    def on_step_begin(self, args, state, control, **kwargs):
        times, config = self.result["times"], self.config
        times.append(time.time())
        if len(times) == 3:
            print(f"rank {self.rank} is under way", flush=True)
        time.sleep(config.pace + (config.slow if self.rank == 1 else 0))
        rank, _, kind = config.raise_on.partition("/")
        if len(times) == 6 and rank == str(self.rank) and kind in ("memory", "error"):
            raise {"memory": torch.OutOfMemoryError, "error": ArithmeticError}[kind]("made on purpose")

    def on_step_end(self, args, state, control, **kwargs):
        result, wish = self.result, self.config.wish
        result["clock"].append(state.global_step)
        result["rates"].append(kwargs["lr_scheduler"].get_last_lr()[0])
        result["epochs"].append(state.epoch)
        if wish and self.rank == 1 and len(result["times"]) >= 5 and "wished" not in result:
            result["wished"] = state.global_step
            name = {"stop_epoch": "should_epoch_stop", "stop_training": "should_training_stop"}.get(wish)
            setattr(control, name or f"should_{wish}", True)
        if self.config.evaluate_in_step and self.rank == 0:
            self.trainer.evaluate()
        return control

    def note(self, event, state):
        self.result["events"].append([event, state.global_step, len(self.result["times"])])
        self.result["batches"].append(len(self.result["samples"]))

    def on_epoch_end(self, args, state, control, **kwargs):
        self.note("epoch", state)
        if self.config.evaluate_at_epoch or self.config.evaluate_on_rank == self.rank:
            self.trainer.evaluate()

    def on_evaluate(self, args, state, control, **kwargs):
        self.note("evaluate", state)

    def on_save(self, args, state, control, **kwargs):
        self.note("save", state)


def run_case(options):
    common = ["--use_cpu", "--report_to=none", "--remove_unused_columns=False", "--logging_steps=5"]
    config = HfArgumentParser(WorkConfig).parse_args_into_dataclasses([*common, *options])[0]
    rank = config.process_index
    if config.batch_sizes:
        config.per_device_train_batch_size = int(config.batch_sizes.split("/")[rank])
    lists = ("samples", "times", "clock", "rates", "events", "batches", "epochs")
    result = {"rank": rank, **{name: [] for name in lists}}
    torch.manual_seed(0)
    observer = Observer(config, result)
    trainer = NumberedTrainer(
        model=GPT2LMHeadModel(
            GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=2, n_positions=32, bos_token_id=0)
        ),
        args=config,
        train_dataset=Stream(config.samples) if config.iterable else Numbers(config.samples),
        eval_dataset=Numbers(8),
        callbacks=[observer],
    )
    trainer.result, observer.trainer = result, trainer
    output = trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    trainer.accelerator.wait_for_everyone()  # the next case may resume from what rank 0 has just written
    return result | {
        "steps": len(result["times"]),
        "global_step": output.global_step,
        "train_loss": output.training_loss,
        "tokens": trainer.state.num_input_tokens_seen,
        "max_steps": trainer.state.max_steps,
        "logs": trainer.state.log_history,
    }


run_cases(run_case)
