"""What a relay's answer to a reservation grants, and what is no such answer."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pllm.errors import NetworkError
from p2pllm.network.relays import carries, granted
from p2pllm.testing import peer_number

STATUS = b"\x08\x02"
RESERVATION = b"\x1a\x06\x08\x80\x88\xc4\xd3\x06"
OK, REFUSED = b"\x28\x64", b"\x28\xc8\x01"


def limit(data: bytes) -> bytes:
    return bytes([0x22, 2 + len(data), 0x08, 0x78]) + data


@pytest.mark.parametrize(
    ("answer", "allowed"),
    [
        (STATUS + RESERVATION + limit(b"\x10\x80\x80\x08") + OK, 1 << 17),
        (STATUS + RESERVATION + limit(b"\x10\x80\x80\x80\x80\x80\x20") + OK, 1 << 40),
        (STATUS + RESERVATION + limit(b"") + OK, 1 << 62),
        (STATUS + RESERVATION + OK, 1 << 62),
        (STATUS + limit(b"\x10\x80\x80\x08") + REFUSED, 0),
        (STATUS, 0),
        (b"", 0),
    ],
)
def test_what_is_granted(answer: bytes, allowed: int) -> None:
    assert granted(answer) == allowed


@given(st.binary(max_size=64))
def test_no_answer_does_harm(answer: bytes) -> None:
    with suppress(ValueError):
        assert 0 <= granted(answer) < 1 << 70


@pytest.mark.parametrize("framed", [b"", b"\x05ab", b"\xff\xff\xff", b"\x01\x08"])
async def test_whoever_does_not_answer_so_is_no_relay(framed: bytes) -> None:
    reader = asyncio.StreamReader()
    reader.feed_data(framed)
    reader.feed_eof()

    class Control:
        sent = b""

        async def open_stream(self, peer_id: object, proto: str) -> object:
            return reader, self

        def write(self, data: bytes) -> None:
            self.sent += data

        async def drain(self) -> None:
            pass

        def close(self) -> None:
            pass

    control = Control()
    with pytest.raises(NetworkError, match="does not say whether it relays"):
        await carries(control, peer_number(1))  # type: ignore[arg-type]
    assert control.sent == b"\x02\x08\x00"
