"""Workers that run the doctor. Each line of input starts some.

A line is a JSON object: `workers`, `port` of a store, `folder`, `arguments` for the doctor, `environment` of all, and
`faults` by rank, which are names of functions here. If `ends_all`, the others get SIGTERM when one fails, as from a
launcher. The imports, which take long, are done once; then each worker is a
fork. It writes into `log-RANK.txt`, and leaves its process number in `pid-RANK` and its exit code in `exit-RANK`.
"""

import ctypes
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

os.environ.update({"NIXL_LOG_LEVEL": "FATAL", "UCX_LOG_LEVEL": "FATAL"})  # as the windows set it: read at the import

import nixl._api  # noqa: F401
import torch
import transformers.trainer_utils
from exchanging import run_forked, write

from layup_hf.blocks import split_into_blocks  # noqa: F401
from layup_hf.doctor import exchange, main, meeting, together  # noqa: F401
from layup_hf.trainer.seams import WORKING, check_seams

# ---- Faults ----


def lacks_nixl():
    for name in [name for name in sys.modules if name.partition(".")[0] == "nixl"]:
        del sys.modules[name]
    sys.modules["nixl"] = None


def lacks_a_seam():
    del transformers.trainer_utils.sort_checkpoints


def has_another_secret():
    os.environ["LAYUP_TOKEN"] = "another"


def has_few_files():
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, 400))


def is_on_another_host():
    mock.patch("layup_hf.windows.opening.host", return_value="elsewhere").start()


def is_behind_a_firewall():
    mock.patch.object(together, "Probe", side_effect=TimeoutError("timed out")).start()


def has_another_torch():
    metadata = importlib.metadata
    real = metadata.version
    metadata.version = lambda name: "2.13.9" if name == "torch" else real(name)


def hangs_in_a_check():
    main.machine.check_disk = lambda folder: time.sleep(1000)


def comes_late():
    time.sleep(4)


def freezes():
    """After it has introduced itself."""
    main.machine.check_memory = lambda workers: os.kill(os.getpid(), signal.SIGSTOP)


def dies():
    main.machine.check_memory = lambda workers: os._exit(3)


def freezes_at_once():
    os.kill(os.getpid(), signal.SIGSTOP)


def cannot_map_the_others():
    """As if it were in another container that has the same name."""
    from layup_hf.windows import shared

    def fail(self, *, writable):
        raise ValueError(f"Cannot map the memory of worker process {self.process} (Permission denied). ...")

    shared.Segment.map = fail


def mount(folder, options):
    """A small file system in the place of a folder, for this process alone."""
    assert ctypes.CDLL(None).unshare(0x20000) == 0  # CLONE_NEWNS
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)


def has_a_full_disk():
    mount(sys.argv[2], "size=64k")


def has_a_disk_for_reading_only():
    mount(sys.argv[2], "ro")


def has_a_small_disk():
    mount(sys.argv[2], "size=1g")


def has_little_shared_memory():
    mount("/dev/shm", "size=64m")


# ---- Workers ----


def work(rank, order):
    torch.set_num_threads(1)
    world_size = order["workers"]
    os.environ.update(
        {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(order["port"]),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            **order["environment"],
        }
        if world_size > 1
        else order["environment"]
    )
    sys.argv = ["layup_hf", *order["arguments"]]
    for fault in order["faults"].get(str(rank), []):
        globals()[fault]()
    main.run(check_seams, WORKING)


def work_all(order):
    ranks, folder = {}, Path(order["folder"])
    for rank in range(order["workers"]):
        pid = run_forked(lambda rank=rank: work(rank, order), folder / f"log-{rank}.txt")
        ranks[pid] = rank
        write(folder / f"pid-{rank}", str(pid))
    while ranks:
        pid, status = os.wait()
        write(folder / f"exit-{ranks.pop(pid)}", str(os.waitstatus_to_exitcode(status)))
        for other in ranks if status and order["ends_all"] else ():
            os.kill(other, signal.SIGTERM)


if __name__ == "__main__":
    print("ready", flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        run_forked(lambda: work_all(order), Path(order["folder"]) / "log-all.txt")  # noqa: B023
    os._exit(0)
