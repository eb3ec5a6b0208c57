"""Tiny models, a tokenizer and data for the Trainers of the family, made on the spot."""

from __future__ import annotations

import importlib.util
import warnings
from dataclasses import dataclass

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from layup_hf import LayupMixin, LayupOptions

with warnings.catch_warnings():  # about what is experimental
    warnings.simplefilter("ignore")
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    if importlib.util.find_spec("trl.experimental.kto.kto_trainer"):  # until TRL 1.x made it stable
        from trl.experimental.kto import KTOConfig, KTOTrainer
    else:
        from trl import KTOConfig, KTOTrainer

WORDS = [str(number) for number in range(80)]
SPECIAL = ["<pad>", "<end>", "<user>", "<assistant>"]
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'assistant' %}<assistant> {% generation %}"
    "{{ message.content }} <end>{% endgeneration %}{% else %}<user> {{ message.content }} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


@dataclass
class LayupSFTConfig(LayupOptions, SFTConfig):
    """`SFTConfig` with the options of LayUp."""


@dataclass
class LayupDPOConfig(LayupOptions, DPOConfig):
    """`DPOConfig` with the options of LayUp."""


@dataclass
class LayupRewardConfig(LayupOptions, RewardConfig):
    """`RewardConfig` with the options of LayUp."""


@dataclass
class LayupKTOConfig(LayupOptions, KTOConfig):
    """`KTOConfig` with the options of LayUp."""


@dataclass
class LayupCPOConfig(LayupOptions, CPOConfig):
    """`CPOConfig` with the options of LayUp."""


@dataclass
class LayupORPOConfig(LayupOptions, ORPOConfig):
    """`ORPOConfig` with the options of LayUp."""


class LayupSFTTrainer(LayupMixin, SFTTrainer):
    pass


class LayupDPOTrainer(LayupMixin, DPOTrainer):
    pass


class LayupRewardTrainer(LayupMixin, RewardTrainer):
    pass


class LayupKTOTrainer(LayupMixin, KTOTrainer):
    pass


class LayupCPOTrainer(LayupMixin, CPOTrainer):
    pass


class LayupORPOTrainer(LayupMixin, ORPOTrainer):
    pass


def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each number, and a chat template that marks what the assistant says."""
    vocabulary = {word: place for place, word in enumerate([*SPECIAL, *WORDS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<end>")
    made.add_special_tokens({"additional_special_tokens": SPECIAL[2:]})
    made.chat_template = TEMPLATE
    return made


def llama(cls: type[nn.Module] = LlamaForCausalLM, **options: object) -> nn.Module:
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = {"vocab_size": len(SPECIAL) + len(WORDS), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    return cls(LlamaConfig(**size, **tokens, max_position_embeddings=128, **options))


def lora() -> LoraConfig:
    return LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def base_weights(model: PeftModel) -> dict[str, torch.Tensor]:
    """What training must not touch."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" not in name}


def t5() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    size = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
    tokens = {"vocab_size": 40, "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
    # Larger weights than usual, so that even a hardly trained model writes something else for each input.
    return T5ForConditionalGeneration(T5Config(**size, **tokens, dropout_rate=0.0, initializer_factor=4.0))


# ---- Data ----


def copies(count: int) -> list[dict[str, list[int]]]:
    """For T5: the target is the first half of the source."""
    sources = torch.randint(2, 40, (count, 8), generator=torch.Generator().manual_seed(count)).tolist()
    return [{"input_ids": source, "attention_mask": [1] * 8, "labels": source[:4]} for source in sources]


def texts(count: int) -> Dataset:
    """Plain text of unequal length."""
    return Dataset.from_list(
        [{"text": " ".join(WORDS[i % 60 : i % 60 + 4 + i % 7])} for i in range(count)],
    )


def chats(count: int) -> Dataset:
    turns = [(WORDS[i % 60], " ".join(WORDS[i % 60 + 1 : i % 60 + 4])) for i in range(count)]
    return Dataset.from_list(
        [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]} for q, a in turns]
    )


def completions(count: int) -> Dataset:
    return Dataset.from_list(
        [{"prompt": " ".join(WORDS[i % 60 : i % 60 + 3]), "completion": f" {WORDS[i % 60 + 3]}"} for i in range(count)]
    )


def preferences(count: int) -> Dataset:
    """The next number is better than the one before."""
    return Dataset.from_list(
        [
            {"prompt": WORDS[i % 60 + 1], "chosen": f" {WORDS[i % 60 + 2]}", "rejected": f" {WORDS[i % 60]}"}
            for i in range(count)
        ]
    )


def judged(count: int) -> Dataset:
    """The same by one judgement for each: half are good."""
    pairs = preferences(count)
    rows = [
        {"prompt": row["prompt"], "completion": row["chosen" if i % 2 else "rejected"], "label": bool(i % 2)}
        for i, row in enumerate(pairs)
    ]
    return Dataset.from_list(rows)


def prompts(count: int) -> Dataset:
    """Two words each, no two alike."""
    return Dataset.from_list([{"prompt": f"{WORDS[i // 60]} {WORDS[i % 60]}"} for i in range(count)])
