"""Who takes part: leases, and agreement on who is there."""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch.distributed import Store

from .joining import Requests, answer, answer_to, ask_to_join
from .leases import Leases, now
from .store import WORKERS

logger = logging.getLogger(__name__)

_ALIVE, _FENCED, _AFTER, ENDED = "alive", "fenced", " after ", "has ended"
_RENEWALS = 6  # of a lease before it runs out
_POLL = 0.01  # seconds between two looks at who has come
_SILENCE = 4  # leases that the store may take for an answer, at least _LEAST_SILENCE
_LEAST_SILENCE = 60.0


STORE_LOST = (
    "The store of the job does not answer any more: has the machine of rank 0 gone, or the network? Start again, and "
    "resume from the last checkpoint."
)


class Fenced(RuntimeError):
    """The others have done without this worker since its lease ran out: it must come back as a new member."""


class StoreLost(ConnectionError):
    """The store of the job does not answer any more."""


class Era(NamedTuple):
    """A time in which the same members exchange blocks.

    Attributes:
        number: Counts from 1.
        roster: Its members, in the order of their ranks.
        joined: Those of them that were not there in the era before.
    """

    number: int
    roster: tuple[str, ...]
    joined: tuple[str, ...] = ()

    @classmethod
    def of(cls, read: Any) -> Era:
        """Of what was read; anything but an era is a `TypeError` or `ValueError`."""
        number, roster, joined = read
        lists = type(roster) is list and type(joined) is list
        if type(number) is not int or not lists or not all(type(name) is str for name in (*roster, *joined)):
            raise TypeError("This is no era.")
        return cls(number, tuple(roster), tuple(joined))


class Membership:
    """One worker's place in a job, and its view of the others.

    Every member renews a lease in the store, from a thread of its own. A member whose lease is not renewed is *fenced*
    by whoever sees it first, in the store, once and for all: it may come back, but only as a new member. So all agree
    on who is there, and a worker that was frozen finds out that it is not.

    Members that exchange blocks form an era. Who is fenced or leaves is missing from there on; a new era begins when
    all that are left have come together (`assemble`), and takes in who has asked to join.

    Args:
        connect: Makes a connection to the store of the job.
        lease_seconds: How long a lease holds.
        on_broken: Called from the thread when the collectives of this era cannot end any more.
        adapts: Whether leases hold longer for those that are late: see `Leases`.

    Attributes:
        member: This worker's name; a new one after it has been fenced.
        era: The era that this worker is in; None before the first.
        gone: Ranks of this era that have been fenced or have left.
        is_broken: Whether a member waits for all others to form a new era.
        is_fenced: Whether the others do without this worker.
        applicants: Workers that have asked to join, and wait.
    """

    def __init__(
        self,
        connect: Callable[[], Store],
        lease_seconds: float,
        on_broken: Callable[[], None],
        *,
        adapts: bool = False,
    ) -> None:
        self.lease_seconds = lease_seconds
        self._leases = Leases(lease_seconds, adapts)
        self._store, self._control = connect(), connect()
        self._on_broken = on_broken
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._renewed = now()
        self._failure: Exception | None = None
        self._silent_since: float | None = None
        self.applicants: list[str] = []
        self._requests = Requests()
        self._is_counted = False  # among those that are there and will end
        self._register()
        atexit.register(self._count_out)
        atexit.register(self.leave)  # comes first
        self._thread = threading.Thread(target=self._mind, name="layup-lease", daemon=True)
        self._thread.start()

    def _register(self) -> None:
        member = str(self._store.add("members", 1))
        self._store.set(f"beat/{member}", "0")
        self._store.set(f"state/{member}", _ALIVE)
        self._store.add(WORKERS, 1)
        with self._lock:
            self.member = member
            self.era: Era | None = None
            self._forget()

    def _forget(self) -> None:
        self.gone: set[int] = set()
        self.is_broken = self.is_fenced = self._cannot_end = self._has_told = False
        self._leases.forget()

    # ---- Forming eras ----

    def begin(self, era: Era) -> None:
        """Be in this era from here on."""
        with self._lock:
            self.era = era
            self.applicants = [member for member in self.applicants if member not in era.roster]
            self._forget()

    @property
    def present_era(self) -> Era:
        """The era that this worker is in; not to be asked before the first."""
        era = self.era
        assert era is not None
        return era

    @property
    def rank(self) -> int:
        """This worker's rank in the era."""
        return self.present_era.roster.index(self.member)

    @property
    def leads(self) -> bool:
        """Whether this worker is the first of those that are left: it sees to those who have asked to join."""
        return all(rank in self.gone for rank in range(self.rank))

    def present(self) -> list[str]:
        """The members of this era that are left."""
        gone = self.gone
        return [member for rank, member in enumerate(self.present_era.roster) if rank not in gone]

    def assemble(self, admits: bool = True) -> Era:
        """Wait until all members of this era that are left have come, and agree on the next one. Collective.

        Args:
            admits: Take in who has asked to join.

        Raises:
            Fenced: The others go on without this worker.
            StoreLost: The store does not answer.
        """
        present, store = self.present_era, self._store
        number = present.number + 1
        store.set(f"broken/{present.number}", "")
        store.set(f"come/{number}/{self.member}", "")
        while (era := self._read_era(number)) is None:
            self.check()
            alive = self._alive(present.roster)
            if self.member not in alive:
                raise Fenced
            if alive[0] == self.member and store.check([f"come/{number}/{member}" for member in alive]):
                joined = self._alive(list(self.applicants)) if admits else []
                text = json.dumps(Era(number, (*alive, *joined), tuple(joined)))
                store.compare_set(f"roster/{number}", "", text)
                continue
            time.sleep(_POLL)
        if self.member not in era.roster:
            raise Fenced
        for member in era.joined:
            answer(store, member, number)
        return era

    def apply(self) -> Era:
        """Ask to be taken into the next era, and wait for it, as a member that is in none.

        Raises:
            ConnectionError: The job has ended meanwhile.
        """
        if not self._alive([self.member]):
            self._register()
        store, member = self._store, self.member
        ask_to_join(store, member)
        while (number := answer_to(store, member)) is None or (era := self._read_era(number)) is None:
            self.check()
            if not self._alive([member]):
                return self.apply()  # it was frozen meanwhile
            if store.add(WORKERS, 0) <= 1:
                raise ConnectionError("The job has ended before this worker could join it.")
            time.sleep(_POLL)
        return era

    def _alive(self, members: Sequence[str]) -> list[str]:
        states = _values(self._store, [f"state/{member}" for member in members])
        return [member for member, state in zip(members, states, strict=True) if _text(state) == _ALIVE]

    def _read_era(self, number: int) -> Era | None:
        """What has been agreed on, if anything has: what is no era is removed."""
        key = f"roster/{number}"
        if not self._store.check([key]):
            return None
        with contextlib.suppress(ValueError, TypeError, RecursionError):
            return Era.of(json.loads(self._store.get(key)))
        self._store.delete_key(key)
        return None

    # ---- The others ----

    def is_current(self) -> bool:
        """Whether this worker's lease holds, as far as it can know without asking: at once false after a freeze."""
        return now() - self._renewed < self.lease_seconds and not self.is_fenced

    def check(self) -> None:
        """Make sure that the store answers.

        Raises:
            StoreLost: It does not, or not for long.
        """
        limit = max(_LEAST_SILENCE, _SILENCE * self.lease_seconds)
        if now() - self._renewed <= limit:
            self._silent_since = None
        elif self._silent_since is None:
            self._silent_since = now()  # perhaps it was this worker that was away
        is_silent = self._silent_since is not None and now() - self._silent_since > limit / 2
        if self._failure is not None or is_silent:
            raise StoreLost(f"{STORE_LOST} ({self._failure or f'silent for {limit:.0f} s'})")

    def reason_of(self, rank: int) -> str:
        """Why a member is gone."""
        (value,) = _values(self._store, [f"state/{self.present_era.roster[rank]}"])
        state = _text(value)
        if state.startswith(_FENCED):
            return f"has given no sign of life for {state.partition(_AFTER)[2] or f'{self.lease_seconds:g} s'}"
        return state

    def leave(self, reason: str = ENDED) -> None:
        """Say goodbye, with the reason. Idempotent; never raises.

        The store stays until this process ends, as collectives may need it.
        """
        if self._stop.is_set():
            return
        self._stop.set()
        self._thread.join(self.lease_seconds)
        try:
            if _text(self._store.compare_set(f"state/{self.member}", _ALIVE, reason)) == reason:
                self._is_counted = True
        except RuntimeError as error:
            logger.info(f"The store of the job has gone before this worker: {error}")

    def _count_out(self) -> None:
        if self._is_counted:
            with contextlib.suppress(RuntimeError):
                self._store.add(WORKERS, -1)

    # ---- The thread ----

    def _mind(self) -> None:
        """Renew the lease and look after the others', until `leave`."""
        beat = 0
        while not self._stop.wait(self.lease_seconds / _RENEWALS):
            beat += 1
            try:
                self._look(beat)
            except RuntimeError as error:
                self._failure = error
                self._on_broken()
                return
            except Exception:  # whatever it is: without this thread the others would do without this worker
                logger.exception("LayUp: a look at the other workers has failed. It is tried again.")

    def _look(self, beat: int) -> None:
        began, store = now(), self._control
        with self._lock:
            era, member = self.era, self.member
        store.set(f"beat/{member}", str(beat))
        self.applicants = [*self.applicants, *self._requests.new(store)]
        roster = era.roster if era is not None else (member,)
        watched = (*roster, *(other for other in self.applicants if other not in roster))
        values = _values(store, [f"{key}/{other}" for key in ("beat", "state") for other in watched])
        beats, states = values[: len(watched)], [_text(state) for state in values[len(watched) :]]
        is_broken = era is not None and store.check([f"broken/{era.number}"])
        with self._lock:
            if (member, era) != (self.member, self.era):
                return  # what has been read is of the past
            was_away, self._renewed = now() - self._renewed > self.lease_seconds / 2, began
            self.is_broken |= is_broken
            self.is_fenced |= states[roster.index(member)].startswith(_FENCED)
            for other, its_beat, state in zip(watched, beats, states, strict=True):
                if other != member and self._has_gone(other, its_beat, state, was_away):
                    if other in roster:
                        self.gone.add(roster.index(other))
                        self._cannot_end |= state != ENDED  # who has ended has first done its part in all collectives
                    else:
                        self.applicants = [one for one in self.applicants if one != other]
            self.applicants = [other for other in self.applicants if other not in roster]
            cannot_end = self.is_broken or self.is_fenced or self._cannot_end
            tells, self._has_told = cannot_end and not self._has_told, self._has_told or cannot_end
        if tells:
            self._on_broken()

    def _has_gone(self, other: str, beat: bytes, state: str, was_away: bool) -> bool:
        """Whether another worker is no longer there; one whose lease has run out is fenced."""
        if state != _ALIVE:
            return True
        era = self.era
        who = f"rank {era.roster.index(other)}" if era is not None and other in era.roster else f"worker {other}"
        if not self._leases.has_run_out(other, beat, was_away, who):
            return False
        mine = f"{_FENCED} by {self.member}{_AFTER}{self._leases.patience(other):.3g} s"
        if _text(self._control.compare_set(f"state/{other}", _ALIVE, mine)) == mine:
            self._control.add(WORKERS, -1)
        return True


def _values(store: Store, keys: Sequence[str]) -> list[bytes]:
    """What the store has for these keys, nothing where it has none: a key that is missing is not waited for."""
    if not keys or store.check(list(keys)):
        return list(store.multi_get(list(keys))) if keys else []
    return [store.get(key) if store.check([key]) else b"" for key in keys]


def _text(value: bytes) -> str:
    return value.decode(errors="replace")
