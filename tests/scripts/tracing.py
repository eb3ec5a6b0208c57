"""Trains with a trace in several ways, one after the other, and writes what it is to agree with.

python tracing.py FOLDER CASE...
"""

import sys
from pathlib import Path

import torch
from accelerate.utils import gather_object
from stock import arguments, gpt2, text
from worker import leave, write_result

from layup_hf import LayupTrainer

FOLDER = Path(sys.argv[1])
EVALUATED = {"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 6}
CASES = {
    "boundary": {**EVALUATED, "max_grad_norm": 1.0, "straggler": "rank=1,compute=0.05"},
    "arrival": {"merge_at": "arrival", "max_steps": 12},
    "exact": {"clip": "exact", "max_grad_norm": 1.0, "gradient_accumulation_steps": 2},
    "shards": {"shared_batches": False},
    "untraced": {"trace": None},
}


def train(case):
    options = {"trace": str(FOLDER / case / "trace.json"), **CASES[case]}
    trainer = LayupTrainer(
        model=gpt2(), args=arguments(FOLDER / "out", **options), train_dataset=text(), eval_dataset=text(8)
    )
    conclude = trainer.layup.conclude

    def noting():
        conclude()
        noted.update(trainer.layup.exchange.engine.counts, steps=trainer.layup.state.steps_done)

    noted = {}
    trainer.layup.conclude = noting
    trainer.train()
    return {
        **noted,
        "blocks": [block.name for block in trainer.layup.model.blocks],
        "log": [entry for entry in trainer.state.log_history if "layup/merges" in entry],
        "accelerator": sorted(set(vars(trainer.accelerator)) & {"backward"}),
        "callbacks": [type(callback).__name__ for callback in trainer.callback_handler.callbacks],
    }


def refused():
    """A trace on one worker alone."""
    try:
        options = {"trace": str(FOLDER / "trace.json") if rank else None}
        LayupTrainer(model=gpt2(), args=arguments(FOLDER / "out", **options), train_dataset=text()).train()
    except ValueError as error:
        return str(error)
    return None


rank = arguments(FOLDER).process_index
result = {"rank": rank} | {case: train(case) for case in sys.argv[2:]} | {"refused": refused()}
assert gather_object([rank]) == [0, 1]
write_result(rank, result)
torch.distributed.barrier()
leave()
