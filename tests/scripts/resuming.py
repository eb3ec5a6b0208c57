"""Saves a checkpoint, breaks copies of it for one worker or the other, and tries to go on from each of them."""

import os
import shutil
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from stock import arguments, gpt2, text
from worker import leave, write_result

from layup_hf import LayupTrainer

FOLDER = Path(os.environ["LAYUP_TEST_RESULTS"])
STEPS = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}


def train(folder, resume, **options):
    """What the step was at the end, or why there is none; and the first moments of the optimizer before training."""
    trainer = LayupTrainer(model=gpt2(), args=arguments(folder, **{**STEPS, **options}), train_dataset=text())
    try:
        return {"step": trainer.train(resume_from_checkpoint=resume).global_step}
    except (ValueError, RuntimeError) as error:
        return {"error": type(error).__name__, "message": str(error)}


def broken(name, change):
    """A copy of the checkpoint in which rank 0 has changed something. Collective."""
    place = FOLDER / name / "checkpoint-2"
    if state.process_index == 0:
        shutil.copytree(FOLDER / "whole" / "checkpoint-2", place)
        change(place)
    state.wait_for_everyone()
    return place


def truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def poison(file):
    states = torch.load(file, weights_only=True)
    states["state"][3]["exp_avg"][0] = float("nan")
    torch.save(states, file)


def of_another_model(place):
    """The optimizer's state of a model with the same parameters, one of them longer."""
    states = torch.load(place / "optimizer_1.pt", weights_only=True)
    for moment in ("exp_avg", "exp_avg_sq"):
        states["state"][3][moment] = torch.zeros(states["state"][3][moment].numel() + 8)
    torch.save(states, place / "optimizer_1.pt")


def of_another_optimizer(place):
    states = torch.optim.SGD(gpt2().parameters(), lr=0.1, momentum=0.9).state_dict()
    states["param_groups"] *= 2  # as many as AdamW has here, of other sizes
    torch.save(states, place / "optimizer_1.pt")


def wider(place):
    weights = load_file(place / "model.safetensors")
    weights["transformer.wte.weight"] = torch.zeros(7, 5)
    save_file(weights, place / "model.safetensors", metadata={"format": "pt"})


def swapped(place):
    for first, second in (("optimizer.pt", "optimizer_1.pt"), ("rng_state_0.pth", "rng_state_1.pth")):
        (place / first).rename(place / "aside")
        (place / second).rename(place / first)
        (place / "aside").rename(place / second)


arguments(FOLDER)  # makes the process group
state = PartialState()
rank = state.process_index
result = {"saving": train(FOLDER / "whole", None)}
whole, later = (FOLDER / "whole" / f"checkpoint-{step}" for step in (2, 4))
cases = {
    "own optimizer": [broken("optimizer", lambda place: truncate(place / "optimizer_1.pt"))] * 2,
    "own optimizer is not finite": [broken("poisoned", lambda place: poison(place / "optimizer_1.pt"))] * 2,
    "optimizer of rank 0": [broken("first", lambda place: truncate(place / "optimizer.pt"))] * 2,
    "model on one machine": [whole, broken("model", lambda place: truncate(place / "model.safetensors"))],
    "state on one machine": [whole, broken("state", lambda place: truncate(place / "trainer_state.json"))],
    "own optimizer is of another model": [broken("longer", of_another_model)] * 2,
    "own optimizer is another": [broken("sgd", of_another_optimizer)] * 2,
    "model is another": [broken("wider", wider)] * 2,
    "model is another on one machine": [whole, broken("wide", wider)],
    "each other's": [broken("swapped", swapped)] * 2,
    "missing on one machine": [whole, FOLDER / "nowhere" / "checkpoint-2"],
    "another step on one machine": [whole, later],
    "none on one machine": [whole, None],
    "whole": [whole, whole],
    "copies": [whole, broken("copy", lambda place: None)],
    "own random state": [broken("random", lambda place: truncate(place / "rng_state_1.pth"))] * 2,  # the last: it ends
}
for name, places in cases.items():
    place = places[rank]
    result[name] = train(FOLDER / "again", None if place is None else str(place), save_strategy="no")
write_result(rank, result)
leave()
