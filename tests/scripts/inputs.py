"""What people bring, trained by each of several workers together; one case for each name on the command line."""

import os

import torch
from accelerate.utils import gather_object
from brought import BROUGHT, OLD, OVERRIDING, NoteSteps
from stock import arguments, gpt2, text
from worker import run_cases, same_everywhere

from layup_hf import LayupTrainer


def overriding(name):
    """What the user's own methods have found, on all workers."""
    folder = f"{os.environ['LAYUP_TEST_RESULTS']}/{name}"
    saved = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 3}
    args = arguments(folder, num_train_epochs=1, max_steps=-1, **saved)
    callback, data = NoteSteps(), {"train_dataset": text(48), "eval_dataset": text(8)}
    callback.trainer = trainer = OVERRIDING[name][0](LayupTrainer)(
        model=gpt2(), args=args, callbacks=[callback], **data
    )
    trainer.train()
    return {"rank": args.process_index, "noted": gather_object([trainer.noted])}


def run_case(options):
    name = " ".join(options)
    if name in OVERRIDING:
        return overriding(name)
    brought = BROUGHT[name]()
    args = arguments(os.environ["LAYUP_TEST_RESULTS"], **brought.options)
    trainer = brought.trainer(LayupTrainer, args, text(64))
    before = [p.detach().clone() for p in brought.model.parameters()]
    output = trainer.train()
    parameters = list(brought.model.parameters())
    moved = [float((p.detach() - old).abs().max()) for p, old in zip(parameters, before, strict=True)]
    result = {
        "rank": args.process_index,
        "global_step": output.global_step,
        "loss": output.training_loss,
        "same": same_everywhere(torch.cat([p.detach().flatten() for p in parameters])),
        "moved": sum(m > 0 for m in moved) / len(moved),
        "mass": [entry["layup/mass"] for entry in trainer.state.log_history if "layup/mass" in entry],
    }
    if "mask" in name:
        embedding = brought.model.get_input_embeddings().weight
        result["old"] = float((embedding.detach()[:OLD] - before[0][:OLD]).abs().max())
    if hasattr(trainer, "weight"):
        result["beside"], result["beside_same"] = float(trainer.weight), same_everywhere(trainer.weight.detach())
    steps = {int(state["step"]) for state in trainer.optimizer.state.values() if "step" in state}
    return {**result, "own_steps": trainer.layup.state.steps_done, "optimizer_steps": sorted(steps)}


run_cases(run_case)
