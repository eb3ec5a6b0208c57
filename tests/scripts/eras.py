"""Trains a tiny GPT-2 while workers come and go: at a pace, and with faults, that a test sets by files."""

import hashlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, HfArgumentParser, TrainerCallback

from layup_hf import LayupConfig, LayupTrainer
from layup_hf.trainer import hollow

NAME = os.environ.get("LAYUP_TEST_LAUNCH") or os.environ["RANK"]
SIGNS = Path(os.environ["LAYUP_TEST_RESULTS"])


@dataclass
class Config(LayupConfig):
    """`LayupConfig` with a pace."""

    pause: float = 0.3
    """Seconds that each step takes longer, until there is a file `hurry`."""


(config,) = HfArgumentParser(Config).parse_args_into_dataclasses()
is_joining = config.job_to_join is not None
torch.manual_seed(0)
model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=32))
tokens = torch.randint(0, 64, (256, 1), generator=torch.Generator().manual_seed(0)) + torch.arange(16)
data = [{"input_ids": row % 64, "labels": row % 64} for row in tokens]  # sequences that count up: easily learnt
result = {"name": NAME, "is_joining": is_joining}


def state_of_optimizer(trainer):
    """Steps that the moments of the last parameter are of, and whether there are any."""
    optimizer = trainer.layup.model.optimizer
    state = optimizer.state_of(trainer.layup.model.blocks[-1].parameters[-1])
    return [float(state["step"]), bool(state["exp_avg"].any())] if state else None


class Faults(TrainerCallback):
    """What files in the folder of results ask for."""

    def on_step_begin(self, args, state, control, **kwargs):
        if "begins" not in result:
            result["begins"] = {"step": state.global_step, "optimizer": state_of_optimizer(trainer)}
            print(f"{NAME} begins at step {state.global_step}", flush=True)

    def on_optimizer_step(self, args, state, control, **kwargs):
        end = time.monotonic() + config.pause
        while time.monotonic() < end and not (SIGNS / "hurry").exists():
            time.sleep(0.02)
        if (SIGNS / f"raise-{NAME}").exists():
            raise ArithmeticError("a fault made on purpose")
        print(f"{NAME} made a step of {state.global_step}", flush=True)

    def on_step_end(self, args, state, control, **kwargs):
        sign = SIGNS / f"evaluate-{NAME}"
        if sign.exists():
            sign.unlink()
            print(f"{NAME} wants to evaluate", flush=True)
            control.should_evaluate = True

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        print(f"{NAME} evaluated at {state.global_step}, rank {args.process_index} of {args.world_size}", flush=True)


write = hollow._write


def held(file, piece):
    while (SIGNS / f"hold-{NAME}").exists():
        time.sleep(0.02)
    write(file, piece)


hollow._SMALL, hollow._write = 1, held  # as if the model were large; what is written in the background can be held up
trainer = LayupTrainer(model=model, args=config, train_dataset=data, eval_dataset=data[:32], callbacks=[Faults()])
begin = trainer.layup.eras.begin


def begin_and_tell(era):
    begin(era)
    print(f"{NAME} is rank {config.process_index} of {config.world_size} in era {era.number}", flush=True)


trainer.layup.eras.begin = begin_and_tell
trainer.train(resume_from_checkpoint=config.resume_from_checkpoint == "True")
result["evaluation"] = trainer.evaluate()["eval_loss"]
trainer.save_model()
result["model"] = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()
result["step"] = trainer.state.global_step
result["rank"], result["workers"] = config.process_index, config.world_size
result["logs"] = trainer.state.log_history
(SIGNS / f"result-{NAME}.json").write_text(json.dumps(result))
print(f"{NAME} is done", flush=True)
