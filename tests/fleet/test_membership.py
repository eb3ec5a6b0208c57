"""Leases, and agreement on who is there: several members in one process, on a real store, some of them frozen."""

import threading
import time

import pytest
from fleet import wait_until
from members import LEASE, Job, assemble

from layup_hf.fleet.leases import _Heard, now
from layup_hf.fleet.membership import ENDED, Era, Fenced, StoreLost


@pytest.fixture
def job():
    job = Job()
    yield job
    for worker in job.workers:
        worker.close()


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
    assert job.state(members[1].member) in [f"fenced by {member.member} after {LEASE:g} s" for member in others]
    time.sleep(LEASE / 2)
    assert job.count() == 3
    assert members[0].present() == [members[0].member, members[2].member, members[3].member]
    assert members[2].reason_of(1) == f"has given no sign of life for {LEASE:g} s"
    assert [worker.breaks for worker in job.workers] == [1, 0, 1, 1]  # collectives with it cannot end


def test_who_is_fenced_by_two_at_once_is_fenced_by_one(job):
    """Both have read that it was alive."""
    members = job.begin(3)
    for member in members[:2]:
        member._leases._heard[members[2].member] = _Heard(b"7", now() - 2 * LEASE)
        assert member._has_gone(members[2].member, b"7", "alive", False)
    assert job.state(members[2].member) == f"fenced by {members[0].member} after {LEASE:g} s"
    assert job.count() == 2


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


@pytest.mark.parametrize("value", ["x", "[" * 100_000, "[2, [3], []]", '[2, "1", []]', "{}", b"\xff\xfe\x00"])
def test_what_is_no_era_is_not_begun(job, value):
    """Without a given secret anybody may write into the store."""
    members = job.begin(2)
    members[0]._store.set("roster/2", value)
    assert assemble(members) == [Era(2, tuple(member.member for member in members))] * 2


@pytest.mark.parametrize("harm", ["no text", "missing", "no beat"])
def test_a_state_that_somebody_has_spoilt_ends_no_thread(job, harm):
    members = job.begin(3)
    store, victim = members[0]._store, members[1].member
    if harm == "no text":
        store.set(f"state/{victim}", b"\xff\xfe\x00")
    else:
        store.delete_key(f"{'state' if harm == 'missing' else 'beat'}/{victim}")
    time.sleep(2 * LEASE)
    assert all(member.is_current() for member in (members[0], members[2]))
    for member in members:
        member.check()
    if harm != "no beat":  # which is made anew
        assert members[0].gone == {1}


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
    assert job.state(second.member) == f"fenced by {first.member} after {LEASE:g} s"
    second._count_out()  # as at the end of its process
    assert job.count() == 1


def test_who_has_left_is_counted_out_when_its_process_ends(job):
    _, second = job.begin(2)
    second.leave()
    assert job.count() == 2  # collectives may need the store until then
    second._count_out()
    assert job.count() == 1


# ---- The store ----


def test_when_the_store_is_gone_every_worker_learns_it_with_what_to_do(job):
    members = job.begin(2)
    for member in members:
        member.check()
    job.keeper.kill()
    wait_until(lambda: all(worker.breaks for worker in job.workers), "groups are broken")
    for member in members:
        with pytest.raises(StoreLost, match=r"does not answer.*resume from the last checkpoint"):
            member.check()
        member.leave()


def test_a_store_that_is_silent_is_lost_after_a_while(job, monkeypatch):
    """A store that is out of reach answers with no error."""
    monkeypatch.setattr("layup_hf.fleet.membership._LEAST_SILENCE", 2.0)
    (member,) = job.begin(1)
    job.workers[0].freeze()
    began = time.monotonic()
    monkeypatch.setattr("layup_hf.fleet.membership._SILENCE", 1)
    while time.monotonic() < began + 1.5:
        member.check()
        time.sleep(0.05)
    with pytest.raises(StoreLost, match=r"silent for 2 s"):  # noqa: PT012
        while time.monotonic() < began + 6:
            member.check()
            time.sleep(0.05)
