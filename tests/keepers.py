"""Processes that keep the store of a job."""

from contextlib import suppress

import psutil

from layup_hf.fleet.job import Job, start_keeper

TOKEN = b"secret of the job".ljust(32)


class Keeper:
    """A keeper that this process has started."""

    def __init__(self, token=TOKEN, **options):
        before = set(psutil.Process().children())
        self.place = start_keeper("127.0.0.1", token, **{"is_open": False, **options})
        (self.process,) = set(psutil.Process().children()) - before
        self.job = Job(*self.place, workers=2, run="run", lease_seconds=15.0)

    def connect(self):
        return self.job.connect(TOKEN)

    def close(self):
        with suppress(psutil.NoSuchProcess):
            self.process.kill()
            self.process.wait(60)
