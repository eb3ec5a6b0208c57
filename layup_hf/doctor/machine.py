"""What the machine has: memory, /dev/shm, files, disk. Needs the standard library alone."""

from __future__ import annotations

import contextlib
import errno
import resource
import shutil
from pathlib import Path

from ..disk import nearest, remedy, try_to_write
from ..fleet.network import rdma_devices
from .finding import Finding

BYTES_OF_ADAMW = 12
"""For each parameter that is trained in fp32: weight and two moments. Gradients are freed in backward."""

_GIGABYTE = 10**9
_UNLIMITED = 2**62
_FILES, _FILES_OF_PEER, _USUAL_FILES = 128, 8, 1024


def check_memory(workers: int, root: Path = Path("/")) -> list[Finding]:
    """How much each worker on this machine can have.

    Args:
        workers: On this machine.
        root: Where the file systems of the kernel are; tests have others.
    """
    free, source = _free_memory(root)
    share = free / max(workers, 1)
    if share < _GIGABYTE:
        return [
            Finding(
                "memory",
                f"{share / _GIGABYTE:.1f} GB for each of {workers} worker(s) on this machine ({source}): Python with "
                "torch alone takes about half of one",
                "warning",
                "start fewer workers, or raise the memory limit of the container or the job",
            )
        ]
    text = (
        f"{share / _GIGABYTE:.0f} GB for each worker ({source}): room for {_count(share / BYTES_OF_ADAMW)} "
        "parameters with AdamW in fp32, less activations"
    )
    return [Finding("memory", text, score=share)]


def check_shared_memory_folder(folder: Path = Path("/dev/shm")) -> list[Finding]:
    """Whether /dev/shm is large enough for others than LayUp, which does not use it."""
    try:
        size = shutil.disk_usage(folder)
    except OSError as error:
        return [
            Finding(
                "shm",
                f"{folder} cannot be used ({error.strerror}). LayUp does without, but not the workers of a DataLoader",
                "warning",
                "set `dataloader_num_workers=0`, or give the container a /dev/shm",
            )
        ]
    if size.free < _GIGABYTE / 4:
        return [
            Finding(
                "shm",
                f"{folder} has {_bytes(size.free)} free of {_bytes(size.total)}. LayUp does not use it; the workers "
                "of a DataLoader and NCCL do, and fail or crash when it is full",
                "warning",
                "start the container with `--shm-size=8g` (or `--ipc=host`), or set `dataloader_num_workers=0`",
            )
        ]
    return [Finding("shm", f"{folder} has {_bytes(size.free)} free; LayUp itself does not use it", score=size.free)]


def check_files(world_size: int, has_rdma: bool | None = None) -> list[Finding]:
    """How many files may be open, and how much memory may be locked.

    Args:
        world_size: Workers of the job: each is a few sockets.
        has_rdma: Whether there is an RDMA device; None: look.
    """
    limit, highest = (_number(value) for value in resource.getrlimit(resource.RLIMIT_NOFILE))
    least = _FILES + _FILES_OF_PEER * world_size
    findings = [Finding("files", f"{limit if limit < _UNLIMITED else 'any number'} may be open")]
    if limit < max(least, _USUAL_FILES):
        is_enough = limit >= least
        text = f"only {limit} may be open; a worker among {world_size} takes up to {least}, and data sets take more"
        remedy = f"`ulimit -n {min(highest, max(65536, least))}` before the launch"
        if highest == limit or highest < least:
            remedy = f"let it be {max(65536, least)}: in /etc/security/limits.conf, or `docker run --ulimit nofile=...`"
        findings = [Finding("files", text, "warning" if is_enough else "error", remedy)]
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if (rdma_devices() if has_rdma is None else has_rdma) and locked != resource.RLIM_INFINITY:
        text = f"only {_bytes(locked)} of memory may be locked: RDMA needs to lock what it sends"
        findings.append(Finding("memlock", text, "warning", "`ulimit -l unlimited` (or `--ulimit memlock=-1`)"))
    return findings


def check_disk(output_dir: Path) -> list[Finding]:
    """Whether the output directory can be written, by writing, and how much is free."""
    there = nearest(output_dir.absolute())
    about = str(output_dir) if there == output_dir.absolute() else f"{output_dir}, which is to be made in {there},"
    try:
        if not there.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "it is a file")
        try_to_write(there)
        free = shutil.disk_usage(there).free
    except OSError as error:
        text = f"{about} cannot be written: {error.strerror}"
        return [Finding("disk", text, "error", f"{remedy(error.errno)}; or choose another `output_dir`")]
    text = f"{about} can be written; {_bytes(free)} free"
    if free < 5 * _GIGABYTE:
        room = _count(free / BYTES_OF_ADAMW)
        text += f": one checkpoint of a model of {room} parameters, with the optimizer of one worker"
        return [Finding("disk", text, "warning", "free some space, or set `save_total_limit` or `save_only_model`")]
    return [Finding("disk", text, score=free)]


# ---- Helpers ----


def _free_memory(root: Path) -> tuple[int, str]:
    """Bytes that can still be had, and what limits them."""
    lines = (root / "proc/meminfo").read_text().splitlines()
    values = {name: int(rest.split()[0]) * 1024 for name, _, rest in (line.partition(":") for line in lines)}
    limits = [(values["MemAvailable"], f"of {_bytes(values['MemTotal'])} in the machine")]
    for limit, used in _control_groups(root):
        limits.append((max(limit - used, 0), f"limit of the container or job: {_bytes(limit)}"))
    return min(limits)


def _control_groups(root: Path) -> list[tuple[int, int]]:
    """(limit, use) of memory of each control group that this process is in, where there is a limit."""
    found = []
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory") and "memory" not in controllers.split(","):
            continue
        is_second = not controllers
        base = root / "sys/fs/cgroup" if is_second else root / "sys/fs/cgroup/memory"
        names = ("memory.max", "memory.current", "inactive_file")
        if not is_second:
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        inner = base / path.lstrip("/")
        for folder in (inner, *inner.parents):
            if folder != base and base not in folder.parents:
                break
            with contextlib.suppress(OSError, ValueError):  # the outermost has none; "max" is no number
                limit, used = int((folder / names[0]).read_text()), int((folder / names[1]).read_text())
                if limit < 2**60:
                    found.append((limit, used - _statistic(folder / "memory.stat", names[2])))
    return found


def _statistic(file: Path, name: str) -> int:
    """A number in a file of `name value` lines: what is cached of files and can be given up at once counts as free."""
    with contextlib.suppress(OSError):
        for line in file.read_text().splitlines():
            if line.startswith(f"{name} "):
                return int(line.split()[1])
    return 0


def _bytes(number: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if number >= size:
            return f"{number / size:.3g} {unit}" if number < 1000 * size else f"{number / size:.0f} {unit}"
    return f"{number / 1e3:.3g} kB"


def _count(number: float) -> str:
    for word, size in (("billion", 1e9), ("million", 1e6)):
        if number >= size:
            return f"{number / size:.2g} {word}" if number < 100 * size else f"{number / size:.0f} {word}"
    return f"{number:.0f}"


def _number(limit: int) -> int:
    return _UNLIMITED if limit == resource.RLIM_INFINITY else limit
