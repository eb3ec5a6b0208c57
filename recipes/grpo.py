"""Let a language model learn from rewards with TRL's GRPOTrainer, by LayUp.

    accelerate launch --multi_gpu --num_processes 2 recipes/grpo.py

As it is, a small Llama that has read Python's standard library (made by LayUp within a minute, and kept in the cache)
learns to finish functions: the reward is for four different statements, if Python can parse it all. Completions differ
in length, so workers take unequal time for each step; nobody waits. What a model this small writes means nothing; it is
Python. ``--trainer ddp`` trains the very same with TRL's own trainer. The options take another model, and whatever
GRPOConfig has.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from parts.curve import TimedLog
from parts.functions import load_functions, pretrained, reward_of
from parts.training import in_turn, leave_together
from transformers import AutoTokenizer, HfArgumentParser, set_seed
from trl import GRPOConfig, GRPOTrainer

from layup_hf import LayupMixin, LayupOptions, StragglerCallback

# The recipe's own defaults for the training options; the command line goes before them.
DEFAULTS: dict[str, Any] = {
    "output_dir": "grpo-output",
    "num_generations": 8,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "max_completion_length": 64,
    "max_steps": 120,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "logging_steps": 10,
    "save_strategy": "no",
    "report_to": "none",
    "log_level_replica": "error",
    "gradient_checkpointing": False,  # saves memory, of which a small model needs little
}
PROMPTS_HELD_OUT = 64


@dataclass
class LayupGRPOConfig(LayupOptions, GRPOConfig):
    """`GRPOConfig` with the options of LayUp."""


class LayupGRPOTrainer(LayupMixin, GRPOTrainer):
    """`GRPOTrainer` that trains by gossip."""


@dataclass
class RecipeArguments:
    """Which model, and who trains it."""

    trainer: Literal["layup", "ddp"] = field(
        default="layup", metadata={"help": "LayUp, or TRL's own trainer with gradient averaging."}
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A model that writes Python. Unset: a small Llama made anew."}
    )
    pretraining_steps: int = field(
        default=400, metadata={"help": "Steps in which the small model reads the functions before."}
    )


def main() -> None:
    """Run the recipe with the options of the command line."""
    parser = HfArgumentParser((RecipeArguments, LayupGRPOConfig))
    parser.set_defaults(**DEFAULTS, use_cpu=not torch.cuda.is_available(), bf16=torch.cuda.is_available())
    recipe, args = parser.parse_args_into_dataclasses()
    data = in_turn(args, "the functions", load_functions)
    name = recipe.model_name_or_path or pretrained(data, recipe.pretraining_steps, args)
    tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
    held_out = data.held_out.select_columns("prompt")
    timed = TimedLog()
    callbacks = [timed]
    if args.straggler and recipe.trainer == "ddp":
        callbacks.append(StragglerCallback(args.straggler))  # which LayUp's trainer adds itself
    set_seed(args.seed)
    trainer = {"layup": LayupGRPOTrainer, "ddp": GRPOTrainer}[recipe.trainer](
        model=name,
        args=args,
        reward_funcs=reward_of(tokenizer.eos_token_id),
        train_dataset=data.train.select_columns("prompt"),
        eval_dataset=held_out.select([i * len(held_out) // PROMPTS_HELD_OUT for i in range(PROMPTS_HELD_OUT)]),
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    before = trainer.evaluate()
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    trainer.save_model()
    after = trainer.evaluate()
    if args.process_index == 0:
        made = trainer.state.global_step * args.generation_batch_size // args.steps_per_generation
        print(
            f"Reward on held-out prompts: {before['eval_reward']:.3f} before, {after['eval_reward']:.3f} after. "
            f"{made / timed.seconds:.0f} completions per second in {timed.seconds:.0f} s. "
            f"In {args.output_dir}: the model."
        )
    leave_together(args.distributed_state)


if __name__ == "__main__":
    main()
