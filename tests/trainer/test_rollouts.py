"""Trainers that generate what they learn from, TRL's GRPO and RLOO: whole rollouts for a worker, and nobody waits."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import traces
from datasets import load_dataset
from launching import run
from relatives import WORDS, llama, prompts, tokenizer
from torch.utils.data import SequentialSampler
from transformers import TrainingArguments
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from layup_hf import LayupConfig, LayupMixin, LayupTrainer
from layup_hf.trainer.rollouts import check_generating_trainer

CASES = ["shared", "resumed", "adapters", "sharded", "distilled"]
COMMON = {"use_cpu": True, "report_to": "none", "bf16": False, "gradient_checkpointing": False, "disable_tqdm": True}
COMMON |= {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 6, "save_strategy": "no"}


class LayupGRPOTrainer(LayupMixin, GRPOTrainer):
    pass


class LayupRLOOTrainer(LayupMixin, RLOOTrainer):
    pass


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    results = run("rollouts.py", 2, [str(folder / "out"), *CASES], folder).results()
    assert len(results) == 2
    found = {case: [result[case] for result in results] for case in CASES}
    parts = {part: [result["resumed"][part] for result in results] for part in ("first", "second")}
    return found | parts | {"folder": folder / "out"}


def entries(result, name):
    return [entry for entry in result["logs"] if name in entry]


def uses(*parts):
    """How often each prompt was generated for, by all workers."""
    rollouts = [rollout for part in parts for result in part for rollout in result["rollouts"]]
    return Counter(prompt for rollout in rollouts for prompt in set(rollout))


# ---- Two workers ----


@pytest.mark.parametrize("case", ["shared", "first", "second", "adapters", "sharded"])
def test_workers_generate_whole_groups_alone(two, case):
    for result in two[case]:
        assert len(result["collectives"]) >= 2
        assert set(result["collectives"]) == {0}
        assert result["places"] == [[0, 1]]
        assert result["same"]
        assert result["rollouts"]
        for rollout in result["rollouts"]:
            assert Counter(rollout) == dict.fromkeys(rollout, 4)
    assert any(entry["layup/bytes_read"] for result in two[case] for entry in entries(result, "layup/bytes_read"))


def test_every_prompt_of_an_epoch_is_used_once_and_a_slow_worker_takes_fewer(two):
    fast, slow = two["shared"]
    assert uses(two["shared"]) == dict.fromkeys(uses(two["shared"]), 2)  # in each of two epochs once
    assert len(uses(two["shared"])) == 24
    assert fast["steps"] == 2 * len(fast["rollouts"])
    assert slow["steps"] == 2 * len(slow["rollouts"])
    assert fast["steps"] > slow["steps"]
    assert fast["steps"] + slow["steps"] == 48
    assert fast["global_step"] == slow["global_step"] == 24


def test_the_trace_tells_rollouts_from_steps_that_use_one_again(two):
    trace = traces.read(two["folder"] / "trace.json")
    for rank, result in enumerate(two["shared"]):
        counted = traces.counts(trace, rank)
        assert counted["rollout"] == len(result["rollouts"])
        assert counted["inputs"] == result["steps"] - len(result["rollouts"])
        assert counted["forward"] == counted["backward"] == counted["step"] == result["steps"]


def test_completions_come_from_the_weights_that_learn_from_them(two):
    for result in two["adapters"]:  # one step with each rollout
        assert all(result["by_what_learns"])
    for result in two["shared"]:  # the first of two
        assert all(result["by_what_learns"][::2])
        assert not any(result["by_what_learns"][1::2])


def test_metrics_are_logged_and_tokens_are_those_of_all(two):
    for case in ("shared", "adapters"):
        fast, slow = two[case]
        assert fast["tokens"] == slow["tokens"] > 24 * 4 * 2
        for result in two[case]:
            learnt = entries(result, "reward")
            assert learnt
            assert all(0 <= entry["rewards/small/mean"] <= 1 for entry in learnt)
            assert entries(result, "kl")
    assert entries(two["adapters"][0], "rewards/reward-model/mean")


def test_all_evaluate_together(two):
    for case, evaluations in (("shared", 2), ("adapters", 1)):
        found = [[entry["eval_reward"] for entry in entries(result, "eval_reward")] for result in two[case]]
        assert found[0] == found[1]
        assert len(found[0]) == evaluations


def test_completions_of_rank_0_are_kept(two):
    files = sorted((two["folder"] / "shared" / "completions").glob("*.parquet"))
    table = load_dataset("parquet", data_files=str(files[0]), split="train")
    assert {"prompt", "completion", "small", "advantage"} <= set(table.column_names)
    assert len(table) % 4 == 0


def test_a_resumed_run_generates_for_what_is_left(two):
    assert uses(two["first"], two["second"]) == dict.fromkeys((row["prompt"] for row in prompts(24)), 1)
    assert uses(two["second"])


def test_a_student_that_generates_is_taught_without_waiting(two):
    for result in two["distilled"]:
        assert set(result["collectives"]) == {0}
        assert result["same"]
        assert all(result["by_what_learns"])
        assert all(entry["loss"] > 0 for entry in entries(result, "loss"))
        assert len(result["by_what_learns"]) == 2 * result["steps"] == 2 * len(result["rollouts"])
    assert uses(two["distilled"]) == dict.fromkeys((row["prompt"] for row in prompts(32)), 1)


def test_only_adapters_are_trained(two):
    assert all(result["base_untouched"] for result in two["adapters"])


# ---- One process ----

ONE = {"max_steps": 6, "max_grad_norm": 0.0, "logging_steps": 1}


def low_numbers(completions, **others):
    return [float(len(set(text.split()) & set(WORDS[:9]))) for text in completions]


@pytest.mark.parametrize(
    ("ours", "stock", "config", "options"),
    [
        (LayupGRPOTrainer, GRPOTrainer, GRPOConfig, {"num_iterations": 2, "steps_per_generation": 2}),
        (LayupRLOOTrainer, RLOOTrainer, RLOOConfig, {"gradient_accumulation_steps": 2, "beta": 0.0}),
    ],
    ids=["grpo", "rloo"],
)
def test_with_one_process_it_is_trls_own_bit_for_bit(tmp_path, ours, stock, config, options):
    trainers = []
    for number, kind in enumerate((ours, stock)):
        trainer = kind(
            model=llama(),
            reward_funcs=low_numbers,
            args=config(str(tmp_path / str(number)), **COMMON, **ONE, **options),
            train_dataset=prompts(24),
            processing_class=tokenizer(),
        )
        trainer.train()
        trainers.append(trainer)
    for name, weight in trainers[0].model.state_dict().items():
        assert torch.equal(weight, trainers[1].model.state_dict()[name])
    assert not torch.equal(llama().model.embed_tokens.weight, trainers[0].model.model.embed_tokens.weight)
    for entry, other in zip(*(trainer.state.log_history[:-1] for trainer in trainers), strict=True):
        assert {**entry, "grad_norm": 0, "step_time": 0} == {**other, "grad_norm": 0, "step_time": 0}


# ---- What is refused ----


@pytest.fixture
def two_workers(monkeypatch):
    """What is checked at the start of one of two workers."""
    monkeypatch.setattr(TrainingArguments, "world_size", 2)


def grpo(folder, rows=24, sampler=None, **options):
    class Sampled(LayupGRPOTrainer):
        def _get_train_sampler(self, dataset=None):
            return SequentialSampler(dataset) if sampler else super()._get_train_sampler(dataset)

    return Sampled(
        model=llama(),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=GRPOConfig(str(folder), **{**COMMON, **options}),
        train_dataset=prompts(rows),
        processing_class=tokenizer(),
    )


def test_a_worker_must_hold_whole_groups(tmp_path, two_workers):
    grpo(tmp_path, per_device_train_batch_size=2, steps_per_generation=2)
    with pytest.raises(ValueError, match=r"steps_per_generation` \(2\) must be a multiple of `num_generations` \(4\)"):
        grpo(tmp_path, per_device_train_batch_size=2)


def test_there_must_be_a_rollout_for_each_worker(tmp_path, two_workers):
    grpo(tmp_path, rows=4, steps_per_generation=2)
    with pytest.raises(ValueError, match="3 samples, 1 rollouts of 2: fewer than the 2 workers"):
        grpo(tmp_path, rows=3, steps_per_generation=2)


def test_samplers_that_do_not_say_how_often_prompts_come_are_refused(tmp_path, two_workers):
    trainer = grpo(tmp_path, sampler=True)
    with pytest.raises(ValueError, match="A sampler SequentialSampler and `shared_batches=True` exclude each other"):
        trainer.get_train_dataloader()


def test_what_keeps_a_worker_from_generating_alone_is_refused(tmp_path, two_workers):
    with pytest.raises(ValueError, match="`use_vllm` and LayUp with several workers that generate"):
        grpo(tmp_path, use_vllm=True)
    args = LayupConfig(str(tmp_path), use_cpu=True, bias_every=4)
    with pytest.raises(ValueError, match="`bias_every` and LayUp with several workers that generate"):
        check_generating_trainer(SimpleNamespace(args=args, _step=0, _buffered_inputs=None))
    args = LayupConfig(str(tmp_path), use_cpu=True, evaluations="background")
    with pytest.raises(ValueError, match="`evaluations='background'` and SimpleNamespace exclude each other"):
        check_generating_trainer(SimpleNamespace(args=args, _step=0, _buffered_inputs=None))
    with pytest.raises(ValueError, match="`use_transformers_continuous_batching` and `bf16` exclude each other"):
        grpo(tmp_path, use_transformers_continuous_batching=True, bf16=True)


def test_trainers_that_generate_otherwise_are_refused_by_name(tmp_path, two_workers):
    class OtherTrainer(LayupTrainer):
        pass

    args = GRPOConfig(str(tmp_path), **COMMON)
    other = object.__new__(OtherTrainer)
    vars(other).update(args=args)
    with pytest.raises(ValueError, match="OtherTrainer and LayUp with several workers exclude each other"):
        check_generating_trainer(other)
    check_generating_trainer(SimpleNamespace(args=args, _step=0, _buffered_inputs=None))
