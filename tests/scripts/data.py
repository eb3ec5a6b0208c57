"""Trains on data of many kinds, one case after the other, and writes what a test wants to know.

python data.py FOLDER CASE...
"""

import logging
import random
import sys
from collections import Counter

import datasets
import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather, gather_object
from datasets.distributed import split_dataset_by_node
from stock import arguments, gpt2
from torch.utils.data import Dataset, IterableDataset, Sampler
from transformers import TrainerCallback
from worker import leave, same_everywhere, write_result

from layup_hf import LayupTrainer

FOLDER = sys.argv[1]
ROWS = [{"input_ids": [number % 50] * 8, "labels": [number % 50] * 8, "number": number} for number in range(96)]


class Recorder(LayupTrainer):
    """Writes down which samples it uses."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.used.extend(inputs.pop("number").tolist())
        return super().compute_loss(model, inputs, *args, **kwargs)


def train(data, trainer_class=Recorder, **options):
    """Train; what all workers have used, or why they have not."""
    chosen = {"max_steps": 12, "remove_unused_columns": False, **options}
    try:
        trainer = trainer_class(model=gpt2(), args=arguments(FOLDER, **chosen), train_dataset=data)
        trainer.used = []
        output = trainer.train()
    except (ValueError, RuntimeError) as error:
        return {"error": type(error).__name__, "message": str(error)}
    used = Counter(gather_object(trainer.used))
    return {
        "distinct": len(used),
        "most": max(used.values(), default=0),
        "least": min(used.values(), default=0),
        "global_step": output.global_step,
        "epochs": [entry["epoch"] for entry in trainer.state.log_history],
        "epoch": trainer.state.epoch,
        "loss": output.training_loss,
    }


# ---- Streams of datasets ----


def stream():
    return datasets.Dataset.from_list(ROWS).to_iterable_dataset(num_shards=4)


def interleaved(seed):
    parts = [stream().filter(lambda row, rest=rest: row["number"] % 2 == rest) for rest in range(2)]
    return datasets.interleave_datasets(
        parts, [0.5, 0.5], seed=seed, stopping_strategy="all_exhausted_without_replacement"
    )


SHARDS = {"shared_batches": False}


def streams():
    return {
        "seeded": train(stream().shuffle(seed=1, buffer_size=32)),
        "unseeded": train(stream().shuffle(buffer_size=32)),
        "unseeded, in shards": train(stream().shuffle(buffer_size=32), **SHARDS),
        "mapped": train(stream().shuffle(seed=1, buffer_size=32).map(lambda row: row).filter(lambda row: True)),
        "unseeded, mapped": train(stream().shuffle(buffer_size=32).map(lambda row: row).take(90)),
        "interleaved": train(interleaved(seed=1)),
        "interleaved, unseeded": train(interleaved(seed=None)),
        "split": train(split_dataset_by_node(stream(), rank=rank, world_size=2)),
        "split, in shards": train(split_dataset_by_node(stream(), rank=rank, world_size=2), **SHARDS),
    }


# ---- Streams of one's own ----


def by_torch(numbers):
    return torch.randperm(len(numbers)).tolist()


def by_numpy(numbers):
    return np.random.permutation(len(numbers)).tolist()


def by_python(numbers):
    return random.sample(range(len(numbers)), len(numbers))


def by_itself(numbers):
    return np.random.default_rng().permutation(len(numbers)).tolist()


def by_rank(numbers):
    return numbers[rank::2]


class Stream(IterableDataset):
    def __init__(self, order=list, samples=96, passes=1 << 20):
        self.order, self.samples, self.passes = order, samples, passes

    def __iter__(self):
        self.passes -= 1
        if self.passes >= 0:
            for number in self.order(list(range(self.samples))):
                yield {name: torch.tensor(value) for name, value in ROWS[number].items()}


class StreamOfKnownLength(Stream):
    def __len__(self):
        return self.samples


class StreamWithNoise(StreamOfKnownLength):
    """What is drawn within samples is not alike on all workers."""

    def __iter__(self):
        generator = np.random.default_rng()
        for row in super().__iter__():
            yield row | {"number": row["number"] + 1000 * int(generator.integers(1 << 20))}


class Forgetful(Recorder):
    def compute_loss(self, model, inputs, *args, **kwargs):
        inputs["number"] %= 1000
        return super().compute_loss(model, inputs, *args, **kwargs)


def own_streams():
    found, once = {}, {"max_steps": -1, "num_train_epochs": 1}
    for shares in (True, False):
        for order in (by_torch, by_numpy, by_python):
            stream = StreamOfKnownLength(order)
            found[f"{order.__name__}, {shares}"] = train(stream, shared_batches=shares, **once)
    found |= {order.__name__: train(Stream(order)) for order in (by_itself, by_rank)}
    found["loaded by processes"] = train(Stream(by_torch), dataloader_num_workers=1)
    found["noise"] = train(StreamWithNoise())
    logger, said = logging.getLogger("layup_hf.trainer.work"), []
    warnings = logging.Handler()
    warnings.emit = lambda record: said.append(record.getMessage())
    logger.addHandler(warnings)
    for name, stream, options in (
        ("noise", StreamWithNoise(), {}),
        ("by_rank", StreamOfKnownLength(by_rank), {}),
        ("by_rank, loaded by processes", StreamOfKnownLength(by_rank), {"dataloader_num_workers": 2}),
        ("by_torch", StreamOfKnownLength(by_torch), {}),
    ):
        said.clear()
        found[f"{name}, in shards"] = train(stream, Forgetful, **SHARDS, **once, **options)
        found[f"{name}, in shards"]["said"] = gather_object(said)
    logger.removeHandler(warnings)
    return found


def ends():
    """Streams that are over before training is."""
    found = {}
    for shares in (True, False):
        own = {"shared_batches": shares}
        found[f"one pass, {shares}"] = train(Stream(samples=64, passes=1), max_steps=30, **own)
        found[f"two passes, {shares}"] = train(Stream(samples=64, passes=2), max_steps=30, **own)
        known = StreamOfKnownLength(samples=64, passes=1)
        found[f"known length, {shares}"] = train(known, max_steps=-1, num_train_epochs=3, **own)
    found["nothing"] = train(Stream(samples=0))
    return found


def epochs():
    rows = [{name: torch.tensor(value) for name, value in row.items()} for row in ROWS]
    return {
        "whole": train(rows, max_steps=-1, num_train_epochs=2),
        "stream": train(StreamOfKnownLength(), max_steps=-1, num_train_epochs=2),
        "in shards": train(rows, max_steps=-1, num_train_epochs=2, **SHARDS),
    }


# ---- Samplers and loaders ----


class Named(Dataset):
    """Samples by names, and by pairs."""

    def __len__(self):
        return len(ROWS)

    def __getitem__(self, key):
        number = int(key[1:]) if isinstance(key, str) else key[0] * 10 + key[1]
        return {name: torch.tensor(value) for name, value in ROWS[number].items()}


class Keys(Sampler):
    def __init__(self, keys):
        self.keys = keys

    def __iter__(self):
        keys = list(self.keys)
        random.shuffle(keys)
        return iter(keys)

    def __len__(self):
        return len(self.keys)


def samplers():
    def sampling(keys):
        class Sampling(Recorder):
            def _get_train_sampler(self, *args):
                return Keys(keys)

        return Sampling

    names, pairs = [f"n{number}" for number in range(96)], [divmod(number, 10) for number in range(96)]
    return {"names": train(Named(), sampling(names)), "pairs": train(Named(), sampling(pairs))}


def loaders():
    """What a user finds at the training loader, and what callbacks find."""
    args = arguments(FOLDER, dataloader_drop_last=True, max_steps=2)
    rows = [{"input_ids": torch.tensor(row["input_ids"]), "labels": torch.tensor(row["labels"])} for row in ROWS]
    trainer = LayupTrainer(model=gpt2(), args=args, train_dataset=rows)
    loader = trainer.get_train_dataloader()
    return {
        "sampler": type(loader.batch_sampler.batch_sampler.sampler).__name__,
        "sizes": [loader.batch_sampler.batch_size, loader.batch_size, loader.total_batch_size, len(loader)],
        "drop_last": [loader.drop_last, loader.batch_sampler.drop_last],
        "num_workers": loader.num_workers,
        "batches": [len(list(loader)), len(list(loader.batch_sampler)), len(loader.batch_sampler)],
        "collates": loader.collate_fn is not None,
    }


# ---- Who is there in a step ----


class Place(TrainerCallback):
    def __init__(self):
        self.seen = {"chosen": set()}

    def on_step_end(self, args, state, control, **kwargs):
        self.look("in a callback", args, state)

    def on_evaluate(self, args, state, control, **kwargs):
        self.look("at an evaluation", args, state)

    def look(self, where, args, state):
        accelerator = self.trainer.accelerator
        self.seen[where] = {
            "accelerator": [accelerator.process_index, accelerator.num_processes],
            "state": [PartialState().process_index, PartialState().num_processes],
            "accelerator's state": [accelerator.state.process_index, accelerator.state.num_processes],
            "arguments": [args.process_index, args.world_size, args.should_log, args.should_save],
            "local": [accelerator.local_process_index, args.local_process_index],
            "gathered": gather(torch.tensor([rank])).tolist(),
            "first": [accelerator.is_main_process, PartialState().is_main_process, state.is_world_process_zero],
            "last": [accelerator.is_last_process, PartialState().is_last_process],
        }
        with accelerator.split_between_processes(["a", "b"]) as mine:
            self.seen[where]["split"] = list(mine)
        for name, choose in (
            ("main", accelerator.on_main_process),
            ("last", accelerator.on_last_process),
            ("first of all", accelerator.on_process(process_index=0)),
            ("second of all", accelerator.on_process(process_index=1)),
            ("second by state", PartialState().on_process(process_index=1)),
        ):
            choose(lambda name=name: self.seen["chosen"].add(f"{name} {where}"))()


class Contrastive(LayupTrainer):
    """With in-batch negatives of all, as under DDP."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        if return_outputs:
            return super().compute_loss(model, inputs, return_outputs, **kwargs)
        hidden = model(**inputs, output_hidden_states=True).hidden_states[-1]
        mine, others = hidden[:, 0], hidden[:, -1]
        everyone, rows = self.accelerator.gather(others.detach()), len(mine)
        first = rows * self.accelerator.process_index
        assert self.accelerator.num_processes == len(everyone) // rows == 1
        everyone = torch.cat([everyone[:first], others, everyone[first + rows :]])
        return torch.nn.functional.cross_entropy(mine @ everyone.T, torch.arange(rows) + first)


def alone():
    rows = [{"input_ids": torch.tensor(row["input_ids"]), "labels": torch.tensor(row["labels"])} for row in ROWS]
    callback, options = Place(), {"eval_strategy": "steps", "eval_steps": 3, "prediction_loss_only": True}
    args = arguments(FOLDER, **options)
    trainer = Contrastive(model=gpt2(), args=args, train_dataset=rows, eval_dataset=rows[:8], callbacks=[callback])
    callback.trainer = trainer
    given = args.average_tokens_across_devices, args.distributed_state is PartialState()
    output = trainer.train()
    return callback.seen | {
        "chosen": sorted(callback.seen["chosen"]),
        "loss": output.training_loss,
        "tokens": [given[0], args.average_tokens_across_devices],
        "after": [args.process_index, args.world_size, PartialState().process_index, PartialState().num_processes],
    }


# ---- Numbers of other kinds ----


class Numbers(torch.nn.Module):
    """Learns to double what it gets; a weight may be complex."""

    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Parameter(torch.randn(4, 4, dtype=dtype))
        self.second = torch.nn.Linear(4, 4, dtype=torch.float64 if dtype == torch.float64 else torch.float32)

    def forward(self, x, labels):
        x = x.to(self.second.weight.dtype)
        hidden = x.to(self.first.dtype) @ self.first
        hidden = (hidden.real + hidden.imag if hidden.is_complex() else hidden).to(x.dtype)
        return {"loss": (self.second(hidden) - 2 * x).square().mean()}


def numbers():
    found, rows = {}, [{"x": torch.randn(4), "labels": torch.zeros(1)} for _ in range(64)]
    unfused = {"optim": "adamw_torch"}  # torch's fused AdamW takes no complex numbers
    exact, clipped = unfused | {"clip": "exact"}, {"max_grad_norm": 1.0}
    kinds = [{}, unfused | clipped, exact, exact | clipped, exact | {"optim": "sgd"}]
    for dtype in (torch.float64, torch.complex64, torch.complex128):
        for options in kinds if dtype == torch.float64 else kinds[1:]:
            model = Numbers(dtype)
            trainer = LayupTrainer(model=model, args=arguments(FOLDER, max_steps=16, **options), train_dataset=rows)
            output = trainer.train()
            found[f"{dtype}, {options}"] = {
                "same": all(same_everywhere(parameter.detach()) for parameter in model.parameters()),
                "imaginary": float(model.first.detach().imag.abs().sum()) if model.first.is_complex() else None,
                "loss": output.training_loss,
            }
    return found


# ---- What is not exchanged ----


class Keeping(torch.nn.Module):
    """Changes buffers in its forward."""

    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 4))
        self.register_buffer("codes", torch.zeros(3))
        self.register_buffer("codes_in_half", torch.zeros(3, dtype=torch.bfloat16))
        self.register_buffer("phases", torch.zeros(3, dtype=torch.complex64))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("still", torch.arange(5.0))
        self.register_buffer("cache", torch.zeros(1), persistent=False)
        self.teacher = torch.nn.Linear(4, 4).requires_grad_(False)

    def forward(self, x, labels):
        if self.training:
            for buffer in (self.codes, self.codes_in_half, self.cache):
                buffer += rank + 1
            self.phases += (rank + 1) * 1j
            self.calls += 1
        return {"loss": (self.inner(x) - x).square().mean()}


class Teaching(TrainerCallback):
    def on_optimizer_step(self, args, state, control, model, **kwargs):
        model.teacher.weight.data.add_(rank + 1)


def rest():
    rows = [{"x": torch.randn(4), "labels": torch.zeros(1)} for _ in range(64)]
    found, model = [], Keeping()
    args = arguments(FOLDER, max_steps=16)
    trainer = LayupTrainer(model=model, args=args, train_dataset=rows, callbacks=[Teaching()])
    teacher = gather_object([model.teacher.weight.clone()])[0]
    logger, warnings = logging.getLogger("layup_hf.trainer.agreement"), logging.Handler()
    warnings.emit = lambda record: found.append(record.getMessage())
    logger.addHandler(warnings)
    trainer.train()
    logger.removeHandler(warnings)
    return {
        "steps": gather_object([trainer.layup.state.steps_done]),
        "codes": model.codes.tolist(),
        "codes_in_half": model.codes_in_half.tolist(),
        "phases": torch.view_as_real(model.phases).tolist(),
        "calls": int(model.calls),
        "still": model.still.tolist(),
        "cache": model.cache.tolist(),
        "teacher": (model.teacher.weight - teacher).mean().item(),
        "same": all(same_everywhere(tensor) for tensor in model.state_dict().values()),
        "warnings": found,
    }


rank = PartialState(cpu=True).process_index
datasets.disable_progress_bars()
results = {name: globals()[name]() for name in sys.argv[2:]}
write_result(rank, results)
leave()
