"""Trainers that generate what they learn from, within their steps: TRL's `GRPOTrainer`, `RLOOTrainer` and relatives.

A worker draws whole prompts, generates all their completions itself, scores them and steps: nobody waits for another's
rollout. In a step a worker is rank 0 of 1 (see `Collectives`), so what TRL gathers, cuts and normalises by is its own.
"""

from __future__ import annotations

from typing import Any

from .seams import OF_GENERATING
from .suitability import has_several_workers

_EXCLUDED = {
    "auto_find_batch_size": "a smaller batch may not hold whole groups of completions. Lower "
    "`per_device_train_batch_size` yourself",
    "bias_every": "the second forward would generate anew. Leave it at 0",
    "use_vllm": "in `colocate` mode TRL hands vLLM new weights when `global_step` changes, which counts the steps of "
    "all workers here, and in `server` mode all workers come together for each rollout. Set `use_vllm=False`, or use "
    "TRL's trainer with DDP",
}
"""Options that cannot go together with workers that generate each for itself: why not, and what to do."""


def check_generation(args: Any) -> None:
    """Refuse what keeps a worker from generating alone, as far as the arguments show it: before models are loaded.

    Raises:
        ValueError: Naming the options and the remedy.
    """
    generates = getattr(args, "num_generations", None) or getattr(args, "use_vllm", None)
    if not generates or not has_several_workers(args):
        return
    _refuse_options(args)
    group, completions = getattr(args, "num_generations", None), completions_of_worker(args)
    if group and completions % group:
        raise ValueError(
            f"`per_device_train_batch_size * steps_per_generation` ({completions}) must be a multiple of "
            f"`num_generations` ({group}): with LayUp a worker generates all completions of a prompt itself. Set "
            f"`steps_per_generation` or `gradient_accumulation_steps` so that it is, or lower `num_generations`."
        )


def _refuse_options(args: Any) -> None:
    for option, why in _EXCLUDED.items():
        if getattr(args, option, None):
            raise ValueError(
                f"`{option}` and LayUp with several workers that generate what they learn from exclude each other: "
                f"{why}."
            )


def completions_of_worker(args: Any) -> int:
    """How many one worker generates at once."""
    return args.per_device_train_batch_size * (getattr(args, "steps_per_generation", None) or 1)


def check_generating_trainer(trainer: Any) -> None:
    """Refuse a trainer that generates in a way that is not known, or that would replace weights which peers read.

    Raises:
        ValueError: With the remedy.
    """
    args, name = trainer.args, type(trainer).__name__
    is_known = all(hasattr(trainer, member) for member in OF_GENERATING)
    if not (is_known or getattr(args, "num_generations", None)) or not has_several_workers(args):
        return
    _refuse_options(args)
    if getattr(args, "evaluations", "wait") == "background":
        raise ValueError(
            f"`evaluations='background'` and {name} exclude each other with several workers: it evaluates groups of "
            "completions that all of them generate together. Use `evaluations='wait'`."
        )
    if not is_known:
        raise ValueError(
            f"{name} and LayUp with several workers exclude each other: it generates completions in a way that is not "
            "known. Those of TRL's `GRPOTrainer` and `RLOOTrainer` are. Use one of these, an offline method, or the "
            "stock trainer."
        )
    wanted = "bf16" if args.bf16 else "fp16" if args.fp16 else None
    for option in ("use_transformers_continuous_batching", "use_transformers_paged"):
        if getattr(args, option, False) and wanted is not None:
            raise ValueError(
                f"`{option}` and `{wanted}` exclude each other with LayUp and several workers: TRL then moves the "
                f"weights into other memory to generate, and peers would read what is no longer used. Load the model "
                f"in that type and set `{wanted}=False`, or leave `{option}` at False."
            )
