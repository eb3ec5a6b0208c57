"""What scripts that tests launch have in common: cases one after the other, results, and a count of collectives."""

import atexit
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object

collectives: Counter[str] = Counter()
"""Calls by name since the last `clear()`, once `count_collectives()` has been called."""


@atexit.register  # before there is a trainer, so it comes after whatever a trainer leaves for the end
def say_whether_the_group_is_left() -> None:
    threads = []
    for thread in os.listdir("/proc/self/task"):
        with suppress(FileNotFoundError, ProcessLookupError):  # it has ended since
            threads.append(Path(f"/proc/self/task/{thread}/comm").read_text())
    is_left = torch.distributed.is_initialized() or any("gloo" in name for name in threads)
    print(f"the process group is {'left' if is_left else 'destroyed'} at exit", flush=True)


def count_collectives() -> None:
    for name in ("all_reduce", "all_gather", "all_gather_object", "all_gather_into_tensor", "broadcast", "barrier"):
        original = getattr(torch.distributed, name)

        def counted(*args, _name=name, _original=original, **kwargs):
            collectives[_name] += 1
            return _original(*args, **kwargs)

        setattr(torch.distributed, name, counted)


def same_everywhere(tensor: torch.Tensor) -> bool:
    """Whether all workers have the same. Collective."""
    tensor = tensor.cpu()
    return all(torch.equal(other, tensor) for other in gather_object([tensor]))


def write_result(rank: int, result: Any) -> None:
    """Where `Run.results()` finds it."""
    Path(os.environ["LAYUP_TEST_RESULTS"], f"result-{rank}.json").write_text(json.dumps(result))


def run_cases(run_case: Callable[[list[str]], dict[str, Any]]) -> None:
    """Run the cases of the command line, with `--then` between their options, and end as a worker should."""
    cases: list[list[str]] = [[]]
    for argument in sys.argv[1:]:
        if argument == "--then":
            cases.append([])
        else:
            cases[-1].append(argument)
    results = [run_case(options) for options in cases]
    write_result(results[0]["rank"], results)
    leave()


def leave() -> None:
    """End the process group, if there is one, a moment after the last collective.

    DDP, where a case trains by that, waits with the interpreter's lock for gloo's threads, which need it to let go of
    what the collective used.
    """
    if torch.distributed.is_initialized():
        time.sleep(0.2)
        torch.distributed.destroy_process_group()
