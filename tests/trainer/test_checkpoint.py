"""Checkpoints: complete whatever ends the run, and resumed by as many workers as there are."""

import json
import os
import random
import re
import shutil
import time
from pathlib import Path

import pytest
import torch
from killing import killed_at, killed_runs
from safetensors.torch import load_file
from stock import BOTH, arguments, gpt2, same, text
from test_loop import all_samples, counts, seen_until, start, work
from transformers import GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

from layup_hf import LayupTrainer
from layup_hf.trainer.folders import UNFINISHED

SAVING = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "max_steps": 5}


def step_of(checkpoint):
    return int(checkpoint.name.split("-")[1])


def checkpoints(folder):
    return sorted(Path(folder).glob("checkpoint-*"), key=step_of)


def assert_complete(checkpoint, workers=1):
    """Every file is there and can be read."""
    ranks = range(1, workers)
    random_states = ["rng_state.pth"] if workers == 1 else [f"rng_state_{rank}.pth" for rank in range(workers)]
    for name in ["optimizer.pt", "scheduler.pt", *random_states, *(f"optimizer_{rank}.pt" for rank in ranks)]:
        torch.load(checkpoint / name, weights_only=False)
    load_file(checkpoint / "model.safetensors")
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    assert checkpoint.name == f"checkpoint-{state['global_step']}"


# ---- One process ----


def train_until_killed(folder, moment):
    killed_at(folder, moment)
    LayupTrainer(model=gpt2(), args=arguments(folder, **SAVING), train_dataset=text()).train()
    os._exit(0)


def test_killed_at_any_moment_a_run_leaves_complete_checkpoints(tmp_path):
    """Every operation on files of the last two of three checkpoints, of which the first one is then rotated away."""
    killed, resumed = 0, set()
    for folder, has_ended in killed_runs(tmp_path, train_until_killed, every=3):
        for checkpoint in checkpoints(folder):
            assert_complete(checkpoint)
        if has_ended:
            break
        killed += 1
        if checkpoints(folder)[-1:] not in ([], [folder / "checkpoint-5"]):
            resumed.add(len(checkpoints(folder)))
            fresh = gpt2(seed=1)
            trainer = LayupTrainer(model=fresh, args=arguments(folder, **SAVING), train_dataset=text())
            assert trainer.train(resume_from_checkpoint=True).global_step == 5
            assert not (folder / UNFINISHED).exists()
            assert [path.name for path in checkpoints(folder)] == ["checkpoint-4", "checkpoint-5"]
    assert killed > 20
    assert resumed >= {1, 2}


def test_killed_while_a_checkpoint_is_replaced_the_old_one_is_there_at_the_next_start(tmp_path, monkeypatch):
    LayupTrainer(model=gpt2(), args=arguments(tmp_path, **SAVING), train_dataset=text()).train()
    rename = Path.rename

    def fail_to_publish(self, target):
        if target == tmp_path / "checkpoint-5":
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail_to_publish)
    last = SAVING | {"save_steps": 5}  # with others before it, the old one would be rotated away if they take long
    with pytest.raises(KeyboardInterrupt):
        LayupTrainer(model=gpt2(), args=arguments(tmp_path, **last), train_dataset=text()).train()
    assert list((tmp_path / UNFINISHED).glob("replaced-*"))
    monkeypatch.undo()
    assert not (tmp_path / "checkpoint-5").exists()
    LayupTrainer(model=gpt2(), args=arguments(tmp_path), train_dataset=text()).train()
    assert_complete(tmp_path / "checkpoint-5")
    assert not (tmp_path / UNFINISHED).exists()


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(tmp_path):
    options = {
        **SAVING,
        "save_steps": 2,
        "save_total_limit": None,
        "gradient_accumulation_steps": 2,
        "lr_scheduler_type": "cosine",
        "bf16": True,
    }
    options |= {"clip": "exact", "max_grad_norm": 0.3, "dataloader_num_workers": 0, "neftune_noise_alpha": 5.0}
    whole, again = gpt2(), gpt2(seed=1)
    LayupTrainer(model=whole, args=arguments(tmp_path / "a", **options), train_dataset=text()).train()
    trainer = LayupTrainer(model=again, args=arguments(tmp_path / "b", **options), train_dataset=text())
    trainer.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert same(whole, again)


DAMAGED = ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize("left", [0, 0.5])
def test_a_truncated_file_is_named_as_such(tmp_path, name, left):
    LayupTrainer(model=gpt2(), args=arguments(tmp_path, **SAVING), train_dataset=text()).train()
    file = tmp_path / "checkpoint-5" / name
    file.write_bytes(file.read_bytes()[: int(left * file.stat().st_size)])
    trainer = LayupTrainer(model=gpt2(), args=arguments(tmp_path, **SAVING), train_dataset=text())
    with pytest.raises(ValueError, match=r"checkpoint-5 cannot be read, as it is incomplete or damaged.*another one"):
        trainer.train(resume_from_checkpoint=True)


def test_a_model_of_another_shape_is_not_called_damaged(tmp_path):
    LayupTrainer(model=gpt2(), args=arguments(tmp_path, **SAVING), train_dataset=text()).train()
    config = gpt2().config
    config.n_embd = 32
    trainer = LayupTrainer(model=GPT2LMHeadModel(config), args=arguments(tmp_path, **SAVING), train_dataset=text())
    with pytest.raises(ValueError, match=r"model.safetensors is of another model .*'transformer.h.0.attn.c_attn.bias'"):
        trainer.train(resume_from_checkpoint=True)


def test_the_best_checkpoint_has_its_own_name(tmp_path):
    options = {**SAVING, "eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    runs = []
    for cls, kind in ((LayupTrainer, None), (Trainer, TrainingArguments)):
        folder = tmp_path / cls.__name__
        args = arguments(folder, **options) if kind is None else arguments(folder, kind, **options)
        model = gpt2()
        trainer = cls(model=model, args=args, train_dataset=text(), eval_dataset=text(8))
        trainer.train()
        best = Path(trainer.state.best_model_checkpoint)
        assert best.parent == folder
        state = json.loads((best / "trainer_state.json").read_text())
        assert state["best_model_checkpoint"] == str(best)
        runs.append((model, best.name, [path.name for path in checkpoints(folder)]))
    assert same(runs[0][0], runs[1][0])
    assert runs[0][1:] == runs[1][1:]


def with_the_best_at_step_2(cls):
    class Judged(cls):
        def evaluate(self, *args, **kwargs):
            return {**super().evaluate(*args, **kwargs), "eval_loss": abs(self.state.global_step - 2.0)}

    return Judged


def test_the_best_checkpoint_is_kept_when_the_folder_has_been_moved(tmp_path):
    options = {**SAVING, "eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    for cls, kind in BOTH:
        before, folder = tmp_path / "before", tmp_path / cls.__name__
        for place, steps in ((before, 3), (folder, 5)):
            args = arguments(place, kind, **{**options, "max_steps": steps})
            judged = with_the_best_at_step_2(cls)
            trainer = judged(model=gpt2(), args=args, train_dataset=text(), eval_dataset=text(8))
            trainer.train(resume_from_checkpoint=place == folder)
            if place == before:
                before.rename(folder)
        assert trainer.state.best_model_checkpoint == str(folder / "checkpoint-2")
        assert [path.name for path in checkpoints(folder)] == ["checkpoint-2", "checkpoint-5"]
        state = json.loads((folder / "checkpoint-5" / "trainer_state.json").read_text())
        assert state["best_model_checkpoint"] == str(folder / "checkpoint-2")


@pytest.mark.parametrize("folder", ["plain", "./dotted", "slashed/", "a/../up"])
def test_the_best_checkpoint_is_spelled_as_the_trainer_does(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a").mkdir()
    options = {**SAVING, "eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    bests = []
    for cls, kind in (*BOTH, BOTH[0]):
        background = {"checkpoints": "background"} if len(bests) == 2 else {}
        args = arguments(folder, kind, **options, **background)
        args.output_dir = folder
        judged = with_the_best_at_step_2(cls)
        trainer = judged(model=gpt2(), args=args, train_dataset=text(), eval_dataset=text(8))
        trainer.train()
        bests.append(trainer.state.best_model_checkpoint)
        assert [path.name for path in checkpoints(folder)] == ["checkpoint-2", "checkpoint-5"]
        shutil.rmtree(folder)
    assert bests[0] == bests[1] == bests[2]


def test_a_checkpoint_that_cannot_be_removed_ends_no_training(tmp_path, monkeypatch):
    remove_folder = os.rmdir

    def fail(path, **options):
        if str(path).endswith("checkpoint-1") or "_unfinished" in str(path):
            raise OSError("made on purpose")
        remove_folder(path, **options)

    monkeypatch.setattr(os, "rmdir", fail)
    for cls, kind in BOTH:
        args = arguments(tmp_path / cls.__name__, kind, **SAVING)
        assert cls(model=gpt2(), args=args, train_dataset=text()).train().global_step == 5


def test_the_best_checkpoint_gone_takes_no_other_with_it(tmp_path):
    class Gone(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            if state.global_step == 5:
                shutil.rmtree(state.best_model_checkpoint)

    options = {**SAVING, "save_total_limit": 1, "eval_strategy": "steps", "eval_steps": 1}
    for cls, kind in BOTH:
        args = arguments(tmp_path / cls.__name__, kind, **options, metric_for_best_model="loss")
        judged = with_the_best_at_step_2(cls)
        trainer = judged(model=gpt2(), args=args, train_dataset=text(), eval_dataset=text(8), callbacks=[Gone()])
        with pytest.raises(FileNotFoundError):
            trainer.train()
        assert [path.name for path in checkpoints(tmp_path / cls.__name__)] == ["checkpoint-5"]


def test_a_disk_that_is_full_leaves_the_checkpoints_before(tmp_path):
    class Full(LayupTrainer):
        def _save_scaler(self, output_dir):
            if self.state.global_step == 3:
                raise OSError(28, "No space left on device")
            super()._save_scaler(output_dir)

    trainer = Full(model=gpt2(), args=arguments(tmp_path, **SAVING), train_dataset=text())
    with pytest.raises(OSError, match="No space left") as error:
        trainer.train()
    assert re.search(f"those in {tmp_path} are", error.value.__notes__[0])
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-2"]
    for checkpoint in checkpoints(tmp_path):
        assert_complete(checkpoint)


# ---- Several workers ----


def test_killed_at_random_moments_workers_leave_complete_checkpoints(tmp_path):
    generator = random.Random(7)
    options = ["--max_steps=100000", "--save_strategy=steps", "--save_steps=1", "--save_total_limit=2", "--pace=0"]
    for _ in range(3):
        last = checkpoints(tmp_path / "out")[-1:]
        started = start(tmp_path, *options, *(f"--resume_from_checkpoint={path}" for path in last))
        started.wait_for("is under way", times=2)
        time.sleep(generator.uniform(0.5, 1.5))
        started.kill()
        shutil.rmtree(started.temporary)
        assert step_of(checkpoints(tmp_path / "out")[-1]) > max(map(step_of, last), default=0), started.output[-8000:]
        for checkpoint in checkpoints(tmp_path / "out"):
            assert_complete(checkpoint, workers=2)


RUNS = [(2, 10, 32), (4, 15, 21), (1, 20, 39), (2, None, 30)]
"""Workers, the step from which the next run goes on, and the one that it would have ended with."""


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """Two epochs, begun by two workers, taken over by four, by one, and by two again."""
    logs, results, checkpoint = [], [], None
    for number, (workers, step, _) in enumerate(RUNS):
        folder = tmp_path_factory.mktemp(f"run{number}")
        options = ["--num_train_epochs=2", "--save_strategy=steps", "--save_steps=5", "--slow=0.03"]
        options += [f"--resume_from_checkpoint={checkpoint}"] if checkpoint else []
        log, (result,) = work(folder, options, workers=workers)
        checkpoint = folder / "out0" / f"checkpoint-{step}"
        logs.append(log)
        results.append(result)
    return logs, results


def test_every_sample_comes_once_per_epoch_whoever_takes_over(chain):
    _, runs = chain
    seen = counts()
    for (_, step, _), results in zip(RUNS, runs, strict=True):
        seen += all_samples(results) if step is None else seen_until(results, "save", step)
    assert seen == counts(range(64), range(64))
    assert sum(len(all_samples(results)) for results in runs[1:]) < 3 * 64  # none has gone through all


def test_another_number_of_workers_fits_the_end_and_the_schedule(chain):
    _, runs = chain
    first = 1
    for (_, step, end), results in zip(RUNS, runs, strict=True):
        for result in results:
            assert result["max_steps"] == result["global_step"] == end
            assert result["clock"] == list(range(first, end + 1))
            assert result["epochs"] == sorted(result["epochs"])
            assert result["epochs"][-1] == 2
            assert result["rates"][-1] == 0
            assert result["rates"] == sorted(result["rates"], reverse=True)
        first = (step or 0) + 1


def test_what_another_number_of_workers_means_is_said(chain):
    logs, _ = chain
    assert "go on from step" not in logs[0]
    said = [
        "4 worker(s) go on from step 10 (epoch 0.625) of 2. Optimizer states: new workers begin with those of the old",
        "1 worker(s) go on from step 15 (epoch 1.25) of 4. Optimizer states: those of rank 1, 2, 3 are not used",
        "2 worker(s) go on from step 20 (epoch 1.406) of 1. Optimizer states: new workers",
    ]
    for log, line in zip(logs[1:], said, strict=True):
        assert log.count(line) == 1, log[-4000:]


def test_each_worker_goes_on_with_its_own_optimizer_state(tmp_path):
    options = ["--max_steps=8", "--save_strategy=steps", "--save_steps=4"]
    checkpoint = tmp_path / "out0" / "checkpoint-4"
    resuming = [*options, f"--resume_from_checkpoint={checkpoint}"]
    _, (_, results) = work(tmp_path, options, resuming, forked=False)
    assert_complete(checkpoint, workers=2)
    for result, name in zip(results, ["optimizer.pt", "optimizer_1.pt"], strict=True):
        states = torch.load(checkpoint / name)["state"].values()
        assert result["moments"] == pytest.approx(sum(float(state["exp_avg"].abs().sum()) for state in states))
    assert results[0]["moments"] != results[1]["moments"]
