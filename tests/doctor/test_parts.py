"""Versions, GPUs, links, reports, time limits: what each says, without a launch."""

import importlib.metadata
import sys
import threading
import time

import pytest
import torch

from layup_hf.doctor import called, devices, libraries, link
from layup_hf.doctor.attempt import NoAnswer, look, within
from layup_hf.doctor.finding import Finding
from layup_hf.doctor.report import has_failed, report
from layup_hf.trainer.seams import WORKING

# ---- Time limits ----


def test_what_does_not_end_is_left_behind():
    began, released = time.monotonic(), threading.Event()
    with pytest.raises(TimeoutError, match=r"did not end within 0\.1 s"):
        within(0.1, released.wait)
    assert time.monotonic() - began < 5
    released.set()  # its thread must not be there when another test counts threads
    assert within(10, lambda: 3) == 3


@pytest.mark.parametrize(
    ("failure", "finding"),
    [
        (ValueError("no\n  such thing"), Finding("disk", "no such thing", "error", "buy one")),
        (OSError("lost"), Finding("disk", "OSError: lost", "error", "buy one")),
        (NoAnswer("rank 2 sleeps"), Finding("disk", "not looked at: rank 2 sleeps", "skipped")),
    ],
)
def test_what_happens_to_a_check_is_a_finding(failure, finding):
    def check():
        raise failure

    assert look("disk", check, 10, "buy one") == [finding]


# ---- Libraries ----


@pytest.mark.parametrize(
    ("version", "is_known"),
    [("2.13.0", True), ("2.13.1+cu128", True), ("2.14", True), ("2.7.9", False), ("3.0.0a1", False), ("none", False)],
)
def test_versions_that_have_been_tested(monkeypatch, version, is_known):
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version if name == "torch" else real(name))
    (found,) = libraries.check_libraries(lambda: None, WORKING)
    assert found.level == ("ok" if is_known else "warning")
    assert f"torch {version}" in found.text


def test_a_library_that_is_not_there(monkeypatch):
    def check():
        raise ModuleNotFoundError("No module named 'transformers'")

    (found,) = libraries.check_libraries(check, WORKING)
    assert (found.level, found.text) == ("error", "ModuleNotFoundError: No module named 'transformers'")
    assert "README.md" in found.remedy


# ---- Devices ----


class Gpus:
    """What torch says of a machine with GPUs that does not exist."""

    def __init__(self, monkeypatch, number, apart=(), mode="Default"):
        for name, answer in {
            "is_available": lambda: True,
            "device_count": lambda: number,
            "get_device_name": lambda index: "H200",
            "can_device_access_peer": lambda a, b: (a, b) not in apart,
        }.items():
            monkeypatch.setattr(torch.cuda, name, answer)
        monkeypatch.setattr(devices, "_compute_mode", lambda index: mode)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        for variable in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
            monkeypatch.delenv(variable, raising=False)


@pytest.mark.parametrize(
    ("workers", "level", "said"),
    [
        (1, "ok", "4 GPU(s), H200: start one worker on each: `accelerate launch --multi_gpu --num_processes 4`"),
        (2, "ok", "4 GPU(s), H200: 2 workers leave 2 of them unused"),
        (4, "ok", "4 GPU(s), H200: one for each worker"),
        (5, "error", "4 GPU(s), H200, but 5 workers: each needs one of its own"),
    ],
)
def test_gpus_and_workers(monkeypatch, workers, level, said):
    Gpus(monkeypatch, 4)
    (found,) = devices.check_devices(workers)
    assert (found.level, found.text) == (level, said)


def test_visible_gpus_are_named(monkeypatch):
    Gpus(monkeypatch, 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    (found,) = devices.check_devices(2)
    assert "1 GPU(s), H200 (CUDA_VISIBLE_DEVICES=3), but 2 workers" in found.text


def test_gpus_that_cannot_read_each_other(monkeypatch):
    Gpus(monkeypatch, 4, apart=[(0, 1), (1, 0), (2, 3)], mode="Exclusive_Process")
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64, expandable_segments: True")
    _, mode, segments, apart = devices.check_devices(4)
    assert mode.level == "error"
    assert mode.text.startswith("GPU 0, 1, 2, 3 is in compute mode Exclusive_Process")
    assert "expandable_segments" in segments.text
    assert apart.text.startswith("no direct way between GPUs 0 and 1, 2 and 3:")


def test_expandable_segments_where_a_process_may_not_look_into_another(monkeypatch):
    monkeypatch.setattr(devices.os, "geteuid", lambda: 1000)
    (found,) = devices.check_gpus_together(["", ""], [], "expandable_segments:True", 1)
    assert found.level == "error"
    assert "kernel.yama.ptrace_scope = 1" in found.text
    assert devices.check_gpus_together(["Default"], [], "expandable_segments:False", 1) == []


def test_more_workers_than_cores(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(devices.os, "sched_getaffinity", lambda process: {0, 1})
    (found,) = devices.check_devices(3)
    assert found.level == "warning"
    assert found.text.endswith("3 workers for 2 CPU core(s): they take turns")


def test_one_process_is_told_how_many_workers_there_could_be(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(devices.os, "sched_getaffinity", lambda process: {0, 1, 2})
    (found,) = devices.check_devices(1, is_alone=True)
    assert found.text.endswith(
        "3 CPU cores: up to one worker on each: `--multi_gpu --num_processes 3` with `use_cpu=True`"
    )
    (found,) = devices.check_devices(1)
    assert found.text.endswith("1 worker(s) on 3 CPU core(s)")


def test_a_driver_without_a_gpu_that_torch_can_use(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(devices, "_DRIVER", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    (found,) = devices.check_devices(1)
    assert found.level == "warning"
    assert found.text.startswith(
        "no GPU that torch (built for CUDA 12.8) can use, but this machine has NVIDIA's driver"
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (found,) = devices.check_devices(1)
    assert (found.level, found.text.partition(";")[0]) == ("ok", "no GPU, as CUDA_VISIBLE_DEVICES is empty")


# ---- Links ----


def test_a_link_is_measured_in_a_second():
    sink = link.Sink("127.0.0.1", b"secret", 10)
    began = time.monotonic()
    with link.Probe(sink.place, b"secret", 10) as probe:
        assert 0 < probe.round_trip() < 1
        assert probe.rate() > 1e6
    assert time.monotonic() - began < 5


def test_who_does_not_know_the_secret_measures_nothing_and_is_in_nobodys_way():
    sink = link.Sink("127.0.0.1", b"secret", 10)
    with link.Probe(sink.place, b"another", 10) as probe, pytest.raises(OSError, match=r"closed|reset|pipe"):
        probe.round_trip()
    with link.Probe(sink.place, b"secret", 10) as probe:
        assert probe.round_trip() < 1


def test_a_link_that_is_not_there():
    sink = link.Sink("127.0.0.1", b"secret", 0.1)
    time.sleep(0.5)
    with pytest.raises(OSError, match="refused"):
        link.Probe(sink.place, b"secret", 1)


# ---- The report ----


def test_the_report_names_ranks_that_differ():
    fast, slow = Finding("disk", "fast", score=2), Finding("disk", "slow", score=1)
    bad = Finding("versions", "old", "error", "buy a new one")
    warned = Finding("shm", "small", "warning")
    findings = {
        0: [Finding("versions", "new"), fast, warned],
        1: [Finding("versions", "new"), slow, warned],
        2: [bad, fast, warned],
        3: [Finding("versions", "new"), fast, warned],
    }
    assert report("All:", findings, 4).splitlines() == [
        "All:",
        "  ok      versions   rank 0-1, 3: new",
        "  ERROR   versions   rank 2: old",
        "                     -> buy a new one",
        "  ok      disk       slow",
        "  warning shm        small",
        "Training would not work here: see versions.",
    ]
    assert has_failed(findings)
    del findings[2]
    assert report("All:", findings, 4).splitlines()[-1] == "Training would work here. Look at shm."
    assert not has_failed(findings)


def test_lines_are_broken_between_words():
    lines = report("", {0: [Finding("disk", "word " * 60, "error", "step " * 60)]}, 1).splitlines()[1:-1]
    assert len(lines) == 8
    assert max(map(len, lines)) <= 118
    assert all(line.startswith(" " * 21) for line in lines[1:])


# ---- The call ----


@pytest.mark.parametrize(
    ("original", "argv", "is_called"),
    [
        (["python", "-m", "layup_hf"], ["-m"], True),
        (["python", "-u", "-m", "layup_hf", "--timeout", "3"], ["-m", "--timeout", "3"], True),
        (["python", "-mlayup_hf"], ["-m"], True),
        (["python", "-m", "layup_hf.__main__"], ["-m"], True),
        (["python", "-m", "recipes.gpt2", "layup_hf"], ["-m", "layup_hf"], False),
        (["python", "-m", "layup_hf_other"], ["-m"], False),
        (["python", "-m", "layup_hf"], ["/site-packages/layup_hf/__main__.py"], False),
        (["python"], [""], False),
    ],
)
def test_who_is_called(monkeypatch, original, argv, is_called):
    monkeypatch.setattr(sys, "orig_argv", original)
    monkeypatch.setattr(sys, "argv", argv)
    assert called.is_called() == is_called
