"""`optim="muon"`: as an argument like any other, and trained with: by one process as by hand, by two workers."""

import copy
import dataclasses
import json
import pickle

import pytest
from launching import run_cases
from stock import arguments, gpt2, same, text
from torch import nn
from transformers import HfArgumentParser, Trainer, TrainingArguments
from transformers.training_args import OptimizerNames

from layup_hf import LayupConfig, LayupOptions, LayupTrainer, MuonMixin
from layup_hf.optim.muon import MuonAdamW
from layup_hf.trainer.muon import Optimizers, is_muon


class MuonTrainer(MuonMixin, Trainer):
    """The stock Trainer, which steps the whole model when backward has ended."""


@dataclasses.dataclass
class OtherDefault(TrainingArguments):
    optim: OptimizerNames | str = "adafactor"


@dataclasses.dataclass
class Both(LayupOptions, OtherDefault):
    pass


def train(cls, folder, **options):
    trainer = cls(model=gpt2(), args=arguments(folder, optim="muon", **options), train_dataset=text())
    trainer.train(resume_from_checkpoint=options.get("resume_from_checkpoint"))
    return trainer


# ---- The argument ----


def test_it_is_an_argument_as_any_other(tmp_path):
    args = arguments(tmp_path, optim="muon")
    for other in (args, copy.deepcopy(args), pickle.loads(pickle.dumps(args)), dataclasses.replace(args)):
        assert is_muon(other.optim)
    assert args.to_dict()["optim"] == json.loads(args.to_json_string())["optim"] == "muon"
    assert is_muon(args.set_optimizer("muon", learning_rate=0.5).optim)
    assert args.learning_rate == 0.5
    assert args.set_optimizer("adafactor").optim is OptimizerNames.ADAFACTOR
    assert arguments(tmp_path, optim=Optimizers.ADAFACTOR).optim is OptimizerNames.ADAFACTOR


@pytest.mark.parametrize("kind", [LayupConfig, Both])
def test_command_lines_and_files_know_it(tmp_path, kind):
    parser = HfArgumentParser(kind)
    common = ["--output_dir", str(tmp_path), "--use_cpu", "True"]
    (args,) = parser.parse_args_into_dataclasses([*common, "--optim", "muon"])
    assert is_muon(args.optim)
    (args,) = parser.parse_dict({"output_dir": str(tmp_path), "use_cpu": True, "optim": "muon"})
    assert is_muon(args.optim)
    (args,) = parser.parse_args_into_dataclasses(common)
    assert args.optim == {LayupConfig: TrainingArguments.default_optim, Both: "adafactor"}[kind]
    with pytest.raises(SystemExit):
        parser.parse_args_into_dataclasses([*common, "--optim", "muonn"])


def test_the_name_is_ours_also_where_transformers_has_one_of_its_own():
    """But in arguments that know nothing of LayUp, whose name is of their own kind, it is theirs."""
    assert [is_muon(value) for value in ("muon", Optimizers.MUON, "adamw_torch", OptimizerNames.SGD, None)] == [
        True,
        True,
        False,
        False,
        False,
    ]
    assert {option.value for option in Optimizers} == {"muon"} | {option.value for option in OptimizerNames}


@pytest.mark.parametrize("given", ["rank=3", "momentum=x", "nesterov=perhaps", "momentum", "ns_steps=2.5"])
def test_options_that_it_does_not_understand_are_refused(tmp_path, given):
    with pytest.raises(ValueError, match=f"does not understand '{given}' in `optim_args`: it takes momentum=0.95"):
        arguments(tmp_path, optim="muon", optim_args=f"nesterov=true, {given}")


# ---- One process ----


@pytest.mark.parametrize(
    "options",
    [
        {"weight_decay": 0.1, "warmup_steps": 2},
        {"clip": "exact", "max_grad_norm": 0.5},
        {"gradient_accumulation_steps": 2, "bf16": True},
        {"optim_args": "momentum=0.8,nesterov=no,ns_steps=3", "adam_beta1": 0.8},
        {"optim_target_modules": ["mlp"]},
    ],
)
def test_it_trains_as_the_same_optimizer_that_steps_the_whole_model(tmp_path, options):
    """Bit for bit."""
    mine, theirs = (train(cls, tmp_path, **options) for cls in (LayupTrainer, MuonTrainer))
    assert same(mine.model, theirs.model)
    assert not same(mine.model, gpt2())


def test_it_is_the_optimizer_that_the_arguments_describe(tmp_path):
    options = {"weight_decay": 0.1, "optim_args": "momentum=0.8, nesterov=false, ns_steps=3", "adam_beta2": 0.9}
    trainer = train(LayupTrainer, tmp_path, **options, lr_scheduler_type="constant")
    optimizer = trainer.optimizer.optimizer.inner
    assert type(optimizer) is MuonAdamW
    groups = [(group["matrices"], group["weight_decay"], len(group["params"])) for group in optimizer.param_groups]
    assert groups == [(None, 0.1, 2), ("whole", 0.1, 8), (None, 0.0, 18)]
    for group in optimizer.param_groups:
        assert (group["lr"], group["momentum"], group["nesterov"], group["ns_steps"]) == (1e-2, 0.8, False, 3)
        assert (group["betas"], group["fused"]) == ((0.9, 0.9), True)
    states = {name for state in optimizer.state.values() for name in state}
    assert states == {"momentum_buffer", "step", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("first", [LayupTrainer, MuonTrainer])
def test_a_run_that_is_resumed_ends_as_one_that_was_not(tmp_path, first):
    """Bit for bit, whichever Trainer has saved."""
    saving = {"save_strategy": "steps", "save_steps": 3}
    whole = train(LayupTrainer, tmp_path / "whole", **saving)
    train(first, tmp_path / "part", **saving)
    resumed = train(LayupTrainer, tmp_path / "part", resume_from_checkpoint=str(tmp_path / "part/checkpoint-3"))
    assert same(whole.model, resumed.model)


def test_it_goes_on_where_something_is_frozen_or_unused(tmp_path):
    models = []
    for cls in (LayupTrainer, MuonTrainer):
        model = gpt2()
        model.transformer.h[0].mlp.c_fc.weight.requires_grad = False
        model.transformer.h[1].unused = nn.Linear(4, 4)
        cls(model=model, args=arguments(tmp_path, optim="muon"), train_dataset=text()).train()
        models.append(model)
    assert same(*models)


@pytest.mark.parametrize(
    ("options", "message"),
    [({}, "none of its layers"), ({"optim_target_modules": "x"}, "no module that `optim_target_modules='x'` names")],
)
def test_a_model_without_matrices_is_refused(tmp_path, options, message):
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.output = nn.Embedding(50, 4), nn.Linear(4, 50)

        def forward(self, input_ids, labels):
            logits = self.output(self.embedding(input_ids))
            return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())}

    trainer = LayupTrainer(model=Flat(), args=arguments(tmp_path, optim="muon", **options), train_dataset=text())
    with pytest.raises(ValueError, match=f"`optim='muon'` and this model exclude each other: {message}"):
        trainer.train()
    chosen = arguments(tmp_path, optim="muon", optim_target_modules="all-linear", max_steps=2)
    trainer = LayupTrainer(model=Flat(), args=chosen, train_dataset=text())
    trainer.train()
    assert [group["matrices"] for group in trainer.optimizer.param_groups] == [None, "whole", None]


# ---- Several workers ----

CASES = {
    "auto": ["--optim=muon"],
    "exact": ["--optim=muon", "--clip=exact"],
    "own": ["--optim=muon", "--second_moment=own", "--nesterov=off"],
}


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """What each of two workers has to say of each case."""
    return run_cases("moments.py", 2, CASES, tmp_path_factory.mktemp("muon"))


@pytest.mark.parametrize("case", CASES)
def test_workers_end_with_one_model(real, case):
    for mine in real[case]:
        assert mine["failure"] is None
        assert mine["same"]
        assert mine["state"] == ["exp_avg", "exp_avg_sq", "momentum_buffer", "step"]
        assert mine["loss"] < 3.8
        assert mine["looks_ahead"] == (case != "own")


def test_workers_compare_the_moments_of_what_adamw_steps(real):
    """Embeddings, norms, biases; two tensors of embeddings, and of the head, and eight of each layer are vectors."""
    for case in ("auto", "exact"):
        for mine, other in (real[case], real[case][::-1]):
            assert len(mine["first"]) == 2 + 2 * 8 + 2
            assert mine["theirs"][0] == pytest.approx(other["first"][0], rel=0.5)  # live, so not to the bit
            assert 1.0 < mine["length"] < 2**0.5
    assert all(mine["length"] is None for mine in real["own"])
