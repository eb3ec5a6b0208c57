"""Two workers, each with a monotonic clock of its own, read each other's; then both record one moment.

RANK=... python clocks.py FOLDER
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from worker import write_result

from layup_hf.fleet.talk import Talk
from layup_hf.trace.clocks import now
from layup_hf.trace.events import STEP
from layup_hf.trainer.tracing import Tracing


class NoAccelerator:
    def backward(self):
        raise NotImplementedError


torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
talk = Talk(bytes(32), b"group", torch.distributed.group.WORLD)
options = SimpleNamespace(trace=str(Path(sys.argv[1], "trace.json")))
tracing = Tracing(SimpleNamespace(options=options, accelerator=NoAccelerator(), rank=rank, world_size=2))
tracing.start()
tracing.require_all(talk)
talk.wait()
start = now()
talk.wait()  # there is a moment in which both are here
tracing.track.add(STEP, start)
clock = tracing.trace.clock
tracing.finish(talk)
write_result(rank, {"now": now(), "clock": clock.told(), "is recording": tracing.trace is not None})
torch.distributed.destroy_process_group()
