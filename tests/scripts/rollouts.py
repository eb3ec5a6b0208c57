"""Trains with trainers that generate what they learn from, one case after the other, and writes what a test wants.

python rollouts.py FOLDER CASE...
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
from accelerate import PartialState
from relatives import WORDS, base_weights, llama, lora, prompts, tokenizer
from transformers import LlamaForSequenceClassification, TrainerCallback
from trl import DistillationConfig, DistillationTrainer, GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from worker import collectives, count_collectives, leave, same_everywhere, write_result

from layup_hf import LayupMixin, LayupOptions

datasets.disable_progress_bars()
FOLDER = Path(sys.argv[1])
COMMON = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "learning_rate": 1e-2, "logging_steps": 1}
COMMON |= {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 6, "save_strategy": "no"}
COMMON |= {"bf16": False, "gradient_checkpointing": False}
SLOW = {"straggler": "rank=1,compute=0.3"}


@dataclass
class LayupGRPOConfig(LayupOptions, GRPOConfig):
    pass


@dataclass
class LayupRLOOConfig(LayupOptions, RLOOConfig):
    pass


class Observed(LayupMixin):
    """Notes what is generated and by which weights, and the collectives between two meetings."""

    def _prepare_for_training(self, *args, **kwargs):
        prepared = super()._prepare_for_training(*args, **kwargs)
        self.rollouts, self.collectives, self.by_what_learns, self.places = [], [], [], set()
        collectives.clear()
        meetings = self.layup.meetings

        def meet(**how):
            self.collectives.append(sum(collectives.values()))
            type(meetings).meet(meetings, **how)
            collectives.clear()

        meetings.meet = meet
        return prepared

    @property
    def weights(self):
        return [p.detach().double().sum().item() for p in self.model.parameters() if p.requires_grad]

    def _generate_and_score_completions(self, inputs):
        self.drawn_by = self.weights
        output = super()._generate_and_score_completions(inputs)
        if self.model.training:
            self.rollouts.append([row["prompt"] for row in inputs])
            self.places.add((self.accelerator.process_index, self.accelerator.num_processes))
        return output

    def compute_loss(self, *args, **kwargs):
        if self.model.training:
            self.by_what_learns.append(self.drawn_by == self.weights)
        return super().compute_loss(*args, **kwargs)


@dataclass
class LayupDistillationConfig(LayupOptions, DistillationConfig):
    pass


class LayupGRPOTrainer(Observed, GRPOTrainer):
    pass


class LayupRLOOTrainer(Observed, RLOOTrainer):
    pass


class LayupDistillationTrainer(Observed, DistillationTrainer):
    pass


def small(completions, **others):
    """The reward: how many of the words are small numbers."""
    return [sum(word in WORDS[:40] for word in text.split()) / 6 for text in completions]


def train(trainer, resume=None):
    trainer.train(resume_from_checkpoint=resume)
    trainable = [p for p in trainer.model.parameters() if p.requires_grad]
    return {
        "collectives": trainer.collectives,
        "steps": trainer.layup.state.steps_done,
        "global_step": trainer.state.global_step,
        "logs": trainer.state.log_history,
        "same": same_everywhere(torch.cat([tensor.detach().double().flatten() for tensor in trainable])),
        "rollouts": trainer.rollouts,
        "places": sorted(trainer.places),
        "by_what_learns": trainer.by_what_learns,
        "tokens": trainer.state.num_input_tokens_seen,
    }


def saved(name, model):
    """A folder with this model, which TRL loads reference and reward models from."""
    with PartialState().main_process_first():
        if PartialState().is_main_process:
            model.save_pretrained(FOLDER / name)
            tokenizer().save_pretrained(FOLDER / name)
    return str(FOLDER / name)


def grpo(case, *, count=24, **options):
    return LayupGRPOTrainer(
        model=saved(f"{case}-model", llama()),
        reward_funcs=small,
        args=LayupGRPOConfig(str(FOLDER / case), **{**COMMON, **options}),
        train_dataset=prompts(count),
        eval_dataset=prompts(5),
        processing_class=tokenizer(),
    )


def shared():
    """Two optimizer steps for each rollout of two prompts, of which rank 1 makes fewer; with a reference model."""
    options = {"steps_per_generation": 2, "beta": 0.1, "num_train_epochs": 2, "log_completions": True, **SLOW}
    evaluated = {"eval_strategy": "epoch", "per_device_eval_batch_size": 4}
    traced = {"trace": str(FOLDER / "trace.json")}
    return train(grpo("shared", **options, **evaluated, **traced, gradient_accumulation_steps=1))


def resumed():
    """Stopped in the middle of an epoch and of rollouts, which are used in four steps; then to the end."""
    options = {"num_iterations": 2, "steps_per_generation": 2, "gradient_accumulation_steps": 1}
    first = train(grpo("resumed", **options, max_steps=9, save_strategy="steps", save_steps=9))
    checkpoint = FOLDER / "resumed" / "checkpoint-9"
    return {"first": first, "second": train(grpo("resumed", **options, num_train_epochs=1), resume=str(checkpoint))}


def adapters():
    """RLOO with LoRA, the reward from a model; completions are used at once, in one step of two batches."""

    class Ask(TrainerCallback):
        """Asks for an evaluation on one worker."""

        def on_step_end(self, args, state, control, **kwargs):
            control.should_evaluate = rank == 1 and state.global_step == 3

    reward = saved("reward-model", llama(LlamaForSequenceClassification, num_labels=1))
    trainer = LayupRLOOTrainer(
        model=llama(),
        reward_funcs=[reward, small],
        args=LayupRLOOConfig(
            str(FOLDER / "adapters"), **COMMON, beta=0.1, gradient_accumulation_steps=2, max_steps=5,
            eval_strategy="steps", eval_steps=100, per_device_eval_batch_size=4,
        ),
        train_dataset=prompts(24),
        eval_dataset=prompts(5),
        processing_class=tokenizer(),
        reward_processing_classes=[tokenizer(), None],
        peft_config=lora(),
        callbacks=[Ask()],
    )  # fmt: skip
    before = base_weights(trainer.model)
    result = train(trainer)
    after = base_weights(trainer.model)
    return result | {"base_untouched": all(torch.equal(before[name], after[name]) for name in before)}


def sharded():
    """Prompts from a stream: each worker keeps its shard."""
    trainer = LayupGRPOTrainer(
        model=llama(),
        reward_funcs=small,
        args=LayupGRPOConfig(str(FOLDER / "sharded"), **COMMON, steps_per_generation=2, max_steps=4),
        train_dataset=prompts(24).to_iterable_dataset(),
        processing_class=tokenizer(),
    )
    return train(trainer)


def distilled():
    """The student generates, and a teacher says what it would have: two batches of a rollout in each step."""
    teacher = llama()
    teacher.lm_head.weight.data *= 20
    trainer = LayupDistillationTrainer(
        model=saved("student", llama()),
        teacher_model=saved("teacher", teacher),
        args=LayupDistillationConfig(
            str(FOLDER / "distilled"),
            **{name: value for name, value in COMMON.items() if name != "num_generations"},
            gradient_accumulation_steps=2,
            num_train_epochs=1,
        ),
        train_dataset=prompts(32),
        processing_class=tokenizer(),
    )
    return train(trainer)


rank = PartialState(cpu=True).process_index
count_collectives()
results = {name: globals()[name]() for name in sys.argv[2:]}
write_result(rank, results)
leave()
