"""Workers that do nothing but exchange blocks and look at what comes. Each line of input starts some.

A line is a JSON list: number of workers, port of a store, folder, wire_dtype. The imports, which take long, are done
once; then each worker is a fork. It leaves its process number in `pid-RANK` and its exit code in `exit-RANK`.

Its block `b` is filled with `100 * rank + b`, so it is seen at once if something else has got into what is read. Every
0.05 s it writes what it has seen into `status-RANK.json`. It does without the peers that the file `exclude` names, and
ends when there is a file `stop`.
"""

import collections
import faulthandler
import json
import os
import pickle
import sys
import time
from pathlib import Path

import psutil
import torch
from torch import nn
from torch.distributed import TCPStore

from layup_hf.blocks import split_into_blocks
from layup_hf.windows import nixl, open_windows

nixl.BUDGET = None  # these workers do nothing else: it would only make them slow


def write(file, text):
    temporary = file.with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, file)


def gather_through(store, rank, world_size):
    calls = 0

    def gather(item):
        nonlocal calls
        calls += 1
        store.set(f"{calls}/{rank}", pickle.dumps(item))
        return [pickle.loads(store.get(f"{calls}/{other}")) for other in range(world_size)]

    return gather


def exchange(rank, world_size, port, folder, wire_dtype):
    torch.set_num_threads(1)
    gather = gather_through(TCPStore("127.0.0.1", port, is_master=False), rank, world_size)
    blocks = split_into_blocks(nn.Sequential(*(nn.Linear(512, 512) for _ in range(4))))
    with torch.no_grad():
        for block in blocks:
            for tensor in block.tensors:
                tensor.fill_(100 * rank + block.index)
    windows = open_windows("nixl", blocks, rank, gather, token=b"secret", job=b"job", wire_dtype=wire_dtype)
    ledger = windows.ledger
    reads, wrong, written, excluded = collections.Counter(), 0, 0.0, set()
    while not (folder / "stop").exists():
        time.sleep(0.001)
        for block in blocks:
            index = block.index
            for peer, units in ledger.pending(index):
                if (tensors := windows.read(peer, index)) is None:
                    continue
                wrong += not all(bool((tensor == 100 * peer + index).all()) for tensor in tensors)
                ledger.take(index, peer, units)
                windows.release(peer, index)
                reads[peer] += 1
            for peer in ledger.eligible(index):
                ledger.offer(index, peer, 1000)
        if (folder / "exclude").exists():
            for peer in set(json.loads((folder / "exclude").read_text())) - excluded - {rank}:
                ledger.exclude(peer)
                windows.exclude(peer)
                excluded.add(peer)
        if time.monotonic() > written + 0.05:
            written = time.monotonic()
            status = {"reads": reads, "wrong": wrong, "staging": windows.staging.num_bytes}
            status["figures"], status["clock"] = windows.figures(), written
            status["courier"] = time.clock_gettime(time.pthread_getcpuclockid(windows.courier._thread.ident))
            status["process"] = sum(psutil.Process().cpu_times()[:2])
            write(folder / f"status-{rank}.json", json.dumps(status))
    windows.close()


def run_forked(action, log):
    """Run `action` in a new process, with its output in `log`. Returns the number of the process."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for standard in (1, 2):
            os.dup2(descriptor, standard)
        faulthandler.enable()  # a crash in NIXL says where
        action()
        code = 0
    finally:
        if code:
            sys.excepthook(*sys.exc_info())
        os._exit(code)


def run_workers(world_size, port, folder, wire_dtype):
    ranks = {}
    for rank in range(world_size):
        pid = run_forked(
            lambda rank=rank: exchange(rank, world_size, port, folder, wire_dtype), folder / f"log-{rank}.txt"
        )
        ranks[pid] = rank
        write(folder / f"pid-{rank}", str(pid))
    while ranks:
        pid, status = os.wait()
        write(folder / f"exit-{ranks.pop(pid)}", str(os.waitstatus_to_exitcode(status)))


if __name__ == "__main__":
    print("ready", flush=True)
    for line in sys.stdin:
        world_size, port, folder, wire_dtype = json.loads(line)
        run_forked(
            lambda: run_workers(world_size, port, Path(folder), wire_dtype),  # noqa: B023
            Path(folder) / "log-all.txt",
        )
    os._exit(0)  # it has done nothing itself: to take apart what it has imported may take long on a busy machine
