"""Train an image classifier by LayUp, on GPUs or on a few processor cores, and see how often it is right.

    accelerate launch --multi_gpu --num_processes 2 recipes/vision.py

As it is, it trains a small ResNet on Fashion-MNIST for two to three minutes. The options take a ViT, any trained
image classifier, other images; `--trainer ddp` trains the very same with the stock Trainer. The output folder
gets the model, its image processor, `results.json` and `curve.png`.

BatchNorm: in training each worker normalises by its own batch, as with DDP. With LayUp the running mean and variance
belong to the layer's block: a merge mixes them with a peer's by the same weight as the parameters, and a consensus
point gives every worker the mass-weighted mean, which is what is evaluated and saved. (DDP takes those of rank 0.) The
variance is a mean of the workers' variances, without that between their means, which is small where all draw from the
same data. `num_batches_tracked` is a count that this BatchNorm does not use, and stays each worker's own.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from parts.classifier import TRAINING, ClassifierArguments, accuracy, most_likely, prepare
from parts.curve import TimedLog, draw_curve, write_results
from parts.images import ImageArguments
from parts.training import RecipeConfig, in_turn, parse_options, samples_per_step, train_and_report
from transformers import Trainer

# The recipe's own defaults for the training options; the command line goes before them.
DEFAULTS: dict[str, Any] = {
    "output_dir": "vision-output",
    "per_device_train_batch_size": 64,
    "per_device_eval_batch_size": 128,
    "learning_rate": 3e-3,
    "lr_scheduler_type": "cosine",
    # Below 1 these are shares of all steps, so they hold for any length of run.
    "warmup_steps": 0.2,
    "logging_steps": 0.02,
    "eval_steps": 0.25,
    "eval_strategy": "steps",
    "logging_first_step": True,
    "save_strategy": "no",
    "report_to": "none",
    # One worker's warnings say it all.
    "log_level_replica": "error",
    # No parameter goes unused, so DDP need not look for any.
    "ddp_find_unused_parameters": False,
    **TRAINING,
}
STEPS = 1500


@dataclass
class ModelArguments(ClassifierArguments):
    """Which model, and who trains it. With none named: a small ResNet."""

    _argument_group_name: ClassVar[str] = "model"
    trainer: Literal["layup", "ddp"] = field(
        default="layup", metadata={"help": "LayUp, or the stock Trainer with gradient averaging."}
    )


def parse_arguments(arguments: Sequence[str]) -> tuple[ModelArguments, ImageArguments, RecipeConfig]:
    """Read the command line. Starts the process group, so call it once."""
    return parse_options((ModelArguments, ImageArguments, RecipeConfig), DEFAULTS, STEPS, arguments, __doc__)


def report(trainer: Trainer, timed: TimedLog, final: dict[str, float], which: str) -> None:
    """Print what came out, and write the results and the curve into the output folder."""
    args, steps = trainer.args, trainer.state.global_step
    results = {
        "trainer": which,
        "world_size": args.world_size,
        "device": args.device.type,
        "parameters": trainer.model.num_parameters(),
        "steps": steps,
        "images_per_step": samples_per_step(args),
        "images_seen": steps * samples_per_step(args),
        "seconds": round(timed.seconds, 3),
        "eval_loss": final["eval_loss"],
        "accuracy": final["eval_accuracy"],
        "points": timed.points,
    }
    folder = Path(args.output_dir)
    write_results(folder / "results.json", results)
    title = f"{which}, {args.world_size} worker(s), {args.device.type}"
    drawn = draw_curve(timed.points, title, folder / "curve.png", unit="nats per image")
    print(
        f"Held-out accuracy {100 * final['eval_accuracy']:.1f} %, loss {final['eval_loss']:.3f}, "
        f"after {timed.seconds:.0f} s of training."
    )
    print(f"In {folder}: the model, results.json" + (", curve.png" if drawn else ""))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the recipe with these command-line arguments, those of the process by default."""
    model_args, image_args, args = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    parts = in_turn(args, "the images", lambda: prepare(model_args, image_args, args.seed))
    model, processor, train, held_out = parts
    if args.process_index == 0:
        print(
            f"{args.world_size} worker(s) on {args.device.type}, {model_args.trainer}: "
            f"{model.num_parameters() / 1e6:.2f} M parameters, {len(train):,} + {len(held_out):,} held-out images, "
            f"{samples_per_step(args):,} images per step.",
            flush=True,
        )
    train_and_report(
        model_args.trainer,
        args,
        partial(report, which=model_args.trainer),
        model=model,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=processor,
        compute_metrics=accuracy,
        preprocess_logits_for_metrics=most_likely,
    )


if __name__ == "__main__":
    main()
