"""Records: what a committed round is, in bytes that every peer makes the same way.

A `Body` says what a round did: whose updates, their aggregate, and the state after it. Its digest is the record's
name, and the next body holds it, so that the newest digest stands for the whole log. A `Record` is a body with the
votes for it. Votes are no part of the name: peers that commit one round may have heard different votes.

Every signature is of the peer that it speaks for, and each kind has a domain of its own: a `Claim` of a member for what
it brings, a vote of a member for a body, its word that it holds one, a `Checkpoint` of the organiser for a record. What
does not live here: which records follow each other and which branch to choose (`chain`), files (`log`).
"""

from __future__ import annotations

import functools
import itertools
from typing import Annotated, ClassVar, Literal, Self

import msgpack
from blake3 import blake3
from pydantic import Field, model_validator

from p2pllm.identity import Identity, peer_id_of, public_key_of, verify
from p2pllm.rounds.packing import (
    MAX_ROSTER,
    Digest,
    Loss,
    Message,
    MessageError,
    PublicKey,
    Signature,
    Total,
    Weight,
)

MAX_RECORD_BYTES = 24 * 1024
"""Bound on a packed record; one of MAX_ROSTER members with all their votes has 16.5 KB."""

CLAIM_DOMAIN, VOTE_DOMAIN, HOLDING_DOMAIN, CHECKPOINT_DOMAIN = "claim", "vote", "holding", "checkpoint"

Head = tuple[int, bytes]
"""(round, digest of its record): a place in the log. Round r is the state after r outer steps."""


def genesis(run_id: str) -> Head:
    """Where the log of a run begins: round 0, before the first record."""
    return (0, blake3(b"p2pllm genesis 1\0" + bytes.fromhex(run_id)).digest())


@functools.lru_cache(maxsize=4096)
def peer_of(key: bytes) -> str:
    """The peer id of a public key of 32 bytes."""
    return peer_id_of(key)


@functools.lru_cache(maxsize=4096)  # a claim is seen when it is made, in the roster, and in the record
def _verify(peer: str, domain: str, data: bytes, signature: bytes) -> bool:
    return verify(peer, domain, data, signature)


class Claim(Message):
    """What a member says it brings to the round after a head: so many samples, this update."""

    key: PublicKey
    samples: Weight
    loss: Loss  # mean training loss of the update, nats a token
    update: Digest  # BLAKE3 of the bytes of the update
    signature: Signature

    @property
    def peer(self) -> str:
        """Whose claim it is."""
        return peer_of(self.key)

    @classmethod
    def sign(cls, identity: Identity, head: Head, samples: int, loss: float, update: bytes) -> Self:
        """Our claim for the round after `head`. The head's digest names the run, too."""
        signature = identity.sign(CLAIM_DOMAIN, _claimed(head, samples, loss, update))
        return cls(key=identity.public_key, samples=samples, loss=loss, update=update, signature=signature)

    def is_signed(self, head: Head) -> bool:
        """Whether its member signed it for the round after `head`."""
        return _verify(self.peer, CLAIM_DOMAIN, _claimed(head, self.samples, self.loss, self.update), self.signature)


def _claimed(head: Head, samples: int, loss: float, update: bytes) -> bytes:
    packed: bytes = msgpack.packb([head[0], head[1], samples, loss, update])
    return packed


class Body(Message):
    """What a round did."""

    max_bytes: ClassVar[int] = MAX_RECORD_BYTES

    version: Literal[1] = 1
    run: Digest
    round: Annotated[int, Field(ge=1, le=10**9)]  # outer steps behind the state that it leads to
    previous: Digest  # of the body before it; for round 1 see `genesis`
    total: Total  # samples of this round and all before it on this branch
    members: Annotated[tuple[Claim, ...], Field(min_length=1, max_length=MAX_ROSTER)]  # in the order of the roster
    aggregate: Digest  # of what the members' updates came to, in the form of the run's strategy
    state: Digest  # after the outer step

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len({claim.key for claim in self.members}) != len(self.members):
            raise ValueError("a member is named twice")
        if self.total < self.samples:
            raise ValueError("fewer samples are behind it than it has itself")
        return self

    @functools.cached_property
    def digest(self) -> bytes:
        """BLAKE3 of the packed body, 32 bytes: the name of the record."""
        return blake3(self.pack()).digest()

    @property
    def head(self) -> Head:
        """The place in the log that it leads to."""
        return (self.round, self.digest)

    @property
    def base(self) -> Head:
        """The place in the log that it starts from."""
        return (self.round - 1, self.previous)

    @property
    def peers(self) -> tuple[str, ...]:
        """Ids of the members."""
        return tuple(claim.peer for claim in self.members)

    @property
    def samples(self) -> int:
        """Samples behind the aggregate."""
        return sum(claim.samples for claim in self.members)

    @property
    def loss(self) -> float:
        """Training loss over all members, weighted by samples, nats a token."""
        return sum(claim.samples * claim.loss for claim in self.members) / self.samples


def sign_vote(identity: Identity, body: bytes) -> bytes:
    """Our signature over the digest of a body, 64 bytes."""
    return identity.sign(VOTE_DOMAIN, body)


def is_vote(peer: str, body: bytes, signature: bytes) -> bool:
    """Whether the peer voted for the body with this digest."""
    return _verify(peer, VOTE_DOMAIN, body, signature)


def sign_holding(identity: Identity, head: Head, body: bytes) -> bytes:
    """Our word that we hold the body with this digest for the round after `head`, 64 bytes.

    It is no vote: those are in the log for all to see, and somebody could show ours for a round that is long over.
    """
    return identity.sign(HOLDING_DOMAIN, _held(head, body))


def is_holding(peer: str, head: Head, body: bytes, signature: bytes) -> bool:
    """Whether the peer says that it holds this body for the round after `head`."""
    return _verify(peer, HOLDING_DOMAIN, _held(head, body), signature)


def _held(head: Head, body: bytes) -> bytes:
    packed: bytes = msgpack.packb([head[0], head[1], body])
    return packed


class Record(Message):
    """A committed round: its body and the votes that are known for it, sorted by key."""

    max_bytes: ClassVar[int] = MAX_RECORD_BYTES

    body: Body
    votes: Annotated[tuple[tuple[PublicKey, Signature], ...], Field(min_length=1, max_length=MAX_ROSTER)]

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        keys = [key for key, _ in self.votes]
        if any(one >= other for one, other in itertools.pairwise(keys)):
            raise ValueError("votes are not sorted, or one stands twice")
        return self

    @classmethod
    def of(cls, body: Body, votes: dict[str, bytes]) -> Self:
        """votes: signature by peer id."""
        return cls(body=body, votes=tuple(sorted((public_key_of(peer), vote) for peer, vote in votes.items())))

    @property
    def head(self) -> Head:
        """The place in the log that it leads to."""
        return self.body.head

    @property
    def voters(self) -> tuple[str, ...]:
        """Ids of those whose votes are here."""
        return tuple(peer_of(key) for key, _ in self.votes)

    @property
    def has_majority(self) -> bool:
        """More than half of the members voted. Else it was committed by those who were left, see README.md."""
        voted = {key for key, _ in self.votes}
        return 2 * sum(claim.key in voted for claim in self.body.members) > len(self.body.members)


class Checkpoint(Message):
    """The organiser's word that a record is on the branch to follow."""

    run: Digest
    round: Annotated[int, Field(ge=1, le=10**9)]
    record: Digest
    signature: Signature

    @classmethod
    def sign(cls, organiser: Identity, run_id: str, head: Head) -> Self:
        """Anchor `head`. Only the founder's key makes one that counts."""
        run = bytes.fromhex(run_id)
        signature = organiser.sign(CHECKPOINT_DOMAIN, run + _claimed(head, 0, 0.0, b""))
        return cls(run=run, round=head[0], record=head[1], signature=signature)

    @property
    def head(self) -> Head:
        """The place in the log that it anchors."""
        return (self.round, self.record)

    def is_signed(self, founder: str) -> bool:
        """Whether the organiser, whose peer id is in the manifest, signed it."""
        signed = self.run + _claimed(self.head, 0, 0.0, b"")
        return verify(founder, CHECKPOINT_DOMAIN, signed, self.signature)


def unpack_all(data: bytes | memoryview, most: int) -> list[Record]:
    """Records as `pack_all` joined them. Raises MessageError, also for more than `most`."""
    records, at, view = list[Record](), 0, memoryview(data)
    while at < len(view):
        size = int.from_bytes(view[at : at + 4], "big")
        if len(records) >= most or size > MAX_RECORD_BYTES or at + 4 + size > len(view):
            raise MessageError("these are not the records that were asked for")
        records.append(Record.unpack(bytes(view[at + 4 : at + 4 + size])))
        at += 4 + size
    return records


def pack_all(records: list[bytes]) -> bytes:
    """Packed records, each after its length in 4 bytes, big endian."""
    return b"".join(len(record).to_bytes(4, "big") + record for record in records)
