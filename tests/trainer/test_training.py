"""Whole runs of several real workers."""

import signal
import time

import pytest
from launching import Run, abandoned_shared_memory, assert_no_memory_abandoned_since, run
from stock import CHECKPOINTING

COMMON = ["--max_steps=12", "--per_device_train_batch_size=4", "--learning_rate=1e-2", "--disable_tqdm=True"]


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    folder = tmp_path_factory.mktemp("four")
    options = [
        "--eval_strategy=steps",
        "--eval_steps=6",
        "--save_strategy=steps",
        "--save_steps=6",
        "--logging_steps=3",
        "--include_num_input_tokens_seen=True",
    ]
    return run("train.py", 4, [*COMMON, *options, f"--output_dir={folder}/out"], folder).results()


def test_all_workers_start_from_rank_0_and_end_alike(four):
    assert len(four) == 4
    assert all(result["starts_from_rank_0"] for result in four)
    assert all(result["same_at_end"] for result in four)
    assert all(result["steps"] == 12 for result in four)


def test_no_ddp_and_no_collective_between_meetings(four):
    assert all(result["wrapped"] == "GPT2LMHeadModel" for result in four)
    for result in four:
        assert len(result["collectives_between_meetings"]) >= 2
        assert set(result["collectives_between_meetings"]) == {0}


def test_consensus_points_hold_the_mass_weighted_mean(four):
    for result in four:
        assert len(result["consensus"]) == 2  # after steps 6 and 12: evaluation, saving and the end share them
        for point in result["consensus"]:
            assert point["mass_exact"]
            assert point["same"]
            assert point["error"] < 1e-6
            assert point["distance"] > 0
            assert point["mass_min"] < 1


def test_the_consensus_model_is_what_is_saved_and_evaluated(four):
    assert four[0]["saved_is_model"]
    evaluations = [entry["eval_loss"] for entry in four[0]["logs"] if "eval_loss" in entry]
    assert evaluations[-1] == four[0]["evaluation"]
    assert evaluations[1] < evaluations[0] < 4.16  # log(64): nothing learnt
    assert len({result["evaluation"] for result in four}) == 1


def test_logs_carry_the_figures_of_gossip(four):
    entry = next(entry for entry in four[0]["logs"] if "loss" in entry)
    for name in ("merges", "offers", "skipped_offers", "bytes_read", "mass_min", "mass_max"):
        assert f"layup/{name}" in entry
    last = [entry for entry in four[0]["logs"] if "loss" in entry][-1]
    assert last["layup/merges"] > 0
    assert last["layup/bytes_read"] > 0
    assert any("layup/staleness" in entry for result in four for entry in result["logs"])
    point = next(entry for entry in four[0]["logs"] if "layup/consensus_distance" in entry)
    assert point["layup/mass"] == 4


def test_hooks_are_removed(four):
    assert all(result["hooks_left"] == 0 for result in four)


@pytest.mark.parametrize("workers", [2, 4])
def test_accumulation_checkpointing_and_bf16_together(workers, tmp_path):
    options = [
        "--gradient_accumulation_steps=2",
        f"--{CHECKPOINTING}=True",
        "--bf16=True",
        "--peers_per_step=1",
        "--logging_steps=4",
    ]
    arguments = [*COMMON, *options, f"--output_dir={tmp_path}/out"]
    ended = run("train.py", workers, arguments, tmp_path, forked=workers > 2)
    assert ended.output.count("the process group is destroyed at exit") == workers
    for result in ended.results():
        assert result["same_at_end"]
        assert result["wrapped"] == "GPT2LMHeadModel"  # not DDP, whose collectives are not Python's
        assert result["consensus"][-1]["mass_exact"]
        assert set(result["collectives_between_meetings"]) == {0}
        logged = [entry["step"] for entry in result["logs"] if "loss" in entry]
        assert logged[-1] == 12
        assert all(step >= due for step, due in zip(logged, [4, 8, 12], strict=False))  # a worker may come late
        assert result["steps"] == 12


# ---- What goes wrong ----


def assert_ends(started, before, within):
    begin = time.monotonic()
    code = started.wait(timeout=90)
    assert time.monotonic() - begin < within, f"took {time.monotonic() - begin:.0f} s to end"
    assert code != 0
    started.assert_nothing_left()
    assert_no_memory_abandoned_since(before)


LONG = ["--max_steps=100000", "--per_device_train_batch_size=4", "--linger=0.05", "--disable_tqdm=True"]


def test_an_exception_on_one_rank_ends_all_with_its_traceback(tmp_path):
    before = abandoned_shared_memory()
    started = Run("train.py", 4, [*LONG, "--raise_on_rank=2", f"--output_dir={tmp_path}/out"], tmp_path)
    started.wait_for("rank 2 made step 5")
    assert_ends(started, before, within=30)
    assert "ArithmeticError: a fault made on purpose" in started.output
    assert "Traceback" in started.output


def test_sigkill_of_one_rank_ends_all(tmp_path):
    before = abandoned_shared_memory()
    started = Run("train.py", 4, [*LONG, f"--output_dir={tmp_path}/out"], tmp_path)
    started.wait_for("made step 3", times=4)
    started.worker(1).send_signal(signal.SIGKILL)
    assert_ends(started, before, within=30)
    assert "Signal 9 (SIGKILL)" in started.output


def test_ctrl_c_ends_all(tmp_path):
    before = abandoned_shared_memory()
    started = Run("train.py", 2, [*LONG, f"--output_dir={tmp_path}/out"], tmp_path)
    started.wait_for("made step 3", times=2)
    for process in started.members():  # a terminal sends Ctrl-C to the whole foreground group
        process.send_signal(signal.SIGINT)
    assert_ends(started, before, within=45)


def test_workers_with_different_models_are_all_told(tmp_path):
    before = abandoned_shared_memory()
    started = Run("train.py", 2, [*LONG, "--other_model_on_rank=1", f"--output_dir={tmp_path}/out"], tmp_path)
    assert_ends(started, before, within=90)
    assert "Worker 1 has a different model than worker 0" in started.output
