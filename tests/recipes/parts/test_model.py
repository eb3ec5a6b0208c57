"""The model and its overrides."""

import pytest
import torch
from datasets import Dataset
from transformers import GPT2Config

from recipes.parts.model import apply_overrides, make_config, make_model, write_sample
from recipes.parts.tokens import cached_tokenizer

TINY = "n_layer=1,n_embd=16,n_head=2"


@pytest.fixture(scope="module")
def tokenizer(sources, tmp_path_factory):
    return cached_tokenizer(Dataset.from_dict({"text": sources}), "text", 300, tmp_path_factory.mktemp("cache"))


def test_a_new_model_fits_tokenizer_and_blocks(tokenizer):
    config = make_config(None, None, tokenizer, 48)
    assert (config.vocab_size, config.n_positions, config.eos_token_id) == (300, 48, tokenizer.eos_token_id)


def test_overrides_take_the_type_of_what_they_replace():
    config = GPT2Config()
    apply_overrides(
        config, " n_layer=6, resid_pdrop=0 ,use_cache=false,activation_function=relu,n_inner=64,hidden_size=96,"
    )
    assert (config.n_layer, config.n_inner, config.n_embd) == (6, 64, 96)
    assert config.resid_pdrop == 0.0
    assert isinstance(config.resid_pdrop, float)
    assert config.use_cache is False
    assert config.activation_function == "relu"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("n_layers=6", "GPT2Config has no option 'n_layers'.*Did you mean n_layer"),
        ("save_pretrained=1", "no option 'save_pretrained'"),
        ("n_layer", "not of the form"),
        ("n_layer=six", "n_layer must be of type int, not 'six'"),
        ("n_layer=6.5", "type int"),
        ("resid_pdrop=none", "type float"),
        ("use_cache=maybe", "type bool"),
    ],
)
def test_bad_overrides_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        apply_overrides(GPT2Config(), overrides)


def test_a_block_longer_than_the_model_reads_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"--block_size 128 is more than the model's 64 positions.*--block_size 64"):
        make_config(None, "n_positions=64", tokenizer, 128)


def test_a_tokenizer_larger_than_the_model_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"300 entries, the model only 299.*--tokenizer_name"):
        make_config(None, "vocab_size=299", tokenizer, 32)


def test_workers_with_one_seed_make_one_model(tokenizer):
    config = make_config(None, TINY, tokenizer, 32)
    models = [make_model(None, config, seed) for seed in (1, 1, 2)]
    first, same, other = (model.transformer.wte.weight for model in models)
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_a_saved_model_goes_on_and_writes(tokenizer, tmp_path):
    config = make_config(None, TINY, tokenizer, 32)
    model = make_model(None, config, 1).half()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = make_model(str(tmp_path), make_config(str(tmp_path), "resid_pdrop=0.1", tokenizer, 32), 1)
    assert loaded.dtype == torch.float32
    assert loaded.config.resid_pdrop == 0.1
    assert torch.equal(loaded.transformer.wte.weight, model.transformer.wte.weight.float())

    loaded.save_pretrained(tmp_path)
    for prompt in ("def", "", "def " * 100):
        text = write_sample(tmp_path, prompt, torch.device("cpu"), seed=1)
        assert text == write_sample(tmp_path, prompt, torch.device("cpu"), seed=1)
        assert text.startswith("def") or not prompt.startswith("def ") or "def" in text
