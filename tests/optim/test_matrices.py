"""Which parameters Muon takes: by the structure of models of many families."""

import pytest
import torch
from models import TINY
from peft import LoraConfig, get_peft_model
from stock import gpt2
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, T5Config, T5ForConditionalGeneration

from layup_hf.optim.matrices import layer_matrices

GPT2 = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
LLAMA = (
    *(f"self_attn.{name}_proj.weight" for name in "qkvo"),
    *(f"mlp.{n}_proj.weight" for n in ("gate", "up", "down")),
)
MIXTRAL = (*LLAMA[:4], "mlp.gate.weight")
BERT = (
    *(f"attention.self.{name}.weight" for name in ("query", "key", "value")),
    *(f"{name}.dense.weight" for name in ("attention.output", "intermediate", "output")),
)
LORA = tuple(f"self_attn.{name}_proj.lora_{side}.default.weight" for name in "qv" for side in "AB")
EXPECTED = {
    "gpt2": ("transformer.h", {"whole": GPT2}),
    "llama": ("model.layers", {"whole": LLAMA}),
    "mixtral": ("model.layers", {"whole": MIXTRAL, "stacked": ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")}),
    "bert": ("bert.encoder.layer", {"whole": BERT}),
    "lora_llama": ("base_model.model.model.layers", {"whole": LORA}),
}


def names_of(model, found):
    """By kind, in the model's order."""
    by_id = {id(parameter): name for name, parameter in model.named_parameters()}
    return {kind: [by_id[id(parameter)] for parameter in members] for kind, members in found.items()}


@pytest.mark.parametrize("family", EXPECTED)
def test_the_matrices_of_layers_are_taken_and_nothing_else(family):
    """Of GPT-2 its fused projection as one, of Mixtral its experts and their router, of an adapter its two."""
    stack, members = EXPECTED[family]
    model = TINY[family].build()
    assert names_of(model, layer_matrices(model)) == {
        kind: [f"{stack}.{layer}.{name}" for layer in range(2) for name in names] for kind, names in members.items()
    }


@pytest.mark.parametrize("family", sorted(TINY))
def test_embeddings_norms_biases_and_heads_are_left_to_adamw(family):
    model = TINY[family].build()
    taken = {name for members in names_of(model, layer_matrices(model)).values() for name in members}
    assert taken
    for name, parameter in model.named_parameters():
        if name in taken:
            assert parameter.dim() >= 2
            assert parameter.requires_grad
        outside = ("embed", "wte", "wpe", "shared", "lm_head", "classifier", "norm", "bias", "pooler", "cls")
        assert name not in taken or not any(part in name.lower() for part in outside), name


def test_convolutions_over_all_channels_are_taken_and_those_in_groups_are_not():
    """And of a ResNet neither its first convolution nor its head, though that is a layer for the exchange."""
    model = TINY["resnet"].build()
    (kind,) = found = names_of(model, layer_matrices(model))
    assert kind == "flattened"
    assert all(name.endswith("convolution.weight") for name in found[kind])
    assert not any(name.startswith(("resnet.embedder", "classifier")) for name in found[kind])

    layer = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 6, 1), nn.Conv1d(2, 2, 3, groups=2))
    model = nn.Sequential(layer, nn.Sequential(nn.ConvTranspose2d(6, 3, 2)))
    assert names_of(model, layer_matrices(model)) == {"flattened": ["0.1.weight", "1.0.weight"]}


def test_a_head_beside_the_body_is_none_of_its_layers():
    model = BertForSequenceClassification(
        BertConfig(vocab_size=8, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4)
    )
    model.classifier = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    assert all(name.startswith("bert.encoder") for name in names_of(model, layer_matrices(model))["whole"])


def test_relative_positions_and_other_tables_in_layers_are_left_to_adamw():
    model = T5ForConditionalGeneration(
        T5Config(vocab_size=8, d_model=4, d_kv=2, d_ff=4, num_layers=1, num_heads=2, decoder_start_token_id=0)
    )
    assert not any("relative" in name for name in names_of(model, layer_matrices(model))["whole"])

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.projection = nn.Linear(4, 4)
            self.attention = nn.MultiheadAttention(4, 2)
            self.table, self.scale = nn.Parameter(torch.ones(5, 4)), nn.Parameter(torch.ones(1, 1, 4))
            self.gate_up_proj_bias, self.weight = nn.Parameter(torch.ones(2, 4)), nn.Parameter(torch.ones(1, 4))

    model = nn.ModuleList([Layer()])
    found = names_of(model, layer_matrices(model))
    assert found == {"whole": ["0.projection.weight", "0.attention.in_proj_weight", "0.attention.out_proj.weight"]}


def test_what_is_tied_to_an_embedding_or_frozen_is_left_out():
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.output, self.inner = nn.Embedding(5, 4), nn.Linear(4, 5), nn.Linear(4, 4)
            self.output.weight = self.embedding.weight

    model = nn.ModuleList([Layer(), Layer()])
    model[1].inner.weight.requires_grad = False
    assert names_of(model, layer_matrices(model)) == {"whole": ["0.inner.weight"]}


def test_a_matrix_that_layers_share_is_taken_once():
    model = nn.ModuleList([nn.Linear(4, 4)] * 2)
    assert names_of(model, layer_matrices(model)) == {"whole": ["0.weight"]}


def test_modules_can_be_chosen():
    """Whether they are in layers or not; what looks up rows stays AdamW's."""
    model = gpt2()
    found = layer_matrices(model, lambda path: path in ("transformer.wte", "transformer.h.0.mlp.c_fc"))
    assert names_of(model, found) == {"whole": ["transformer.h.0.mlp.c_fc.weight"]}
    net = nn.Linear(4, 4)
    assert layer_matrices(net) == {}
    assert names_of(net, layer_matrices(net, lambda path: True)) == {"whole": ["weight"]}


def test_heads_that_an_adapter_trains_and_adapters_of_embeddings_are_left_to_adamw():
    config = LoraConfig(target_modules=["wte", "c_attn"], modules_to_save=["lm_head"], fan_in_fan_out=True)
    model = get_peft_model(gpt2(), config)
    found = names_of(model, layer_matrices(model))
    assert list(found) == ["whole"]
    assert {name.split(".")[-3] for name in found["whole"]} == {"lora_A", "lora_B"}
    assert all(".h." in name for name in found["whole"])
