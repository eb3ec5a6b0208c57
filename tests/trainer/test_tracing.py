"""A run's trace: one file, with each worker, that says what the logs say; and something readable whatever ends it."""

import signal

import pytest
import traces
from launching import Run, run
from stock import arguments, gpt2, text
from transformers import TrainerCallback

from layup_hf import LayupConfig, LayupTrainer
from layup_hf.trace import file

CASES = ["boundary", "arrival", "exact", "shards", "untraced"]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    results = run("tracing.py", 2, [str(folder), *CASES], folder).results()
    assert len(results) == 2
    found = {case: traces.read(folder / case / "trace.json") for case in CASES[:-1]}
    return found, results, folder


@pytest.mark.parametrize("case", CASES[:-1])
def test_there_is_one_file_and_each_worker_is_in_it(two, case):
    found, _, folder = two
    assert [path.name for path in (folder / case).iterdir()] == ["trace.json"]
    assert [name.split(" (")[0] for (name,) in traces.names(found[case]).values()] == ["rank 0", "rank 1"]
    threads = ["training", *(["merging on arrival"] if case == "arrival" else [])]
    assert traces.names(found[case], "thread_name") == {0: threads, 1: threads}
    for worker in found[case]["otherData"]["workers"]:
        assert worker["events_not_kept"] == 0
        assert (worker["clock"], worker["clock_error_us"]) == ("read against rank 0's", 0)  # one machine has one clock


@pytest.mark.parametrize("case", CASES[:-1])
def test_steps_and_merges_are_those_of_the_run_and_of_its_logs(two, case):
    found, results, _ = two
    for rank, result in enumerate(results):
        counted = traces.counts(found[case], rank)
        assert counted["step"] == result[case]["steps"]
        assert traces.merges(found[case], rank) == result[case]["merges"]
        numbers = [event["args"]["number"] for event in traces.events(found[case], "step", rank)]
        assert numbers == list(range(1, result[case]["steps"] + 1))
    for entry in results[0][case]["log"]:  # more may have come after the last one
        assert entry["layup/merges"] <= traces.merges(found[case], 0)


def test_workers_have_made_steps_and_merges(two):
    found, _, _ = two
    for rank in range(2):
        assert sum(len(traces.events(trace, "step", rank)) for trace in found.values()) > 0
        assert sum(traces.merges(trace, rank) for trace in found.values()) > 0


def test_a_step_has_its_parts(two):
    found, results, _ = two
    for rank, result in enumerate(results):
        counted, steps = traces.counts(found["boundary"], rank), result["boundary"]["steps"]
        assert counted["forward"] == counted["backward"] == counted["inputs"] == counted["clock"] == steps
        assert counted["block step"] == steps * len(result["boundary"]["blocks"])
        assert counted["data"] >= 2 * steps
        assert counted["delay"] == rank * steps
        named = {event["args"]["block"] for event in traces.events(found["boundary"], "block step", rank)}
        assert named == set(result["boundary"]["blocks"])
        counted = traces.counts(found["exact"], rank)
        assert counted["forward"] == counted["backward"] == 2 * result["exact"]["steps"]
        assert counted["block step"] == result["exact"]["steps"] * len(result["exact"]["blocks"])


def inside(trace, rank, name, around):
    outer = [(event["ts"], event["ts"] + event["dur"]) for event in traces.events(trace, around, rank)]
    inner = [(event["ts"], event["ts"] + event["dur"]) for event in traces.events(trace, name, rank)]
    return [any(a <= start and end <= b for a, b in outer) for start, end in inner]


def test_what_belongs_to_something_is_within_it(two):
    trace = two[0]["boundary"]
    for rank in range(2):
        for name, around in (("forward", "step"), ("backward", "step"), ("block step", "backward"), ("merge", "step")):
            assert all(inside(trace, rank, name, around)), (name, around)
        assert all(inside(trace, rank, "delay", "forward"))
        assert any(inside(trace, rank, "wait for workers", "meeting"))


def test_meetings_and_what_is_done_at_them(two):
    for rank in range(2):
        counted = traces.counts(two[0]["boundary"], rank)
        assert counted["meeting"] >= 2
        assert counted["consensus point"] == 2
        assert counted["evaluation"] == 2
        assert counted["saving"] == 1
        assert counted["new era"] == 0


def test_nothing_is_left_on_the_trainer(two):
    for result in two[1]:
        assert [result[case]["accelerator"] for case in CASES] == [[]] * len(CASES)


def test_it_is_off_by_default(two):
    _, results, folder = two
    assert LayupConfig.trace is None
    assert not (folder / "untraced").exists()
    assert all("StepTracer" not in result["untraced"]["callbacks"] for result in results)
    assert all("StepTracer" in result["boundary"]["callbacks"] for result in results)


def test_a_trace_on_some_workers_is_refused_on_all(two):
    for result in two[1]:
        assert result["refused"] == "`trace` is set on rank 1 alone. Set it on all workers, or on none."


# ---- Whatever ends a run ----

LONG = ["--max_steps=100000", "--per_device_train_batch_size=4", "--linger=0.02", "--disable_tqdm=True"]


def begun(folder):
    started = Run("train.py", 2, [*LONG, f"--output_dir={folder}/out", f"--trace={folder}/t/trace.json"], folder)
    for rank in range(2):
        started.wait_for(f"rank {rank} made step 5")
    return started


def test_when_a_worker_is_killed_what_the_others_have_is_readable(tmp_path):
    started = begun(tmp_path)
    started.worker(1).send_signal(signal.SIGKILL)
    assert started.wait() != 0
    assert [path.name for path in (tmp_path / "t").iterdir()] == ["trace.rank-0.json"]
    assert file.join(tmp_path / "t/trace.json") == [tmp_path / "t/trace.rank-0.json"]
    trace = traces.read(tmp_path / "t/trace.json")
    assert len(traces.events(trace, "step")) > 0


def test_on_sigterm_there_is_one_file(tmp_path):
    started = begun(tmp_path)
    started.worker(1).send_signal(signal.SIGTERM)
    started.wait()
    assert [path.name for path in (tmp_path / "t").iterdir()] == ["trace.json"]
    trace = traces.read(tmp_path / "t/trace.json")
    assert len(traces.names(trace)) == 2


class Raises(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise ArithmeticError("a fault made on purpose")


def test_when_a_worker_that_is_alone_raises_the_file_is_whole(tmp_path):
    args = arguments(tmp_path / "out", trace=str(tmp_path / "trace.json"))
    trainer = LayupTrainer(model=gpt2(), args=args, train_dataset=text(), callbacks=[Raises()])
    with pytest.raises(ArithmeticError):
        trainer.train()
    assert traces.counts(traces.read(tmp_path / "trace.json"), 0)["step"] == 3
    assert "backward" not in vars(trainer.accelerator)
    trainer.remove_callback(Raises)
    trainer.train()
    assert traces.counts(traces.read(tmp_path / "trace.json"), 0)["step"] == 6  # of the latest training


def test_a_trace_that_cannot_be_written_ends_no_training(tmp_path, caplog):
    args = arguments(tmp_path / "out", trace=str(tmp_path / "folder" / "trace.json"))
    trainer = LayupTrainer(model=gpt2(), args=args, train_dataset=text())
    (tmp_path / "folder").write_text("this is no folder")
    trainer.train()
    assert trainer.state.global_step == 6
    assert any("the trace could not be written" in message for message in caplog.messages)


# ---- What cannot work ----


def test_a_file_that_no_viewer_opens_is_refused():
    with pytest.raises(ValueError, match=r"^trace='run\.log': viewers tell a trace by its ending"):
        LayupConfig(trace="run.log")


def test_a_folder_is_refused_with_a_file_in_it(tmp_path):
    folder = tmp_path / "runs.json"
    folder.mkdir()
    with pytest.raises(ValueError, match=r"is a folder. Name a file in it, such as .*runs\.json/trace\.json"):
        LayupConfig(trace=str(folder))


def test_a_file_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="nothing can be written in"):
        LayupConfig(trace=str(tmp_path / "file" / "deep" / "trace.json"))


def test_what_is_no_name_is_refused():
    with pytest.raises(ValueError, match="trace=True is not of its type: use text, or None"):
        LayupConfig(trace=True)
