"""Two hosts train while somebody on their network attacks them; needs root, for network namespaces."""

import argparse

import pytest

from recipes.measure.common import lab as lab_module
from recipes.measure.common.lab import Lab
from recipes.measure.hosts.attack import attacked
from recipes.measure.hosts.faults import Place
from recipes.measure.hosts.outsider import ATTACKS

pytestmark = [
    pytest.mark.skipif(lab_module.missing() is not None, reason=str(lab_module.missing())),
    pytest.mark.timeout(900),
]

REFUSED = "DistNetworkError: The store of the job does not answer: It has closed the connection."
SECONDS = 1.0  # of each attack
MODEL = ["--methods", "layup", "--batch_size=2", "--block_size=32", "--blocks=400"]
MODEL += ["--config_overrides=n_layer=2,n_embd=32,n_head=2"]


@pytest.fixture(scope="module")
def place():
    with Lab(hosts=2, rate="1gbit", outsiders=1) as lab:
        yield Place(lab, argparse.Namespace(rates=["1gbit"], fork=True))


def test_training_goes_on_as_if_nobody_had_attacked_it(place):
    """Every attack, one after the other, and random ones: all steps are made, mass is exact, and nobody stood still."""
    outcome = attacked(place, MODEL, "all", steps=2000, seconds=SECONDS, bound=30)
    assert outcome.problems == [], outcome
    assert outcome.masses == [2.0]
    assert [note["attack"] for note in outcome.notes] == list(ATTACKS)
    done = {note["attack"]: note for note in outcome.notes}
    assert done["half_open"]["connections held"] > 10  # it has really tried
    assert done["guessed_secret"]["guesses"] > 0
    assert not done["guessed_secret"]["tells its secret"]
    assert done["fuzz"]["operations on keys"] > 10
    needs_the_store = {"forged_membership", "forged_end", "malformed_clock", "moved_clock", "nested_request"}
    needs_the_store |= {"malformed_state", "counted_down", "forged_worker", "forged_requests", "replayed_requests"}
    stopped = {name for name, note in done.items() if "WrongSecret" in note.get("stopped by", "")}
    assert stopped == needs_the_store, done
    assert done["garbage"]["connections"] > 0
    assert done["taken_places"]["looks"] > 0
    writing = done["forged_transfer"]  # to the launcher's store and to gloo, too, which are nothing to write to
    assert writing["ports written to"] > writing["clients that failed"], done


def test_an_open_job_says_so_once_and_passes_over_what_is_malformed(place):
    """Without LAYUP_TOKEN whoever reaches the store is a worker; still nothing ends the run by being no data."""
    outcome = attacked(
        place, MODEL, "malformed_clock+nested_request", steps=600, seconds=SECONDS, bound=30, has_secret=False
    )
    assert outcome.problems == [], outcome
    assert [note.get("stopped by", "") for note in outcome.notes] == [REFUSED, ""]
