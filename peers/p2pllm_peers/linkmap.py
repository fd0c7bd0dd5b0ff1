"""Link map: who exchanges how fast with whom in the swarm, by what each of its peers measured.

A peer asks the others only while somebody on its machine wants to know, each at most every `ASK_EVERY_S`. What does
not live here: measuring our own links (`links`), and drawing (`dashboard`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, Field, model_validator

from p2pllm.errors import NetworkError
from p2pllm.identity import is_peer_id
from p2pllm.network.transport import Transport
from p2pllm.rounds.packing import MAX_ROSTER, Message, MessageError
from p2pllm_peers.links import Links

METHOD = "links"

ASK_EVERY_S = 15.0

ANSWER_S = 5.0
"""How long a peer may take to answer."""

MAX_MBIT = 1e6

_AT_ONCE = 4


def _peer_id(value: str) -> str:
    if not is_peer_id(value):
        raise ValueError("no peer id")
    return value


class Rate(Message):
    """What a peer measured of its exchange with another one, both ways, in its newest round."""

    peer: Annotated[str, AfterValidator(_peer_id)]
    mbit: Annotated[float, Field(ge=0, le=MAX_MBIT, allow_inf_nan=False)]


class Rates(Message):
    """All that a peer tells of its links: its own claim, which nobody can check."""

    max_bytes: ClassVar[int] = 8192
    rates: Annotated[tuple[Rate, ...], Field(max_length=MAX_ROSTER)]

    @model_validator(mode="after")
    def _once_each(self) -> Rates:
        if len({rate.peer for rate in self.rates}) < len(self.rates):
            raise ValueError("a peer is there twice")
        return self


class LinkMap:
    """Tells others of our links, and gathers theirs. Of this event loop only."""

    def __init__(self, transport: Transport, own: Links, alive: Callable[[], Iterable[str]]) -> None:
        """alive: the other members of the run, who alone are asked."""
        self._transport = transport
        self._own = own
        self._alive = alive
        self._claims: dict[str, dict[str, float]] = {}  # by peer: Mbit/s by the other end
        self._asked: dict[str, float] = {}  # when, by peer
        self._asking: asyncio.Task[None] | None = None

    async def serve(self) -> None:
        """Answer whoever asks from now on."""

        async def answer(peer: str, payload: bytes) -> bytes:
            rows = self._own.rows()[:MAX_ROSTER]
            return Rates(rates=tuple(Rate(peer=row["peer"], mbit=min(row["mbit"], MAX_MBIT)) for row in rows)).pack()

        await self._transport.serve_call(METHOD, answer)

    def look(self) -> dict[str, Any]:
        """The map as far as it is known.

        "peers": ids. "pairs": [place of one in these, place of the other, Mbit/s, how many of the two say so].
        Of two claims the smaller one counts. Whoever's claim is old is asked, so the next look knows more.
        """
        alive = {self._transport.peer_id, *self._alive()}
        self._claims = {peer: claim for peer, claim in self._claims.items() if peer in alive}
        self._asked = {peer: at for peer, at in self._asked.items() if peer in alive}
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._ask_all(alive))
        claims = self._claims | {self._transport.peer_id: {row["peer"]: row["mbit"] for row in self._own.rows()}}
        peers = sorted(alive)
        pairs = []
        for at, one in enumerate(peers):
            for there, other in enumerate(peers[at + 1 :], at + 1):
                said = [claims[a][b] for a, b in ((one, other), (other, one)) if b in claims.get(a, {})]
                if said:
                    pairs.append([at, there, float(f"{min(said):.3g}"), len(said)])
        return {"peers": peers, "pairs": pairs}

    async def _ask_all(self, alive: set[str]) -> None:
        now = asyncio.get_running_loop().time()
        due = [peer for peer in alive if now - self._asked.get(peer, float("-inf")) >= ASK_EVERY_S]
        places = asyncio.Semaphore(_AT_ONCE)
        async with asyncio.TaskGroup() as group:
            for peer in due:
                if peer != self._transport.peer_id:
                    self._asked[peer] = now
                    group.create_task(self._ask(peer, places))

    async def _ask(self, peer: str, places: asyncio.Semaphore) -> None:
        try:
            async with places:
                told = Rates.unpack(await self._transport.call(peer, METHOD, b"", ANSWER_S))
            self._claims[peer] = {rate.peer: rate.mbit for rate in told.rates}
        except (NetworkError, MessageError):
            self._claims.pop(peer, None)  # it does not answer, or not as this version does; the others' claims remain

    def close(self) -> None:
        """Ask nobody any more."""
        if self._asking is not None:
            self._asking.cancel()
