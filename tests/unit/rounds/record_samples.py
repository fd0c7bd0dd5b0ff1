"""A record to test with, and the keys that signed it."""

from __future__ import annotations

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from p2pllm.identity import Identity
from p2pllm.rounds.record import (
    Body,
    Claim,
    Head,
    Record,
    sign_vote,
)


def identity(seed: int) -> Identity:
    """The same keys in every run: random bytes would look like something else once in a while."""
    return Identity(Ed25519PrivateKey.from_private_bytes(bytes([seed]) * 32))


RUN = "5a" * 32
BASE: Head = (6, bytes(range(32)))
PEERS = [identity(seed) for seed in range(3)]
BODY = Body(
    run=bytes.fromhex(RUN),
    round=7,
    previous=BASE[1],
    total=1000,
    members=tuple(Claim.sign(peer, BASE, 10 + at, 2.5, bytes([at]) * 32) for at, peer in enumerate(PEERS)),
    aggregate=bytes([8]) * 32,
    state=bytes([9]) * 32,
)
RECORD = Record.of(BODY, {peer.peer_id: sign_vote(peer, BODY.digest) for peer in PEERS[:2]})
