"""Resumed with other options than before: what is left of the data is used once, and the clock fits it."""

import shutil

import pytest
from stock import arguments, gpt2, text
from test_loop import all_samples, counts, seen_until, work
from transformers import Trainer, TrainerCallback, TrainingArguments

from layup_hf import LayupTrainer

SAVING = ["--save_strategy=steps", "--save_steps=2", "--num_train_epochs=1"]
SHARDS = [*SAVING, "--shared_batches=False"]
CASES = {
    "first": SAVING,
    "finished": [*SAVING, "first/16"],
    "finished by steps": [*SAVING, "--max_steps=8", "first/8"],
    "more steps than now": [*SAVING, "--max_steps=6", "first/8"],
    "no skip": [*SAVING, "--ignore_data_skip=True", "first/12"],
    "larger batches": [*SAVING, "--num_train_epochs=2", "--per_device_train_batch_size=4", "first/12"],
    "once more": [*SAVING, "--num_train_epochs=2", "--per_device_train_batch_size=4", "larger batches/16"],
    "large": [*SAVING, "--max_steps=12", "--per_device_train_batch_size=8"],
    "smaller batches": [*SAVING, "--max_steps=12", "--per_device_train_batch_size=1", "large/6"],
    "shards": [*SHARDS, "--slow=0.2"],
    "shards, finished": [*SHARDS, "shards/16"],
    "shards, one used up": [*SHARDS, "shards/12"],
    "shards, shared now": [*SAVING, "shards/8"],
    "stream": [*SHARDS, "--iterable=True", "--max_steps=4", "--slow=0.2"],
    "stream, more steps": [*SAVING, "--iterable=True", "--max_steps=16", "stream/2"],
}


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """Every case's results, and the log. `case/step` says what a case goes on from."""
    folder, cases = tmp_path_factory.mktemp("resumed"), []
    for *options, last in CASES.values():
        case, _, step = last.partition("/")
        place = f"{folder}/out{list(CASES).index(case)}/checkpoint-{step}" if step else None
        cases.append([*options, last if place is None else f"--resume_from_checkpoint={place}"])
    log, results = work(folder, *cases)
    return dict(zip(CASES, results, strict=True)), log


@pytest.mark.parametrize("case", ["finished", "finished by steps", "more steps than now", "shards, finished"])
def test_a_finished_run_ends_at_once(case, resumed):
    for result in resumed[0][case]:
        assert result["steps"] == 0
        assert result["events"] == []
        assert result["train_loss"] == 0


def test_without_skipping_data_it_ends_by_the_clock(resumed):
    results = resumed[0]["no skip"]
    assert all(result["clock"] == [13, 14, 15, 16] for result in results)
    assert sum(result["steps"] for result in results) == 8


def test_with_other_batches_the_end_moves_to_where_the_data_end(resumed):
    """Also when this has been resumed once more, with the same options."""
    cases, log = resumed
    for result in cases["larger batches"]:
        assert result["clock"] == list(range(13, 23))
    for result in cases["once more"]:
        assert result["clock"] == list(range(17, 23))
        assert result["rates"][-1] == 0
    seen = seen_until(cases["first"], "save", 12) + seen_until(cases["larger batches"], "save", 16)
    assert seen + all_samples(cases["once more"]) == counts(range(64), range(64))
    assert log.count("Training ends at step 22, not 16, as that is when the data of all epochs have been used") == 2


def test_a_later_epoch_than_the_steps_would_come_to_is_trained(resumed):
    for result in resumed[0]["smaller batches"]:
        assert result["clock"] == list(range(7, 13))


def test_a_shard_that_has_been_used_is_not_used_again(resumed):
    cases, _ = resumed
    first = seen_until(cases["shards"], "save", 12)
    assert ["save", 12, 16] in cases["shards"][0]["events"]  # all of this shard
    assert first + all_samples(cases["shards, one used up"]) == counts(range(64))
    assert cases["shards, one used up"][0]["clock"] == list(range(13, 17))


def test_what_unequal_shards_have_left_over_is_shared(resumed):
    cases, _ = resumed
    first = seen_until(cases["shards"], "save", 8)
    assert first + all_samples(cases["shards, shared now"]) == counts(range(64))
    assert all(result["clock"] == list(range(9, 17)) for result in cases["shards, shared now"])


def test_a_stream_of_unknown_length_goes_on_where_it_was(resumed):
    cases, _ = resumed
    first = seen_until(cases["stream"], "save", 2)
    assert first + all_samples(cases["stream, more steps"]) == counts(range(64))


def test_one_process_goes_on_from_several_of_the_stock_trainer(tmp_path):
    """By the clock: as many epochs as are left, whatever one of its steps was."""
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": -1, "num_train_epochs": 1}
    args = arguments(tmp_path, TrainingArguments, **options)
    whole = Trainer(model=gpt2(), args=args, train_dataset=text(32)).train()
    checkpoint, batch = tmp_path / "checkpoint-2", 32 // whole.global_step
    for rank in range(2):  # as two workers with half of the batch would have written it
        shutil.copy(checkpoint / "rng_state.pth", checkpoint / f"rng_state_{rank}.pth")
    (checkpoint / "rng_state.pth").unlink()
    steps = []

    class Observer(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            steps.append(state.global_step)

    options["per_device_train_batch_size"] = batch // 2
    args = arguments(tmp_path / "one", **options)
    trainer = LayupTrainer(model=gpt2(), args=args, train_dataset=text(32), callbacks=[Observer()])
    trainer.train(resume_from_checkpoint=str(checkpoint))
    left = 2 * (whole.global_step - 2)
    assert steps == list(range(3, 3 + left))
    assert trainer.state.epoch == 1
