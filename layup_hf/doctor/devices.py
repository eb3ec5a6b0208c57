"""What workers would compute on, and what stands between GPUs of one machine."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import torch

from .finding import Finding

_ALLOCATOR_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
_DRIVER = Path("/proc/driver/nvidia/version")
_PTRACE = Path("/proc/sys/kernel/yama/ptrace_scope")


def device_of(local_rank: int) -> torch.device:
    """What this worker would compute on."""
    return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")


def check_devices(workers: int, is_alone: bool = False) -> list[Finding]:
    """What there is, and how many workers that gives.

    Args:
        workers: On this machine.
        is_alone: Whether there is one process, which may not be all that are to be started.
    """
    if not torch.cuda.is_available():
        return [_without_gpu(workers, is_alone)]
    number, visible = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES")
    kinds = sorted({torch.cuda.get_device_name(index) for index in range(number)})
    text = f"{number} GPU(s), {' and '.join(kinds)}"
    text += f" (CUDA_VISIBLE_DEVICES={visible})" if visible is not None else ""
    if workers > number:
        remedy = f"`--num_processes {number}` for this machine, or let CUDA_VISIBLE_DEVICES name more GPUs"
        return [Finding("devices", f"{text}, but {workers} workers: each needs one of its own", "error", remedy)]
    findings = [Finding("devices", f"{text}: {_worth(number, workers)}")]
    if workers > 1:
        findings += check_gpus_together(
            [_compute_mode(index) for index in range(workers)],
            [(a, b) for a in range(workers) for b in range(workers) if a != b and not _sees(a, b)],
            next((os.environ[name] for name in _ALLOCATOR_VARIABLES if os.environ.get(name)), ""),
            int(_PTRACE.read_text()) if _PTRACE.exists() else 0,
        )
    return findings


def check_gpus_together(
    modes: list[str], apart: list[tuple[int, int]], allocator: str, ptrace_scope: int
) -> list[Finding]:
    """Whether one worker can open the memory of another one's GPU (CUDA IPC).

    Args:
        modes: Compute mode of each GPU, as `nvidia-smi` calls it; "" where it is not known.
        apart: Pairs of GPUs, neither of which can read the other's memory directly.
        allocator: Settings of torch's allocator.
        ptrace_scope: Of the kernel: from 1 on, a process may look into its children alone.
    """
    findings = []
    if closed := [index for index, mode in enumerate(modes) if mode.lower().startswith(("exclusive", "prohibited"))]:
        text = f"GPU {_listed(closed)} is in compute mode {modes[closed[0]]}: no second process can open its memory"
        findings.append(Finding("ipc", text, "error", "`sudo nvidia-smi --compute-mode=DEFAULT`"))
    if "expandable_segments:true" in allocator.lower().replace(" ", ""):
        text = "expandable_segments is on: peers open such memory by a descriptor of the process that owns it"
        remedy = "unset expandable_segments in PYTORCH_CUDA_ALLOC_CONF"
        if ptrace_scope > 0 and os.geteuid() != 0:
            text += f", which this machine forbids (kernel.yama.ptrace_scope = {ptrace_scope})"
            findings.append(Finding("ipc", text, "error", remedy))
        else:
            findings.append(Finding("ipc", f"{text}; needs Linux 5.6", "warning", remedy))
    if apart:
        pairs = ", ".join(f"{a} and {b}" for a, b in apart if a < b or (b, a) not in apart)
        text = f"no direct way between GPUs {pairs}: what they read of each other goes through the machine's memory"
        remedy = "nothing, if it cannot be changed: it works, but slower. In a virtual machine, ask for P2P or NVLink"
        findings.append(Finding("p2p", text, "warning", remedy))
    return findings


def _without_gpu(workers: int, is_alone: bool) -> Finding:
    cores, visible = len(os.sched_getaffinity(0)), os.environ.get("CUDA_VISIBLE_DEVICES")
    built = torch.version.cuda
    if built is not None and visible != "":
        why = f"no GPU that torch (built for CUDA {built}) can use"
        why += f", as CUDA_VISIBLE_DEVICES={visible}" if visible is not None else ""
    else:
        why = "no GPU, as CUDA_VISIBLE_DEVICES is empty" if built is not None else "no GPU: this torch is for CPUs"
    if visible != "" and _DRIVER.exists():
        text = f"{why}, but this machine has NVIDIA's driver ({workers} worker(s) on {cores} CPU core(s))"
        remedy = (
            "install a torch for this driver's CUDA, and start a container with `--gpus all`; or set `use_cpu=True`"
        )
        return Finding("devices", text, "warning", remedy)
    if workers > cores:
        text = f"{why}; {workers} workers for {cores} CPU core(s): they take turns"
        return Finding("devices", text, "warning", f"`--num_processes {cores}` for this machine")
    if is_alone and cores > 1:
        how = f"up to one worker on each: `--multi_gpu --num_processes {cores}` with `use_cpu=True`"
        return Finding("devices", f"{why}; {cores} CPU cores: {how}")
    return Finding("devices", f"{why}; {workers} worker(s) on {cores} CPU core(s)")


def _worth(number: int, workers: int) -> str:
    if workers == number:
        return "one for each worker"
    if workers == 1:
        return f"start one worker on each: `accelerate launch --multi_gpu --num_processes {number}`"
    return f"{workers} workers leave {number - workers} of them unused"


def _sees(one: int, other: int) -> bool:
    return torch.cuda.can_device_access_peer(one, other)


def _compute_mode(index: int) -> str:
    """As `nvidia-smi` says; "" where that cannot be asked."""
    identifier = str(torch.cuda.get_device_properties(index).uuid)
    query = ["nvidia-smi", "--query-gpu=compute_mode", "--format=csv,noheader", f"--id=GPU-{identifier}"]
    try:
        return subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))
