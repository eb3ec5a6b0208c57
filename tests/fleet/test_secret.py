"""The secret of a job, and what is signed with it."""

import hashlib

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from layup_hf.fleet.secret import draw_token, given_token, is_signed, sign


def test_the_secret_is_that_of_the_environment(monkeypatch):
    monkeypatch.setenv("LAYUP_TOKEN", "Größe")
    assert given_token() == given_token() == hashlib.sha256("Größe".encode()).digest()


@pytest.mark.parametrize("is_empty", [False, True])
def test_without_one_it_is_random(monkeypatch, is_empty):
    monkeypatch.setenv("LAYUP_TOKEN", "")
    if not is_empty:
        monkeypatch.delenv("LAYUP_TOKEN")
    assert given_token() is None
    first, second = draw_token(), draw_token()
    assert first != second
    assert len(first) == len(second) == 32


# ---- Proofs ----

tokens = st.binary(min_size=32, max_size=32)
messages = st.lists(st.binary(max_size=20), max_size=4)


@given(tokens, messages)
def test_a_proof_holds_for_what_was_meant(token, parts):
    proof = sign(token, *parts)
    assert is_signed(token, proof, *parts)
    assert len(proof) == 16


@given(tokens, tokens, messages)
def test_another_secret_is_noticed(token, other, parts):
    assume(token != other)
    assert not is_signed(other, sign(token, *parts), *parts)


@given(tokens, messages, messages)
def test_other_parts_are_noticed(token, parts, others):
    assume(parts != others)
    assert not is_signed(token, sign(token, *parts), *others)


@given(tokens, st.binary(min_size=1, max_size=40), st.data())
def test_bytes_that_are_moved_between_parts_are_noticed(token, message, data):
    """One text, cut at two different places."""
    first, second = (data.draw(st.integers(0, len(message))) for _ in range(2))
    assume(first != second)
    proof = sign(token, message[:first], message[first:])
    assert not is_signed(token, proof, message[:second], message[second:])
    assert not is_signed(token, proof, message)
    assert not is_signed(token, proof, message[:first], message[first:], b"")


@given(tokens, messages, st.data())
def test_a_changed_bit_of_anything_is_noticed(token, parts, data):
    def flipped(original):
        place = data.draw(st.integers(0, len(original) * 8 - 1))
        changed = bytearray(original)
        changed[place // 8] ^= 1 << place % 8
        return bytes(changed)

    proof = sign(token, *parts)
    assert not is_signed(token, flipped(proof), *parts)
    assert not is_signed(flipped(token), proof, *parts)
    for k, part in enumerate(parts):
        if part:
            assert not is_signed(token, proof, *parts[:k], flipped(part), *parts[k + 1 :])


@pytest.mark.parametrize("proof", [b"", b"short", bytes(17)])
def test_what_is_no_proof_is_none(proof):
    assert not is_signed(bytes(32), proof, b"part")
