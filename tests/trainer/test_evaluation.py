"""Several workers evaluate and predict what one process does on the same weights, and choose the best of them.

All is compared bit for bit, losses included (0 ulp). One thing differs from one process: where the length of a set is
no multiple of the batch, accelerate fills the last batch up from the beginning of the set, and the loss is that of the
batch so filled. With several workers of the stock Trainer it is the same, which is compared bit for bit, too.
"""

import gc
import weakref

import numpy as np
import pytest
import torch
from evaluations import BATCH, EVALUATIONS, EVEN, ODD, Evaluation, completed, flat, results
from launching import run
from stock import arguments, gpt2
from transformers import GPT2LMHeadModel, Trainer, TrainingArguments

from layup_hf import LayupTrainer

OPTIONS = [
    "--use_cpu",
    "--output_dir=set by the script",
    "--report_to=none",
    "--disable_tqdm=True",
    "--max_steps=10",
    "--per_device_train_batch_size=2",
    f"--per_device_eval_batch_size={BATCH}",
    "--learning_rate=1e-2",
    "--eval_strategy=steps",
    "--eval_steps=2",
    "--save_strategy=steps",
    "--save_steps=2",
    "--load_best_model_at_end=True",
    "--metric_for_best_model=worth",
]
OTHERS = {2: ["--save_total_limit=1"], 4: ["--save_total_limit=2", "--shared_batches=False"]}
LEFT = {2: {"last": [10], "second": [4]}, 4: {"last": [8, 10], "second": [4, 8]}}
"""Steps of the checkpoints that `save_total_limit` leaves, in the two trainings of the script."""


@pytest.fixture(scope="module", params=OTHERS, ids=lambda workers: f"{workers} workers")
def workers(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("workers")
    return run("evaluation.py", request.param, [*OPTIONS, *OTHERS[request.param]], folder, forked=request.param > 2)


def loss_of(model, folder, rows):
    """In one process, the mean over the rows of the losses of their batches, the last one filled up."""
    losses = []
    args = arguments(folder, TrainingArguments, per_device_eval_batch_size=BATCH, include_for_metrics=["loss"])
    trainer = Trainer(model=model, args=args, compute_metrics=lambda prediction: losses.append(prediction.losses) or {})
    trainer.predict(completed(rows))
    return losses[0][: len(rows)].mean().item()


@pytest.mark.parametrize("name", EVALUATIONS)
def test_metrics_and_predictions_are_those_of_one_process(workers, name, tmp_path):
    model = GPT2LMHeadModel.from_pretrained(workers.folder / "model")
    ours = torch.load(workers.folder / f"{name}.pt", weights_only=False)
    theirs = results(Trainer, TrainingArguments, model, tmp_path, EVALUATIONS[name])
    loss = loss_of(model, tmp_path, ODD)
    for metrics, expected in zip(ours["metrics"], theirs["metrics"], strict=True):
        for key in ("eval_odd_loss", "eval_loss", "given_loss", "test_loss"):
            if key in expected:
                expected[key] = loss
        assert metrics == expected
    for kind in ("predictions", "label_ids"):
        if theirs[kind] is None:
            assert ours[kind] is None
        else:
            assert np.array_equal(flat(ours[kind]), flat(theirs[kind]))
            assert len(flat(ours[kind])) == len(ODD)


@pytest.mark.parametrize("name", EVALUATIONS)
def test_every_worker_has_what_the_stock_trainer_with_as_many_workers_has(workers, name):
    for result in workers.results():
        assert result[name] == {"like_stock": True, "same": True}


@pytest.mark.parametrize(("name", "step", "best"), [("last", 10, 10), ("second", 8, 4)])
def test_all_workers_end_with_the_best_checkpoint(workers, name, step, best):
    for result in workers.results():
        training = result[name]
        assert (training["step"], training["best"]) == (step, f"checkpoint-{best}")
        assert training["has_been_written"]
        assert training["is_best"]
        assert training["same"]
        assert training["changed"] == (step != best)
        assert training["is_freed"]


@pytest.mark.parametrize("name", ["last", "second"])
def test_evaluation_in_training_is_that_of_the_checkpoint(workers, name, tmp_path):
    checkpoints = sorted((workers.folder / name).glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    histories = [result[name]["logs"] for result in workers.results()]
    assert [int(path.name.split("-")[1]) for path in checkpoints] == LEFT[len(histories)][name]
    for checkpoint in checkpoints:
        model = GPT2LMHeadModel.from_pretrained(checkpoint)
        expected = results(Trainer, TrainingArguments, model, tmp_path, Evaluation())["metrics"][1]
        for history in histories:
            (entry,) = [e for e in history if "eval_loss" in e and f"checkpoint-{e['step']}" == checkpoint.name]
            assert entry["eval_loss"] == loss_of(model, tmp_path, ODD)
            assert entry["eval_accuracy"] == expected["eval_accuracy"]


def test_the_stock_trainer_goes_on_from_a_checkpoint(workers, tmp_path):
    folder = workers.folder / "second" / "checkpoint-4"
    ranks = range(len(workers.results()))
    names = {"model.safetensors", "config.json", "generation_config.json", "training_args.bin", "trainer_state.json"}
    states = {"optimizer.pt", "scheduler.pt", *(f"rng_state_{rank}.pth" for rank in ranks)}
    own = {f"optimizer_{rank}.pt" for rank in ranks[1:]}  # the Trainer has one optimizer state, rank 0's
    assert {path.name for path in folder.iterdir()} == names | states | own
    options = {"max_steps": 5, "restore_callback_states_from_checkpoint": True, "per_device_train_batch_size": 2}
    args = arguments(tmp_path, TrainingArguments, **options)
    trainer = Trainer(model=gpt2(), args=args, train_dataset=EVEN)
    assert trainer.train(resume_from_checkpoint=str(folder)).global_step == 5
    assert [entry["step"] for entry in trainer.state.log_history if "eval_loss" in entry] == [2, 4]


def test_a_schedule_that_goes_by_the_metric_does_so_on_every_worker(workers):
    """After the first evaluation of training, four more, at which the metric did not become smaller."""
    for result in workers.results():
        assert result["last"]["learning_rate"] == 1e-2 / 2**4
        assert [entry["step"] for entry in result["last"]["logs"] if "eval_loss" in entry] == [0, 2, 4, 6, 8, 10]


def test_the_sets_are_what_they_are_for():
    assert [len(EVEN) % (workers * BATCH) for workers in OTHERS] == [0, 0]
    assert all(len(ODD) % (workers * BATCH) % BATCH for workers in OTHERS)


@pytest.mark.parametrize(("persistent", "made"), [(False, 6), (True, 2)])
def test_a_loader_lives_no_longer_than_its_evaluation(persistent, made, tmp_path):
    """The stock Trainer's lives as long as the trainer, so that the process grows with each evaluation."""
    loaders = []

    class Watching(LayupTrainer):
        def _get_dataloader(self, *args, **kwargs):
            loader = super()._get_dataloader(*args, **kwargs)
            loaders.append(weakref.ref(loader))
            return loader

    options = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True} if persistent else {}
    args = arguments(tmp_path, eval_strategy="steps", eval_steps=2, **options)
    trainer = Watching(model=gpt2(), args=args, train_dataset=EVEN, eval_dataset=ODD)
    trainer.train()
    trainer.evaluate()
    trainer.evaluate() if persistent else trainer.predict(ODD)
    gc.collect()
    lives = [loader() is not None for loader in loaders]
    assert len(loaders) == made
    assert lives == [True] + [persistent] * (made - 2) + [True]  # that of training; of the latest callbacks know
