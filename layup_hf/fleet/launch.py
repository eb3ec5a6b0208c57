"""What is settled before the process group is made: the network interface, and whether this worker joins a job."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch.distributed import HashStore

from .job import Job, launcher_store
from .network import Network
from .started import has_launcher, launches

_joining: Job | None = None  # by this process, with whichever of its configurations it trains


def prepare_launch(args: Any) -> None:
    """Choose the network interface; if the job is running already, begin alone, to join it when training begins.

    Args:
        args: A `LayupConfig` that has not chosen its device yet. Gets the attribute `job_to_join`, a `Job` or None.

    Raises:
        ValueError: There is no such interface or job, or the process group has been made already.
    """
    global _joining
    args.job_to_join = _joining
    place = getattr(args, "join", None)
    if torch.distributed.is_initialized():
        if place is not None and _joining is None:
            raise ValueError(
                "`join` comes too late: the process group has been made already. Create the configuration before "
                "anything that makes it, such as `PartialState` or `Accelerator`."
            )
        return
    if place is None and launches() == 1:
        return
    host = place.rpartition(":")[0] if place is not None else os.environ["MASTER_ADDR"]
    Network.find(getattr(args, "network_interface", None), towards=host or "127.0.0.1").use()
    job = Job.at(place) if place is not None else _running_job()
    if job is not None:
        args.job_to_join = _joining = job
        backend = "nccl" if torch.cuda.is_available() and not getattr(args, "use_cpu", False) else "gloo"
        torch.distributed.init_process_group(backend, store=HashStore(), rank=0, world_size=1)


def has_joined(args: Any) -> None:
    """What this process trains from here on joins nothing."""
    global _joining
    args.job_to_join = _joining = None


def _running_job() -> Job | None:
    """The job of this launch, if it has begun without this worker: then its launch has been repeated."""
    if not has_launcher():  # so there is no store yet to ask
        return None
    try:
        job = Job.find(launcher_store())
    except ConnectionError:  # the process group will say so
        return None
    return job if job is not None and job.is_running() else None
