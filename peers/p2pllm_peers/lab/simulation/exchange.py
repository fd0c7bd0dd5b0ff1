"""FewFloats: the exchange of simulated peers, with the messages of the all-reduce but next to nothing to average.

What does not live here: the real one (`p2pllm.averaging`) and the other parts of a simulated peer (`parts`).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from p2pllm.averaging import Exchange, ExchangeResult, Group, Payload
from p2pllm.averaging.attempt import ACCEPTED, FINISHED, MAGIC, STREAM_METHOD
from p2pllm.averaging.dense import NOTICE_METHOD, NOTICE_SECONDS
from p2pllm.averaging.mean import weighted_mean
from p2pllm.errors import NetworkError
from p2pllm.network.transport import Transport

STALL_S = 5.0
"""As the all-reduce: silence in an exchange after which a member has failed."""


@dataclass
class _Attempt:
    """One exchange that is under way here."""

    group: Group
    come: dict[str, bytes]  # member -> its floats
    failed: set[str] = field(default_factory=set)
    accused: dict[str, frozenset[str]] = field(default_factory=dict)  # who gave up -> whom it named
    is_over: bool = False  # a member had ended it before we came
    news: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def is_lost(self) -> bool:
        return bool(self.failed or self.accused or self.is_over)


class FewFloats(Exchange):
    """The exchange with as many messages as the all-reduce opens streams: each member sends its few floats to every
    other one, and all work out the same mean. Streams of thousands of peers would not fit into memory.
    """

    def __init__(self, transport: Transport, on_attempt: Callable[[Group], None]) -> None:
        """on_attempt: called with the group of every attempt."""
        self._transport = transport
        self._on_attempt = on_attempt
        self._open: dict[bytes, _Attempt] = {}
        self._early: dict[bytes, dict[str, bytes]] = {}  # of faster members, before we have begun
        self._ended: set[bytes] = set()

    async def start(self) -> None:
        """Take what the others send."""
        await self._transport.serve_call(STREAM_METHOD, self._on_floats)
        await self._transport.serve_call(NOTICE_METHOD, self._on_notice)

    async def run(self, group: Group, payload: Payload, deadline: float) -> ExchangeResult:
        """See Exchange."""
        floats_of_ours = np.asarray(payload, np.float32).tobytes()
        self._on_attempt(group)
        others = [member for member in group.members if member != self._transport.peer_id]
        attempt = self._open[group.group_id] = _Attempt(group, self._early.pop(group.group_id, {}))
        message = MAGIC + group.group_id + bytes(32) + floats_of_ours
        sending = asyncio.gather(*(self._send(peer, message, attempt) for peer in others))
        sending.add_done_callback(lambda _: attempt.news.set())
        try:
            async with asyncio.timeout(min(deadline, STALL_S)):
                while not attempt.is_lost and not (sending.done() and len(attempt.come) == len(others)):
                    attempt.news.clear()
                    await attempt.news.wait()
        except TimeoutError:
            attempt.failed.update(peer for peer in others if peer not in attempt.come)
        finally:
            sending.cancel()
            del self._open[group.group_id]
            self._ended.add(group.group_id)
        if attempt.is_lost:
            await self._give_up(attempt, others)
            return ExchangeResult(None, frozenset(attempt.failed), "A member failed.", 0, 0, attempt.accused)
        floats = {**attempt.come, self._transport.peer_id: floats_of_ours}
        return ExchangeResult(_mean(group, floats), frozenset(), "", 0, 0)

    async def _send(self, peer: str, payload: bytes, attempt: _Attempt) -> None:
        try:
            attempt.is_over |= await self._transport.call(peer, STREAM_METHOD, payload, STALL_S) == FINISHED
        except NetworkError:
            attempt.failed.add(peer)
        if attempt.is_lost:
            attempt.news.set()

    async def _give_up(self, attempt: _Attempt, others: list[str]) -> None:
        """Tell the others whom we hold responsible, so that nobody waits for them, too."""
        members = attempt.group.members
        mask = sum(1 << index for index, member in enumerate(members) if member in attempt.failed)
        notice = attempt.group.group_id + mask.to_bytes(32, "little")

        async def tell(peer: str) -> None:
            with contextlib.suppress(NetworkError):
                await self._transport.call(peer, NOTICE_METHOD, notice, NOTICE_SECONDS)

        await asyncio.gather(*(tell(peer) for peer in others if peer not in attempt.failed))

    async def _on_floats(self, peer: str, payload: bytes) -> bytes:
        group_id, floats = payload[len(MAGIC) : len(MAGIC) + 32], payload[len(MAGIC) + 64 :]
        if group_id in self._ended:
            return FINISHED
        attempt = self._open.get(group_id)
        if attempt is None:
            self._early.setdefault(group_id, {})[peer] = floats
        else:
            attempt.come[peer] = floats
            attempt.news.set()
        return ACCEPTED

    async def _on_notice(self, peer: str, payload: bytes) -> bytes:
        attempt = self._open.get(payload[:32])
        if attempt is not None:
            mask = int.from_bytes(payload[32:], "little")
            named = (member for index, member in enumerate(attempt.group.members) if mask >> index & 1)
            attempt.accused.setdefault(peer, frozenset(named))
            attempt.news.set()
        return b""


def _mean(group: Group, floats: dict[str, bytes]) -> np.ndarray:
    """The weighted mean in roster order, the same bits at every member."""
    terms = [np.frombuffer(floats[member], np.float32).copy() for member in group.members]
    out = np.empty(group.size, np.float32)
    weighted_mean(terms, group.shares(), out)
    return out
