"""Tiny models of many families, and a training batch for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    ResNetConfig,
    ResNetForImageClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

VOCAB = 48
HIDDEN = 16
LENGTH = 8
CLASSES = 3

Batch = dict[str, Tensor]


def gpt2(layers: int = 2, tied: bool = True) -> nn.Module:
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB,
            n_positions=LENGTH,
            n_embd=HIDDEN,
            n_layer=layers,
            n_head=2,
            tie_word_embeddings=tied,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def llama(layers: int = 2, tied: bool = False) -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**_decoder(layers, tied)))


def qwen2(layers: int = 2, tied: bool = False) -> nn.Module:
    return Qwen2ForCausalLM(Qwen2Config(**_decoder(layers, tied)))


def gemma(layers: int = 2, tied: bool = True) -> nn.Module:
    return GemmaForCausalLM(GemmaConfig(**_decoder(layers, tied), head_dim=8))


def mixtral(layers: int = 2, tied: bool = False) -> nn.Module:
    return MixtralForCausalLM(MixtralConfig(**_decoder(layers, tied), num_local_experts=4, num_experts_per_tok=1))


def gpt_neox(layers: int = 2, tied: bool = False) -> nn.Module:
    config = _decoder(layers, tied)
    del config["num_key_value_heads"]
    return GPTNeoXForCausalLM(GPTNeoXConfig(**config))


def opt(layers: int = 2, tied: bool = True) -> nn.Module:
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            word_embed_proj_dim=HIDDEN,
            ffn_dim=HIDDEN,
            num_hidden_layers=layers,
            num_attention_heads=2,
            max_position_embeddings=LENGTH,
            layerdrop=0.0,
            tie_word_embeddings=tied,
        )
    )


def lora_llama(layers: int = 2) -> nn.Module:
    adapter = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return get_peft_model(llama(layers), adapter)


def bert(layers: int = 2) -> nn.Module:
    return BertForMaskedLM(
        BertConfig(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            num_hidden_layers=layers,
            num_attention_heads=2,
            intermediate_size=HIDDEN,
            max_position_embeddings=LENGTH,
        )
    )


def t5(layers: int = 2) -> nn.Module:
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCAB,
            d_model=HIDDEN,
            d_kv=8,
            d_ff=HIDDEN,
            num_layers=layers,
            num_heads=2,
            decoder_start_token_id=0,
        )
    )


def bart(layers: int = 2) -> nn.Module:
    return BartForConditionalGeneration(
        BartConfig(
            vocab_size=VOCAB,
            d_model=HIDDEN,
            encoder_layers=layers,
            decoder_layers=layers,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            encoder_ffn_dim=HIDDEN,
            decoder_ffn_dim=HIDDEN,
            max_position_embeddings=LENGTH,
        )
    )


def vit(layers: int = 2) -> nn.Module:
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=HIDDEN,
            num_hidden_layers=layers,
            num_attention_heads=2,
            intermediate_size=HIDDEN,
            image_size=8,
            patch_size=4,
            num_labels=CLASSES,
        )
    )


def resnet() -> nn.Module:
    return ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], layer_type="basic", num_labels=CLASSES)
    )


def text_batch() -> Batch:
    tokens = _tokens()
    return {"input_ids": tokens, "labels": tokens}


def image_batch() -> Batch:
    generator = torch.Generator().manual_seed(0)
    return {"pixel_values": torch.randn(4, 3, 8, 8, generator=generator), "labels": torch.arange(4) % CLASSES}


@dataclass(frozen=True)
class TinyModel:
    """A model to build, what to train it on, and how it is to be split.

    Attributes:
        layers: Path of each layer in forward order.
        blocks: Name of each block, in order.
    """

    build: Callable[[], nn.Module]
    batch: Callable[[], Batch]
    layers: tuple[str, ...]
    blocks: tuple[str, ...]


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """The loss in the model's present mode; dropout is the same in every call."""
    torch.manual_seed(0)
    return model(**batch).loss


def _decoder(layers: int, tied: bool) -> dict[str, object]:
    return {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": LENGTH,
        "tie_word_embeddings": tied,
        "pad_token_id": None,
    }


def _tokens() -> Tensor:
    return torch.randint(3, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(0))


def _one_stack(build: Callable[[], nn.Module], stack: str, batch: Callable[[], Batch] = text_batch) -> TinyModel:
    layers = (f"{stack}.0", f"{stack}.1")
    return TinyModel(build, batch, layers, ("embeddings", *layers, "head"))


def _two_stacks(build: Callable[[], nn.Module], encoder: str, decoder: str) -> TinyModel:
    first, second = (f"{encoder}.0", f"{encoder}.1"), (f"{decoder}.0", f"{decoder}.1")
    return TinyModel(build, text_batch, first + second, ("embeddings", *first, "between.1", *second, "head"))


_LORA_LAYERS = tuple(f"base_model.model.model.layers.{number}" for number in range(2))
_RESNET_LAYERS = tuple(f"resnet.encoder.stages.{stage}.layers.{number}" for stage in range(2) for number in range(2))
_OPT_LAYERS = tuple(f"model.decoder.layers.{number}" for number in range(2))

CAUSAL = {"gpt2": gpt2, "llama": llama, "qwen2": qwen2, "gemma": gemma, "opt": opt, "gpt_neox": gpt_neox}
CAUSAL["mixtral"] = mixtral
"""Builders that take the number of layers and whether the LM head is tied."""

TINY = {
    "gpt2": _one_stack(gpt2, "transformer.h"),
    "llama": _one_stack(llama, "model.layers"),
    "qwen2": _one_stack(qwen2, "model.layers"),
    "gemma": _one_stack(gemma, "model.layers"),
    # final_layer_norm is registered before the layers and the head is tied: nothing comes after the stack
    "opt": TinyModel(opt, text_batch, _OPT_LAYERS, ("embeddings", *_OPT_LAYERS)),
    "gpt_neox": _one_stack(gpt_neox, "gpt_neox.layers"),
    "mixtral": _one_stack(mixtral, "model.layers"),
    "lora_llama": TinyModel(lora_llama, text_batch, _LORA_LAYERS, _LORA_LAYERS),
    "bert": _one_stack(bert, "bert.encoder.layer"),
    "t5": _two_stacks(t5, "encoder.block", "decoder.block"),
    "bart": _two_stacks(bart, "model.encoder.layers", "model.decoder.layers"),
    "vit": _one_stack(vit, "vit.layers", image_batch),
    # the classifier is a Sequential: its linear layer is a layer
    "resnet": TinyModel(resnet, image_batch, _RESNET_LAYERS, ("embeddings", *_RESNET_LAYERS, "classifier.1")),
}
