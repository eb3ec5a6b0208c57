"""Evaluations in the background: of one model, by rank 0, while the others train."""

import pytest
import torch
from evaluations import BATCH, EVEN, ODD, Evaluation, results
from launching import run
from stock import arguments, gpt2
from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers import GPT2LMHeadModel, Trainer, TrainingArguments

from layup_hf import LayupTrainer
from layup_hf.trainer.checks import check_evaluations

OPTIONS = [
    "--use_cpu",
    "--output_dir=set by the script",
    "--report_to=none",
    "--disable_tqdm=True",
    "--max_steps=6",
    "--per_device_train_batch_size=2",
    f"--per_device_eval_batch_size={BATCH}",
    "--learning_rate=1e-2",
    "--eval_strategy=steps",
    "--eval_steps=2",
    "--save_strategy=steps",
    "--save_steps=2",
    "--load_best_model_at_end=True",
    "--metric_for_best_model=worth",
    "--evaluations=background",
]
STEPS = {"to the end": [2, 4, 6], "in the background": [2, 4, 6], "by epochs": [8, 16, 24]}


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    return run("evaluating.py", 2, OPTIONS, tmp_path_factory.mktemp("workers"))


@pytest.mark.parametrize("name", STEPS)
def test_rank_0_evaluates_all_of_one_model_while_the_other_trains_and_the_last_time_both_do(workers, name):
    first, second = (result[name]["evaluations"] for result in workers.results())
    assert [each["step"] for each in first] == STEPS[name]
    assert [each["is_alone"] for each in first] == [True, True, False]
    assert [each["others_train"] for each in first] == [True, True, False]
    assert all(each["model_stays"] and each["rows"] == len(ODD) for each in first + second)
    assert [each["step"] for each in second] == STEPS[name][-1:]


@pytest.mark.parametrize("name", STEPS)
def test_metrics_are_those_of_the_checkpoint_of_that_step_and_are_logged_with_it(workers, name, tmp_path):
    logs = workers.results()[0][name]["logs"]
    entries = {entry["step"]: entry for entry in logs if "eval_loss" in entry}
    assert list(entries) == STEPS[name]
    for step in STEPS[name][:2]:
        model = GPT2LMHeadModel.from_pretrained(workers.folder / name / f"checkpoint-{step}")
        expected = results(Trainer, TrainingArguments, model, tmp_path, Evaluation())["metrics"][1]
        assert {key: entries[step][key] for key in ("eval_loss", "eval_accuracy")} == {
            key: expected[key] for key in ("eval_loss", "eval_accuracy")
        }


@pytest.mark.parametrize("name", STEPS)
def test_all_workers_end_with_the_best_model(workers, name):
    for result in workers.results():
        training = result[name]
        assert (training["step"], training["worth"]) == (STEPS[name][-1], 0.9)
        assert training["best"] == f"checkpoint-{STEPS[name][1]}"
        assert training["is_best"]
        assert training["same"]


def test_what_a_callback_makes_of_the_metrics_is_done_by_all(workers):
    """Early stopping after the second evaluation, when the other has come to the next one at the latest."""
    first, second = (result["stopped"] for result in workers.results())
    assert first["step"] == second["step"] in (5, 6)
    assert [each["step"] for each in first["evaluations"] if each["is_alone"]] == [2, 4]
    assert [each["step"] for each in second["evaluations"]] == [6] * (first["step"] == 6)
    assert first["best"] == second["best"] == "checkpoint-2"
    assert all(training["is_best"] and training["same"] for training in (first, second))


NEEDING = [("save_strategy", "best"), ("lr_scheduler_type", "reduce_lr_on_plateau"), ("lr_scheduler_type", "greedy")]


@pytest.mark.parametrize(("option", "value"), NEEDING)
def test_what_needs_the_metrics_at_once_is_refused(option, value, tmp_path):
    args = arguments(
        tmp_path, evaluations="background", metric_for_best_model="loss", eval_strategy="steps", **{option: value}
    )
    with pytest.raises(ValueError, match=f"`evaluations='background'` and `{option}='{value}'` exclude each other"):
        check_evaluations(args)


def test_so_is_a_scheduler_of_the_users_own(tmp_path):
    scheduler = ReduceLROnPlateau(torch.optim.SGD(gpt2().parameters()))
    with pytest.raises(ValueError, match="`evaluations='background'` and `ReduceLROnPlateau` exclude each other"):
        check_evaluations(arguments(tmp_path, evaluations="background"), scheduler)
    check_evaluations(arguments(tmp_path), scheduler)


@pytest.mark.parametrize(("option", "value"), NEEDING)
def test_with_one_process_it_changes_nothing(option, value, tmp_path):
    args = arguments(
        tmp_path,
        evaluations="background",
        metric_for_best_model="loss",
        eval_strategy="steps",
        eval_steps=2,
        **{option: value},
    )
    trainer = LayupTrainer(model=gpt2(), args=args, train_dataset=EVEN, eval_dataset=ODD)
    trainer.train()
    assert any("eval_loss" in entry for entry in trainer.state.log_history)
