"""Training data of every kind with real workers: each sample once, or a word that says why not; and who is there."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from datasets.distributed import split_dataset_by_node
from launching import run
from stock import BOTH, arguments, gpt2, same, text
from torch.utils.data import IterableDataset
from transformers import TrainingArguments

from layup_hf import LayupConfig, LayupTrainer
from layup_hf.gossip import consensus
from layup_hf.trainer.streams import require_same_seeds
from layup_hf.trainer.suitability import check_data

CASES = ["streams", "own_streams", "ends", "epochs", "samplers", "loaders", "alone", "numbers", "rest"]
SEED = "Pass `seed=` to `shuffle()` and `interleave_datasets()`"


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    results = run("data.py", 2, [str(folder / "out"), *CASES], folder, timeout=400, forked=False).results()
    assert len(results) == 2
    return {case: [result[case] for result in results] for case in CASES}


def assert_used(results, name, times=1, samples=96):
    for result in results:
        found = result[name]
        assert "message" not in found, found
        assert (found["distinct"], found["least"], found["most"]) == (samples, times, times), name


# ---- Streams ----


def test_a_seeded_stream_of_datasets_is_used_once(two):
    for name in ("seeded", "mapped", "interleaved"):
        assert_used(two["streams"], name)


@pytest.mark.parametrize("name", ["unseeded", "unseeded, in shards", "unseeded, mapped", "interleaved, unseeded"])
def test_an_unseeded_stream_of_datasets_is_refused_on_every_worker(two, name):
    for result in two["streams"]:
        assert result[name]["error"] == "ValueError"
        assert SEED in result[name]["message"]


def test_a_stream_that_has_been_split_by_rank_is_refused(two):
    for result in two["streams"]:
        for name in ("split", "split, in shards"):
            assert "`split_dataset_by_node` and LayUp with several workers exclude" in result[name]["message"]
            assert "Pass the whole" in result[name]["message"]


@pytest.mark.parametrize("shares", [True, False])
@pytest.mark.parametrize("order", ["by_torch", "by_numpy", "by_python"])
def test_a_stream_that_a_global_generator_shuffles_is_used_once(two, order, shares):
    assert_used(two["own_streams"], f"{order}, {shares}")


def test_a_stream_that_is_loaded_by_other_processes_is_used_once(two):
    assert_used(two["own_streams"], "loaded by processes")


@pytest.mark.parametrize("order", ["by_itself", "by_rank", "noise"])
def test_a_stream_that_differs_between_workers_ends_training(two, order):
    errors = [result[order] for result in two["own_streams"]]
    assert sorted(error["error"] for error in errors) == ["ValueError", "WorkerFailure"]
    for error in errors:
        assert "The workers read different streams in epoch 0" in error["message"]
        assert "`seed=`" in error["message"]


def test_what_is_random_within_samples_may_differ_in_shards(two):
    assert_used(two["own_streams"], "noise, in shards")


@pytest.mark.parametrize("name", ["by_rank", "by_rank, loaded by processes", "noise", "by_torch"])
def test_a_stream_that_differs_between_workers_is_told_in_shards(two, name):
    found = two["own_streams"][0][f"{name}, in shards"]
    assert ("message" in found) is False
    assert len(found["said"]) == (0 if name == "by_torch" else 1)
    assert all("`shared_batches=False`, workers read different streams in epoch 0" in line for line in found["said"])
    if name.startswith("by_rank"):
        assert found["distinct"] < 96


def streamed(shuffled):
    return shuffled.map(lambda row: row).select_columns("x")


def test_seeds_are_compared_without_reading():
    stream, others = Dataset.from_dict({"x": range(8)}).to_iterable_dataset(2), []

    def compare(dataset, other):
        others.clear()
        require_same_seeds(other, lambda seeds: others.append(seeds) or [seeds])
        require_same_seeds(dataset, lambda seeds: [*others, seeds])

    compare(streamed(stream.shuffle(seed=1)), streamed(stream.shuffle(seed=1)))
    compare(SimpleNamespace(dataset=stream.shuffle(seed=1)), stream.shuffle(seed=1))
    compare(stream, stream)
    compare(None, [1, 2])
    for dataset, other in ((stream.shuffle(), stream.shuffle()), (stream.shuffle(seed=1), stream.shuffle(seed=2))):
        with pytest.raises(ValueError, match="Pass `seed=`"):
            compare(streamed(dataset), streamed(other))


def test_one_process_may_take_a_part_by_its_rank():
    part = split_dataset_by_node(Dataset.from_dict({"x": range(8)}).to_iterable_dataset(2), rank=0, world_size=2)
    sizes = {"train_batch_size": 1, "gradient_accumulation_steps": 1, "dataloader_drop_last": False}
    check_data(part, SimpleNamespace(world_size=1, **sizes))
    with pytest.raises(ValueError, match="`split_dataset_by_node` and LayUp"):
        check_data(part, SimpleNamespace(world_size=2, **sizes))


# ---- The end of the data ----


class Stream(IterableDataset):
    def __init__(self, passes):
        self.passes = passes

    def __iter__(self):
        self.passes -= 1
        return iter(text() if self.passes >= 0 else [])


@pytest.mark.parametrize("shares", [True, False])
def test_a_stream_that_is_used_up_ends_training_as_in_the_stock_trainer(two, shares):
    for name, passes, steps in (("one pass", 1, 8), ("two passes", 2, 16), ("known length", 1, 8)):
        assert_used(two["ends"], f"{name}, {shares}", times=passes, samples=64)
        assert [result[f"{name}, {shares}"]["global_step"] for result in two["ends"]] == [steps, steps]


def test_a_stream_of_nothing_ends_training_as_in_the_stock_trainer(two):
    for result in two["ends"]:
        assert (result["nothing"]["global_step"], result["nothing"]["loss"]) == (0, 0.0)


def test_with_one_process_a_stream_ends_as_in_the_stock_trainer(tmp_path):
    ends = []
    for trainer_class, config in BOTH:
        found = []
        for passes in (0, 1, 2):
            args = arguments(tmp_path, config, max_steps=30, accelerator_config={"dispatch_batches": False})
            trainer = trainer_class(model=gpt2(), args=args, train_dataset=Stream(passes))
            output = trainer.train()
            found.append((output.global_step, output.training_loss, trainer.state.epoch))
        ends.append(found)
    assert ends[0] == ends[1]
    assert [steps for steps, _, _ in ends[0]] == [0, 8, 16]


@pytest.mark.parametrize("name", ["whole", "stream", "in shards"])
def test_epochs_are_numbers_with_a_fraction(two, name):
    assert_used(two["epochs"], name, times=2)
    for result in two["epochs"]:
        assert all(isinstance(epoch, float) for epoch in (*result[name]["epochs"], result[name]["epoch"]))
        assert result[name]["epoch"] == 2.0


# ---- Samplers and loaders ----


def test_samplers_may_yield_names_and_pairs(two):
    for name in ("names", "pairs"):
        assert_used(two["samplers"], name)


def test_the_training_loader_has_what_that_of_the_stock_trainer_has(two):
    for result in two["loaders"]:
        assert result == {
            "sampler": "SeedableRandomSampler",
            "sizes": [4, 4, 8, 12],
            "drop_last": [True, True],
            "num_workers": 0,
            "batches": [12, 12, 12],
            "collates": True,
        }


# ---- Who is there in a step ----


def test_in_its_own_step_a_worker_is_the_first_of_one(two):
    for rank, result in enumerate(two["alone"]):
        seen = result["in a callback"]
        assert seen["accelerator"] == seen["state"] == seen["accelerator's state"] == [0, 1]
        assert seen["gathered"] == [rank]
        assert seen["split"] == ["a", "b"]
        assert result["loss"] > 0


def test_what_chooses_one_worker_chooses_among_all(two):
    for rank, result in enumerate(two["alone"]):
        for where in ("in a callback", "at an evaluation"):
            assert result[where]["first"] == [rank == 0] * 3
            assert result[where]["last"] == [rank == 1] * 2
            assert result[where]["arguments"] == [rank, 2, rank == 0, rank == 0]
            assert result[where]["local"] == [rank, rank]
    names = [["first of all", "main"], ["last", "second by state", "second of all"]]
    chosen = [[f"{name} {where}" for name in mine for where in ("at an evaluation", "in a callback")] for mine in names]
    assert [result["chosen"] for result in two["alone"]] == chosen


def test_at_a_meeting_and_after_training_all_are_there(two):
    for rank, result in enumerate(two["alone"]):
        seen = result["at an evaluation"]
        assert seen["accelerator"] == seen["state"] == seen["accelerator's state"] == [rank, 2]
        assert seen["gathered"] == [0, 1]
        assert seen["split"] == ["ab"[rank]]
        assert result["after"] == [rank, 2, rank, 2]


# ---- What is the user's ----


def test_the_arguments_stay_as_they_were_given(two, tmp_path):
    assert [result["tokens"] for result in two["alone"]] == [[True, True]] * 2
    for value in (True, False):
        args = arguments(tmp_path, average_tokens_across_devices=value)
        before = copy.deepcopy(vars(args))
        trainers = [LayupTrainer(model=gpt2(), args=args, train_dataset=text()) for _ in range(2)]
        for trainer in trainers:
            trainer.train()
        assert trainers[0].args is args
        assert vars(args).keys() == before.keys()
        assert {name for name in before if name not in OBJECTS and vars(args)[name] != before[name]} == set()


OBJECTS = ("distributed_state", "accelerator_config")


@pytest.mark.parametrize(
    "options",
    [
        {"accelerator_config": {"dispatch_batches": True}, "dataloader_num_workers": 0},
        {"accelerator_config": {"split_batches": True}},
        {"accelerator_config": {"use_seedable_sampler": False}},
        {"dataloader_in_order": False, "dataloader_num_workers": 1},
        {"train_sampling_strategy": "batch_rebalance"},
        {"fp16": True},
    ],
    ids=str,
)
def test_one_process_may_do_what_several_may_not(options, tmp_path):
    models = []
    for trainer_class, config in BOTH:
        models.append(gpt2())
        args = arguments(tmp_path, config, max_steps=3, **copy.deepcopy(options))
        torch.manual_seed(0)
        trainer_class(model=models[-1], args=args, train_dataset=text()).train()
    assert same(*models)
    assert not same(models[0], gpt2())


def test_one_process_may_keep_a_shard_by_a_sampler_that_is_not_seeded(tmp_path):
    options = {"accelerator_config": {"use_seedable_sampler": False}, "shared_batches": False, "max_steps": 2}
    args = arguments(tmp_path, LayupConfig, **options)
    assert LayupTrainer(model=gpt2(), args=args, train_dataset=text()).train().global_step == 2


def test_plain_arguments_are_enough_for_one_process(tmp_path):
    args = arguments(tmp_path, TrainingArguments, max_steps=2)
    assert LayupTrainer(model=gpt2(), args=args, train_dataset=text()).train().global_step == 2


# ---- Numbers of other kinds ----


def test_float64_and_complex_models_train_and_agree(two):
    for name, found in two["numbers"][0].items():
        assert found["same"], name
        assert math.isfinite(found["loss"]), name
        assert "complex" not in name or found["imaginary"] > 1, name
        assert two["numbers"][1][name]["same"]


class Turned(torch.nn.Module):
    """With weights that may be complex."""

    def __init__(self, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.turn = torch.nn.Parameter(torch.randn(8, 8, dtype=dtype))

    def forward(self, input_ids, labels):
        turned = input_ids.to(self.turn.dtype) @ self.turn
        return {"loss": (turned.abs() - input_ids).square().mean()}


@pytest.mark.parametrize(("clip", "norm"), [("exact", 1.0), ("auto", 0.0), ("auto", 1e6)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_with_one_process_float64_and_complex_models_are_trained_as_by_the_stock_trainer(dtype, clip, norm, tmp_path):
    models = []
    for trainer_class, config in BOTH:
        models.append(Turned(dtype))
        own = {"clip": clip} if config is LayupConfig else {}
        args = arguments(tmp_path, config, optim="adamw_torch", max_grad_norm=norm, **own)
        trainer_class(model=models[-1], args=args, train_dataset=text()).train()
    assert same(*models)
    assert not same(models[0], Turned(dtype))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128, torch.float64, torch.bfloat16])
def test_a_mean_keeps_all_of_a_number(dtype):
    first, second = torch.randn(3, 2).to(dtype), torch.randn(4, dtype=torch.float32).to(dtype)
    if dtype.is_complex:
        first, second = first * (1 + 2j), second * (3 - 1j)
    expected = [first * 0.5, second * 0.5]
    flat = consensus._flatten([first, second])
    consensus._assign([first, second], flat * 0.5)
    for found, value in zip((first, second), expected, strict=True):
        assert torch.equal(found, value)


# ---- What is not exchanged ----


def test_what_training_changes_and_nobody_exchanges_is_agreed_on(two):
    results = two["rest"]
    steps = results[0]["steps"]
    assert sum(steps) == 32
    mean = sum((rank + 1) * done for rank, done in enumerate(steps)) / 2
    for rank, result in enumerate(results):
        assert result["same"]
        assert result["codes"] == [mean] * 3
        assert result["codes_in_half"] == [mean] * 3
        assert result["phases"] == [[0.0, mean]] * 3
        assert result["calls"] == steps[0]
        assert result["still"] == [0.0, 1.0, 2.0, 3.0, 4.0]
        assert result["cache"] == [(rank + 1) * steps[rank]]  # not saved, so nobody's but this worker's
        assert result["teacher"] == pytest.approx(mean, rel=1e-6)


def test_one_warning_names_what_is_not_exchanged(two):
    (warning,) = two["rest"][0]["warnings"]
    assert warning.startswith("LayUp: training changes what workers do not exchange: ")
    assert "codes, codes_in_half, phases, teacher.weight. Between consensus points" in warning
    assert "still" not in warning
    assert "num_batches" not in warning
    assert two["rest"][1]["warnings"] == []
