"""How the workers of this run have been started, as the environment tells."""

from __future__ import annotations

import os


def launches() -> int:
    """How many launches have started the workers of this run.

    torch's launchers say it. Where Slurm's `srun` has started each worker itself, it is one for each node: nobody ends
    the workers of another one.
    """
    if "GROUP_WORLD_SIZE" in os.environ:
        return int(os.environ["GROUP_WORLD_SIZE"])
    of_srun = int(os.environ.get("WORLD_SIZE", "1")) > 1 and "SLURM_PROCID" in os.environ
    return int(os.environ.get("SLURM_STEP_NUM_NODES") or os.environ.get("SLURM_NNODES") or "1") if of_srun else 1


def has_launcher() -> bool:
    """Whether a launcher of torch's keeps the store by which the process group is made; else rank 0 does."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
