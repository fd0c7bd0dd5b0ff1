"""What peers say to each other about a round while it is under way. What is done with it: `roster`, `vote`, `loop`."""

from __future__ import annotations

import itertools
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from p2pllm.rounds.chain import Branch
from p2pllm.rounds.packing import (
    MAX_ROSTER,
    Digest,
    MaybeDigest,
    MaybeSignature,
    Message,
    MessageError,
    RoundNumber,
    Samples,
    Signature,
    Total,
)
from p2pllm.rounds.record import Claim, Head, is_holding

Phase = Literal[
    "starting", "joining", "arriving", "collecting", "roster", "exchange", "vote", "commit", "paused", "done", "leaving"
]
"""arriving: catching up with the few rounds that are missing, so about to take part in the next. paused: alive, and
nobody is to wait for it."""

__all__ = ["MAX_ROSTER", "Enrol", "EnrolReply", "MessageError", "Phase", "Roster", "Status", "Vote"]


class Status(Message):
    """What a peer says of itself in every heartbeat."""

    round: RoundNumber  # of the newest record that its state has behind it
    digest: Digest  # of that record
    total: Total  # samples behind it
    anchor: RoundNumber  # of the newest checkpoint on its branch; 0: none
    phase: Phase
    samples: Samples  # gathered towards the next round
    tokens_per_s: Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]

    @property
    def head(self) -> Head:
        """The place in the log where it is."""
        return (self.round, self.digest)

    @property
    def branch(self) -> Branch:
        """The log that it claims to hold."""
        return Branch(self.head, self.total, self.anchor)


class Enrol(Message):
    """A member tells the leader that its update for the round after a head is ready."""

    round: RoundNumber
    digest: Digest
    claim: Claim
    holding: MaybeDigest  # the body that it has voted for in an attempt that found no majority; empty: none
    proof: MaybeSignature  # that it holds that, see `sign_holding`

    @model_validator(mode="after")
    def _proven(self) -> Self:
        if bool(self.holding) != bool(self.proof):
            raise ValueError("what is held is signed, and nothing else")
        return self

    @property
    def head(self) -> Head:
        """The head that the round starts from."""
        return (self.round, self.digest)

    def is_signed(self, peer: str) -> bool:
        """Whether all that it says is signed by `peer`."""
        held = not self.holding or is_holding(peer, self.head, self.holding, self.proof)
        return held and self.claim.peer == peer and self.claim.is_signed(self.head)


Holder = tuple[Annotated[int, Field(ge=0, lt=MAX_ROSTER)], Signature]
"""A member's place in the roster, and its proof that it holds the proposal."""


class EnrolReply(Message):
    """Whether the leader noted it, or is at another head."""

    accepted: bool


class Roster(Message):
    """The leader closes a round: who takes part, in this order, with which claim.

    With a proposal nothing is exchanged: its holders have its aggregate from an attempt before, and the roster votes
    on that, so that what one of them may have committed is not lost. Holders are shown by their own signatures: if they
    cannot give what they hold it speaks against them, so nobody else may name them.
    """

    max_bytes: ClassVar[int] = 16 * 1024

    round: RoundNumber
    digest: Digest
    nonce: Annotated[bytes, Field(min_length=16, max_length=16)]  # tells attempts of a round apart
    claims: Annotated[tuple[Claim, ...], Field(min_length=1, max_length=MAX_ROSTER)]
    proposal: MaybeDigest
    holders: Annotated[tuple[Holder, ...], Field(max_length=MAX_ROSTER)]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len({claim.key for claim in self.claims}) != len(self.claims):
            raise ValueError("a member is named twice")
        places = [place for place, _ in self.holders]
        if bool(self.proposal) != bool(places) or any(place >= len(self.claims) for place in places):
            raise ValueError("a proposal needs holders, and holders are members")
        if any(one >= other for one, other in itertools.pairwise(places)):
            raise ValueError("holders are not in the order of the roster, or one stands twice")
        return self

    @property
    def head(self) -> Head:
        """The head that the round starts from."""
        return (self.round, self.digest)

    @property
    def members(self) -> tuple[str, ...]:
        """Peer ids, in the order of the roster."""
        return tuple(claim.peer for claim in self.claims)

    @property
    def holding(self) -> list[str]:
        """Members that hold the proposal."""
        return [self.claims[place].peer for place, _ in self.holders]

    @property
    def is_signed(self) -> bool:
        """Whether its members signed their claims, and its holders what they hold."""
        proofs = zip(self.holding, self.holders, strict=True)
        return all(claim.is_signed(self.head) for claim in self.claims) and all(
            is_holding(peer, self.head, self.proposal, proof) for peer, (_, proof) in proofs
        )


class Vote(Message):
    """What a member holds after the exchange: the body it makes of it, signed, or nothing."""

    group: Digest
    body: MaybeDigest  # empty: the exchange failed here
    signature: MaybeSignature

    @model_validator(mode="after")
    def _signed(self) -> Self:
        if bool(self.body) != bool(self.signature):
            raise ValueError("a vote for a body is signed, and no other")
        return self
