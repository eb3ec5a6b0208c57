"""Members of a job in one process, on a real store, each of which can be frozen."""

import atexit
import threading
import time

from fleet import together
from keepers import TOKEN, Keeper

from layup_hf.fleet.membership import Era, Membership
from layup_hf.fleet.store import WORKERS, JobStore

LEASE = 2.0  # seconds; a busy machine may keep a thread waiting for one


class Worker:
    """A member whose threads can be frozen: all that it asks of the store, or says to it, then waits."""

    def __init__(self, place):
        self._place = place
        self._runs = threading.Event()
        self._runs.set()
        self.breaks = 0
        self.membership = Membership(self._connect, LEASE, on_broken=self._note)

    def _connect(self):
        return Freezing(JobStore(*self._place, TOKEN), self._runs)

    def _note(self):
        self.breaks += 1

    def freeze(self):
        self._runs.clear()

    def go_on(self):
        self._runs.set()

    def close(self):
        self.go_on()
        self.membership.leave()
        atexit.unregister(self.membership.leave)
        atexit.unregister(self.membership._count_out)


class Freezing:
    """A connection to a store that lets nothing through while its worker is frozen."""

    def __init__(self, store, runs):
        self._store, self._runs = store, runs

    def __getattr__(self, name):
        def call(*arguments):
            self._runs.wait()
            return getattr(self._store, name)(*arguments)

        return call


class Job:
    """A store and the workers at it."""

    def __init__(self):
        started = Keeper()
        self.place, self.keeper = started.place, started.process
        self.store = JobStore(*self.place, TOKEN)
        self.workers = []

    def add(self):
        self.workers.append(Worker(self.place))
        return self.workers[-1]

    def begin(self, count):
        """Members of a first era."""
        workers = [self.add() for _ in range(count)]
        roster = tuple(worker.membership.member for worker in workers)
        for worker in workers:
            worker.membership.begin(Era(1, roster))
        return [worker.membership for worker in workers]

    def state(self, member):
        return self.store.get(f"state/{member}").decode()

    def count(self):
        """Workers that are there."""
        return self.store.add(WORKERS, 0)

    def requests(self):
        return self.store.add("requests", 0)


def assemble(members):
    """The next era, as each of them sees it; they come one after the other."""

    def come(member, delay):
        time.sleep(delay)
        era = member.assemble()
        member.begin(era)
        return era

    return together([lambda m=member, d=0.05 * k: come(m, d) for k, member in enumerate(members)])


def apply(worker):
    """Ask to join, in the background; gives a list that will hold the outcome."""
    outcome = []

    def ask():
        try:
            outcome.append(worker.membership.apply())
        except Exception as error:
            outcome.append(error)

    threading.Thread(target=ask, daemon=True).start()
    return outcome
