"""Checkpoints that are damaged, edited, or made by somebody else: that is said at once, and nothing in them is run."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from launching import run
from safetensors.torch import load_file, save_file
from stock import arguments, gpt2, text
from torch.utils.data import IterableDataset
from transformers import TrainerCallback

from layup_hf import LayupTrainer
from layup_hf.trainer.resumed import MOST_WORKERS, Resumed

WEIGHT = "transformer.wte.weight"
SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint of one process, at the second of four steps."""
    folder = tmp_path_factory.mktemp("saved")
    LayupTrainer(model=gpt2(), args=arguments(folder, **SAVING), train_dataset=text()).train()
    return folder / "checkpoint-2"


@pytest.fixture
def checkpoint(saved, tmp_path):
    """A copy of it, to be broken."""
    return Path(shutil.copytree(saved, tmp_path / "checkpoint-2"))


class Counter(TrainerCallback):
    steps = 0

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.steps += 1


def resume(checkpoint, data=None, **options):
    """Steps that were made after it."""
    counter = Counter()
    trainer = LayupTrainer(
        model=gpt2(),
        args=arguments(checkpoint.parent, **{**SAVING, "save_strategy": "no", **options}),
        train_dataset=text() if data is None else data,
        callbacks=[counter],
    )
    trainer.train(resume_from_checkpoint=str(checkpoint))
    return counter.steps


def truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


# ---- Files that cannot be read ----

FILES = ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "damage", [truncate, lambda file: file.write_bytes(b""), lambda file: file.write_bytes(b"\x93" * 999)]
)
def test_a_damaged_file_is_named(checkpoint, name, damage):
    damage(checkpoint / name)
    with pytest.raises(ValueError, match=r"cannot be read, as it is incomplete or damaged.*another one") as error:
        resume(checkpoint)
    listed = [line.split(":")[0].strip() for line in str(error.value).splitlines()[1:]]
    assert listed == [name]


def test_each_file_that_is_damaged_is_named(checkpoint):
    for name in ("optimizer.pt", "scheduler.pt"):
        truncate(checkpoint / name)
    with pytest.raises(ValueError, match=r"optimizer\.pt: .*\n.*scheduler\.pt: "):
        resume(checkpoint)


class Planted:
    """Code, where a file belongs that is read."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return exec, (f"open({str(self.mark)!r}, 'w').close()",)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "pytorch_model.bin"])
def test_planted_code_is_not_run_and_its_file_is_named(checkpoint, name, tmp_path):
    if name == "pytorch_model.bin":
        (checkpoint / "model.safetensors").unlink()
    torch.save({"state": Planted(tmp_path / "ran")}, checkpoint / name)
    with pytest.raises(ValueError, match=rf"(?s)cannot be read.*{name}.*nothing of that was run"):
        resume(checkpoint)
    assert not (tmp_path / "ran").exists()
    torch.load(checkpoint / name, weights_only=False)
    assert (tmp_path / "ran").exists()  # it would have


def test_planted_code_in_the_arguments_is_not_read(checkpoint, tmp_path):
    torch.save(Planted(tmp_path / "ran"), checkpoint / "training_args.bin")
    assert resume(checkpoint) == 2
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_moments_that_are_not_finite_are_told(checkpoint, value):
    states = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    states["state"][3]["exp_avg_sq"].view(-1)[1] = value
    torch.save(states, checkpoint / "optimizer.pt")
    with pytest.raises(ValueError, match=r"optimizer\.pt has numbers that are not finite.*'exp_avg_sq' of parameter 3"):
        resume(checkpoint)
    (checkpoint / "optimizer.pt").unlink()  # as the message says
    assert resume(checkpoint) == 2


# ---- Files of another run ----


def change_weights(checkpoint, change):
    file = checkpoint / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda weights: {**weights, WEIGHT: weights[WEIGHT][:-1].clone()}, f"'{WEIGHT}' has the shape"),
        (lambda weights: {**weights, WEIGHT: weights[WEIGHT].reshape(-1)}, f"'{WEIGHT}' has the shape"),
        (
            lambda weights: {**weights, WEIGHT: weights[WEIGHT].to(torch.int8)},
            "of whole numbers there (I8), and of tor",
        ),
        (lambda weights: {f"other.{name}": weight for name, weight in weights.items()}, "none of this model's weights"),
    ],
)
def test_weights_of_another_model_are_refused_with_their_file(checkpoint, change, said):
    change_weights(checkpoint, change)
    with pytest.raises(ValueError, match="Resume from a checkpoint of this model") as error:
        resume(checkpoint)
    assert str(error.value).startswith(f"{checkpoint / 'model.safetensors'} is of another model than this run's: ")
    assert said in str(error.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_in_another_precision_are_gone_on_from(checkpoint, dtype):
    change_weights(checkpoint, lambda weights: {name: weight.to(dtype) for name, weight in weights.items()})
    assert resume(checkpoint) == 2


def of_another_optimizer(states):
    return torch.optim.SGD(gpt2().parameters(), lr=0.1, momentum=0.9).state_dict()


def of_fewer_parameters(states):
    groups = [{**group, "params": group["params"][:-1]} for group in states["param_groups"]]
    return {**states, "param_groups": groups}


def of_longer_parameters(states):
    states["state"][3]["exp_avg"] = torch.zeros(states["state"][3]["exp_avg"].numel() + 8)
    return states


def of_other_settings(states):
    """As SGD's, with as many parameters."""
    for group in states["param_groups"]:
        del group["betas"]
    return states


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (of_another_optimizer, "loaded state dict"),
        (of_fewer_parameters, "loaded state dict"),
        (of_longer_parameters, "'exp_avg' of parameter 3 has the shape"),
        (of_other_settings, "nothing is said there of 'betas'"),
        (lambda states: {}, "'param_groups'"),
    ],
)
def test_an_optimizers_state_of_another_model_is_refused_with_its_file(checkpoint, change, said):
    states = change(torch.load(checkpoint / "optimizer.pt", weights_only=True))
    torch.save(states, checkpoint / "optimizer.pt")
    with pytest.raises(
        ValueError, match=r"optimizer\.pt is of another optimizer than this run's, or of another"
    ) as error:
        resume(checkpoint)
    assert said in str(error.value)
    (checkpoint / "optimizer.pt").unlink()  # as the message says
    assert resume(checkpoint) == 2


# ---- Positions and steps that have been edited ----


def edited(checkpoint, **values):
    file = checkpoint / "trainer_state.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
    return checkpoint


def at(**position):
    """The callbacks' states with this position in the data."""
    drawn = {"workers": 2, "epoch": 0, "drawn": {"0": 16}, "not_begun": [[0, 8, 12]]}
    return {"stateful_callbacks": {"layup_hf": {**drawn, **position}}}


def of_shards(*places, **more):
    return {"stateful_callbacks": {"layup_hf": {"workers": 2, "shards": places, "batch_size": 4, **more}}}


NO_NUMBERS = [-1, 1 << 70, "2", 2.5, True, None, [2]]
STEPS = [*(("global_step", value) for value in NO_NUMBERS), *(("epoch", value) for value in (-1, 1 << 70, "2", [2]))]


@pytest.mark.parametrize(("name", "value"), [*STEPS, ("max_steps", -2), ("max_steps", "x")])
def test_a_step_that_cannot_be_is_told(checkpoint, name, value):
    with pytest.raises(ValueError, match=f"trainer_state.json says {name}=.*which cannot be.*Resume from another"):
        resume(edited(checkpoint, **{name: value}))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_epoch_that_is_no_number_is_told(checkpoint, value):
    with pytest.raises(ValueError, match="says epoch="):
        resume(edited(checkpoint, epoch=value))


@pytest.mark.parametrize(
    "states",
    [
        *({"stateful_callbacks": value} for value in ("x", 5)),
        *({"stateful_callbacks": {"layup_hf": value}} for value in ("x", 5, [], True)),
        *(at(workers=value) for value in [0, 10**9, MOST_WORKERS + 1, *NO_NUMBERS]),
        *(at(epoch=value) for value in NO_NUMBERS),
        *(at(drawn=value) for value in [None, [], {"x": 1}, {"-1": 1}, *({"0": number} for number in NO_NUMBERS)]),
        *(at(not_begun=value) for value in [None, {}, [0], [[0, 1]], [[0, 1, 2, 3]], [["0", 1, 2]], [[0, 2, 1]]]),
        at(not_begun=[[0, -4, 4]]),
        at(not_begun=[[0, 12, 20]]),  # later than what was drawn
        at(not_begun=[[1, 0, 4]]),  # of an epoch that nobody had come to
        at(not_begun=[[0, 0, 8], [0, 4, 12]]),  # twice
        *(of_shards(*places) for places in [[], [[0, 1]], [[0, 1]] * 3, [[0], [0]], [["0", 1]] * 2, [[0, -1]] * 2]),
        *(of_shards([0, 1], [0, 2], batch_size=value) for value in (0, -4, "4", 1.5)),
        of_shards([0, 0], [10**9, 0]),  # epochs that would be gone through one by one
        of_shards([0, 0], [1 << 61, 0]),
    ],
    ids=lambda states: json.dumps(states["stateful_callbacks"])[:70],
)
def test_a_position_that_cannot_be_is_told_at_once(checkpoint, states):
    with pytest.raises(ValueError, match="Resume from another"):
        resume(edited(checkpoint, **states))


def test_a_deep_state_is_named(checkpoint):
    (checkpoint / "trainer_state.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"trainer_state\.json: RecursionError"):
        resume(checkpoint)


@pytest.mark.parametrize("content", ["[]", "5", '"x"', '{"no_such_field": 1}'])
def test_json_of_something_else_is_told(checkpoint, content):
    (checkpoint / "trainer_state.json").write_text(content)
    with pytest.raises(ValueError, match=r"trainer_state\.json.*(no JSON object|no state of a Trainer)"):
        resume(checkpoint)


def test_a_position_of_two_workers_is_gone_on_from(checkpoint):
    """Of 32 samples, 16 had been drawn, 4 of them not been begun: 20 are left, in steps of 4."""
    assert resume(edited(checkpoint, **at()), max_steps=-1, num_train_epochs=1) == 5


def test_what_lies_beyond_the_data_is_left_out_and_a_gap_that_never_ends_is_refused(checkpoint):
    class Stream(IterableDataset):
        def __iter__(self):
            yield from text()

    position = at(drawn={"0": 1 << 61}, not_begun=[[0, 28, 1 << 61]])
    assert resume(edited(checkpoint, **position), max_steps=-1, num_train_epochs=1) == 1
    with pytest.raises(ValueError, match="more than any run leaves"):
        resume(checkpoint, Stream())
    with pytest.raises(ValueError, match="more than any run leaves"):
        resume(edited(checkpoint, **of_shards([0, 0], [0, 1 << 61])), Stream())


def test_a_folder_without_a_state_is_no_checkpoint_to_go_on_from(tmp_path):
    assert Resumed.read(str(tmp_path)) is None
    assert Resumed.read(None) is None


# ---- Two workers ----


@pytest.fixture(scope="module")
def tried(tmp_path_factory):
    """What each of two workers says of each case."""
    return run("resuming.py", 2, [], tmp_path_factory.mktemp("tried"), timeout=280).results()


def test_what_one_worker_cannot_read_is_named_by_both(tried):
    first, second = tried
    for case, file in {
        "own optimizer": "optimizer_1.pt",
        "own optimizer is not finite": "optimizer_1.pt",
        "model on one machine": "model.safetensors",
        "state on one machine": "trainer_state.json",
    }.items():
        assert second[case]["error"] == "ValueError", second[case]
        assert file in second[case]["message"]
        assert first[case]["error"] == "RuntimeError", first[case]
        assert first[case]["message"].startswith("Worker 1 could not ")
        assert file in first[case]["message"]
    assert "optimizer.pt" in first["optimizer of rank 0"]["message"]
    assert "optimizer.pt" in second["optimizer of rank 0"]["message"]


@pytest.mark.parametrize(
    ("case", "file"),
    [
        (
            "own optimizer is of another model",
            "optimizer_1.pt is of another optimizer than this run's, or of another mod",
        ),
        ("own optimizer is another", "optimizer_1.pt is of another optimizer than this run's, or of another model's"),
        ("model is another on one machine", "model.safetensors is of another model than this run's"),
    ],
)
def test_what_one_worker_has_of_another_model_is_named_by_both(tried, case, file):
    first, second = (worker[case] for worker in tried)
    assert (first["error"], second["error"]) == ("RuntimeError", "ValueError")
    assert first["message"] == f"Worker 1 could not read its checkpoint: ValueError: {second['message']}"
    assert file in second["message"]


def test_a_checkpoint_of_another_model_is_told_alike_by_all(tried):
    messages = {worker["model is another"]["message"] for worker in tried}
    assert len(messages) == 1
    assert "has the shape (7, 5) there" in messages.pop()


def test_states_of_another_rank_are_as_good(tried):
    """Nothing in the files says whose they are; each worker goes on with the other's moments and random numbers."""
    assert [worker["each other's"] for worker in tried] == [{"step": 4}] * 2


def test_a_random_state_that_one_worker_cannot_read_is_named_by_both(tried):
    first, second = (worker["own random state"] for worker in tried)
    assert second["error"] == "ValueError"
    assert first["error"] == "WorkerFailure"
    assert all("rng_state_1.pth" in worker["message"] for worker in (first, second))


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("another step on one machine", "rank 0 from step 2, rank 1 from step 4"),
        ("none on one machine", "rank 0 from step 2, rank 1 from no checkpoint"),
        ("missing on one machine", "nowhere/checkpoint-2, which is not there"),
    ],
)
def test_workers_go_on_from_one_step(tried, case, said):
    for worker in tried:
        assert said in worker[case]["message"], worker[case]


def test_a_whole_checkpoint_and_a_copy_of_it_are_gone_on_from(tried):
    for worker in tried:
        assert worker["saving"] == worker["whole"] == worker["copies"] == {"step": 4}
