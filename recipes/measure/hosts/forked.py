"""In a host: the process that a `Forker` gives its orders to, and the parents of the workers that it forks.

Each worker gets a parent of its own, in the place of its launcher: that gives it the environment which `accelerate
launch` gives, keeps the store if it is rank 0's, and ends as torch's launcher does, at once with an error if the worker
has failed. A worker is a whole process with a session of its own and ends as any Python does. What a worker needs is
imported here, also what it would import only on its way.
"""

import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import nixl._api  # noqa: F401
from torch.distributed import TCPStore

import layup_hf.windows.nixl  # noqa: F401

from .forker import WORKER_NAME
from .worker import main as work

OTHERS_SECONDS = 2  # rank 0's parent keeps the store so long after its worker has ended well


def serve() -> list[str] | None:
    """Follow orders until there are no more; in a forked worker, returns its arguments."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        order = json.loads(line)
        if order["do"] == "start":
            answer = pid = os.fork()
            if pid == 0:
                return launch(order)
        else:
            pid, status = os.waitpid(order["pid"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        print(json.dumps(answer), file=answers, flush=True)
    return None


def launch(order: dict[str, Any]) -> list[str]:
    """Be the launcher of a worker that is forked here. Returns in the worker, with its arguments, alone."""
    os.setsid()
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream, target in ((0, os.open(os.devnull, os.O_RDONLY)), (1, log), (2, log)):
        os.dup2(target, stream)
    os.environ.update(order["environment"])
    worker = os.fork()
    if worker == 0:
        os.setsid()
        Path("/proc/self/comm").write_text(WORKER_NAME)
        return order["arguments"]
    code = 1
    try:
        store = None
        if os.environ["RANK"] == "0":
            address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            store = TCPStore(address, port, is_master=True, wait_for_workers=False)
        code = os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1])
        if store is not None and code == 0:
            time.sleep(OTHERS_SECONDS)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1 if code < 0 else code)


if __name__ == "__main__":
    arguments = serve()
    if arguments is not None:
        sys.argv[1:] = arguments
        work()
