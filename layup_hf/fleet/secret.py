"""The secret of a job, and how workers prove to each other that they know it.

Imports nothing but the standard library: the keeper of the store starts in no time.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import struct

TOKEN_VARIABLE = "LAYUP_TOKEN"
"""Environment variable with the secret of a job. Unset: drawn by rank 0; whoever reaches the store can then get it."""

SIGNATURE_BYTES = 16


def given_token() -> bytes | None:
    """The job's secret from LAYUP_TOKEN, 32 bytes; None if that is unset."""
    given = os.environ.get(TOKEN_VARIABLE)
    return hashlib.sha256(given.encode()).digest() if given else None


def draw_token() -> bytes:
    """A secret for a job that has been given none, 32 bytes."""
    return secrets.token_bytes(32)


def sign(token: bytes, *parts: bytes) -> bytes:
    """Proof, 16 bytes, that who made it knows the token and meant exactly these parts."""
    lengths = struct.pack(f">{len(parts)}Q", *map(len, parts))
    digest = hashlib.blake2b(lengths, key=token, digest_size=SIGNATURE_BYTES)
    for part in parts:
        digest.update(part)
    return digest.digest()


def is_signed(token: bytes, signature: bytes, *parts: bytes) -> bool:
    """Whether the proof holds; takes equally long whatever is wrong with it."""
    return hmac.compare_digest(signature, sign(token, *parts))
