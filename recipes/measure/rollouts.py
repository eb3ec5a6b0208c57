"""What it is worth that nobody waits for another's rollout: TRL's GRPO by LayUp, and by DDP.

    python -m recipes.measure.rollouts --processes 4
    python -m recipes.measure.rollouts --processes 2 --slower 5      the last worker takes five times as long
    python -m recipes.measure.rollouts --processes 2 --iterations 4  four steps with each rollout

For each seed both train in turn within one run, with as many completions. A tiny model learns to prefer some words to
others. The time that a device would take for a rollout is slept, and drawn from an exponential distribution, as of
completions that may end after any token. So workers share cores only for the little that the tiny model takes.

The limit is how many times as many rollouts there would be per second without any waiting, if nothing but rollouts took
time: from the times of DDP's rollouts, each of which takes as long as that of the slowest worker. Ratios of
probabilities, of the policy that learns and the one that generated, are taken from TRL's loss. Writes
`rollouts-WORKERS[-slower][-iterations].json` into `--folder`.
"""

import argparse
import json
import os
import platform
import random
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed
from transformers.utils import logging
from trl import GRPOConfig, GRPOTrainer

from layup_hf import LayupMixin, LayupOptions
from recipes.parts.training import leave_together

from .common.command import add_worker_arguments, command_line, passed_on
from .common.launching import measure

WORDS = [f"word{number}" for number in range(22)]
WANTED = set(WORDS[: len(WORDS) // 2])
LONGEST = 12
GROUP = 4


@dataclass
class Config(LayupOptions, GRPOConfig):
    """`GRPOConfig` with the options of LayUp, which DDP leaves alone."""


class Measured(GRPOTrainer):
    """Sleeps as long as generating would take, and notes what there is to say of each rollout."""

    def measure(self, seconds: float) -> None:
        """Begin. Args: `seconds` that a rollout takes on average."""
        self.mean_seconds, self.uses = seconds, 0
        self.times = random.Random(f"{self.args.seed} {self.args.process_index}")
        self.rollouts: list[dict[str, float]] = []
        self.ratios: list[dict[str, float]] = []
        self.start = time.perf_counter()

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        completions, logprobs = super()._generate_single_turn(*args, **kwargs)
        if self.model.training:
            took = self.times.expovariate(1 / self.mean_seconds)
            time.sleep(took)
            self.rollouts.append({"took": took})
        return completions, logprobs

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Any:
        rewards = super()._calculate_rewards(*args, **kwargs)
        if self.model.training:
            noted = {"reward": rewards.mean().item(), "seconds": time.perf_counter() - self.start}
            self.rollouts[-1].update(noted)
            self.uses = 0
        return rewards

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        found = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if torch.is_grad_enabled():
            self.present = found[0].detach()
        return found

    def _compute_loss(self, model: Any, inputs: Any) -> Any:
        loss = super()._compute_loss(model, inputs)
        old, mask = inputs.get("old_per_token_logps"), inputs["completion_mask"].bool()
        if self.model.training and old is not None:
            logs = (self.present - old)[mask]
            clipped = (logs.exp() - 1).abs() > self.epsilon_low
            far = {"mean": logs.abs().mean().item(), "most": logs.abs().max().item()}
            self.ratios.append({"use": self.uses, **far, "clipped": clipped.float().mean().item()})
            self.uses += 1
        return loss


class LayupMeasured(LayupMixin, Measured):
    pass


def wanted(completions: list[str], **others: Any) -> list[float]:
    """The share of words that are wanted."""
    return [sum(word in WANTED for word in text.split()) / max(1, len(text.split())) for text in completions]


def work(options: argparse.Namespace) -> None:
    """One worker: both methods for all seeds, into `FOLDER/worker-RANK.json`."""
    logging.set_verbosity_error()
    state = PartialState(cpu=True)
    core = Tokenizer(models.WordLevel({word: n for n, word in enumerate(["<end>", *WORDS])}, unk_token="<end>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<end>", eos_token="<end>")
    draws = random.Random(0)
    prompts = Dataset.from_list([{"prompt": " ".join(draws.choices(WORDS, k=3))} for _ in range(4096)])
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=len(tokenizer),
        max_position_embeddings=LONGEST + 8, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip

    def run(method: str, seed: int) -> dict[str, Any]:
        state.wait_for_everyone()
        set_seed(seed)
        is_slow = options.slower > 1 and state.process_index == state.num_processes - 1
        trainer = {"layup": LayupMeasured, "ddp": Measured}[method](
            model=LlamaForCausalLM(config),
            reward_funcs=wanted,
            args=Config(
                str(options.folder), seed=seed, use_cpu=True, bf16=False, gradient_checkpointing=False,
                max_steps=options.steps * options.iterations, num_iterations=options.iterations,
                per_device_train_batch_size=GROUP, num_generations=GROUP, max_completion_length=LONGEST,
                per_device_eval_batch_size=128, learning_rate=options.learning_rate, lr_scheduler_type="constant",
                logging_steps=10**6, save_strategy="no", report_to="none", disable_tqdm=True,
                ddp_find_unused_parameters=False,
            ),
            train_dataset=prompts.select(range(256, len(prompts))),
            eval_dataset=prompts.select(range(256 // GROUP)),
            processing_class=tokenizer,
        )  # fmt: skip
        trainer.measure(options.rollout_seconds * (options.slower if is_slow else 1))
        trainer.train()
        seconds = time.perf_counter() - trainer.start
        result = {"method": method, "seed": seed, "rank": state.process_index, "seconds": seconds}
        reward = trainer.evaluate()["eval_reward"]
        return result | {"reward": reward, "rollouts": trainer.rollouts, "ratios": trainer.ratios}

    results = []
    for seed in options.seeds:
        for method in ("layup", "ddp"):
            results.append(run(method, seed))
            if state.is_main_process:
                print(f"seed {seed} {method}: {results[-1]['seconds']:.1f} s", file=sys.stderr, flush=True)
    Path(options.folder, f"worker-{state.process_index}.json").write_text(json.dumps(results))
    leave_together(state)


def figures(results: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    """What is kept of a measurement: for each seed and method, over all workers."""
    kept: dict[str, Any] = {
        name: getattr(options, name) for name in ("processes", "steps", "iterations", "slower", "rollout_seconds")
    }
    kept["runs"] = []
    for seed in options.seeds:
        for method in ("layup", "ddp"):
            workers = [result for result in results if (result["seed"], result["method"]) == (seed, method)]
            rollouts = sorted((one for worker in workers for one in worker["rollouts"]), key=lambda one: one["seconds"])
            seconds = max(worker["seconds"] for worker in workers)
            run = {"seed": seed, "method": method, "seconds": round(seconds, 2), "completions": len(rollouts) * GROUP}
            run["completions_by_worker"] = [len(worker["rollouts"]) * GROUP for worker in workers]
            run["completions_per_second"] = round(run["completions"] / seconds, 3)
            quarter = max(1, len(rollouts) // 4)
            for name, part in (("first_quarter", rollouts[:quarter]), ("last_quarter", rollouts[-quarter:])):
                run[f"reward_{name}"] = round(statistics.mean(one["reward"] for one in part), 4)
            run["reward_held_out"] = round(workers[0]["reward"], 4)
            run["rollout_seconds"] = round(statistics.mean(one["took"] for one in rollouts), 3)
            if method == "ddp":
                spent = [[one["took"] for one in worker["rollouts"]] for worker in workers]
                alone = sum(len(own) / sum(own) for own in spent)  # rollouts of all per second if nobody waits
                waiting = sum(map(len, spent)) / sum(map(max, zip(*spent, strict=True)))
                run["limit"] = round(alone / waiting, 3)
            for use in sorted({one["use"] for worker in workers for one in worker["ratios"]}):
                uses = [one for worker in workers for one in worker["ratios"] if one["use"] == use]
                far = {name: round(statistics.mean(one[name] for one in uses), 5) for name in ("mean", "clipped")}
                run[f"log_ratio_at_use_{use + 1}"] = far | {"most": round(max(one["most"] for one in uses), 4)}
            kept["runs"].append(run)
    return kept


def show(kept: dict[str, Any]) -> None:
    """The table of a measurement."""
    print("\n| seed | method | completions per second | limit | reward: first quarter, last, held out | log ratio |")
    print("|---|---|---|---|---|---|")
    for run in kept["runs"]:
        rewards = " ".join(f"{run[f'reward_{name}']:.3f}" for name in ("first_quarter", "last_quarter", "held_out"))
        far = "; ".join(f"{run[name]}" for name in run if name.startswith("log_ratio"))
        pace = f"{run['completions_per_second']:.2f} ({'/'.join(map(str, run['completions_by_worker']))})"
        print(f"| {run['seed']} | {run['method']} | {pace} | {run.get('limit', '')} | {rewards} | {far} |")
    paces = {
        method: {run["seed"]: run["completions_per_second"] for run in kept["runs"] if run["method"] == method}
        for method in ("layup", "ddp")
    }
    ratios = [paces["layup"][seed] / paces["ddp"][seed] for seed in paces["layup"]]
    print(f"\nTimes as many per second: {statistics.median(ratios):.2f} ({', '.join(f'{one:.2f}' for one in ratios)})")


def main() -> None:
    parser = command_line("recipes.measure.rollouts", __doc__)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=40, help="rollouts of every worker on average")
    parser.add_argument("--iterations", type=int, default=1, help="optimizer steps with each rollout")
    parser.add_argument("--slower", type=float, default=1.0, help="the last worker takes so many times as long")
    parser.add_argument("--rollout_seconds", type=float, default=2.0, help="of a rollout on average")
    parser.add_argument("--learning_rate", type=float, default=4e-3)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    add_worker_arguments(parser)
    options = parser.parse_args()
    if options.worker:
        work(options)
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    print(f"{options.processes} workers, {os.cpu_count()} CPU cores, torch {torch.__version__}, {platform.machine()}")
    arguments = ["--worker", "--seeds", *map(str, options.seeds)]
    arguments += passed_on(options, "steps", "iterations", "slower", "rollout_seconds", "learning_rate", "folder")
    kept = figures(measure("recipes.measure.rollouts", options.processes, arguments, options.folder), options)
    ending = ("-slower" if options.slower > 1 else "") + ("-iterations" if options.iterations > 1 else "")
    (options.folder / f"rollouts-{options.processes}{ending}.json").write_text(json.dumps(kept, indent=1) + "\n")
    show(kept)


if __name__ == "__main__":
    main()
