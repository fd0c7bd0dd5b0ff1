"""Membership: beats between all members of a run, which carry everybody's status and hearsay about others.

One beat a second (less often in large swarms) informs both ends: the reply is the other's status. This is the shell
that sends, receives, bootstraps and remembers. What does not live here: who is alive (`table`), what each of them must
be told (`news`), what a status says (its owner packs and opens it), and the records in the DHT (`dht`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from p2pllm.errors import NetworkError, UnreachableError
from p2pllm.identity import is_peer_id
from p2pllm.network.beat import Beat
from p2pllm.network.news import News
from p2pllm.network.saved import load_peers, save_peers
from p2pllm.network.table import MemberTable
from p2pllm.network.transport import Transport

log = logging.getLogger(__name__)

_BEAT = "beat"
_LEAVE = "leave"
_FULL = b"full"  # the reply of a member whose table holds as many living ones as it may
_TICK_S = 0.1
_BEAT_TIMEOUT_S, _LEAVE_TIMEOUT_S = 4.0, 1.0
_LOOK_UP_EVERY_S, _LOOK_UP_ALONE_S = 120.0, 5.0
_STALL_S = 1.0
_TIDY_EVERY_S = 1.0
_TURNED_AWAY_S = 60.0


class Dialer(Transport, Protocol):
    """A Transport that can be told addresses."""

    def learn(self, peer: str, addresses: Iterable[str]) -> None:
        """Remember where a peer can be reached."""
        ...


class Record(Protocol):
    """What a lookup finds of one member."""

    @property
    def peer(self) -> str: ...
    @property
    def addresses(self) -> tuple[str, ...]: ...
    @property
    def status(self) -> bytes: ...  # as of a beat, or empty


class Lookup(Protocol):
    """Another source of members; `dht.Directory` is one."""

    async def members(self) -> Sequence[Record]:
        """All that can be found. Never raises NetworkError."""
        ...


class Membership:
    """Who takes part in the run, and who of them is alive. `start` it, then ask or wait for changes."""

    def __init__(
        self,
        transport: Dialer,
        *,
        status: Callable[[], bytes],
        on_status: Callable[[str, bytes], None],
        addresses: Callable[[], Sequence[str]],
        directory: Lookup | None = None,
        saved: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """status: packs our own status, at most 4 KiB. on_status: called with (peer id, status) of others,
        unchecked.

        addresses: where we can be reached. directory: looked through every 120 s, every 5 s while nobody is
        alive. saved: file with the peers of former sessions.
        """
        self._transport = transport
        self._on_status = on_status
        self._directory = directory
        self._saved = saved
        self._clock = clock
        self._table = MemberTable(transport.peer_id)
        self._news = News(self._table, status, addresses)
        self._in_flight: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._wake = asyncio.Event()
        self._changed = asyncio.Event()
        self._last_alive: frozenset[str] = frozenset()
        self._last_tick = self._last_tidied = clock()
        self._turned_away = -math.inf  # when a member last had no room for us
        self._stopped = False
        self.on_announced: Callable[[bytes], None] = lambda status: None  # with the status of another's record

    # -- for the owner ---------------------------------------------------------------------------------------

    async def start(self, bootstrap: Iterable[str] = ()) -> None:
        """Begin. bootstrap: addresses with peer ids, those of the invite; never forgotten. Raises NetworkError."""
        self.add(bootstrap)
        for peer, addresses in load_peers(self._saved).items():
            self._hearsay(peer, addresses)
        await self._transport.serve_call(_BEAT, self._answer_beat)
        await self._transport.serve_call(_LEAVE, self._answer_leave)
        self._last_tick = self._clock()
        self._spawn(self._run())
        if self._directory is not None:
            self._spawn(self._look_up(self._directory))

    async def stop(self) -> None:
        """Say goodbye to the living (at most 1 s), save the known peers, end."""
        self._stopped = True
        alive = self.alive()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.gather(*(self._say_goodbye(peer) for peer in alive))
        await self._save(alive)

    def alive(self) -> frozenset[str]:
        """Peer ids of the living, without ourselves."""
        return self._table.alive(self._clock())

    def known(self) -> dict[str, tuple[str, ...]]:
        """Addresses by peer id of all known members, dead and alive, without ourselves."""
        return self._table.known()

    def is_turned_away(self) -> bool:
        """Nobody is alive for us because the members of the run know as many as they can."""
        return not self.alive() and self._clock() - self._turned_away < _TURNED_AWAY_S

    async def wait_changed(self, seen: frozenset[str]) -> frozenset[str]:
        """Wait until the living are others than `seen`; returns them."""
        while (alive := self.alive()) == seen:
            await self._changed.wait()
        return alive

    def add(self, addresses: Iterable[str]) -> None:
        """More addresses to try, each ending in /p2p/ID; malformed ones are skipped. Never forgotten."""
        places: dict[str, list[str]] = {}
        for address in addresses:
            peer = address.rpartition("/p2p/")[2]
            if is_peer_id(peer):
                places.setdefault(peer, []).append(address)
        for peer, known in places.items():
            self._hearsay(peer, known, pinned=True)
        self._wake.set()

    def push(self, but: Iterable[str] = ()) -> None:
        """Our status has changed: tell the living now; each at most 10 times a second, less often if there are many.

        but: who hears of it with the next beat is early enough.
        """
        self._table.push(but)
        self._wake.set()

    # -- sending ---------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        while True:
            self._wake.clear()
            self.tick()
            tick_s = _TICK_S * self._table.slowness
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(tick_s):
                    await self._wake.wait()
                # a push of one who changes its status all the time must not make this loop spin
                await asyncio.sleep(tick_s / 10)

    def tick(self) -> None:
        """Send what is due, notice who fell silent. Every 0.1 s, less often in large swarms; public for tests."""
        now = self._clock()
        gap, self._last_tick = now - self._last_tick, now
        if gap > _STALL_S:
            self._table.forgive(gap, now)
        if now - self._last_tidied >= _TIDY_EVERY_S:
            self._last_tidied = now
            self._table.forget(now)
            self._news.tidy()
        for peer in self._table.due(now):
            if peer not in self._in_flight:
                self._table.beat_sent(peer, now)
                self._in_flight.add(peer)
                self._spawn(self._beat(peer))
        self._notice()

    async def _beat(self, peer: str) -> None:
        try:
            await self._exchange(peer, self._news.beat(peer, self._clock()))
        finally:
            self._in_flight.discard(peer)
            if self._table.is_due(peer, self._clock()):
                self._wake.set()  # our status changed meanwhile

    async def _exchange(self, peer: str, message: bytes) -> None:
        try:
            reply = await self._transport.call(peer, _BEAT, message, _BEAT_TIMEOUT_S)
            if reply == _FULL:
                self._turned_away = self._clock()
                raise NetworkError(f"Peer {peer[-8:]} has no room for another member.")
            self._take(peer, Beat.decode(reply))
        except (NetworkError, ValueError) as error:
            log.debug("no beat: %s", error)
            self._failed(peer, refused=isinstance(error, UnreachableError))

    def _failed(self, peer: str, *, refused: bool) -> None:
        self._news.forget(peer)
        self._table.failed(peer, self._clock(), refused=refused)
        self._notice()

    async def _say_goodbye(self, peer: str) -> None:
        with contextlib.suppress(NetworkError):
            await self._transport.call(peer, _LEAVE, b"", _LEAVE_TIMEOUT_S)

    # -- receiving -------------------------------------------------------------------------------------------

    async def _answer_beat(self, peer: str, payload: bytes) -> bytes:
        if self._stopped:
            raise NetworkError("leaving")  # an answer would look alive
        try:
            has_room = self._take(peer, Beat.decode(payload))
        except ValueError as error:
            log.debug("a beat of %s is malformed: %s", peer, error)
            raise NetworkError("malformed beat") from None
        if not has_room:
            return _FULL
        self._table.answered(peer)
        return self._news.beat(peer, self._clock())

    async def _answer_leave(self, peer: str, _: bytes) -> bytes:
        self._table.left(peer, self._clock())
        self._news.forget(peer)
        self._notice()
        return b""

    def _take(self, peer: str, beat: Beat) -> bool:
        """Use what a member says; False if there is no room for it."""
        if not is_peer_id(peer):
            raise NetworkError("malformed peer id")
        if not self._table.heard(peer, self._clock(), beat.addresses):
            return False
        if beat.addresses:
            self._transport.learn(peer, beat.addresses)
        alive = self.alive()
        for other, addresses in beat.hints.items():
            if other not in alive:  # their own word counts
                self._hearsay(other, addresses)
        self._notice()
        try:
            self._on_status(peer, beat.status)
        except Exception:  # whatever a stranger's status does to its owner's code, the beats go on
            log.exception("the status of %s could not be used", peer)
        return True

    def _hearsay(self, peer: str, addresses: Iterable[str], *, pinned: bool = False) -> None:
        if self._table.learn(peer, addresses, self._clock(), pinned=pinned):
            self._transport.learn(peer, self._table[peer].addresses)
            self._wake.set()

    def _notice(self) -> None:
        alive = self.alive()
        if alive is not self._last_alive and alive != self._last_alive:
            self._last_alive = alive
            self._changed.set()
            self._changed = asyncio.Event()

    # -- other sources ---------------------------------------------------------------------------------------

    async def _look_up(self, directory: Lookup) -> None:
        due, saved = -math.inf, frozenset[str]()
        while True:
            if not self.alive() or self._clock() >= due:
                for record in await directory.members():
                    self._hearsay(record.peer, record.addresses)
                    if record.peer != self._transport.peer_id:
                        self.on_announced(record.status)
                due = self._clock() + _LOOK_UP_EVERY_S
            if (alive := self.alive()) != saved:
                await self._save(alive)
                saved = alive
            await asyncio.sleep(_LOOK_UP_ALONE_S)

    async def _save(self, alive: frozenset[str]) -> None:
        """Remember the living for the next session; if there are none, the former ones stay."""
        known = self._table.known()
        peers = {peer: list(known[peer]) for peer in sorted(alive) if known.get(peer)}
        if self._saved is None or not peers:
            return
        try:
            await asyncio.to_thread(save_peers, self._saved, peers)
        except OSError as error:
            log.warning("the known peers cannot be saved to %s: %s", self._saved, error.strerror)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
