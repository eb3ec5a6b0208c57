"""Other Trainers made into LayUp ones: Seq2SeqTrainer, TRL's trainers, models of PEFT."""

import copy
import math

import pytest
import torch
from launching import run
from peft import get_peft_model_state_dict
from relatives import (
    LayupDPOTrainer,
    LayupSFTConfig,
    LayupSFTTrainer,
    chats,
    completions,
    copies,
    llama,
    lora,
    t5,
    texts,
    tokenizer,
)
from torch import nn
from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainingArguments
from trl import DPOConfig, SFTConfig, SFTTrainer

from layup_hf import LayupConfig, LayupMixin, LayupTrainer

TRL_CASES = ["packed", "padding_free", "chat", "adapters", "dpo", "reward", "kto", "cpo", "orpo"]


def launch(workers, folder, *cases):
    """Run these cases; each one's results in the order of ranks."""
    results = run("family.py", workers, [str(folder / "out"), *cases], folder, forked=workers > 2).results()
    assert len(results) == workers
    return {case: [result[case] for result in results] for case in cases}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    return launch(2, folder, *TRL_CASES, "gathering") | {"folder": folder / "out"}


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    folder = tmp_path_factory.mktemp("four")
    return launch(4, folder, "seq2seq", "plain_adapters", "chat") | {"folder": folder / "out"}


def assert_gossiped(results):
    """All made their steps without a collective between two meetings, exchanged blocks, and agree in the end."""
    for result in results:
        assert len(result["collectives"]) >= 2
        assert set(result["collectives"]) == {0}
        assert result["same"]
        assert sum(result["blocks"].values()) == result["trainable_bytes"]
    done = sum(result["steps"] for result in results)
    assert done == (results[0]["global_step"] - results[0]["began_at"]) * len(results)
    assert any(entry.get("layup/bytes_read") for result in results for entry in result["logs"])


def entries(result, name):
    return [entry for entry in result["logs"] if name in entry]


# ---- Seq2SeqTrainer ----


def seq2seq_arguments(folder, cls=Seq2SeqTrainingArguments, **options):
    fixed = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "predict_with_generate": True}
    return cls(str(folder), **fixed, generation_max_length=6, per_device_eval_batch_size=2, **options)


def test_seq2seq_workers_train_and_evaluate_by_generating(four):
    assert_gossiped(four["seq2seq"])
    for result in four["seq2seq"]:
        evaluations = entries(result, "eval_exact")
        assert [entry["step"] for entry in evaluations] == [6, 12, 12]
        assert evaluations[-1]["eval_loss"] == result["evaluated"]["eval_loss"]
        assert result["evaluated"]["eval_count"] == 16  # as with DDP, 11 samples filled up for 4 workers of 2


def test_seq2seq_predictions_are_those_of_the_stock_trainer_and_in_order(four):
    ours = four["seq2seq"][0]
    names = ("test_loss", "test_exact", "test_count")
    assert ours["as_stock"]
    assert [ours["metrics"][name] for name in names] == [ours["stock_metrics"][name] for name in names]
    model = t5().from_pretrained(four["folder"] / "seq2seq")
    alone = Seq2SeqTrainer(
        model=model,
        args=seq2seq_arguments(four["folder"] / "alone"),
        data_collator=DataCollatorForSeq2Seq(tokenizer(), model=model),
    ).predict(copies(11))
    assert ours["predictions"][:11] == alone.predictions.tolist()
    assert [row[:4] for row in ours["labels"][:11]] == [sample["labels"] for sample in copies(11)]
    assert len({tuple(row) for row in ours["predictions"][:11]}) > 5  # so the order shows
    assert all(result["predictions"] == ours["predictions"] for result in four["seq2seq"])


def test_seq2seq_with_one_process_is_the_stock_trainer(tmp_path):
    class LayupSeq2SeqTrainer(LayupMixin, Seq2SeqTrainer):
        pass

    models, outputs = [], []
    for cls in (LayupSeq2SeqTrainer, Seq2SeqTrainer):
        models.append(t5())
        trainer = cls(
            model=models[-1],
            args=seq2seq_arguments(tmp_path, max_steps=4, max_grad_norm=0.0, save_strategy="no"),
            train_dataset=copies(32),
            data_collator=DataCollatorForSeq2Seq(tokenizer(), model=models[-1]),
        )
        trainer.train()
        outputs.append(trainer.predict(copies(5)))
    assert same(*models)
    assert not same(models[0], t5())
    assert outputs[0].predictions.tolist() == outputs[1].predictions.tolist()
    assert len(outputs[0].predictions) == 5


def same(model, other):
    return all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


# ---- What gathers in a step ----


def test_what_is_gathered_in_a_step_is_the_workers_own_and_nobody_waits_for_it(two):
    fast, slow = two["gathering"]
    assert_gossiped([fast, slow])
    for result in (fast, slow):
        assert result["times"] == 8 * result["steps"]
        assert result["alone"]
        assert {entry["ranks"] for entry in entries(result, "loss")} == {1}
    assert fast["ran"] == ["begins with 1", "ends with 1", "main"]
    assert slow["ran"] == ["begins with 1", "ends with 1", "last"]
    assert fast["steps"] > 2 * slow["steps"]


def test_what_is_gathered_at_a_meeting_comes_from_all(two):
    for result in two["gathering"]:
        assert set(result["together"]) == {2}
        assert {entry["ranks"] for entry in entries(result, "eval_loss")} == {2}
        assert {entry["ranks"] for entry in entries(result, "layup/consensus_distance")} == {2}


# ---- TRL ----


@pytest.mark.parametrize(("workers", "case"), [*(("two", case) for case in TRL_CASES), ("four", "chat")])
def test_trl_trainers_train_without_collectives_between_meetings(workers, case, request):
    results = request.getfixturevalue(workers)[case]
    assert_gossiped(results)
    of_pairs = dict.fromkeys(("dpo", "cpo", "orpo"), "rewards/accuracies")
    own = {**of_pairs, "reward": "accuracy", "kto": "rewards/chosen"}.get(case, "mean_token_accuracy")
    for result in results:
        evaluations = entries(result, "eval_loss")
        assert len({entry["eval_loss"] for entry in evaluations}) >= 2
        assert all(own in entry for entry in entries(result, "loss")) or case == "kto"  # a batch may have no good one
        evaluated = [entry[f"eval_{own}"] for entry in entries(result, f"eval_{own}")]
        found = [entry[own] for entry in entries(result, own)] + evaluated
        if case == "kto" and result is not results[0] and not found:
            continue  # KTO of TRL 0.29 notes its metrics on rank 0 alone
        assert len(evaluated) == len(evaluations) < len(found)
        assert all(math.isfinite(value) if case == "kto" else 0 <= value <= 1 for value in found)


@pytest.mark.parametrize("case", ["packed", "padding_free", "chat"])
def test_sft_learns_and_logs_its_own_metrics(two, case):
    for result in two[case]:
        for entry in entries(result, "loss"):
            assert entry["entropy"] > 0
            assert entry["num_tokens"] > 0
        evaluations = entries(result, "eval_loss")
        assert all(entry["eval_entropy"] > 0 for entry in evaluations)
        untrained = math.log(llama().config.vocab_size)
        assert evaluations[-1]["eval_loss"] < untrained - 0.3  # from one evaluation to the next it may rise


def test_sft_with_a_slow_worker(two):
    fast, slow = two["packed"]
    assert fast["padding_free"]
    assert fast["steps"] > 2 * slow["steps"]
    assert fast["tokens"] > slow["tokens"]  # each logs its own
    assert fast["tokens_of_all"] == slow["tokens_of_all"] == fast["tokens"] + slow["tokens"]


def test_sft_learns_what_it_was_told_to(two):
    assert all(result["learnt"] == "1 2 3 <end>" for result in two["chat"])  # assistant_only_loss
    assert all(result["learnt"] == 2 for result in two["adapters"])  # the completion and the end, not the prompt


def test_sft_checkpoints_have_a_model_card(two):
    assert "SFT" in (two["folder"] / "chat" / "README.md").read_text()
    assert (two["folder"] / "chat" / "checkpoint-12" / "model.safetensors").exists()


def sft(cls, config, folder, data, resume=None, peft_config=None, **options):
    fixed = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "max_grad_norm": 0.0, "max_steps": 6}
    fixed |= {"learning_rate": 1e-2, "per_device_train_batch_size": 2, "logging_steps": 2, "save_strategy": "no"}
    trainer = cls(
        model=llama(),
        args=config(str(folder), **{**fixed, "max_length": 32, **options}),
        train_dataset=data(24),
        processing_class=tokenizer(),
        peft_config=peft_config,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize(
    ("data", "options"),
    [
        (texts, {"packing": True}),
        (chats, {"assistant_only_loss": True, "gradient_accumulation_steps": 2}),
        (completions, {"peft_config": lora()}),
    ],
    ids=["packing", "chat", "lora"],
)
def test_sft_with_one_process_is_the_stock_trainer_bit_for_bit(tmp_path, data, options):
    ours = sft(LayupSFTTrainer, LayupSFTConfig, tmp_path / "ours", data, **copy.deepcopy(options))
    stock = sft(SFTTrainer, SFTConfig, tmp_path / "stock", data, **copy.deepcopy(options))
    assert ours.args.bf16  # TRL's defaults
    assert ours.args.gradient_checkpointing
    assert same(ours.model, stock.model)
    for entry, other in zip(ours.state.log_history[:-1], stock.state.log_history[:-1], strict=True):
        assert {**entry, "grad_norm": 0} == {**other, "grad_norm": 0}


# ---- Adapters ----


@pytest.mark.parametrize(("workers", "case"), [("two", "adapters"), ("four", "plain_adapters")])
def test_only_adapters_are_exchanged(workers, case, request):
    results = request.getfixturevalue(workers)[case]
    assert_gossiped(results)
    for result in results:
        assert result["base_untouched"]
        size = set(result["blocks"].values())
        assert len(size) == 1  # two equal layers and nothing else
        for entry in entries(result, "layup/merges"):
            assert entry["layup/bytes_read"] == entry["layup/merges"] * min(size)


@pytest.mark.parametrize(("workers", "case"), [("two", "adapters"), ("four", "plain_adapters")])
def test_saved_adapters_make_the_trained_model(workers, case, request):
    for result in request.getfixturevalue(workers)[case]:
        assert result["reload"] == {"adapters": True, "merged": True, "has_learnt": True}


def test_the_best_adapters_are_loaded_at_the_end(two):
    assert all(result["is_best"] for result in two["adapters"])


def test_training_with_adapters_goes_on_from_a_checkpoint(two):
    for result in two["adapters"]:
        assert result["resumed_at"] == 6
        assert result["resumed_adapters"]
        assert result["resumed_base"]
    assert_gossiped([result["resumed"] for result in two["adapters"]])
    assert two["adapters"][0]["resumed"]["global_step"] == 12
    assert sum(result["resumed"]["steps"] for result in two["adapters"]) == 12


def test_resuming_with_adapters_gives_the_uninterrupted_run(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 3}
    whole = sft(LayupSFTTrainer, LayupSFTConfig, tmp_path, completions, peft_config=lora(), **options)
    resumed = sft(
        LayupSFTTrainer,
        LayupSFTConfig,
        tmp_path / "resumed",
        completions,
        peft_config=lora(),
        resume=str(tmp_path / "checkpoint-3"),
    )
    saved, found = (get_peft_model_state_dict(trainer.model) for trainer in (whole, resumed))
    assert all(torch.equal(saved[name], found[name]) for name in saved)


# ---- What is refused ----


def test_the_arguments_are_checked_wherever_a_trainer_takes_them(tmp_path):
    config = DPOConfig(str(tmp_path), use_cpu=True, gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ValueError, match="reentrant"):
        LayupDPOTrainer(llama(), llama(), config)


@pytest.fixture
def two_workers(monkeypatch):
    """What is checked at the start of one of two workers."""
    monkeypatch.setattr(TrainingArguments, "world_size", 2)


def test_layers_that_synchronise_are_refused(tmp_path, two_workers):
    model = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    with pytest.raises(ValueError, match="SyncBatchNorm and LayUp exclude each other"):
        LayupTrainer(model=model, args=LayupConfig(str(tmp_path), use_cpu=True))
