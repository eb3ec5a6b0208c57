"""How a job begins: its store, its secret, its first era."""

from __future__ import annotations

import contextlib
import hashlib
import os
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch.distributed import Store
from transformers.utils import logging

from ..fleet.group import Group
from ..fleet.launch import launches
from ..fleet.membership import Era, Membership
from ..fleet.network import TOKEN_VARIABLE, Network, job_token
from ..fleet.store import Job, connect_store, launcher_store, start_keeper
from ..progress.ahead import Ahead
from ..progress.clock import ProgressClock

logger = logging.get_logger(__name__)

LEASE_SECONDS = 15.0
"""Where workers are started by several launches and `lease_seconds` is unset."""


class Founding:
    """Finds or starts what all workers share, and begins the first era. To be mixed into a subclass of `Trainer`.

    One launcher ends all its workers when one of them ends. So leases are kept only where workers have been started by
    several launches, or if `lease_seconds` is set.
    """

    _membership: Membership | None = None
    _group: Group | None = None
    _planned: int | None = None
    _is_outside = False  # this worker is yet to join a running job
    _is_new = False  # this worker does not have the others' model yet
    _exchanging: tuple[str, ...] = ()  # the members that the ledger is of, in the order of their ranks in it

    @property
    def _workers(self) -> int:
        """How many workers the job was started with: the steps of so many make one `global_step`."""
        return self._planned or self.args.world_size

    def _plan_workers(self) -> Job | None:
        """Find out, at the beginning of training, whether it is to be joined; the job if so."""
        job = getattr(self.args, "job_to_join", None)
        self._planned = job.workers if job is not None else self.args.world_size
        self._is_outside = self._is_new = job is not None
        if job is not None and not getattr(self.args, "shared_batches", True):
            raise ValueError(
                "`shared_batches=False` and joining a running job exclude each other: the shards of the data have been "
                "given to the workers that were there. Leave `shared_batches` on."
            )
        return job

    def _start_fleet(self) -> Callable[[], Store]:
        """Find the store that all workers share, and begin the first era. Collective, but for who joins later."""
        if self._membership is not None:
            self._membership.leave()  # of an earlier training
            self._membership = None
        args = self.args
        job, lease = args.job_to_join if self._is_outside else None, getattr(args, "lease_seconds", None)
        if job is None and launches() > 1:
            job = self._found_job(lease or LEASE_SECONDS)
        if job is not None:
            connect, lease = job.connect, job.lease_seconds
        else:
            run = gather_object([uuid.uuid4().hex])[0]

            def connect() -> Store:
                return connect_store(run) if self._workers > 1 else torch.distributed.HashStore()

        self._token = self._agree_on_token(connect)
        self._job_name = hashlib.sha256(self._token + (job.run.encode() if job else b"")).digest()[:16]
        if lease is not None and self._workers > 1:
            self._membership = Membership(connect, lease, self._token, on_broken=self._break_group)
            self._store = connect()
            if not self._is_outside:
                roster = gather_object([self._membership.member])
                self._form_group(Era(1, tuple(roster)))
                self._exchanging, self._done_without = self._membership.era.roster, set[int]()
        return connect

    def _found_job(self, lease_seconds: float) -> Job:
        """Rank 0 starts the store and announces it. Collective: every worker returns, or every worker raises."""
        args, job, failure = self.args, None, None
        if args.process_index == 0:
            try:
                network = Network.find(getattr(args, "network_interface", None), os.environ["MASTER_ADDR"])
                place = start_keeper(network, lease_seconds)
                job = Job(*place, workers=args.world_size, run=uuid.uuid4().hex, lease_seconds=lease_seconds)
                with contextlib.suppress(ConnectionError):  # another launcher than torch's: one joins by `join`
                    launcher = launcher_store()
                    job.announce(launcher)
                logger.warning(f"LayUp: the store of this job is at {job.host}:{job.port} (`join` takes that).")
            except (OSError, ValueError, RuntimeError) as error:
                failure = f"{type(error).__name__}: {error}"
        answers = gather_object([(job, failure)])
        if answers[0][1] is not None:
            raise ConnectionError(f"Rank 0 could not start the store of the job. {answers[0][1]}")
        return answers[0][0]

    def _agree_on_token(self, connect: Callable[[], Store]) -> bytes:
        """The job's secret. Collective, but for who joins later.

        Raises:
            ValueError: Workers have different ones.
        """
        is_given, token = TOKEN_VARIABLE in os.environ, job_token()
        if self._workers == 1:
            return token
        if self._is_outside:
            return token if is_given else bytes.fromhex(connect().get("token").decode())
        proofs = gather_object([hashlib.sha256(token).hexdigest() if is_given else None])
        if len(set(proofs)) > 1:
            others = [rank for rank, proof in enumerate(proofs) if proof != proofs[0]]
            raise ValueError(
                f"Rank {', '.join(map(str, others))} has another {TOKEN_VARIABLE} than rank 0, or only one of them has "
                "any. Give all workers of a job the same secret."
            )
        if is_given:
            return token
        if self.args.process_index == 0:
            connect().set("token", token.hex())
        PartialState().wait_for_everyone()
        return bytes.fromhex(connect().get("token").decode())

    def _draw_ahead(self, clock: ProgressClock, connect: Callable[[], Store]) -> None:
        """Let the clock and the data be drawn from in the background, if the store is somewhere in a network."""
        if self._membership is None:
            return
        executor, store, check = ThreadPoolExecutor(1, "layup-ahead"), connect(), self._membership.check

        def make_ahead(ask: Callable[[], int]) -> Ahead[int]:
            return Ahead(ask, executor, while_waiting=check)

        clock.draw_ahead(store, make_ahead)
        if self._shared_loader is not None:
            self._shared_loader.cursor.draw_ahead(store, make_ahead)

    def _form_group(self, era: Era) -> None:
        self._membership.begin(era)
        args = self.args
        # The Trainer passes its time-out on with a device only; torch's own default is as long for gloo.
        timeout = timedelta(seconds=args.ddp_timeout if args.device.type != "cpu" else 1800)
        self._group = Group(self._store, era.number, self._membership.rank, len(era.roster), timeout)
        self._launched_as = PartialState().distributed_type

    def _break_group(self) -> None:
        if self._group is not None:
            self._group.abort()
