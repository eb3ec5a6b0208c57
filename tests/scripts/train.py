"""Trains a tiny GPT-2 with LayupTrainer and writes what a test wants to know."""

import sys
import time
from dataclasses import dataclass

import torch
from accelerate.utils import gather_object
from transformers import GPT2Config, GPT2LMHeadModel, HfArgumentParser, TrainerCallback
from worker import collectives, count_collectives, same_everywhere, write_result

import layup_hf.trainer.agreement
from layup_hf import LayupConfig, LayupTrainer


@dataclass
class TestConfig(LayupConfig):
    """`LayupConfig` with faults to be made."""

    raise_on_rank: int = -1
    """Rank that raises after five steps."""
    linger: float = 0.0
    """Seconds that each step takes longer."""
    other_model_on_rank: int = -1
    """Rank that has a wider model."""
    forbid_waits: bool = False
    """On a GPU, a step in which the processor waits for it fails, from the fourth on."""


config = HfArgumentParser(TestConfig).parse_args_into_dataclasses(["--use_cpu", "--report_to=none", *sys.argv[1:]])[0]
rank, world_size = config.process_index, config.world_size


def values(model):
    return torch.cat([p.detach().double().flatten().cpu() for p in model.parameters()])


torch.manual_seed(rank)  # different at first: training must start from rank 0's weights
width = 48 if rank == config.other_model_on_rank else 32
model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=width, n_layer=2, n_head=2, n_positions=32))
first = values(model)
generator = torch.Generator().manual_seed(0)
tokens = torch.randint(0, 64, (64, 1), generator=generator) + torch.arange(16)  # sequences that count up: easily learnt
data = [{"input_ids": row % 64, "labels": row % 64} for row in tokens]
result = {"rank": rank, "steps": 0, "consensus": []}


class Observer(TrainerCallback):
    def on_train_begin(self, args, state, control, **kwargs):
        result["starts_from_rank_0"] = torch.equal(values(model), gather_object([first])[0])
        collectives.clear()

    def on_step_end(self, args, state, control, **kwargs):
        result["steps"] += 1
        print(f"rank {rank} made step {result['steps']}", flush=True)
        time.sleep(config.linger)
        if rank == config.raise_on_rank and result["steps"] == 5:
            raise ArithmeticError("a fault made on purpose")


original_consensus = layup_hf.trainer.agreement.reach_consensus


def checked_consensus(blocks, ledger, talk, is_new):
    """The mass-weighted mean, computed the simple way: gather everything."""
    torch.distributed.barrier()
    masses = ledger.masses()
    models = gather_object([[[tensor.cpu() for tensor in block.tensors] for block in blocks]])
    consensus = original_consensus(blocks, ledger, talk, is_new)
    error = 0.0
    for block in blocks:
        shares = torch.tensor([int(m) / int(masses[block.index].sum()) for m in masses[block.index]]).double()
        for k, tensor in enumerate(block.tensors):
            mean = sum(s * worker[block.index][k].double() for s, worker in zip(shares, models, strict=True))
            error = max(error, float((tensor.double().cpu() - mean).abs().max()))
    result["consensus"].append(
        {
            "mass_exact": [int(units) for units in masses.sum(axis=1)] == [world_size * 2**40] * len(blocks),
            "error": error,
            "same": same_everywhere(values(model)),
            "distance": consensus.distance,
            "mass_min": consensus.mass_min,
        }
    )
    return consensus


layup_hf.trainer.agreement.reach_consensus = checked_consensus


class ObservedTrainer(LayupTrainer):
    """Counts the collectives between two meetings, callbacks and logging included."""

    def _prepare_for_training(self, *args, **kwargs):
        prepared = super()._prepare_for_training(*args, **kwargs)
        meetings = self.layup.meetings

        def meet(**how):
            result.setdefault("collectives_between_meetings", []).append(sum(collectives.values()))
            type(meetings).meet(meetings, **how)
            collectives.clear()

        meetings.meet = meet
        return prepared

    def training_step(self, *args, **kwargs):
        if not config.forbid_waits or result["steps"] < 3:
            return super().training_step(*args, **kwargs)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return super().training_step(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")


trainer = ObservedTrainer(model=model, args=config, train_dataset=data, eval_dataset=data[:16], callbacks=[Observer()])
count_collectives()
trainer.train()
trainer.save_model()
result["same_at_end"] = same_everywhere(values(model))
result["wrapped"] = type(trainer.model_wrapped).__name__
result["evaluation"] = trainer.evaluate()["eval_loss"]
result["logs"] = trainer.state.log_history
if rank == 0:
    result["saved_is_model"] = torch.equal(values(GPT2LMHeadModel.from_pretrained(config.output_dir)), values(model))
result["hooks_left"] = sum(len(p._post_accumulate_grad_hooks or ()) for p in model.parameters())
write_result(rank, result)
if world_size == 2:
    trainer.accelerator.end_training()  # as `Trainer.end` of newer versions; else it is left to the exit
