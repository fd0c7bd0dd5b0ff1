"""What peers say to each other about rounds: typed, bounded, msgpack.

A message is a frozen pydantic model in strict mode; on the wire it is the array of its fields in order. Size,
types and ranges are checked before a message exists. What is done with one lives in `roster`, `vote`, `loop`.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

import msgpack
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

MAX_ROSTER = 64

Digest = Annotated[bytes, Field(min_length=32, max_length=32)]
PeerId = Annotated[str, Field(min_length=8, max_length=128)]
RoundNumber = Annotated[int, Field(ge=0, le=10**9)]
Samples = Annotated[int, Field(ge=0, le=10**9)]
Weight = Annotated[int, Field(ge=1, le=10**9)]  # samples behind an update
Loss = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]

Phase = Literal["starting", "joining", "collecting", "roster", "exchange", "vote", "commit", "done", "leaving"]


class MessageError(ValueError):
    """Bytes from the network that are not the message that they should be."""


class Message(BaseModel):
    """Base of all messages."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")
    max_bytes: ClassVar[int] = 1024

    def pack(self) -> bytes:
        """The wire form: a msgpack array of the fields in their order."""
        packed: bytes = msgpack.packb([getattr(self, name) for name in type(self).model_fields])
        return packed

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Parse and check. Raises MessageError."""
        if len(data) > cls.max_bytes:
            raise MessageError(f"{cls.__name__} has {len(data)} bytes, more than {cls.max_bytes}")
        try:
            values = msgpack.unpackb(data, use_list=False)
        except Exception as error:  # noqa: BLE001 - msgpack raises many kinds on hostile bytes
            raise MessageError(f"{cls.__name__} is not msgpack: {error}") from None
        if not isinstance(values, tuple) or len(values) != len(cls.model_fields):
            raise MessageError(f"{cls.__name__} does not have {len(cls.model_fields)} fields")
        try:
            return cls.model_validate(dict(zip(cls.model_fields, values, strict=True)))
        except ValidationError as error:
            raise MessageError(f"{cls.__name__}: {error.error_count()} fields are not valid") from None


class Status(Message):
    """What a peer says of itself in every heartbeat."""

    round: RoundNumber  # rounds that its state has behind it
    digest: Digest  # of its state
    phase: Phase
    samples: Samples  # gathered towards this round
    tokens_per_s: Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]

    @property
    def head(self) -> tuple[int, bytes]:
        """(round, state digest): what two peers compare."""
        return (self.round, self.digest)


class Enrol(Message):
    """A member tells the leader that its update for a round is ready."""

    round: RoundNumber
    digest: Digest
    samples: Weight
    loss: Loss  # mean training loss of the update, nats a token


class EnrolReply(Message):
    """The leader noted it, or is at another head."""

    accepted: bool
    round: RoundNumber
    digest: Digest


class Roster(Message):
    """The leader closes a round: who takes part, in this order, with which weight."""

    max_bytes: ClassVar[int] = 16 * 1024

    round: RoundNumber
    digest: Digest
    nonce: Annotated[bytes, Field(min_length=16, max_length=16)]  # tells attempts of a round apart
    members: Annotated[tuple[PeerId, ...], Field(min_length=1, max_length=MAX_ROSTER)]
    samples: Annotated[tuple[Weight, ...], Field(min_length=1, max_length=MAX_ROSTER)]
    losses: Annotated[tuple[Loss, ...], Field(min_length=1, max_length=MAX_ROSTER)]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if len(set(self.members)) != len(self.members):
            raise ValueError("a member is named twice")
        if not len(self.members) == len(self.samples) == len(self.losses):
            raise ValueError("members, samples and losses differ in number")
        return self

    @property
    def head(self) -> tuple[int, bytes]:
        """The head that the round starts from."""
        return (self.round, self.digest)

    @property
    def total_samples(self) -> int:
        """Samples behind the aggregate."""
        return sum(self.samples)

    @property
    def mean_loss(self) -> float:
        """Training loss over all members, weighted by samples, nats a token."""
        return sum(s * x for s, x in zip(self.samples, self.losses, strict=True)) / self.total_samples


class Vote(Message):
    """What a member holds after the exchange: the digest of its aggregate, or nothing."""

    group: Digest
    aggregate: Annotated[bytes, Field(max_length=32)]  # 32 bytes, or empty: the exchange failed here

    @model_validator(mode="after")
    def _whole_or_empty(self) -> Self:
        if len(self.aggregate) not in (0, 32):
            raise ValueError("an aggregate's digest has 32 bytes")
        return self
