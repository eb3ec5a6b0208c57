"""Checkpoints that are written while training goes on: the same ones, complete or absent, and done at the end."""

import hashlib
import json
import os
import random
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
from killing import killed_at, killed_runs
from launching import Run, run_cases
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from stock import BOTH, arguments, gpt2, same, text
from test_checkpoint import assert_complete, checkpoints, step_of, with_the_best_at_step_2
from torch import nn
from transformers import TrainerCallback, TrainerState

from layup_hf import LayupTrainer
from layup_hf.blocks import snapshot
from layup_hf.blocks.snapshot import Snapshot, Snapshots
from layup_hf.trainer import hollow
from layup_hf.trainer.background import BackgroundCheckpoint, CheckpointFailed
from layup_hf.trainer.folders import UNFINISHED, clear

SAVING = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 2, "max_steps": 7, "checkpoints": "background"}
WRITE = hollow._write


@pytest.fixture(autouse=True)
def as_if_large(monkeypatch):
    """A tiny model is treated as a large one is."""
    monkeypatch.setattr(hollow, "_SMALL", 1)
    monkeypatch.setattr(snapshot, "_LEAST", 64)
    monkeypatch.setattr(snapshot, "PIECE", 4096)


def slowly(monkeypatch, seconds=0.001):
    """Steps are made while a file is written."""

    def write(file, piece):
        time.sleep(seconds)
        WRITE(file, piece)

    monkeypatch.setattr(hollow, "_write", write)


def train(folder, model=None, cls=LayupTrainer, resume=None, callbacks=(), **options):
    args = arguments(folder, **{**SAVING, **options})
    more = {"eval_dataset": text(8)} if "eval_strategy" in options else {}
    trainer = cls(model=model or gpt2(), args=args, train_dataset=text(), callbacks=list(callbacks), **more)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def contents(checkpoint):
    """Every file, as far as it is not about time."""
    found = {}
    for file in checkpoint.iterdir():
        if file.suffix == ".safetensors":
            found[file.name] = file.read_bytes()
        elif file.suffix in (".pt", ".pth"):
            found[file.name] = str(torch.load(file, weights_only=False))
        elif file.suffix == ".json":
            text = json.loads(file.read_text())
            text["log_history"] = [
                {k: v for k, v in log.items() if "/checkpoint" not in k} for log in text.get("log_history", [])
            ]
            text["log_history"] = [log for log in text["log_history"] if set(log) - {"epoch", "step"}]
            found[file.name] = text
        else:
            found[file.name] = None
    return found


# ---- One process ----


@pytest.mark.parametrize(
    "options",
    [
        {"clip": "exact", "max_grad_norm": 0.3, "bf16": True, "gradient_accumulation_steps": 2},
        {"optim": "muon", "max_grad_norm": 0.3},
        {"optim": "sgd", "optim_args": "momentum=0.9", "save_only_model": False},
    ],
    ids=["adamw", "muon", "sgd"],
)
def test_it_is_the_checkpoint_of_the_usual_way(tmp_path, monkeypatch, options):
    torch.set_printoptions(profile="full")
    runs = {way: tmp_path / way for way in ("wait", "background")}
    train(runs["wait"], **options, checkpoints="wait")
    slowly(monkeypatch)
    train(runs["background"], **options)
    torch.set_printoptions(profile="default")
    assert [path.name for path in checkpoints(runs["background"])] == ["checkpoint-6", "checkpoint-7"]
    for name in ("checkpoint-6", "checkpoint-7"):
        ours, theirs = (contents(folder / name) for folder in (runs["background"], runs["wait"]))
        assert ours == theirs
    assert not (runs["background"] / UNFINISHED).exists()
    monkeypatch.undo()
    resumed = []
    for folder in runs.values():
        model = gpt2(seed=1)
        train(tmp_path / "on", model, resume=str(folder / "checkpoint-6"), **{**options, "max_steps": 9})
        resumed.append(model)
    assert same(*resumed)


class Mixed(nn.Module):
    """Statistics, a buffer that forward changes, and frozen weights; no model of a library."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.frozen = nn.Embedding(50, 16), nn.Linear(16, 16)
        self.norm, self.head = nn.BatchNorm1d(16), nn.Linear(16, 50, bias=False)
        self.frozen.requires_grad_(False)
        self.register_buffer("seen", torch.zeros(100))

    def forward(self, input_ids, labels):
        self.seen += 1
        hidden = self.norm(self.frozen(self.tokens(input_ids)).flatten(0, 1))
        return {"loss": nn.functional.cross_entropy(self.head(hidden), labels.flatten())}


def lora():
    adapter = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, init_lora_weights=False)
    return get_peft_model(gpt2(), adapter)


@pytest.mark.parametrize("make", [Mixed, lora], ids=["module", "adapter"])
def test_so_it_is_for_other_models(tmp_path, monkeypatch, make):
    folders, models = [tmp_path / way for way in ("wait", "background")], []
    for folder in folders:
        models.append(make())
        train(folder, models[-1], checkpoints=folder.name)
        slowly(monkeypatch)
    assert same(*models)
    for theirs, ours in zip(*map(checkpoints, folders), strict=True):
        assert len(list(ours.glob("*.safetensors"))) == 1
        assert contents(ours) == contents(theirs)


def test_training_goes_on_meanwhile_and_only_what_changes_is_copied(tmp_path, monkeypatch):
    slowly(monkeypatch, 0.0)
    seen, copied, goes = [], [], threading.Event()
    copy, write = snapshot.Snapshot._copy, hollow._write

    def count(self, extent, source):
        copied.append(extent.size)
        copy(self, extent, source)

    def hold(file, piece):
        goes.wait(60)
        write(file, piece)

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append((state.global_step, [path.name for path in checkpoints(tmp_path)], len(copied)))
            if state.global_step == 4:
                goes.set()

    monkeypatch.setattr(snapshot.Snapshot, "_copy", count)
    monkeypatch.setattr(hollow, "_write", hold)
    trainer = train(tmp_path, callbacks=[Watch()], save_steps=3, max_steps=5)
    assert seen[2] == (3, [], 0)
    assert seen[3][1] == []  # a step has been made
    large = [p for p in trainer.model.parameters() if p.nbytes >= 64]
    assert 0 < len(copied) <= 3 * len(large)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-5"]


def train_until_killed(folder, moment):
    count = killed_at(folder, moment)

    def write(file, piece):
        count()
        WRITE(file, piece)

    hollow._write = write
    train(folder, save_steps=1, max_steps=3)
    os._exit(0)


def test_killed_at_any_moment_a_run_leaves_complete_checkpoints(tmp_path, monkeypatch):
    monkeypatch.setattr(snapshot, "_LEAST", 4000)
    killed = resumed = 0
    for folder, has_ended in killed_runs(tmp_path, train_until_killed, every=23):
        for checkpoint in checkpoints(folder):
            assert_complete(checkpoint)
        if has_ended:
            break
        killed += 1
        if killed % 5 == 0 and checkpoints(folder):
            resumed += 1
            trainer = train(folder, gpt2(seed=1), resume=True, save_steps=1, max_steps=4)
            assert trainer.state.global_step == 4
            assert not (folder / UNFINISHED).exists()
    assert killed > 10
    assert resumed > 0


def fail_at(monkeypatch, step, error):
    """Writing fails from this step on."""

    def write(file, piece):
        if (Path(file.name).parents[1] / f"checkpoint-{step}").exists():
            raise error
        WRITE(file, piece)

    monkeypatch.setattr(hollow, "_write", write)


def test_a_disk_that_is_full_is_told_at_once_and_leaves_the_checkpoints_before(tmp_path, monkeypatch, caplog):
    fail_at(monkeypatch, 4, OSError(28, "No space left on device"))
    with pytest.raises(
        CheckpointFailed, match=r"Rank 0 could not write checkpoint-4 .* No space left on device"
    ) as raised:
        train(tmp_path, max_steps=100)
    assert f"the other checkpoints in {tmp_path} are" in str(raised.value)
    assert any("could not write checkpoint-4" in record.message for record in caplog.records)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2"]
    assert_complete(tmp_path / "checkpoint-2")
    monkeypatch.undo()
    train(tmp_path, resume=True)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-6", "checkpoint-7"]


@pytest.mark.parametrize("error", [ArithmeticError, KeyboardInterrupt, SystemExit])
def test_whatever_ends_training_what_is_being_written_is_finished(tmp_path, monkeypatch, error):
    class Ends(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                assert not checkpoints(tmp_path)
                raise error("made on purpose")

    slowly(monkeypatch, 0.001)
    with pytest.raises(error):
        train(tmp_path, callbacks=[Ends()])
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-2"]
    assert_complete(tmp_path / "checkpoint-2")


def test_the_next_checkpoint_waits_for_the_last_and_says_so(tmp_path, monkeypatch, caplog):
    slowly(monkeypatch, 0.002)
    trainer = train(tmp_path, save_steps=1, max_steps=3, save_total_limit=None)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    for checkpoint in checkpoints(tmp_path):
        assert_complete(checkpoint)
    waits = [record.message for record in caplog.records if "to be written in the background" in record.message]
    assert len(waits) == 3
    assert "s for checkpoint-1 to be written in the background" in waits[0]
    standing = [
        log["layup/checkpoint_standing"] for log in trainer.state.log_history if "layup/checkpoint_standing" in log
    ]
    assert len(standing) == 3
    assert trainer.layup.checkpoints.latest.name == "checkpoint-3"


def test_the_best_checkpoint_is_the_best_when_it_is_complete(tmp_path, monkeypatch):
    slowly(monkeypatch, 0.001)
    bests = []

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            best = state.best_model_checkpoint
            bests.append(best)
            assert best is None or Path(best).is_dir()

    options = {
        "save_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "load_best_model_at_end": True,
        "max_steps": 5,
    }
    judged = with_the_best_at_step_2(LayupTrainer)
    trainer = train(tmp_path / "background", cls=judged, callbacks=[Watch()], **options)
    assert trainer.state.best_model_checkpoint == str(tmp_path / "background" / "checkpoint-2")
    assert bests[-1] == trainer.state.best_model_checkpoint
    assert [path.name for path in checkpoints(tmp_path / "background")] == ["checkpoint-2", "checkpoint-5"]
    stock = BOTH[1][0]
    args = arguments(
        tmp_path / "stock", BOTH[1][1], **{k: v for k, v in {**SAVING, **options}.items() if k != "checkpoints"}
    )
    theirs = with_the_best_at_step_2(stock)(model=gpt2(), args=args, train_dataset=text(), eval_dataset=text(8))
    theirs.train()
    assert same(trainer.model, theirs.model)
    for folder in ("background", "stock"):
        state = json.loads((tmp_path / folder / "checkpoint-5" / "trainer_state.json").read_text())
        assert state["best_model_checkpoint"] == str(tmp_path / folder / "checkpoint-2")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=["disk", "ctrl-c"])
def test_one_that_fails_while_it_is_laid_out_leaves_nothing(tmp_path, monkeypatch, error):
    write = TrainerState.save_to_json

    def fail(self, path):
        if Path(path).exists():  # the Trainer has written it, and the best checkpoint is to be put into it
            raise error
        write(self, path)

    monkeypatch.setattr(TrainerState, "save_to_json", fail)
    args = arguments(tmp_path, **SAVING, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True)
    trainer = LayupTrainer(model=gpt2(), args=args, train_dataset=text(), eval_dataset=text(8))
    with pytest.raises(type(error)):
        trainer.train()
    assert trainer.state.global_step == 2
    assert trainer.state.best_model_checkpoint is None
    assert trainer.layup.model.snapshots.present is None
    assert checkpoints(tmp_path) == []


def test_one_that_is_interrupted_before_it_is_begun_keeps_no_memory(tmp_path, monkeypatch):
    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(BackgroundCheckpoint, "start", interrupted)
    args = arguments(tmp_path, **SAVING)
    trainer = LayupTrainer(model=gpt2(), args=args, train_dataset=text())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert trainer.layup.model.snapshots.present is None
    assert checkpoints(tmp_path) == []


def test_whoever_loses_a_worker_while_it_is_finished_finishes_it_again(tmp_path, monkeypatch):
    slowly(monkeypatch)
    seen = []

    class Loses(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step != 2:
                return
            part = self.trainer.layup.checkpoints
            gather, calls = part._collectives.gather, []

            def lost(value):
                calls.append(value)
                if len(calls) > 1:  # it is complete by then
                    raise RuntimeError("lost")
                return gather(value)

            with monkeypatch.context() as faults:
                faults.setattr(part._collectives, "gather", lost)
                with pytest.raises(RuntimeError, match="lost"):
                    part.finish()
            assert part.latest is None
            part.finish()
            seen.append(part.latest.name)
            part.finish()  # there is none any more

    loses = Loses()
    trainer = LayupTrainer(model=gpt2(), args=arguments(tmp_path, **SAVING), train_dataset=text(), callbacks=[loses])
    loses.trainer = trainer
    trainer.train()
    assert seen == ["checkpoint-2"]
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-6", "checkpoint-7"]


# ---- Who looks into a checkpoint ----


def weights_of(folder):
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def test_a_trainer_with_its_own_save_checkpoint_finds_it_complete(tmp_path, monkeypatch, caplog):
    slowly(monkeypatch, 0.001)
    found = []

    class Reads(LayupTrainer):
        def _save_checkpoint(self, model, trial):
            super()._save_checkpoint(model, trial)
            found.append(weights_of(tmp_path / f"checkpoint-{self.state.global_step}"))

    train(tmp_path, cls=Reads)
    assert len(set(found)) == len(found) == 4
    warnings = [record.message for record in caplog.records if "'background'" in record.message]
    assert len(warnings) == 1
    assert "Reads has its own `_save_checkpoint`, which finds it complete" in warnings[0]


def test_a_callback_that_is_told_of_a_save_finds_it_complete(tmp_path, monkeypatch, caplog):
    slowly(monkeypatch, 0.001)
    found = []

    class Uploads(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            found.append(weights_of(tmp_path / f"checkpoint-{state.global_step}"))

    train(tmp_path, callbacks=[Uploads()])
    assert len(set(found)) == 4
    assert "callback Uploads has an `on_save`, which finds it complete" in caplog.text


def test_who_looks_for_a_file_while_it_is_saved_is_told_why_it_is_not_there(tmp_path):
    class Early(LayupTrainer):
        def _save(self, output_dir=None, state_dict=None):
            super()._save(output_dir, state_dict)
            load_file(os.path.join(output_dir, "model.safetensors"))

    with pytest.raises(FileNotFoundError) as raised:
        train(tmp_path, cls=Early)
    assert any("Set `checkpoints='wait'`" in note for note in raised.value.__notes__)
    assert checkpoints(tmp_path) == []


def test_who_changes_weights_between_steps_is_told(tmp_path, monkeypatch):
    slowly(monkeypatch, 0.001)

    class Clamps(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            with torch.no_grad():
                model.transformer.wte.weight.clamp_(-1, 1)

    with pytest.raises(CheckpointFailed, match="changed by something else than its block's step"):
        train(tmp_path, callbacks=[Clamps()])
    assert checkpoints(tmp_path) == []


def test_it_excludes_a_copy_on_each_machine(tmp_path):
    with pytest.raises(ValueError, match="checkpoints='background' and `save_on_each_node`"):
        arguments(tmp_path, checkpoints="background", save_on_each_node=True)
    with pytest.raises(ValueError, match="checkpoints='later' is unknown"):
        arguments(tmp_path, checkpoints="later")


# ---- Several workers ----


@pytest.mark.parametrize("sign", ["written", "failed", None])
def test_whose_part_never_comes_is_named_and_nothing_appears(tmp_path, sign, caplog):
    """Rank 0 has nothing to write itself; rank 1 leaves a mark, or none."""
    aside = tmp_path / UNFINISHED
    (aside / "checkpoint-5").mkdir(parents=True)
    snapshots = Snapshots()
    snapshots.present = Snapshot([])
    checkpoint = BackgroundCheckpoint(tmp_path, "checkpoint-5", 0, 2, [], snapshots, awaited=[1])
    checkpoint.start()
    (aside / "written-1-of-checkpoint-4").touch()  # of one that has been given up, by a worker that is slow
    if sign is not None:
        (aside / f"{sign}-1-of-checkpoint-5").touch()
    checkpoint.finish(workers=2 if sign is not None else 1)
    assert checkpoint.is_published == (tmp_path / "checkpoint-5").exists() == (sign == "written")
    assert checkpoint.is_abandoned == (sign != "written")
    assert ("rank 1 has not written its part" in caplog.text) == (sign != "written")
    assert snapshots.present is None


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_what_the_others_have_cleared_away_is_given_up(tmp_path, monkeypatch, when, caplog):
    place, part = (tmp_path / UNFINISHED / name / "a.bin" for name in ("checkpoint-5", "parts-0-of-checkpoint-5"))
    for file in (place, part):
        file.parent.mkdir(parents=True)
    part.write_bytes(bytes(32))
    snapshots = Snapshots()
    snapshots.present = taken = Snapshot([])
    file = hollow.HollowFile(part, place, [hollow.Hole(0, taken.extent(torch.ones(8).untyped_storage(), 0, 32))])
    checkpoint = BackgroundCheckpoint(tmp_path, "checkpoint-5", 0, 2, [file], snapshots, awaited=[0])
    if when == "before":
        clear(tmp_path)
    else:
        monkeypatch.setattr(hollow, "_write", lambda file, piece: clear(tmp_path))
    checkpoint.start()
    checkpoint.finish(workers=2)
    assert checkpoint.is_abandoned
    assert checkpoint.failure is None
    assert "done without this worker" in caplog.text
    assert list(tmp_path.iterdir()) == []  # nothing is left where the others are writing the next one


# ---- Two workers ----


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workers")
    place = {name: folder / name for name in ("whole", "again", "arrival", "full", "error", "sigterm")}
    saves = ["--max_steps=20", "--save_steps=5"]
    cases = {name: [f"--output_dir={path}", *saves, "--save_total_limit=3"] for name, path in place.items()}
    cases["again"] += [f"--resume_from_checkpoint={place['whole'] / 'checkpoint-10'}", "--max_steps=12"]
    cases["again"].remove("--max_steps=20")
    cases["whole"] += ["--eval_strategy=steps", "--eval_steps=2"]  # so all take the mean while something is written
    cases["arrival"] += ["--merge_at=arrival", "--max_grad_norm=0", "--max_steps=10"]
    cases["arrival"].remove("--max_steps=20")
    for name in ("full", "error", "sigterm"):
        cases[name] += [f"--fault={name}"]
    return place, run_cases("background.py", 2, cases, folder)


def digest(tensors):
    return hashlib.sha256(
        b"".join(t.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for t in tensors)
    ).hexdigest()


def moments_in(file):
    states = torch.load(file, weights_only=True)["state"]
    return digest(state[name] for _, state in sorted(states.items()) for name in ("exp_avg", "exp_avg_sq"))


def assert_as_saved(checkpoint, results):
    """It has the consensus model, and each worker's own optimizer state, as they were when all stood still."""
    assert_complete(checkpoint, workers=2)
    step = str(step_of(checkpoint))
    model = gpt2()
    model.load_state_dict(load_file(checkpoint / "model.safetensors"), strict=False)
    model.tie_weights()
    for result, name in zip(results, ("optimizer.pt", "optimizer_1.pt"), strict=True):
        assert digest(model.state_dict().values()) == result["saved"][step]["model"]
        assert moments_in(checkpoint / name) == result["saved"][step]["moments"]
    assert results[0]["saved"][step]["moments"] != results[1]["saved"][step]["moments"]


def test_two_workers_save_what_they_had_while_they_train_on(workers):
    place, results = workers
    assert [path.name for path in checkpoints(place["whole"])] == ["checkpoint-10", "checkpoint-15", "checkpoint-20"]
    for checkpoint in checkpoints(place["whole"]):
        assert_as_saved(checkpoint, results["whole"])
    for result in results["whole"]:
        assert result["error"] == ""
        assert not result["left"]
        assert result["unfinished"] > 3  # steps begun while something was being written
    assert sum("layup/checkpoint_standing" in log for log in results["whole"][0]["logs"]) == 4


def test_offers_that_are_merged_at_any_moment_change_nothing_that_is_saved(workers):
    place, results = workers
    assert [path.name for path in checkpoints(place["arrival"])] == ["checkpoint-5", "checkpoint-10"]
    for result in results["arrival"]:
        assert set(result["alone"]) == {True}  # what merges cannot write what a step lets be copied
    for checkpoint in checkpoints(place["arrival"]):
        assert_as_saved(checkpoint, results["arrival"])


def test_each_worker_goes_on_from_its_own(workers):
    place, results = workers
    for result, before in zip(results["again"], results["whole"], strict=True):
        assert result["begins"] == before["saved"]["10"]["moments"]
        assert result["error"] == ""
    assert_as_saved(place["again"] / "checkpoint-12", results["again"])


def test_all_workers_are_told_which_one_could_not_write(workers):
    place, results = workers
    first, second = (result["error"] for result in results["full"])
    assert second.startswith(
        "CheckpointFailed: Rank 1 could not write checkpoint-10 in the background: OSError: [Errno 28]"
    )
    assert "Rank 1 could not write checkpoint-10" in first or "Worker 1 could not write its checkpoint" in first
    assert [path.name for path in checkpoints(place["full"])] == ["checkpoint-5"]
    assert_as_saved(place["full"] / "checkpoint-5", results["full"])


def test_a_worker_that_fails_finishes_its_part_and_so_do_the_others(workers):
    place, results = workers
    assert "made on purpose" in results["error"][1]["error"]
    assert "rank 1 failed" in results["error"][0]["error"]
    assert [path.name for path in checkpoints(place["error"])] == ["checkpoint-5", "checkpoint-10"]
    assert_as_saved(place["error"] / "checkpoint-10", results["error"])


def test_when_the_machine_is_taken_away_the_last_one_is_complete(workers):
    place, results = workers
    last = checkpoints(place["sigterm"])[-1]
    assert 10 < step_of(last) < 20
    for checkpoint in checkpoints(place["sigterm"]):
        assert_as_saved(checkpoint, results["sigterm"])
    assert [result["error"] for result in results["sigterm"]] == ["SystemExit: 143"] * 2


def test_killed_at_random_moments_workers_leave_complete_checkpoints(tmp_path):
    generator = random.Random(3)
    options = ["--max_steps=100000", "--save_steps=1", "--save_total_limit=2", "--pause=0", "--slow=0.0005"]
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        last = checkpoints(tmp_path / "out")[-1:]
        resume = [f"--resume_from_checkpoint={path}" for path in last]
        started = Run("background.py", 2, [f"--output_dir={tmp_path / 'out'}", *options, *resume], folder)
        started.wait_for("is under way", times=2)
        time.sleep(generator.uniform(0.5, 1.5))
        started.kill()
        shutil.rmtree(started.temporary)
        assert step_of(checkpoints(tmp_path / "out")[-1]) > max(map(step_of, last), default=0), started.output[-4000:]
        for checkpoint in checkpoints(tmp_path / "out"):
            assert_complete(checkpoint, workers=2)
