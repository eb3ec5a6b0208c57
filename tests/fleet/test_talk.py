"""Real workers speak to each other over gloo, and one of them as somebody else would."""

import pytest
from launching import run

from layup_hf.fleet.talk import MOST_BYTES, Talk

WORKERS = 3


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run("talk.py", WORKERS, [], tmp_path_factory.mktemp("talk")).results()


def test_all_hear_what_each_says_in_the_order_of_ranks(results):
    for result in results:
        assert result["short"] == [[rank, "ä"] for rank in range(WORKERS)]
        assert result["long"] == [[0, 0], [1, 5000], [2, 10000]]
        assert result["edges"] == list(range(940, 1060))
        assert result["none"] == [None] * WORKERS


def test_one_may_speak_to_one(results):
    assert [result.get("received") for result in results] == [None, None, [[0.0, 1.0, 2.0, 3.0, 4.0], 3]]


def test_what_cannot_be_said_leaves_nobody_waiting(results):
    assert results[0]["too much"].startswith(f"TypeError: {MOST_BYTES + 1}"[:12])
    assert "are too many for workers to say at once" in results[0]["too much"]
    assert results[0]["no data"] == "TypeError: What workers say to each other is data, and a object is none."
    assert [result["after refusals"] for result in results] == [[0, 1, 2]] * WORKERS


@pytest.mark.parametrize(
    "case", ["another secret", "another group", "proof of another secret", "proof of another group", "replayed"]
)
def test_who_does_not_belong_is_found_out_by_all(results, case):
    for rank in (0, 2):
        assert results[rank][case].startswith("Unproven: What rank 1 says is not signed with the job's secret"), case
    assert results[1][case].startswith("Unproven: What rank 0 says is not signed"), case


def test_nobody_speaks_for_another(results):
    for result in results:
        assert result["as another"].startswith("Unproven: What rank 1 says is not signed")


def test_nobody_has_to_listen_for_longer_than_it_wants(results):
    assert results[2]["too long"] == f"Unproven: Rank 1 wants to say {2**40} bytes, where at most 1000 can be."


def test_one_worker_speaks_to_itself():
    talk = Talk(bytes(32), b"", None)
    item = object()
    assert talk.gather(item) == [item]
    assert (talk.rank, talk.size) == (0, 1)
    talk.prove()
    talk.wait()
