"""Every sentence of the threat model has a test."""

import ast
import re

import pytest
from launching import ROOT

from layup_hf.windows import wire

SENTENCES = {
    "Who knows the secret is a worker: what it says is believed, wrong numbers too.": (
        "windows/test_strangers.py::test_who_knows_the_secret_is_believed"
    ),
    "Who can write a checkpoint decides what is learnt from it on, but not what is run.": (
        "trainer/test_checkpoint_input.py::test_planted_code_is_not_run_and_its_file_is_named"
    ),
    "They can see what listens, and connect.": ("recipes/measure/hosts/test_outsider.py::test_what_listens_is_found"),
    "They cannot have anything run in a worker: nothing that comes over the network is unpickled.": (
        "fleet/test_said.py::test_what_says_anything_else_is_refused"
    ),
    "They cannot take part: the job's store listens to nobody who has not proved to know the secret.": (
        "fleet/test_store.py::test_what_is_no_proof_closes_the_connection"
    ),
    "They cannot speak for a worker: what workers say is signed with who says it, to whom, and when.": (
        "fleet/test_talk.py::test_nobody_speaks_for_another"
    ),
    "They cannot repeat what a worker has said.": ("fleet/test_store.py::test_what_was_recorded_says_nothing_again"),
    "They cannot change a worker's memory through UCX from an address that no worker has.": (
        "windows/test_strangers.py::test_a_port_is_all_that_it_takes_to_write_into_a_worker_so_it_is_open_to_workers_alone"
    ),
    "Where the kernel keeps users from filtering their sockets, that check is missing, and a warning says so.": (
        "fleet/test_gate.py::test_a_user_without_privilege_has_a_gate_or_is_told_that_there_is_none"
    ),
    "They cannot stop training through the launcher's store: it is not used after the start.": (
        "security/test_attacks.py::test_training_goes_on_as_if_nobody_had_attacked_it"
    ),
    "They cannot stop it by half-open connections, random bytes, or bytes that come slowly.": (
        "security/test_attacks.py::test_training_goes_on_as_if_nobody_had_attacked_it"
    ),
    "They cannot take a member's place when a group forms: gloo's port is open to members' machines alone.": (
        "fleet/test_group.py::test_strangers_who_are_there_before_a_member_do_not_take_its_place"
    ),
    "They can keep workers from starting: the launcher's store is torch's, and open to all.": (
        "recipes/measure/hosts/test_outsider.py::test_torchs_store_is_open_to_all"
    ),
    "Another user of the machine passes the check of addresses, and can write to a worker's memory through UCX.": (
        "windows/test_strangers.py::test_a_port_is_all_that_it_takes_to_write_into_a_worker_so_it_is_open_to_workers_alone"
    ),
    "They can read the model and what workers say: nothing is encrypted, unless in a tunnel.": (
        "security/test_threat_model.py::test_what_workers_say_is_in_the_clear"
    ),
    "The store of the job tells everybody its secret: who reaches it is a worker.": (
        "recipes/measure/hosts/test_outsider.py::test_without_a_token_the_store_of_a_job_tells_its_secret"
    ),
    "They cannot end a run by what is no number where workers count.": (
        "fleet/test_store.py::test_who_counts_is_not_stopped_by_what_others_write"
    ),
    "They cannot end it by a request to join that is none.": (
        "fleet/test_joining.py::test_what_is_no_request_of_a_worker_holds_up_nobody"
    ),
    "They cannot end it by a list of members that is none.": (
        "fleet/test_membership.py::test_what_is_no_era_is_not_begun"
    ),
    "The log says once, with several launches, that the job is open.": (
        "security/test_attacks.py::test_an_open_job_says_so_once_and_passes_over_what_is_malformed"
    ),
    "Code that is planted in a file is not run, and the file is named.": (
        "trainer/test_checkpoint_input.py::test_planted_code_is_not_run_and_its_file_is_named"
    ),
    "A file that is damaged is named, by all workers.": (
        "trainer/test_checkpoint_input.py::test_what_one_worker_cannot_read_is_named_by_both"
    ),
    "A file of another model, or of another optimizer, is named, by all workers.": (
        "trainer/test_checkpoint_input.py::test_what_one_worker_has_of_another_model_is_named_by_both"
    ),
    "A step, a position or a number of workers that cannot be is refused at once.": (
        "trainer/test_checkpoint_input.py::test_a_position_that_cannot_be_is_told_at_once"
    ),
    "Moments that are not finite are refused, as they would spoil the weights of all workers.": (
        "trainer/test_checkpoint_input.py::test_moments_that_are_not_finite_are_told"
    ),
}
"""Sentences of docs/threat-model.md, each with the test that shows it."""


def test_every_sentence_of_the_page_has_a_test():
    text = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", (ROOT / "docs/threat-model.md").read_text())
    sentences = [" ".join(item.split()) for item in re.findall(r"^- (.*(?:\n  .*)*)", text, re.MULTILINE)]
    assert sentences == list(SENTENCES)


@pytest.mark.parametrize("test", sorted(set(SENTENCES.values())))
def test_that_test_is_there(test):
    file, name = test.split("::")
    tree = ast.parse((ROOT / "tests" / file).read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_what_workers_say_is_in_the_clear():
    content = wire.Request(number=1, block=0, address=2**40, device=0, key=b"what a peer needs to write here")
    assert content.key in wire.encode(content, token=b"t" * 32, job=b"j" * 16, sender=0, receiver=1, sequence=1)
