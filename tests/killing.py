"""Processes that are killed at each of the moments in which they change files."""

import itertools
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")


def killed_at(folder: Path, moment: int) -> Callable[[], None]:
    """Kill this process at the n-th time that something in `folder` is to be made, written, renamed or removed.

    Returns:
        Counts one more such time, of which Python knows nothing.
    """
    seen = 0

    def count() -> None:
        nonlocal seen
        seen += 1
        if seen == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(event: str, parameters: tuple) -> None:
        writes = event == "open" and isinstance(parameters[1], str) and set(parameters[1]) & set("wxa+")
        if (writes or event in CHANGES) and str(folder) in str(parameters[0]):
            count()

    sys.addaudithook(watch)
    return count


def killed_runs(tmp_path: Path, train: Callable[[Path, int], None], every: int) -> Iterator[tuple[Path, bool]]:
    """Folders of runs that have been killed at the first moment, `every` moments later, ..., and whether one has ended
    before its moment came: then it is the last one. Each is removed when the next is asked for.

    Args:
        tmp_path: Where.
        train: Called in a fork with a folder of its own and the moment, for `killed_at`.
        every: Moments from one to the next.
    """
    for moment in itertools.count(1, every):
        folder = tmp_path / str(moment)
        process = multiprocessing.get_context("fork").Process(target=train, args=(folder, moment))
        process.start()
        process.join(60)
        assert process.exitcode in (0, -signal.SIGKILL)
        yield folder, process.exitcode == 0
        if process.exitcode == 0:
            return
        shutil.rmtree(folder, ignore_errors=True)
