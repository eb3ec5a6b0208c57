"""What goes over a connection between a worker and the store of its job: pure functions of bytes.

Both ends prove that they know the job's secret before anything else is listened to. From then on each message is signed
with a key of this connection, in its order: what comes from elsewhere, or has been recorded, is refused.

    server: hello   = magic, whether it tells its secret to everybody, that secret or zeros, its nonce
    client: request = its nonce, proof over both
    server: answer  = proof over both, or zeros: the client does not know the secret
    then both:        length (4 bytes), that many bytes, signature

Imports nothing but the standard library.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .secret import SIGNATURE_BYTES as SIGNATURE_BYTES
from .secret import is_signed, sign

MAGIC = b"layup-store/1\n"
NONCE_BYTES = 16
TOKEN_BYTES = 32
HELLO_BYTES = len(MAGIC) + 1 + TOKEN_BYTES + NONCE_BYTES
REQUEST_BYTES = NONCE_BYTES + SIGNATURE_BYTES
ANSWER_BYTES = SIGNATURE_BYTES
REFUSAL = bytes(ANSWER_BYTES)
MOST_BYTES = 1 << 26
"""Of one message."""

LENGTH = struct.Struct(">I")


class Refused(ConnectionError):
    """The other end has not proved what it should, or says what cannot be."""


class Signer:
    """Signs what goes one way over a connection, or checks it: every message by its place in the order."""

    def __init__(self, token: bytes, direction: bytes, nonces: bytes) -> None:
        self._keyed = hashlib.blake2b(key=sign(token, direction, nonces), digest_size=SIGNATURE_BYTES)
        self._count = 0

    def seal(self, payload: bytes) -> bytes:
        """A message with its length before it and its signature behind it."""
        return LENGTH.pack(len(payload)) + payload + self._next(payload)

    def check(self, payload: bytes, signature: bytes) -> None:
        """Make sure that the next message is this one.

        Raises:
            Refused: It is not.
        """
        if not hmac.compare_digest(signature, self._next(payload)):
            raise Refused("A message on this connection has not been signed by who opened it.")

    def _next(self, payload: bytes) -> bytes:
        digest = self._keyed.copy()
        digest.update(self._count.to_bytes(8, "big"))
        digest.update(payload)
        self._count += 1
        return digest.digest()


@dataclass(frozen=True)
class Hello:
    """What a server says first.

    Attributes:
        nonce: Drawn for this connection.
        token: The job's secret, if none was given to the job: then everybody may know it.
    """

    nonce: bytes
    token: bytes | None

    @classmethod
    def make(cls, token: bytes | None) -> Hello:
        """For a new connection."""
        return cls(secrets.token_bytes(NONCE_BYTES), token)

    def pack(self) -> bytes:
        """As bytes, HELLO_BYTES of them."""
        return MAGIC + bytes([self.token is not None]) + (self.token or bytes(TOKEN_BYTES)) + self.nonce

    @classmethod
    def unpack(cls, data: bytes) -> Hello:
        """From bytes.

        Raises:
            Refused: This is no store of a job.
        """
        if len(data) != HELLO_BYTES or not data.startswith(MAGIC) or data[len(MAGIC)] > 1:
            raise Refused("What answers there is no store of layup_hf, or of another version.")
        place = len(MAGIC) + 1
        token = data[place : place + TOKEN_BYTES]
        return cls(data[place + TOKEN_BYTES :], token if data[place - 1] else None)


@dataclass(frozen=True)
class Session:
    """A connection whose ends know of each other that they know the secret.

    Attributes:
        requests: Signs, or checks, what the client says.
        answers: Signs, or checks, what the server says.
    """

    requests: Signer
    answers: Signer

    @classmethod
    def of(cls, token: bytes, nonces: bytes) -> Session:
        """The same on both ends."""
        return cls(Signer(token, b"request", nonces), Signer(token, b"answer", nonces))


def request(token: bytes, hello: Hello) -> tuple[bytes, bytes]:
    """What a client answers to a hello, and the nonces of the session."""
    nonces = hello.nonce + secrets.token_bytes(NONCE_BYTES)
    return nonces[NONCE_BYTES:] + sign(token, b"client", nonces), nonces


def nonces_of(token: bytes, hello: Hello, data: bytes) -> bytes | None:
    """The nonces of the session that a client asks for; None if it does not know the secret."""
    nonces = hello.nonce + data[:NONCE_BYTES]
    return nonces if is_signed(token, data[NONCE_BYTES:], b"client", nonces) else None


def answer(token: bytes, nonces: bytes) -> bytes:
    """The server's own proof."""
    return sign(token, b"server", nonces)


def require_answer(token: bytes, nonces: bytes, data: bytes) -> None:
    """Make sure that a server knows the secret, too.

    Raises:
        Refused: It does not.
    """
    if not is_signed(token, data, b"server", nonces):
        raise Refused("What answers there does not know the job's secret.")


def pack(parts: Iterable[bytes]) -> bytes:
    """Several byte strings as one."""
    return b"".join(LENGTH.pack(len(part)) + part for part in parts)


def unpack(data: bytes) -> Sequence[bytes]:
    """The byte strings that were packed.

    Raises:
        Refused: They do not fill the data.
    """
    parts, place = [], 0
    while place < len(data):
        start = place + LENGTH.size
        if start > len(data):
            raise Refused("A message is cut off.")
        place = start + LENGTH.unpack_from(data, place)[0]
        if place > len(data):
            raise Refused("A message is cut off.")
        parts.append(data[start:place])
    return parts
