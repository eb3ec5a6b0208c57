"""Every `optim` that the Trainer knows: the Trainer's trajectory bit for bit, or refused by name."""

import pytest
import torch
from stock import arguments, same
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from layup_hf import LayupTrainer

REFUSED = {name for name in OptimizerNames if any(part in name for part in ("layerwise", "lomo", "schedule_free"))}
REFUSED |= {OptimizerNames.GROKADAMW}


def llama():
    """Matrices of 4096 elements and more, from which on optimizers with states of 8 bits really use these."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, max_position_embeddings=16, **sizes))


def data():
    tokens = torch.randint(0, 64, (32, 8), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in tokens]


def train(cls, folder, kind, **options):
    model = llama()
    cls(model=model, args=arguments(folder, *kind, **options), train_dataset=data()).train()
    return model


@pytest.mark.parametrize("name", sorted(set(OptimizerNames) - REFUSED))
def test_the_trajectory_is_the_trainers(tmp_path, name):
    options = {"optim": name, "weight_decay": 0.1, "warmup_steps": 2}
    if name.startswith(("galore", "apollo")):
        options["optim_target_modules"] = ["q_proj", "up_proj"]
    try:
        theirs = train(Trainer, tmp_path, [TrainingArguments], **options)
    except (
        ImportError,
        ValueError,
        RuntimeError,
        AssertionError,
    ) as error:  # it needs another package or device
        pytest.skip(str(error))
    ours = train(LayupTrainer, tmp_path, [], **options)
    assert same(ours, theirs)
    assert not same(ours, llama())


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_cannot_step_by_block_is_refused_by_name(tmp_path, name):
    with pytest.raises(ValueError, match=rf"`optim='{name.value}'` and LayUp exclude each other: .*'adamw_torch'"):
        arguments(tmp_path, optim=name)
