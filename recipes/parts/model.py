"""The model: a small GPT-2 made anew, or any causal language model from the Hub or a folder."""

import difflib
import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

# Small enough to learn something on two processor cores within three minutes.
SMALL = {
    "n_layer": 4,
    "n_embd": 128,
    "n_head": 4,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    # The same curve as GPT-2's own "gelu_new", computed in one fused kernel.
    "activation_function": "gelu_pytorch_tanh",
}
TRUTH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def make_config(
    model_name_or_path: str | None, overrides: str | None, tokenizer: PreTrainedTokenizerBase, block_size: int
) -> PreTrainedConfig:
    """The configuration of the named model, or of a small GPT-2 which fits the tokenizer and the blocks.

    Raises:
        ValueError: a bad override, a block longer than the model can read, or a tokenizer with more
            entries than the model.
    """
    if model_name_or_path:
        config = AutoConfig.from_pretrained(model_name_or_path)
    else:
        config = GPT2Config(
            **SMALL,
            vocab_size=len(tokenizer),
            n_positions=block_size,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    apply_overrides(config, overrides or "")
    longest = getattr(config, "max_position_embeddings", None)
    if longest and block_size > longest:
        raise ValueError(
            f"--block_size {block_size} is more than the model's {longest} positions: "
            f"use --block_size {longest} or less, or a model which reads longer texts."
        )
    if len(tokenizer) > config.vocab_size:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} entries, the model only {config.vocab_size}: "
            "give the --tokenizer_name that belongs to the model, or none."
        )
    return config


def apply_overrides(config: PreTrainedConfig, overrides: str) -> None:
    """Set options of `config` in place from text such as ``"n_layer=6,n_embd=256"``.

    A value takes the type of the present one; where that is None, it is read as JSON if it can be.

    Raises:
        ValueError: an item without "=", an unknown option, or a value of the wrong type.
    """
    known = set(config.to_dict()) | set(config.attribute_map)
    for item in filter(None, (part.strip() for part in overrides.split(","))):
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals:
            raise ValueError(f"--config_overrides: '{item}' is not of the form option=value.")
        if key not in known:
            near = difflib.get_close_matches(key, known, n=3)
            hint = f" Did you mean {' or '.join(near)}?" if near else ""
            raise ValueError(f"--config_overrides: {type(config).__name__} has no option '{key}'.{hint}")
        setattr(config, key, parse_value(key, value, getattr(config, key)))


def parse_value(key: str, value: str, present: Any) -> Any:
    """`value` as the type of `present`.

    Raises:
        ValueError: it cannot be read as that type, or that type cannot be given on a command line.
    """
    try:
        if isinstance(present, bool):
            return TRUTH[value.lower()]
        if isinstance(present, (int, float, str)):
            return type(present)(value)
    except (KeyError, ValueError) as error:
        wanted = type(present).__name__
        raise ValueError(f"--config_overrides: {key} must be of type {wanted}, not '{value}'.") from error
    if present is not None:
        raise ValueError(f"--config_overrides: {key} holds a {type(present).__name__}, which cannot be set this way.")
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def make_model(model_name_or_path: str | None, config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """The named model, or a fresh one of this configuration; equal on every worker for an equal seed."""
    set_seed(seed)
    if model_name_or_path:
        # Master weights in float32 whatever the checkpoint was saved in; --bf16 then autocasts.
        model = AutoModelForCausalLM.from_pretrained(model_name_or_path, config=config, dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_config(config)
    if model.loss_type is None:
        model.loss_type = "ForCausalLM"  # what it takes anyway, but with a warning
    return model


def write_sample(folder: str | Path, prompt: str, device: torch.device, seed: int, length: int = 100) -> str:
    """Text which the model saved in `folder` writes after `prompt`: about `length` tokens."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).to(device)
    longest = getattr(model.config, "max_position_embeddings", None) or 2 * length
    start = tokenizer(prompt or tokenizer.eos_token, return_tensors="pt")["input_ids"][:, : longest - 1].to(device)
    set_seed(seed)
    tokens = model.generate(
        start,
        attention_mask=torch.ones_like(start),
        max_new_tokens=min(length, longest - start.shape[1]),
        do_sample=True,
        temperature=0.8,
        top_k=50,
        pad_token_id=tokenizer.eos_token_id,
    )
    return tokenizer.decode(tokens[0], skip_special_tokens=True)
