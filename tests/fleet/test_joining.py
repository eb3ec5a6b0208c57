"""Workers that ask to join those who are there: admitted, dead while they wait, or back after a freeze."""

import time

import pytest
from fleet import wait_until
from members import LEASE, Job, apply, assemble

from layup_hf.fleet.membership import Era


@pytest.fixture
def job():
    job = Job()
    yield job
    for worker in job.workers:
        worker.close()


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


@pytest.mark.parametrize("value", ["[" * 100_000, "99", "9" * 400, b"\xff\xfe\x00"])
def test_what_is_no_request_of_a_worker_holds_up_nobody(job, value, caplog):
    """Without a given secret anybody may leave one."""
    members = job.begin(2)
    for _ in range(3):
        members[0]._store.set(f"request/{members[0]._store.add('requests', 1)}", value)
    newcomer = job.add()
    outcome = apply(newcomer)
    name = newcomer.membership.member
    wait_until(lambda: all(member.applicants == [name] for member in members), "the request is read")
    assert [era.joined for era in assemble(members)] == [(name,)] * 2
    assert wait_until(lambda: outcome, "it is admitted")
    assert 2 <= caplog.text.count("what asks to join this job is no worker") <= 3  # each says so once, the new one, too


def test_an_era_need_not_admit_anybody(job):
    (member,) = job.begin(1)
    newcomer = job.add()
    outcome = apply(newcomer)
    wait_until(lambda: member.applicants, "the request is read")
    assert member.assemble(admits=False) == Era(2, (member.member,))
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
