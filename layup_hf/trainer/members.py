"""Who trains together: the job's store, its secret, this worker's place in it, the process group."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import secrets
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import torch
from accelerate import DistributedType, PartialState
from torch.distributed import Store

from ..fleet.data import travels
from ..fleet.group import Group, speaking_group
from ..fleet.job import Job, launcher_store, start_keeper
from ..fleet.membership import Era, Membership
from ..fleet.network import Network
from ..fleet.secret import TOKEN_VARIABLE, draw_token, given_token
from ..fleet.started import launches
from ..fleet.store import JobStore
from ..fleet.talk import Talk
from ..progress.ahead import Ahead
from ..windows import opening
from .host import Host
from .state import RunState

logger = logging.getLogger(__name__)

travels(Job)

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
    store: JobStore

    def __init__(self, host: Host, state: RunState) -> None:
        self._host, self._state = host, state
        self._planned: int | None = None
        self._group: Group | None = None
        self._talk: Talk | None = None
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
        if job is None:
            return None
        self._talk = None  # with this one's former peers
        if not host.options.shared_batches:
            raise ValueError(
                "`shared_batches=False` and joining a running job exclude each other: the shards of the data have been "
                "given to the workers that were there. Leave `shared_batches` on."
            )
        return job

    @property
    def talk(self) -> Talk:
        """With the present workers. Collective when it is asked for at first."""
        if self._talk is None and self._state.is_outside:
            return Talk(b"", b"", None)
        if self._talk is None:
            group = speaking_group(self._timeout)
            self.token, name = self._agree_on_token(Talk(b"", b"", group))
            self._talk = Talk(self.token, name, group)
            self._talk.prove()
        return self._talk

    def start(self) -> Callable[[], Store]:
        """Find the store that all workers share, and begin the first era. Collective, but for who joins later.

        Returns:
            Makes a connection to the store.
        """
        self.launched_as = PartialState().distributed_type
        if self.membership is not None:
            self.membership.leave()  # of an earlier training
            self.membership = None
        if self.workers == 1:
            self.token = draw_token()
            self.job_name = hashlib.sha256(self.token).digest()[:16]
            return torch.distributed.HashStore
        job, lease = self._find_job()
        self.token = token = job.connect().token if self._state.is_outside else self.token
        connect = functools.partial(job.connect, token)
        self.job_name = hashlib.sha256(self.token + job.run.encode()).digest()[:16]
        if lease is not None:
            self.membership = Membership(connect, lease, on_broken=self._break_group, adapts=job.adapts)
            self.store = connect()
            if not self._state.is_outside:
                roster = self.talk.gather(self.membership.member)
                self.form_group(Era(1, tuple(roster)))
        return connect

    def _find_job(self) -> tuple[Job, float | None]:
        """The job, and how long a lease holds if leases are wanted. Collective, but for who joins later."""
        lease = self._host.options.lease_seconds
        if self._state.is_outside:
            job = self._job_to_join()
            assert job is not None
            return job, job.lease_seconds
        if launches() > 1:
            lease = lease or LEASE_SECONDS
        return self._found_job(lease), lease

    def _found_job(self, lease_seconds: float | None) -> Job:
        """Rank 0 starts the store and announces it. Collective: every worker returns, or every worker raises."""
        host, talk, job, failure = self._host, self.talk, None, None
        machines = talk.gather(opening.host())
        if host.rank == 0:
            try:
                address = self._address() if len(set(machines)) > 1 or launches() > 1 else "127.0.0.1"
                place = start_keeper(address, self.token, is_open=given_token() is None)
                job = Job(
                    *place,
                    workers=host.world_size,
                    run=uuid.uuid4().hex,
                    lease_seconds=lease_seconds or LEASE_SECONDS,
                    adapts=host.options.lease_seconds is None,
                )
                launcher = None
                if launches() > 1:
                    with contextlib.suppress(ConnectionError):  # another launcher than torch's: one joins by `join`
                        launcher = launcher_store()
                job.announce(self.token, launcher)
                if lease_seconds is not None:
                    logger.warning(f"LayUp: the store of this job is at {job.host}:{job.port} (`join` takes that).")
            except (OSError, ValueError, RuntimeError) as error:
                failure = f"{type(error).__name__}: {error}"
        answers = talk.gather((job, failure))
        if answers[0][1] is not None:
            raise ConnectionError(f"Rank 0 could not start the store of the job. {answers[0][1]}")
        assert answers[0][0] is not None
        return answers[0][0]

    def _address(self) -> str:
        """At which workers on other machines reach this one."""
        interface, towards = self._host.options.network_interface, os.environ.get("MASTER_ADDR", "")
        if interface is None and not towards:
            raise ValueError(
                "The process group has been made without MASTER_ADDR, through a file say, and its workers are on "
                "several machines. Name the network between them with `network_interface`, or start the workers with "
                "`accelerate launch` or `torchrun`."
            )
        return Network.find(interface, towards).address

    def _agree_on_token(self, talk: Talk) -> tuple[bytes, bytes]:
        """The job's secret, and a name that nothing has been signed for yet. Collective.

        Args:
            talk: With all workers; nothing can be signed yet.

        Raises:
            ValueError: Workers have different secrets.
        """
        given = given_token()
        proof = hashlib.sha256(given).hexdigest() if given is not None else None
        drawn = draw_token() if given is None and talk.rank == 0 else b""
        says = talk.gather((proof, drawn, secrets.token_bytes(16)))
        proofs = [proof for proof, _, _ in says]
        if len(set(proofs)) > 1:
            others = [rank for rank, proof in enumerate(proofs) if proof != proofs[0]]
            raise ValueError(
                f"Rank {', '.join(map(str, others))} has another {TOKEN_VARIABLE} than rank 0, or only one of them has "
                "any. Give all workers of a job the same secret."
            )
        name = b"".join(number for _, _, number in says)
        if given is not None:
            return given, name
        if launches() > 1 and talk.size > 1 and talk.rank == 0:
            logger.warning(
                f"LayUp: {TOKEN_VARIABLE} is not set. Whoever reaches the store of this job over the network can join "
                "it and change what is learnt. Set it to one secret on all machines, unless the network is yours alone."
            )
        return says[0][1], name

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

    @property
    def _timeout(self) -> timedelta:
        """How long a collective waits for the slowest worker."""
        args = self._host.args
        # The Trainer passes its time-out on with a device only; torch's own default is as long for gloo.
        return timedelta(seconds=args.ddp_timeout if args.device.type != "cpu" else 1800)

    def form_group(self, era: Era) -> None:
        """Be in this era, and form its process group. Collective over its members."""
        membership = self.present_membership
        membership.begin(era)
        rank, size = membership.rank, len(era.roster)
        group = Group(self.store, era.number, rank, size, self._timeout, token=self.token, run=self.job_name)
        self._group, self._talk = group, group.talk
        self.launched_as = PartialState().distributed_type

    def _break_group(self) -> None:
        if self._group is not None:
            self._group.abort()
