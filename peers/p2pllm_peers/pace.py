"""Pace: what a peer tells whoever thinks about joining: how long rounds take, how fast the swarm is.

What does not live here: what follows for a machine (`doctor`).
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable
from typing import Annotated, Any

from pydantic import Field

from p2pllm.errors import NetworkError
from p2pllm.metrics import RoundRecord
from p2pllm.network.transport import Transport
from p2pllm.rounds.packing import Message, MessageError, RoundNumber

METHOD = "pace"

_Amount = Annotated[float, Field(ge=0, le=1e15, allow_inf_nan=False)]


class Pace(Message):
    """Of a run, as one of its peers has measured it lately; 0 where nothing was measured yet."""

    round: RoundNumber
    peers: Annotated[int, Field(ge=1, le=100_000)]  # alive, the teller included
    members: Annotated[int, Field(ge=0, le=100_000)]  # of the last round
    round_s: _Amount  # median of the last rounds
    tokens_per_s: _Amount  # of the swarm
    record_bytes: _Amount  # of the log, a round
    control_sent_per_s: _Amount  # bytes: heartbeats, rosters, votes, the DHT
    control_received_per_s: _Amount


class Paces:
    """The last rounds of a peer."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=20)
        self._members = 0

    def add(self, record: RoundRecord) -> None:
        """Note a round that was committed."""
        self._seconds.append(record.round_s)
        self._members = len(record.members)

    def of(self, status: dict[str, Any], log_bytes: int) -> Pace:
        """The pace that belongs to a peer's status. log_bytes: of its whole log."""
        uptime = max(status["uptime_s"], 1.0)
        return Pace(
            round=status["round"],
            peers=1 + len(status["peers"]),
            members=self._members,
            round_s=float(statistics.median(self._seconds)) if self._seconds else 0.0,
            tokens_per_s=float(status["swarm_tokens_per_s"]),
            record_bytes=log_bytes / status["round"] if status["round"] else 0.0,
            control_sent_per_s=status["traffic"]["control_sent"] / uptime,
            control_received_per_s=status["traffic"]["control_received"] / uptime,
        )


async def serve_pace(transport: Transport, pace: Callable[[], Pace]) -> None:
    """Tell whoever asks."""

    async def answer(peer: str, payload: bytes) -> bytes:
        return pace().pack()

    await transport.serve_call(METHOD, answer)


async def ask_pace(transport: Transport, peer: str, timeout: float) -> Pace:
    """What a peer says. Raises NetworkError if it does not answer, or not with a pace."""
    try:
        return Pace.unpack(await transport.call(peer, METHOD, b"", timeout))
    except MessageError as error:
        raise NetworkError(f"Peer {peer[-8:]} sent something that is no pace: {error}.") from None
