"""Workers of several launches that die, freeze, fail, return and join: the others go on, and all end with one model."""

import hashlib
import json
import re
import signal
import time

import pytest
from launching import Launches, Run
from safetensors.torch import load_file
from transformers import GPT2LMHeadModel

LEASE = 3
WORKERS, STEPS = 3, 240
OPTIONS = [
    *("--use_cpu=True", "--report_to=none", "--disable_tqdm=True", "--windows=shared"),
    *("--per_device_train_batch_size=4", "--learning_rate=1e-2", "--logging_steps=10"),
    *("--eval_strategy=steps", "--eval_steps=60", "--save_strategy=steps", "--save_steps=120"),
]


def launches(folder, workers=WORKERS, steps=STEPS, **options):
    arguments = [*OPTIONS, f"--max_steps={steps}", f"--lease_seconds={LEASE}"]
    return Launches("eras.py", workers, arguments, folder, **options)


def place_of_store(job):
    return re.search(r"store of this job is at (\S+) ", job.output("0")).group(1)


def finish(job):
    """Let all make their steps without a pause, up to the end."""
    (job.folder / "hurry").touch()
    job.wait()


def hash_of(model):
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()


def assert_all_end_alike(job, names, steps=STEPS):
    """These workers, and no others, come to the end with one model, which is that of the last checkpoint."""
    results = job.results()
    assert sorted(results) == sorted(names), job.output()[-8000:]
    assert len({result["model"] for result in results.values()}) == 1
    assert len({result["evaluation"] for result in results.values()}) == 1
    assert {(result["step"], result["workers"]) for result in results.values()} == {(steps, len(names))}
    assert sorted(result["rank"] for result in results.values()) == list(range(len(names)))
    checkpoint = job.folder / "model" / f"checkpoint-{steps}"
    assert json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] == steps
    for rank in range(len(names)):
        assert (checkpoint / ("optimizer.pt" if rank == 0 else f"optimizer_{rank}.pt")).exists()
        assert (checkpoint / f"rng_state_{rank}.pth").exists()
    (expected,) = {result["model"] for result in results.values()}
    assert hash_of(GPT2LMHeadModel.from_pretrained(checkpoint)) == expected
    assert hash_of(GPT2LMHeadModel.from_pretrained(job.folder / "model")) == expected
    assert not (job.folder / "model" / "_unfinished").exists()


def assert_steps_add_up(job, few, steps=STEPS):
    """One `global_step` is as many steps as the job had workers at first, but for those that were drawn and lost."""
    made = job.output().count(" made a step of ")
    assert steps * WORKERS - few <= made <= steps * WORKERS + few


# ---- Killed, restarted, launched again, and one more ----


@pytest.fixture(scope="module")
def returning(tmp_path_factory):
    """One of three is killed and restarted by its launcher, one killed and launched again; a fourth joins."""
    secret = {"LAYUP_TOKEN": "secret"}
    with launches(tmp_path_factory.mktemp("returning"), environment=secret, forked=False) as job:
        for rank in range(WORKERS):
            job.start(rank, restarts=1 if rank == 2 else 0)
        job.wait_for("made a step", times=3 * WORKERS)
        workers = job.workers()
        workers["1"].kill()
        workers["2"].kill()
        job.wait_for("in era 2", "0")  # alone, or already with the one that was restarted
        job.start(1, name="again")
        job.join("stranger", place_of_store(job), environment={"LAYUP_TOKEN": "guessed"})
        job.join("fourth", place_of_store(job))
        for name in ("2", "again", "fourth"):
            job.wait_for("begins at step", name, times=2 if name == "2" else 1)
        job.wait_for("has another secret", "stranger")
        finish(job)
        yield job


def test_workers_that_return_or_join_end_with_the_others(returning):
    assert_all_end_alike(returning, ["0", "2", "again", "fourth"])
    assert_steps_add_up(returning, few=60)


def test_workers_that_return_or_join_begin_where_the_others_are(returning):
    for name in ("2", "again", "fourth"):
        result = returning.results()[name]
        assert result["is_joining"]
        assert result["begins"]["step"] > 3
        steps, has_moments = result["begins"]["optimizer"]
        assert steps >= result["begins"]["step"]  # of the worker that handed it over
        assert has_moments
    assert not returning.results()["0"]["is_joining"]


def test_the_mass_in_the_logs_is_of_those_who_are_there(returning):
    masses = [log["layup/mass"] for log in returning.results()["0"]["logs"] if "layup/mass" in log]
    assert masses[-1] == 4.0
    assert all(0 < mass <= 4 for mass in masses)


def test_what_was_logged_before_a_worker_joined_is_known_to_it(returning):
    results = returning.results()
    evaluations = [
        [(log["step"], log["eval_loss"]) for log in results[name]["logs"] if "eval_loss" in log]
        for name in ("0", "again", "fourth")
    ]
    assert evaluations[0] == evaluations[1] == evaluations[2]


def test_who_knows_another_secret_does_not_join(returning):
    said = returning.output("stranger")
    assert "WrongSecret: This worker has another secret than the job. Set LAYUP_TOKEN to the job's." in said


# ---- Frozen; the first one killed with its launcher ----


@pytest.fixture(scope="module")
def frozen(tmp_path_factory):
    """One of three freezes between its steps; later rank 0 is killed with its launcher; the rest end."""
    with launches(tmp_path_factory.mktemp("frozen")) as job:
        for rank in range(WORKERS):
            job.start(rank)
        job.wait_for("made a step", times=3 * WORKERS)
        workers = job.workers()
        workers["1"].suspend()
        job.wait_for("has given no sign of life for 3 s", "0")
        job.wait_for("has given no sign of life for 3 s", "2")
        workers["1"].resume()
        job.wait_for("1 is rank 2 of 3", "1")
        workers["2"].suspend()
        (job.folder / "evaluate-0").touch()
        job.wait_for("have lost each other", "0")  # in a collective
        job.wait_for("0 evaluated at", "0")
        workers["2"].resume()
        job.wait_for("2 is rank 2 of 3", "2")
        job.launchers["0"].kill()
        workers["0"].kill()
        job.wait_for("of 2 in era", "1")
        finish(job)
        yield job


def test_without_rank_0_and_its_launcher_the_others_end(frozen):
    assert_all_end_alike(frozen, ["1", "2"])
    assert_steps_add_up(frozen, few=60)


@pytest.mark.parametrize("name", ["1", "2"])
def test_who_was_frozen_comes_back_as_a_new_member(frozen, name):
    """One between its steps, one while the others waited for it."""
    assert "the others do without this worker, as it gave no sign of life. It comes back" in frozen.output(name)
    assert re.search(rf"^{name} is rank 2 of 3 in era \d+$", frozen.output(name), re.MULTILINE)


def test_what_was_to_be_done_together_is_done_by_those_who_are_left(frozen):
    assert re.search(r"^0 evaluated at \d+, rank 0 of 2$", frozen.output("0"), re.MULTILINE)
    assert re.search(r"^1 evaluated at \d+, rank 1 of 2$", frozen.output("1"), re.MULTILINE)


# ---- Failing ----


def test_who_fails_leaves_with_its_reason_and_the_others_go_on(tmp_path):
    steps = 60
    with launches(tmp_path, steps=steps) as job:
        for rank in range(WORKERS):
            job.start(rank)
        job.wait_for("made a step", times=2 * WORKERS)
        (tmp_path / "raise-1").touch()
        for name in ("0", "2"):
            job.wait_for("rank 1 failed: ArithmeticError: a fault made on purpose", name)  # its lease has not run out
        finish(job)
        assert_all_end_alike(job, ["0", "2"], steps)
        assert "ArithmeticError: a fault made on purpose" in job.output("1")


def test_workers_with_different_secrets_do_not_start(tmp_path):
    with launches(tmp_path, workers=2) as job:
        for rank, secret in enumerate(("secret", "guessed")):
            job.start(rank, environment={"LAYUP_TOKEN": secret})
        for name in ("0", "1"):
            job.wait_for("ValueError: Rank 1 has another LAYUP_TOKEN than rank 0", name)
        job.wait()
        assert "made a step" not in job.output()


# ---- One launcher ----


def test_one_launcher_ends_all_workers_when_one_is_killed_and_the_run_can_be_resumed(tmp_path):
    arguments = [*OPTIONS, "--max_steps=60", "--save_steps=10", f"--output_dir={tmp_path / 'model'}"]
    run = Run("eras.py", 2, [*arguments, "--pause=0.1"], tmp_path)
    run.wait_for("evaluated", times=0)
    while not (tmp_path / "model" / "checkpoint-10").exists():
        assert run.process.poll() is None, run.output[-8000:]
        time.sleep(0.1)
    run.worker(1).send_signal(signal.SIGKILL)
    assert run.wait(60) != 0
    run.kill()
    (tmp_path / "hurry").touch()
    resumed = Run("eras.py", 2, [*arguments, "--resume_from_checkpoint=True"], tmp_path)
    assert resumed.wait() == 0, resumed.output[-8000:]
    resumed.assert_nothing_left()
    first, second = resumed.results()
    assert first["begins"]["step"] >= 10
    assert first["begins"]["optimizer"][1]
    assert first["model"] == second["model"]
    assert first["step"] == second["step"] == 60
    assert load_file(tmp_path / "model" / "checkpoint-60" / "model.safetensors")


# ---- A checkpoint in the background ----


def test_a_checkpoint_whose_worker_is_gone_is_given_up_and_the_next_is_complete(tmp_path):
    options = [*OPTIONS, "--max_steps=90", f"--lease_seconds={LEASE}", "--save_steps=15", "--checkpoints=background"]
    with Launches("eras.py", 2, options, tmp_path) as job:
        (tmp_path / "hold-1").touch()
        for rank in range(2):
            job.start(rank)
        parts = tmp_path / "model" / "_unfinished" / "parts-1-of-checkpoint-15"
        end = time.monotonic() + 120
        while not parts.exists():
            assert time.monotonic() < end, job.output()[-8000:]
            time.sleep(0.05)
        steps = job.output("0").count("made a step")
        job.wait_for("made a step", "0", times=steps + 2)  # they train on
        job.workers()["1"].kill()
        finish(job)
        assert "checkpoint-15 is not complete, and will not be: rank 1 has not written its part" in job.output("0")
        assert not (tmp_path / "model" / "checkpoint-15").exists()
        assert not (tmp_path / "model" / "_unfinished").exists()
        (result,) = job.results().values()
        assert (result["step"], result["workers"]) == (90, 1)
        assert hash_of(GPT2LMHeadModel.from_pretrained(tmp_path / "model" / "checkpoint-90")) == result["model"]
