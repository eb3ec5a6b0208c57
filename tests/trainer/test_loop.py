"""Whole runs of real workers of unequal speed: the clock, shared work, meetings, and workers that fail."""

import itertools
import json
import os
import random
import re
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
from launching import Run, run
from transformers import AutoModelForCausalLM

COMMON = ["--per_device_train_batch_size=2", "--disable_tqdm=True", "--learning_rate=1e-3"]


def work(folder, *cases, workers=2, **how):
    """Run cases one after the other in the same processes; the log, and each case's results in the order of ranks."""
    arguments = []
    for number, options in enumerate(cases):
        arguments += [*COMMON, "--save_strategy=no", f"--output_dir={folder}/out{number}", *options, "--then"]
    started = run("work.py", workers, arguments[:-1], folder, timeout=280, **how)
    return started.output, list(zip(*started.results(), strict=True))


def start(folder, *options, workers=2, **how):
    return Run("work.py", workers, [*COMMON, *options, f"--output_dir={folder}/out"], folder, **how)


def counts(*batches):
    """How often each sample came."""
    return Counter(index for batch in batches for index in batch)


def all_samples(results):
    return counts(*(batch for result in results for batch in result["samples"]))


def seen_until(results, event, step):
    """What had been seen at the meeting of this kind at this step."""
    seen = []
    for result in results:
        number = next(n for n, (name, at, _) in enumerate(result["events"]) if (name, at) == (event, step))
        seen += result["samples"][: result["batches"][number]]
    return counts(*seen)


# ---- The clock ----


@pytest.fixture(scope="module")
def unequal(tmp_path_factory):
    """Rank 1 takes four times as long for a step, and what it sends and receives is late."""
    options = ["--max_steps=40", "--straggler=rank=1,compute=0.06,communication=0.1", "--eval_strategy=steps"]
    options += ["--eval_on_start=True", "--eval_steps=15", "--logging_steps=5", "--include_num_input_tokens_seen=True"]
    options += ["--disable_tqdm=False"]
    log, cases = work(tmp_path_factory.mktemp("unequal"), options)
    return log, *cases[0]


def test_the_sum_over_workers_is_exact_and_a_slow_worker_does_less(unequal):
    _, fast, slow = unequal
    assert fast["steps"] + slow["steps"] == 80
    assert slow["steps"] < 0.8 * fast["steps"]  # about a quarter where nothing else runs
    assert slow["steps"] > 5
    assert fast["global_step"] == slow["global_step"] == 40


def test_every_worker_sees_every_step_of_the_clock_once_with_its_learning_rate(unequal):
    for result in unequal[1:]:
        assert result["clock"] == list(range(1, 41))
        assert result["rates"] == pytest.approx([1e-3 * (1 - step / 40) for step in range(1, 41)])
        assert result["epochs"] == sorted(result["epochs"])
        assert result["epochs"][-1] == pytest.approx(80 / 32)


def test_meetings_happen_at_exact_steps(unequal):
    for result in unequal[1:]:
        assert [step for name, step, _ in result["events"] if name == "evaluate"] == [0, 15, 30, 40]
    for step in (15, 30, 40):  # a step of the clock is one of every worker on average
        assert sum(seen_until(unequal[1:], "evaluate", step).values()) == step * 2 * 2


def test_logs_tell_means_and_totals_of_all_workers(unequal):
    log, fast, slow = unequal
    assert fast["train_loss"] == slow["train_loss"]
    assert 3 < fast["train_loss"] < 4.2
    assert fast["tokens"] == slow["tokens"] == 80 * 2 * 16
    assert [entry["step"] for entry in fast["logs"] if "loss" in entry] == list(range(5, 41, 5))
    assert re.search(r"40/40 .*shares \d\d/\d\d %", log)  # the progress bar
    line = re.search(r"^LayUp: .*$", log.replace("\r", "\n"), re.MULTILINE)[0]
    assert f"steps by worker {fast['steps']}/{slow['steps']}" in line
    assert "clock steps old (median; 95 % at most" in line
    assert "mass by worker at the end" in line


# ---- Shared work ----

DATA = {
    "map": [],
    "loader processes": ["--dataloader_num_workers=2"],
    "by length": ["--train_sampling_strategy=group_by_length", "--gradient_accumulation_steps=3"],
    "unequal batches": ["--batch_sizes=4/1", "--gradient_accumulation_steps=2"],
    "shards": ["--shared_batches=False"],
}


def options_of_epochs(options):
    return ["--num_train_epochs=2", "--slow=0.15", "--eval_strategy=epoch", *options]


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """Two epochs of 64 samples from each kind of data, with a slow rank 1."""
    _, cases = work(tmp_path_factory.mktemp("shared"), *map(options_of_epochs, DATA.values()))
    return dict(zip(DATA, cases, strict=True))


@pytest.mark.parametrize("kind", DATA)
def test_every_sample_comes_once_per_epoch_whoever_is_slow(kind, shared):
    results = shared[kind]
    first = next(step for name, step, _ in results[0]["events"] if name == "evaluate")
    assert seen_until(results, "evaluate", first) == counts(range(64))
    assert all_samples(results) == counts(range(64), range(64))
    if kind == "shards":
        assert results[0]["steps"] == results[1]["steps"]
    else:
        assert results[0]["steps"] > results[1]["steps"]
    for result in results:
        assert [name for name, _, _ in result["events"]] == ["epoch", "evaluate"] * 2
        assert result["clock"] == list(range(1, result["max_steps"] + 1))


RESUMED = {
    "loader processes": ["--dataloader_num_workers=2"],
    "iterable": ["--iterable=True", "--max_steps=32"],
    "shards": ["--shared_batches=False"],
}


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """Two epochs of each kind of data, and then again from step 10."""
    folder, cases = tmp_path_factory.mktemp("resumed"), []
    for options in RESUMED.values():
        checkpoint = folder / f"out{len(cases)}" / "checkpoint-10"
        common = ["--num_train_epochs=2", "--slow=0.06", *options]
        cases.append([*common, "--save_strategy=steps", "--save_steps=10"])
        cases.append([*common, f"--resume_from_checkpoint={checkpoint}"])
    _, results = work(folder, *cases)
    return dict(zip(RESUMED, zip(results[::2], results[1::2], strict=True), strict=True))


@pytest.mark.parametrize("kind", RESUMED)
def test_a_resumed_run_goes_on_in_the_middle_of_an_epoch(kind, resumed):
    first, second = resumed[kind]
    seen = seen_until(first, "save", 10)
    assert set(seen.values()) == {1}
    assert len(seen) == 40
    assert all_samples(first) == counts(range(64), range(64))
    assert seen + all_samples(second) == counts(range(64), range(64))
    for result, uninterrupted in zip(second, first, strict=True):
        assert result["clock"] == list(range(11, 33))
        assert result["global_step"] == 32
        assert result["train_loss"] > 0.8 * uninterrupted["train_loss"]  # the mean of 22 steps, not their sum / 32


# ---- Meetings ----

WISHES = ["evaluate", "save", "stop_epoch", "stop_training"]


@pytest.fixture(scope="module")
def wished(tmp_path_factory):
    """After its fifth own step, rank 1's callback asks for something."""
    options = ["--num_train_epochs=2", "--slow=0.05", "--save_strategy=steps", "--save_steps=1000"]
    wishes = [*(f"--wish={wish}" for wish in WISHES), "--evaluate_at_epoch=True"]
    _, cases = work(tmp_path_factory.mktemp("wished"), *([*options, wish] for wish in wishes))
    return dict(zip([*WISHES, "call"], cases, strict=True))


@pytest.mark.parametrize("wish", WISHES)
def test_what_a_callback_of_one_worker_asks_for_is_done_by_all(wish, wished):
    results = wished[wish]
    events = [[(name, step) for name, step, _ in result["events"]] for result in results]
    assert events[0][0] == events[1][0]
    name, at = events[0][0]
    assert name == (wish if wish in ("evaluate", "save") else "epoch")
    own = [result["events"][0][2] for result in results]
    assert own[1] == 5  # at once, after the step that each of them was making
    assert sum(own) <= 2 * at <= sum(own) + 2
    if wish == "stop_training":
        assert [result["global_step"] for result in results] == [at, at]
    elif wish == "stop_epoch":
        samples = seen_until(results, "epoch", at)
        assert set(samples.values()) == {1}
        assert 64 > len(samples) > 0
        assert all_samples(results) == samples + counts(range(64))  # the second epoch is whole
    else:
        assert all_samples(results) == counts(range(64), range(64))


def random_case(seed):
    """Some training, with delays, meetings and wishes of every kind."""
    draw = random.Random(seed)
    options = ["--pace=0.002", f"--samples={draw.choice([30, 41, 64])}", f"--logging_steps={draw.choice([1, 3])}"]
    kind = draw.choice(["iterable", "steps", "epochs", "epochs"])
    if kind == "epochs":
        options.append(f"--num_train_epochs={draw.choice([1, 2, 3, 1.5])}")
    else:
        options += [f"--max_steps={draw.randint(4, 20)}", *(["--iterable=True"] if kind == "iterable" else [])]
    if draw.random() < 0.25:
        options.append("--shared_batches=False")
    if draw.random() < 0.3:
        options.append(f"--gradient_accumulation_steps={draw.choice([2, 3])}")
    for event in ("eval", "save"):
        strategy = draw.choice(["no", "steps", "epoch"])
        options += [f"--{event}_strategy={strategy}", f"--{event}_steps={draw.randint(1, 9)}"]
    if draw.random() < 0.6:
        options.append(f"--wish={draw.choice(WISHES)}")
    if draw.random() < 0.4:
        options.append("--evaluate_at_epoch=True")
    delay = f"compute={draw.choice([0.002, 0.02])},distribution=exponential,seed={seed}"
    return [*options, f"--straggler={delay}; rank={draw.randrange(3)},compute={draw.choice([0.01, 0.05])}"]


# A slow rank 0 is still at the end of the first epoch when rank 1 stops the second one.
STOPS_THE_NEXT_EPOCH = ["--pace=0.002", "--samples=30", "--num_train_epochs=2", "--gradient_accumulation_steps=2"]
STOPS_THE_NEXT_EPOCH += ["--save_strategy=steps", "--save_steps=1", "--wish=stop_epoch", "--evaluate_at_epoch=True"]
STOPS_THE_NEXT_EPOCH += ["--straggler=compute=0.02,distribution=exponential,seed=6; rank=0,compute=0.01"]


def test_meetings_of_every_kind_come_to_an_end_and_all_workers_agree(tmp_path):
    options = [STOPS_THE_NEXT_EPOCH, *map(random_case, range(11))]
    _, cases = work(tmp_path, *options, workers=3)
    for case, results in zip(options, cases, strict=True):
        meetings = [[(name, step) for name, step, _ in r["events"] if name != "epoch"] for r in results]
        assert meetings[0] == meetings[1] == meetings[2], case
        assert len({result["global_step"] for result in results}) == 1, case
        for result in results:
            assert result["clock"] == list(range(1, result["global_step"] + 1)), case


def test_a_call_on_one_worker_alone_is_an_error_on_all(tmp_path):
    started = start(tmp_path, "--num_train_epochs=2", "--save_strategy=no", "--evaluate_on_rank=0")
    assert started.wait(60) != 0
    started.assert_nothing_left()
    assert "Some workers wait for all others to come to evaluate(), and the others do not come." in started.output


def test_evaluate_may_be_called_on_every_worker_at_the_end_of_an_epoch(wished):
    for result in wished["call"]:
        names = [name for name, _, _ in result["events"] if name != "save"]
        assert names == ["epoch", "evaluate", "epoch", "evaluate"]
    for step in {step for name, step, _ in wished["call"][0]["events"] if name == "evaluate"}:
        seen = seen_until(wished["call"], "evaluate", step)
        assert seen in (counts(range(64)), counts(range(64), range(64)))


def test_evaluating_in_the_middle_of_a_step_is_refused_and_the_peers_are_told(tmp_path):
    started = start(tmp_path, "--num_train_epochs=2", "--evaluate_in_step=True")
    assert started.wait() != 0
    assert "set `control.should_evaluate` or `control.should_save`" in started.output
    assert "WorkerFailure: Training ends, as rank 0 failed: RuntimeError: Evaluating" in started.output
    started.assert_nothing_left()


# ---- Workers that stop, fail, or are taken away ----


def test_a_frozen_worker_stops_nobody_and_is_useful_afterwards(tmp_path):
    started = start(tmp_path, "--max_steps=250", "--pace=0.05", "--save_strategy=no", "--samples=6000", workers=3)
    started.wait_for("is under way", times=3)
    time.sleep(2)
    frozen = started.worker(1)
    begin = time.time()
    frozen.send_signal(signal.SIGSTOP)
    time.sleep(12)
    end = time.time()
    frozen.send_signal(signal.SIGCONT)
    assert started.wait() == 0, started.output[-8000:]
    started.assert_nothing_left()
    results = [cases[0] for cases in started.results()]
    assert sum(result["steps"] for result in results) == 750
    assert set(all_samples(results).values()) == {1}  # 1500 of the 6000 samples
    for result in results:
        during = [moment for moment in result["times"] if begin + 0.5 < moment < end]
        after = sum(moment > end for moment in result["times"])
        if result["rank"] == 1:
            assert during == []
        else:  # one who waited would do so for 12 s
            pauses = [after - before for before, after in itertools.pairwise([begin, *during, end])]
            assert max(pauses) < 5, f"rank {result['rank']} made {len(during)} steps"
        assert after > 20
        assert result["clock"] == list(range(1, 251))


def checkpoint_of(folder):
    (checkpoint,) = Path(folder, "out").glob("checkpoint-*")
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    assert checkpoint.name == f"checkpoint-{state['global_step']}"
    AutoModelForCausalLM.from_pretrained(checkpoint)
    return state


@pytest.mark.parametrize("who", ["launcher", "worker"])
def test_sigterm_leads_to_a_checkpoint_of_all(who, tmp_path):
    options = ["--max_steps=5000", "--save_strategy=steps", "--save_steps=4000", "--slow=0.1"]
    started = start(tmp_path, *options, forked=who == "worker")
    started.wait_for("is under way", times=2)
    os.kill(started.process.pid if who == "launcher" else started.worker(1).pid, signal.SIGTERM)
    assert started.wait(60) != 0
    started.assert_nothing_left()
    assert "got SIGTERM: all workers end after step" in started.output, started.output[-8000:]
    assert "saving a checkpoint" in started.output
    assert checkpoint_of(tmp_path)["stateful_callbacks"]["layup_hf"]["drawn"]
    assert not started.results(), started.output[-8000:]  # the script did not go on as if training had been completed
    if who == "worker":
        assert "the process group is destroyed at exit" in started.output, started.output[-8000:]
        assert "the process group is left at exit" not in started.output
        assert "exitcode  : 143" in started.output, started.output[-8000:]


def test_with_jit_checkpoint_train_returns_after_sigterm(tmp_path):
    options = ["--max_steps=5000", "--save_strategy=steps", "--save_steps=4000", "--enable_jit_checkpoint=True"]
    started = start(tmp_path, *options)
    started.wait_for("is under way", times=2)
    os.kill(started.worker(1).pid, signal.SIGTERM)
    assert started.wait(60) == 0, started.output[-8000:]
    started.assert_nothing_left()
    step = checkpoint_of(tmp_path)["global_step"]
    assert [cases[0]["global_step"] for cases in started.results()] == [step] * 2


def test_sigterm_without_a_save_strategy_saves_nothing_and_says_so(tmp_path):
    started = start(tmp_path, "--max_steps=5000", "--save_strategy=no")
    started.wait_for("is under way", times=2)
    os.kill(started.process.pid, signal.SIGTERM)
    assert started.wait(60) != 0
    started.assert_nothing_left()
    assert "saving nothing, as `save_strategy` is 'no'" in started.output
    assert not list(Path(tmp_path, "out").glob("checkpoint-*"))


FAULTS = {
    "1/error": (["--save_strategy=no"], "ArithmeticError: made on purpose"),
    "0/memory": (["--save_strategy=no"], "OutOfMemoryError: made on purpose"),
    "1/evaluation": (["--save_strategy=no", "--eval_strategy=epoch"], "ArithmeticError: made on purpose"),
    "1/save": (
        ["--save_strategy=epoch", "--auto_find_batch_size=True"],
        "RuntimeError: Rank 1 ran out of memory outside of a training step.",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_worker_that_fails_tells_the_others_why(fault, tmp_path):
    options, error = FAULTS[fault]
    started = start(tmp_path, "--max_steps=5000", f"--raise_on={fault}", *options)
    assert started.wait(60) != 0
    started.assert_nothing_left()
    assert f"WorkerFailure: Training ends, as rank {fault[0]} failed: {error}" in started.output
    assert f"Rank {1 - int(fault[0])} ran out of memory" not in started.output


def test_a_killed_worker_ends_the_run_with_a_message(tmp_path):
    started = start(tmp_path, "--max_steps=5000", "--save_strategy=no")
    started.wait_for("is under way", times=2)
    started.worker(1).kill()
    assert started.wait(60) != 0
    started.assert_nothing_left()
    assert "WorkerFailure: A worker has ended without a word: was it killed, or out of memory?" in started.output


def test_all_begin_again_with_a_smaller_batch_when_one_runs_out_of_memory(tmp_path):
    options = ["--num_train_epochs=1", "--samples=96", "--per_device_train_batch_size=8", "--memory_for=5"]
    _, (results,) = work(tmp_path, [*options, "--auto_find_batch_size=True", "--gradient_accumulation_steps=1"])
    for result in results:
        sizes = [len(batch) for batch in result["samples"]]
        assert sizes[0] == 8
        assert [size for size, after in itertools.pairwise(sizes) if size > after > 4] == [8, 7, 6]
        last = sizes.index(5)
        assert all(size <= 5 for size in sizes[last:])
        result["samples"] = result["samples"][last:]
    assert all_samples(results) == counts(range(96))
