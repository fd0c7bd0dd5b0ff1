"""How everything that peers say about rounds is packed: typed, bounded, msgpack, one byte string for one value.

A message is a frozen pydantic model in strict mode; on the wire it is the array of its fields in order, messages in
it likewise. Size, types and ranges are checked before a message exists. What the messages are lives in `messages`
and `record`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Self

import msgpack
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

MAX_ROSTER = 64


def _empty_or(size: int) -> Callable[[bytes], bytes]:
    def check(value: bytes) -> bytes:
        if len(value) not in (0, size):
            raise ValueError(f"has {len(value)} bytes, not 0 or {size}")
        return value

    return check


Digest = Annotated[bytes, Field(min_length=32, max_length=32)]
MaybeDigest = Annotated[bytes, AfterValidator(_empty_or(32))]
Signature = Annotated[bytes, Field(min_length=64, max_length=64)]
MaybeSignature = Annotated[bytes, AfterValidator(_empty_or(64))]
PublicKey = Annotated[bytes, Field(min_length=32, max_length=32)]
RoundNumber = Annotated[int, Field(ge=0, le=10**9)]
Samples = Annotated[int, Field(ge=0, le=10**9)]
Weight = Annotated[int, Field(ge=1, le=10**9)]  # samples behind an update
Total = Annotated[
    int, Field(ge=0, le=10**18)
]  # samples behind a branch: at most MAX_ROSTER weights in each of its rounds
Loss = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]


class MessageError(ValueError):
    """Bytes from the network or the disk that are not the message that they should be."""


def opened(data: bytes) -> Any:
    """The values in msgpack bytes: numbers, texts of up to 64 bytes, bytes, and tuples of at most MAX_ROSTER of them.

    A few bytes could otherwise ask for a million empty places, each in one of the other's. Raises ValueError.
    """
    try:
        return msgpack.unpackb(
            data,
            use_list=False,
            max_array_len=MAX_ROSTER,
            max_str_len=64,
            max_bin_len=len(data),
            max_map_len=0,
            max_ext_len=0,
        )
    except Exception as error:  # noqa: BLE001 - msgpack raises many kinds on hostile bytes
        raise ValueError(f"not msgpack: {error}") from None


class Message(BaseModel):
    """Base of all messages."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")
    max_bytes: ClassVar[int] = 1024

    @model_validator(mode="before")
    @classmethod
    def _from_fields(cls, values: Any) -> Any:
        """A message inside another one arrives as the array of its fields."""
        if isinstance(values, tuple) and len(values) == len(cls.model_fields):
            return dict(zip(cls.model_fields, values, strict=True))
        return values

    def pack(self) -> bytes:
        """The one wire form: a msgpack array of the fields in their order."""
        packed: bytes = msgpack.packb(self, default=_fields)
        return packed

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Parse and check. Raises MessageError, also for other spellings of a message than `pack` gives."""
        if len(data) > cls.max_bytes:
            raise MessageError(f"{cls.__name__} has {len(data)} bytes, more than {cls.max_bytes}")
        try:
            values = opened(data)
        except ValueError as error:
            raise MessageError(f"{cls.__name__} is {error}") from None
        if not isinstance(values, tuple) or len(values) != len(cls.model_fields):
            raise MessageError(f"{cls.__name__} does not have {len(cls.model_fields)} fields")
        try:
            message = cls.model_validate(values)
        except ValidationError as error:
            raise MessageError(f"{cls.__name__}: {error.error_count()} fields are not valid") from None
        if message.pack() != data:
            raise MessageError(f"{cls.__name__} is not in its canonical form")
        return message


def _fields(message: Message) -> list[Any]:
    return [getattr(message, name) for name in type(message).model_fields]
