"""Who trains together: the job's store, its secret, this worker's place in it, the process group."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import torch
from accelerate import DistributedType, PartialState
from accelerate.utils import gather_object
from torch.distributed import Store

from ..fleet.group import Group
from ..fleet.launch import launches
from ..fleet.membership import Era, Membership
from ..fleet.network import TOKEN_VARIABLE, Network, job_token
from ..fleet.store import GroupStore, Job, launcher_store, start_keeper
from ..progress.ahead import Ahead
from ..windows import opening
from .host import Host
from .state import RunState

logger = logging.getLogger(__name__)

LEASE_SECONDS = 15.0
"""Where workers are started by several launches and `lease_seconds` is unset."""


class Members:
    """Finds or starts what all workers share, and begins the first era.

    One launcher ends all its workers when one of them ends. So leases are kept only where workers have been started by
    several launches, or if `lease_seconds` is set.

    Attributes:
        membership: This worker's lease, and its view of the others; None without leases.
        store: A connection of the training thread's own to the store of the job; with leases.
        token: The job's secret.
        job_name: 16 bytes that tell this job from others.
        launched_as: What accelerate calls workers of this kind.
    """

    token: bytes
    job_name: bytes
    store: Store

    def __init__(self, host: Host, state: RunState) -> None:
        self._host, self._state = host, state
        self._planned: int | None = None
        self._group: Group | None = None
        self._group_store: GroupStore | None = None
        self.membership: Membership | None = None
        self.launched_as = DistributedType.NO

    @property
    def workers(self) -> int:
        """How many workers the job was started with: the steps of so many make one `global_step`."""
        return self._planned or self._host.world_size

    @property
    def era(self) -> int:
        """Number of the present era; 0 without leases."""
        era = self.membership.era if self.membership is not None else None
        return era.number if era is not None else 0

    @property
    def present_membership(self) -> Membership:
        """This worker's; not to be asked without leases."""
        assert self.membership is not None
        return self.membership

    def may_exchange(self) -> bool:
        """Whether this worker's lease holds, if there are leases."""
        return self.membership is None or self.membership.is_current()

    def _job_to_join(self) -> Job | None:
        return getattr(self._host.args, "job_to_join", None)  # from `prepare_launch`

    def plan(self) -> Job | None:
        """Find out, at the beginning of training, whether it is to be joined; the job if so.

        Raises:
            ValueError: It cannot be, as workers keep to their shards.
        """
        host, job = self._host, self._job_to_join()
        self._planned = job.workers if job is not None else host.world_size
        self._state.is_outside = self._state.is_new = job is not None
        if job is not None and not host.options.shared_batches:
            raise ValueError(
                "`shared_batches=False` and joining a running job exclude each other: the shards of the data have been "
                "given to the workers that were there. Leave `shared_batches` on."
            )
        return job

    def start(self) -> Callable[[], Store]:
        """Find the store that all workers share, and begin the first era. Collective, but for who joins later.

        Returns:
            Makes a connection to the store.
        """
        self.launched_as = PartialState().distributed_type
        if self.membership is not None:
            self.membership.leave()  # of an earlier training
            self.membership = None
        job, lease = self._find_job()
        if job is not None:
            connect, lease = job.connect, job.lease_seconds
        else:
            connect = self._connecting_to_group()

        self.token = self._agree_on_token(connect)
        self.job_name = hashlib.sha256(self.token + (job.run.encode() if job else b"")).digest()[:16]
        if lease is not None and self.workers > 1:
            self.membership = Membership(connect, lease, self.token, on_broken=self._break_group)
            self.store = connect()
            if not self._state.is_outside:
                roster = gather_object([self.membership.member])
                self.form_group(Era(1, tuple(roster)))
        return connect

    def _connecting_to_group(self) -> Callable[[], Store]:
        """What makes connections to the store of the process group. Collective."""
        if self.workers == 1:
            return torch.distributed.HashStore
        run = gather_object([uuid.uuid4().hex])[0]
        self._group_store = GroupStore(self._host.rank, lambda item: gather_object([item]), opening.host())
        return functools.partial(self._group_store.connect, run)

    def _find_job(self) -> tuple[Job | None, float | None]:
        """The job of several launches, and how long a lease holds if one is wanted."""
        lease = self._host.options.lease_seconds
        job = self._job_to_join() if self._state.is_outside else None
        if job is None and launches() > 1:
            job = self._found_job(lease or LEASE_SECONDS)
        return job, lease

    def _found_job(self, lease_seconds: float) -> Job:
        """Rank 0 starts the store and announces it. Collective: every worker returns, or every worker raises."""
        host, job, failure = self._host, None, None
        if host.rank == 0:
            try:
                network = Network.find(host.options.network_interface, os.environ["MASTER_ADDR"])
                place = start_keeper(network, lease_seconds)
                job = Job(*place, workers=host.world_size, run=uuid.uuid4().hex, lease_seconds=lease_seconds)
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
        if self.workers == 1:
            return token
        if self._state.is_outside:
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
        if self._host.rank == 0:
            connect().set("token", token.hex())
        PartialState().wait_for_everyone()
        return bytes.fromhex(connect().get("token").decode())

    def epoch_of_others(self) -> int:
        """For a worker that joins: the epoch that rank 0 is in."""
        job = self._job_to_join()
        assert job is not None
        return int(job.connect().get("epoch"))

    def drawing_ahead(self, connect: Callable[[], Store]) -> tuple[Store, Callable[[Callable[[], int]], Ahead[int]]]:
        """What it takes to draw numbers from the store in the background: a connection, and what asks over it.

        For a store that is somewhere in a network: with leases.
        """
        executor, check = ThreadPoolExecutor(1, "layup-ahead"), self.present_membership.check

        def make_ahead(ask: Callable[[], int]) -> Ahead[int]:
            return Ahead(ask, executor, while_waiting=check)

        return connect(), make_ahead

    def form_group(self, era: Era) -> None:
        """Be in this era, and form its process group. Collective over its members."""
        membership, args = self.present_membership, self._host.args
        membership.begin(era)
        # The Trainer passes its time-out on with a device only; torch's own default is as long for gloo.
        timeout = timedelta(seconds=args.ddp_timeout if args.device.type != "cpu" else 1800)
        self._group = Group(self.store, era.number, membership.rank, len(era.roster), timeout)
        self.launched_as = PartialState().distributed_type

    def _break_group(self) -> None:
        if self._group is not None:
            self._group.abort()
