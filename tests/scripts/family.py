"""Trains with Trainers of the family, one case after the other, and writes what a test wants to know.

python family.py FOLDER CASE...
"""

import copy
import sys
from dataclasses import dataclass
from pathlib import Path

import datasets
import torch
from accelerate import PartialState
from accelerate.utils import broadcast, gather, gather_object
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from relatives import (
    LayupCPOConfig,
    LayupCPOTrainer,
    LayupDPOConfig,
    LayupDPOTrainer,
    LayupKTOConfig,
    LayupKTOTrainer,
    LayupORPOConfig,
    LayupORPOTrainer,
    LayupRewardConfig,
    LayupRewardTrainer,
    LayupSFTConfig,
    LayupSFTTrainer,
    base_weights,
    chats,
    completions,
    copies,
    judged,
    llama,
    lora,
    preferences,
    t5,
    texts,
    tokenizer,
)
from safetensors.torch import load_file
from transformers import (
    DataCollatorForSeq2Seq,
    LlamaForSequenceClassification,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainerCallback,
)
from worker import collectives, count_collectives, leave, same_everywhere, write_result

from layup_hf import LayupConfig, LayupMixin, LayupOptions, LayupTrainer

datasets.disable_progress_bars()
FOLDER = Path(sys.argv[1])
COMMON = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "learning_rate": 1e-2, "logging_steps": 2}
COMMON |= {"max_steps": 12, "per_device_train_batch_size": 2, "save_strategy": "no"}
SLOW = {"straggler": "rank=1,compute=0.4"}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 6}


class Observed:
    """To be mixed into a trainer: counts the collectives between two meetings, callbacks and logging included."""

    def _prepare_for_training(self, *args, **kwargs):
        prepared = super()._prepare_for_training(*args, **kwargs)
        self.collectives = []
        collectives.clear()
        meetings = self.layup.meetings

        def meet(**how):
            self.collectives.append(sum(collectives.values()))
            type(meetings).meet(meetings, **how)
            collectives.clear()

        meetings.meet = meet
        return prepared


def observed(trainer_class):
    return type(trainer_class.__name__, (Observed, trainer_class), {})


def train(trainer, resume=None):
    """Train, and tell what is worth knowing whatever the trainer."""
    trainer.train(resume_from_checkpoint=resume)
    trainable = [p for p in trainer.model.parameters() if p.requires_grad]
    return {
        "collectives": trainer.collectives,
        "steps": trainer.layup.state.steps_done,
        "global_step": trainer.state.global_step,
        "began_at": trainer.layup.host.initial_global_step,
        "logs": trainer.state.log_history,
        "same": same_everywhere(torch.cat([tensor.detach().double().flatten() for tensor in trainable])),
        "blocks": {block.name: block.num_bytes for block in trainer.layup.model.blocks},
        "trainable_bytes": sum(p.nbytes for p in trainable),
    }


def folder(name):
    return str(FOLDER / name)


# ---- Seq2SeqTrainer ----


@dataclass
class LayupSeq2SeqArguments(LayupOptions, Seq2SeqTrainingArguments):
    pass


class LayupSeq2SeqTrainer(LayupMixin, Seq2SeqTrainer):
    pass


def seq2seq():
    def share_exact(prediction):
        exact = (prediction.predictions[:, 1:5] == prediction.label_ids[:, :4]).all(axis=1)
        return {"exact": float(exact.mean()), "count": len(exact)}

    def make(trainer_class, config, model):
        generating = {"predict_with_generate": True, "generation_max_length": 6, "per_device_eval_batch_size": 2}
        return trainer_class(
            model=model,
            args=config(folder("seq2seq"), **{**COMMON, **EVALUATED, **generating}),
            train_dataset=copies(96),
            eval_dataset=copies(11),
            data_collator=DataCollatorForSeq2Seq(tokenizer(), model=model),
            compute_metrics=share_exact,
        )

    trainer = make(observed(LayupSeq2SeqTrainer), LayupSeq2SeqArguments, t5())
    result = train(trainer)
    trainer.save_model()
    predicted, evaluated = trainer.predict(copies(11)), trainer.evaluate()
    stock = make(Seq2SeqTrainer, Seq2SeqTrainingArguments, copy.deepcopy(trainer.model))
    expected = stock.predict(copies(11))
    return result | {
        "predictions": predicted.predictions.tolist(),
        "labels": predicted.label_ids.tolist(),
        "as_stock": bool((predicted.predictions == expected.predictions).all()),
        "metrics": predicted.metrics,
        "stock_metrics": expected.metrics,
        "evaluated": evaluated,
    }


# ---- What gathers in a step ----


class GatheringTrainer(LayupTrainer):
    """Does in its steps and logs what needs all workers under DDP."""

    def compute_loss(self, model, inputs, *args, **kwargs):
        if not model.training:
            self.together.append(len(self.accelerator.gather(torch.ones(1))))
            return super().compute_loss(model, inputs, *args, **kwargs)
        mine = torch.full((2,), float(rank))
        for found in (
            self.accelerator.gather(mine),
            self.accelerator.gather_for_metrics(mine),
            self.accelerator.reduce(mine),
            self.accelerator.reduce(mine, "mean"),
            self.accelerator.pad_across_processes(mine),
            gather(mine),
            broadcast(mine.clone()),
            torch.tensor(gather_object([float(rank)] * 2)),
        ):
            self.alone.append(torch.equal(found, mine))
        self.accelerator.wait_for_everyone()
        return super().compute_loss(model, inputs, *args, **kwargs)

    def log(self, logs, *args, **kwargs):
        logs["ranks"] = len(gather_object([rank]))
        super().log(logs, *args, **kwargs)


class GatheringCallback(TrainerCallback):
    def __init__(self):
        self.ran = set()

    def on_step_end(self, args, state, control, **kwargs):
        PartialState().wait_for_everyone()
        PartialState().on_main_process(lambda: self.ran.add("main"))()
        PartialState().on_last_process(lambda: self.ran.add("last"))()

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.ran.add(f"begins with {len(gather_object([rank]))}")

    def on_epoch_end(self, args, state, control, **kwargs):
        self.ran.add(f"ends with {len(gather_object([rank]))}")


def gathering():
    tokens = torch.tensor([row["labels"] for row in copies(64)])
    data = [{"input_ids": row, "labels": row} for row in tokens]
    options = {"max_steps": 24, "shared_batches": False}  # the fast one is at the end of its epoch long before the slow
    args = LayupConfig(folder("gathering"), **{**COMMON, **EVALUATED, **SLOW, **options})
    callback = GatheringCallback()
    trainer = observed(GatheringTrainer)(
        model=llama(), args=args, train_dataset=data, eval_dataset=data[:8], callbacks=[callback]
    )
    trainer.alone, trainer.together = [], []
    result = train(trainer) | {"ran": sorted(callback.ran)}
    return result | {"alone": all(trainer.alone), "times": len(trainer.alone), "together": trainer.together}


# ---- TRL ----


def sft(case, data, *, peft_config=None, **options):
    return observed(LayupSFTTrainer)(
        model=llama(),
        args=LayupSFTConfig(folder(case), **{**COMMON, **EVALUATED, "max_length": 32, **options}),
        train_dataset=data(96),
        eval_dataset=data(8),
        processing_class=tokenizer(),
        peft_config=peft_config,
    )


def learnt_of_first(trainer):
    """Those tokens of the first sample that are learnt."""
    labels = trainer.data_collator([trainer.train_dataset[0]])["labels"]
    return labels[labels != -100].tolist()


def packed():
    """Plain text, packed into batches without padding; rank 1 is slow."""
    trainer = sft("packed", texts, packing=True, max_steps=24, include_num_input_tokens_seen=True, **SLOW)
    result = train(trainer)
    tokens = {"tokens_of_all": trainer.state.num_input_tokens_seen, "tokens": trainer._total_train_tokens}
    return result | tokens | {"padding_free": trainer.padding_free}


def padding_free():
    return train(sft("padding_free", texts, padding_free=True, max_length=None))


def chat():
    """Conversations, of which only what the assistant says is learnt."""
    trainer = sft("chat", chats, assistant_only_loss=True, save_strategy="steps", save_steps=6)
    result = train(trainer)
    return result | {"learnt": trainer.processing_class.decode(learnt_of_first(trainer))}


def adapters():
    """Prompts and completions with LoRA; then the same again from the checkpoint in the middle."""
    saving = {"save_strategy": "steps", "save_steps": 6, "load_best_model_at_end": True}
    trainer = sft("adapters", completions, peft_config=lora(), **saving)
    before = base_weights(trainer.model)
    result = train(trainer)
    result["base_untouched"] = same_weights(before, base_weights(trainer.model))
    result["learnt"] = len(learnt_of_first(trainer))
    best = load_file(f"{trainer.state.best_model_checkpoint}/adapter_model.safetensors")
    result["is_best"] = same_weights(best, get_peft_model_state_dict(trainer.model))
    trainer.save_model()
    trainer.accelerator.wait_for_everyone()
    result["reload"] = compare_with_saved(trainer.model, folder("adapters"))

    class Watch(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            saved = load_file(f"{checkpoint}/adapter_model.safetensors")
            loaded = get_peft_model_state_dict(resumed.model)
            result["resumed_at"] = state.global_step
            result["resumed_adapters"] = same_weights(saved, loaded)

    checkpoint = folder("adapters/checkpoint-6")
    resumed = sft("adapters", completions, peft_config=lora())
    resumed.add_callback(Watch())
    result["resumed"] = train(resumed, resume=checkpoint)
    return result | {"resumed_base": same_weights(before, base_weights(resumed.model))}


def same_weights(some, others):
    return some.keys() == others.keys() and all(torch.equal(some[name], others[name]) for name in some)


def compare_with_saved(model, path):
    """Whether the saved adapter makes of the base model what has been trained, also merged."""
    loaded = PeftModel.from_pretrained(llama(), path)
    merged = copy.deepcopy(model).merge_and_unload().state_dict()
    return {
        "adapters": same_weights(get_peft_model_state_dict(model), get_peft_model_state_dict(loaded)),
        "merged": same_weights(merged, loaded.merge_and_unload().state_dict()),
        "has_learnt": not same_weights(merged, llama().state_dict()),
    }


def plain_adapters():
    """LoRA with the plain Trainer."""
    tokens = torch.tensor([row["labels"] for row in copies(96)])
    model = get_peft_model(llama(), lora())
    before = base_weights(model)
    trainer = observed(LayupTrainer)(
        model=model,
        args=LayupConfig(folder("plain"), **COMMON),
        train_dataset=[{"input_ids": row, "labels": row} for row in tokens],
    )
    result = train(trainer)
    trainer.save_model()
    trainer.accelerator.wait_for_everyone()
    return result | {
        "base_untouched": same_weights(before, base_weights(model)),
        "reload": compare_with_saved(model, folder("plain")),
    }


def preference(trainer_class, config, case, model, data=preferences, **options):
    trainer = observed(trainer_class)(
        model=model,
        args=config(folder(case), **{**COMMON, **EVALUATED}),
        train_dataset=data(96),
        eval_dataset=data(8),
        processing_class=tokenizer(),
        **options,
    )
    return train(trainer)


def dpo():
    return preference(LayupDPOTrainer, LayupDPOConfig, "dpo", llama(), ref_model=llama())


def reward():
    model = llama(LlamaForSequenceClassification, num_labels=1)
    return preference(LayupRewardTrainer, LayupRewardConfig, "reward", model)


def kto():
    return preference(LayupKTOTrainer, LayupKTOConfig, "kto", llama(), judged, ref_model=llama())


def cpo():
    return preference(LayupCPOTrainer, LayupCPOConfig, "cpo", llama())


def orpo():
    return preference(LayupORPOTrainer, LayupORPOConfig, "orpo", llama())


rank = PartialState(cpu=True).process_index
count_collectives()
results = {name: globals()[name]() for name in sys.argv[2:]}
write_result(rank, results)
leave()
