"""Leases, and agreement on who is there: several members in one process, on a real store, some of them frozen."""

import atexit
import threading
import time
from datetime import timedelta

import pytest
from fleet import together, wait_until
from torch.distributed import PrefixStore, TCPStore

from layup_hf.keeper import PREFIX, WORKERS
from layup_hf.membership import ENDED, Era, Fenced, Membership, StoreLost

LEASE = 1.0
TOKEN = b"secret of the job".ljust(32)


class Worker:
    """A member whose threads can be frozen: all that it asks of the store, or says to it, then waits."""

    def __init__(self, port, token=TOKEN):
        self._port = port
        self._runs = threading.Event()
        self._runs.set()
        self.breaks = 0
        self.membership = Membership(self._connect, LEASE, token, on_broken=self._note)

    def _connect(self):
        store = TCPStore("127.0.0.1", self._port, is_master=False, timeout=timedelta(seconds=10))
        return Freezing(PrefixStore(PREFIX, store), self._runs)

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
        self.server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.port = self.server.port
        self.store = PrefixStore(PREFIX, TCPStore("127.0.0.1", self.port, timeout=timedelta(seconds=10)))
        self.workers = []

    def add(self, **options):
        self.workers.append(Worker(self.port, **options))
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


@pytest.fixture
def job():
    job = Job()
    yield job
    for worker in job.workers:
        worker.close()


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


# ---- Leases ----


def test_who_renews_its_lease_stays(job):
    members = job.begin(3)
    end = time.monotonic() + 3 * LEASE
    while time.monotonic() < end:
        assert all(member.is_current() for member in members)
        assert not any(member.gone or member.is_broken or member.is_fenced for member in members)
        time.sleep(0.05)
    assert job.count() == 3
    assert [worker.breaks for worker in job.workers] == [0, 0, 0]


def test_who_does_not_is_fenced_by_exactly_one_and_counted_out_once(job):
    members = job.begin(4)
    began = time.monotonic()
    job.workers[1].freeze()
    others = [members[0], *members[2:]]
    wait_until(lambda: all(member.gone == {1} for member in others), "all do without it", timeout=4 * LEASE)
    assert time.monotonic() - began > 0.8 * LEASE
    assert job.state(members[1].member) in [f"fenced by {member.member}" for member in others]
    time.sleep(LEASE / 2)
    assert job.count() == 3
    assert members[0].present() == [members[0].member, members[2].member, members[3].member]
    assert members[2].reason_of(1) == f"has given no sign of life for {LEASE:g} s"
    assert [worker.breaks for worker in job.workers] == [1, 0, 1, 1]  # collectives with it cannot end


def test_a_frozen_worker_does_not_take_itself_for_current_and_finds_out_that_it_is_fenced(job):
    first, second = job.begin(2)
    job.workers[1].freeze()
    wait_until(lambda: first.gone == {1}, "fenced", timeout=4 * LEASE)
    assert not second.is_current()  # before it has asked anybody
    job.workers[1].go_on()
    wait_until(lambda: second.is_fenced, "the worker finds out")
    assert not second.is_current()
    assert job.workers[1].breaks == 1
    with pytest.raises(Fenced):
        second.assemble()
    assert first.gone == {1}
    assert job.count() == 1


def test_after_a_freeze_of_its_own_a_worker_gives_the_others_a_whole_lease(job):
    """As when the whole machine slept, or the store was out of reach: some come back before others."""
    members = job.begin(3)
    time.sleep(LEASE / 2)  # they know each other
    for worker in job.workers:
        worker.freeze()
    time.sleep(1.5 * LEASE)
    for worker in job.workers:
        assert not worker.membership.is_current()
        worker.go_on()
        time.sleep(LEASE / 3)
    time.sleep(LEASE)
    assert not any(member.gone or member.is_fenced for member in members)
    assert all(member.is_current() for member in members)


def test_a_lease_holds_for_whom_was_frozen_for_less(job):
    first, second = job.begin(2)
    for _ in range(3):
        job.workers[1].freeze()
        time.sleep(0.6 * LEASE)
        job.workers[1].go_on()
        time.sleep(0.4 * LEASE)
    assert not first.gone
    assert second.is_current()


# ---- Eras ----


def test_all_agree_on_the_next_era(job):
    members = job.begin(3)
    eras = assemble(reversed(members))
    assert eras == [Era(2, tuple(member.member for member in members))] * 3
    assert [member.rank for member in members] == [0, 1, 2]
    assert not any(member.is_broken for member in members)


def test_those_who_are_left_form_the_next_era_in_the_order_of_ranks(job):
    members = job.begin(4)
    job.workers[0].freeze()
    left = members[1:]
    eras = assemble([left[2], left[0], left[1]])
    assert eras == [Era(2, tuple(member.member for member in left))] * 3
    assert [member.rank for member in left] == [0, 1, 2]
    assert [member.leads for member in left] == [True, False, False]


def test_who_does_not_come_is_waited_for_as_long_as_it_lives(job):
    members = job.begin(2)
    outcome = []
    threading.Thread(target=lambda: outcome.append(members[0].assemble()), daemon=True).start()
    wait_until(lambda: members[1].is_broken, "it hears that the other waits")
    assert job.workers[1].breaks == 1
    time.sleep(1.5 * LEASE)
    assert not outcome
    assert members[1].assemble() == wait_until(lambda: outcome, "the era")[0]


def test_eras_follow_each_other(job):
    members = job.begin(3)
    job.workers[2].freeze()
    assemble(members[:2])
    job.workers[0].freeze()
    (era,) = assemble(members[1:2])
    assert era == Era(3, (members[1].member,))
    wait_until(lambda: job.count() == 1, "both are counted out")


def test_whoever_is_first_of_those_left_leads(job):
    members = job.begin(3)
    assert [member.leads for member in members] == [True, False, False]
    job.workers[0].freeze()
    wait_until(lambda: members[1].gone and members[2].gone, "fenced", timeout=4 * LEASE)
    assert [member.leads for member in members[1:]] == [True, False]


# ---- Leaving ----


def test_who_has_ended_breaks_nothing(job):
    members = job.begin(3)
    members[2].leave(ENDED)
    wait_until(lambda: members[0].gone == members[1].gone == {2}, "the others notice")
    time.sleep(LEASE / 2)
    assert [worker.breaks for worker in job.workers] == [0, 0, 0]
    assert members[0].reason_of(2) == "has ended"


def test_who_leaves_as_it_has_failed_breaks_the_group_and_says_why(job):
    members = job.begin(3)
    members[0].leave("failed: OSError: disk full")
    wait_until(lambda: members[1].gone == members[2].gone == {0}, "the others notice", timeout=0.8 * LEASE)
    wait_until(lambda: [worker.breaks for worker in job.workers[1:]] == [1, 1], "both groups are broken")
    assert members[1].reason_of(0) == "failed: OSError: disk full"
    assert assemble(members[1:]) == [Era(2, (members[1].member, members[2].member))] * 2


def test_leaving_twice_is_leaving_once(job):
    first, second = job.begin(2)
    second.leave("failed: once")
    second.leave("failed: twice")
    assert job.state(second.member) == "failed: once"
    assert first.reason_of(1) == "failed: once"


def test_who_has_been_fenced_cannot_leave(job):
    first, second = job.begin(2)
    job.workers[1].freeze()
    wait_until(lambda: first.gone == {1}, "fenced", timeout=4 * LEASE)
    job.workers[1].go_on()
    second.leave()
    assert job.state(second.member) == f"fenced by {first.member}"
    second._count_out()  # as at the end of its process
    assert job.count() == 1


def test_who_has_left_is_counted_out_when_its_process_ends(job):
    _, second = job.begin(2)
    second.leave()
    assert job.count() == 2  # collectives may need the store until then
    second._count_out()
    assert job.count() == 1


# ---- Joining ----


def test_who_asks_to_join_is_in_the_next_era(job):
    members = job.begin(2)
    newcomer = job.add()
    outcome = apply(newcomer)
    name = newcomer.membership.member
    wait_until(lambda: all(member.applicants == [name] for member in members), "the request is read")
    assert not outcome
    eras = assemble(members)
    expected = Era(2, (members[0].member, members[1].member, name), joined=(name,))
    assert eras == [expected] * 2
    assert wait_until(lambda: outcome, "it is admitted") == [expected]
    newcomer.membership.begin(expected)
    assert newcomer.membership.rank == 2
    time.sleep(LEASE)
    assert not any(member.applicants or member.gone for member in (*members, newcomer.membership))


def test_an_era_need_not_admit_anybody(job):
    (member,) = job.begin(1)
    newcomer = job.add()
    outcome = apply(newcomer)
    wait_until(lambda: member.applicants, "the request is read")
    assert member.assemble(admits=False) == Era(2, (member.member,))
    assert not outcome


def test_who_has_another_secret_is_refused_and_nobody_else_notices(job):
    members = job.begin(2)
    stranger = job.add(token=b"guessed".ljust(32))
    outcome = apply(stranger)
    (error,) = wait_until(lambda: outcome, "it is refused")
    assert isinstance(error, ValueError)
    assert "has another secret than the job: set LAYUP_TOKEN to the job's" in str(error)
    time.sleep(LEASE / 2)
    assert not any(member.applicants or member.gone or member.is_broken for member in members)
    assert assemble(members)[0].joined == ()


def test_a_proof_is_of_one_member(job):
    """A request that was overheard lets nobody else in."""
    (member,) = job.begin(1)
    apply(job.add())
    wait_until(lambda: member.applicants, "the request is read")
    overheard = job.store.get("request/1").decode()
    name = job.workers[1].membership.member
    job.store.set("request/2", overheard.replace(f'"{name}"', '"99"', 1))
    job.store.add("requests", 1)
    wait_until(lambda: job.store.check(["admitted/99"]), "an answer")
    assert b"another secret" in job.store.get("admitted/99")
    assert member.applicants == [name]


@pytest.mark.parametrize("request_", [b"", b"no json", b"[1]", b'["7", 5]', b'["7", "xx"]', b'{"a": 1}', b"\xff"])
def test_what_is_no_request_is_passed_over(job, request_):
    (member,) = job.begin(1)
    job.store.set("request/1", request_)
    job.store.add("requests", 1)
    wait_until(lambda: member._requests_read == 1, "it is read")
    outcome = apply(job.add())
    wait_until(lambda: member.applicants, "the next one is read")
    assert member.is_current()
    assert not outcome


def test_who_dies_while_it_waits_is_not_admitted(job):
    members = job.begin(2)
    newcomer = job.add()
    apply(newcomer)
    wait_until(lambda: all(member.applicants for member in members), "the request is read")
    newcomer.freeze()
    wait_until(lambda: not any(member.applicants for member in members), "it is no applicant", timeout=4 * LEASE)
    assert [worker.breaks for worker in job.workers[:2]] == [0, 0]
    assert job.count() == 2
    assert assemble(members) == [Era(2, (members[0].member, members[1].member))] * 2


def test_who_was_frozen_while_it_waited_asks_again(job):
    (member,) = job.begin(1)
    newcomer = job.add()
    outcome, former = apply(newcomer), newcomer.membership.member
    wait_until(lambda: member.applicants, "the request is read")
    newcomer.freeze()
    wait_until(lambda: not member.applicants, "it is no applicant", timeout=4 * LEASE)
    newcomer.go_on()
    wait_until(lambda: member.applicants, "it has asked again")
    era = member.assemble()
    assert wait_until(lambda: outcome, "it is admitted") == [era]
    assert former not in era.roster
    assert era.joined == (newcomer.membership.member,)


def test_who_was_fenced_comes_back_as_a_new_member(job):
    first, second = job.begin(2)
    former = second.member
    job.workers[1].freeze()
    wait_until(lambda: first.gone == {1}, "fenced", timeout=4 * LEASE)
    job.workers[1].go_on()
    wait_until(lambda: second.is_fenced, "the worker finds out")
    outcome = apply(job.workers[1])
    wait_until(lambda: first.applicants, "the request is read")
    era = first.assemble()
    assert era.roster == (first.member, second.member)
    assert era.joined == (second.member,)
    assert second.member != former
    assert wait_until(lambda: outcome, "it is admitted") == [era]
    assert job.count() == 2


def test_when_the_job_ends_who_waits_is_told(job):
    (member,) = job.begin(1)
    outcome = apply(job.add())
    wait_until(lambda: member.applicants, "the request is read")
    member.leave()
    member._count_out()
    (error,) = wait_until(lambda: outcome, "an answer")
    assert isinstance(error, ConnectionError)
    assert "The job has ended before this worker could join it." in str(error)


# ---- The store ----


def test_when_the_store_is_gone_every_worker_learns_it_with_what_to_do(job):
    members = job.begin(2)
    for member in members:
        member.check()
    job.server = None
    wait_until(lambda: all(worker.breaks for worker in job.workers), "groups are broken")
    for member in members:
        with pytest.raises(StoreLost, match=r"does not answer.*resume from the last checkpoint"):
            member.check()
        member.leave()


def test_a_store_that_is_silent_is_lost_after_a_while(job, monkeypatch):
    """A store that is out of reach answers with no error."""
    monkeypatch.setattr("layup_hf.membership._LEAST_SILENCE", 2.0)
    (member,) = job.begin(1)
    job.workers[0].freeze()
    began = time.monotonic()
    monkeypatch.setattr("layup_hf.membership._SILENCE", 2)
    while time.monotonic() < began + 1.5:
        member.check()
        time.sleep(0.05)
    with pytest.raises(StoreLost, match=r"silent for 2 s"):  # noqa: PT012
        while time.monotonic() < began + 6:
            member.check()
            time.sleep(0.05)
