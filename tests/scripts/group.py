"""Forms a group, whose last worker is stopped, ends a collective that waits for it, and forms one of those left.

One of these comes late, and strangers are where it is waited for.
"""

import json
import os
import signal
import sys
import threading
import time
from datetime import timedelta

import psutil
import torch
from accelerate import Accelerator, PartialState
from torch.distributed import HashStore
from worker import write_result

from layup_hf.fleet.group import Group, end_group_at_exit, is_of_group
from layup_hf.fleet.store import JobStore

TOKEN = bytes(32)

end_group_at_exit()
rank, workers, port = (int(argument) for argument in sys.argv[1:])
store = JobStore("127.0.0.1", port, TOKEN)
torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
accelerator = Accelerator(cpu=True)  # alone at first, as of a worker that joins
result = {"alone": [accelerator.num_processes, accelerator.distributed_type.value]}


def form(era, workers):
    """A group, and what torch, accelerate and with it a Trainer see."""
    began = time.monotonic()
    group = Group(store, era, rank, workers, timedelta(seconds=120), token=TOKEN, run=b"run")
    result[f"era {era}"] = {
        "seconds": time.monotonic() - began,
        "torch": [torch.distributed.get_rank(), torch.distributed.get_world_size()],
        "accelerate": [PartialState().process_index, PartialState().num_processes],
        "accelerator": [accelerator.process_index, accelerator.num_processes, accelerator.is_main_process],
        "kind": accelerator.distributed_type.value,
        "gathered": group.talk.gather(rank),
    }
    return group


group = form(1, workers)
if rank == workers - 1:
    store.set("stopped", str(os.getpid()))
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(600)
while psutil.Process(int(store.get("stopped"))).status() != psutil.STATUS_STOPPED:
    time.sleep(0.01)

threading.Timer(1.0, group.abort).start()
began = time.monotonic()
try:
    group.talk.gather(rank)
except RuntimeError as error:
    result["aborted"] = {"seconds": time.monotonic() - began, "error": str(error), "is_of_group": is_of_group(error)}
group.abort()  # once more
result["store_answers"] = store.add("answers", 1) > 0  # its connection is none of the group's
if rank == 0:
    store.set("forms", str(os.getpid()))
else:  # it comes late: others are there before it
    store.set("sends_from/2/1", json.dumps(["127.0.0.1"]))
    store.wait(["strangers have tried"], timedelta(seconds=60))
form(2, workers - 1)
torch.distributed.barrier()
write_result(rank, result)
