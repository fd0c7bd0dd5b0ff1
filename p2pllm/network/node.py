"""Node: the real Transport. It names the methods, knows where peers live and keeps the handlers.

A restart of p2pd keeps the identity, the port and the handlers; calls in flight fail with NetworkError, later
ones wait for the new p2pd within their own time-out. What does not live here: p2pd's life (`supervisor`), its
protocol (`control`), the DHT (`dht`), who is alive (`membership`).
"""

from __future__ import annotations

import asyncio
import contextlib
from asyncio import StreamReader, StreamWriter
from collections.abc import Callable, Coroutine, Iterable
from pathlib import Path
from typing import Any, Self

from hivemind.p2p import PeerID

from p2pllm.errors import NetworkError, UnreachableError
from p2pllm.identity import Identity, is_peer_id
from p2pllm.network.addresses import MAX_ADDRESS_BYTES, MAX_ADDRESSES, hosts_of, split, to_text
from p2pllm.network.book import AddressBook
from p2pllm.network.calls import METHOD as CALLS
from p2pllm.network.calls import Calls
from p2pllm.network.control import P2PD_STOPPED, Control
from p2pllm.network.dht import Directory
from p2pllm.network.direct import Direct
from p2pllm.network.introduction import METHOD as DIRECT
from p2pllm.network.options import ListenSettings, NodeSettings, P2pdOptions, Reach
from p2pllm.network.p2pd import Progress
from p2pllm.network.relays import carries
from p2pllm.network.streams import Traffic
from p2pllm.network.supervisor import Supervisor
from p2pllm.network.transport import MAX_CALL_BYTES, MUCH_BYTES, CallHandler, StreamHandler
from p2pllm.network.wire import short

OPEN_STREAM_S = 10.0
"""Time that `open_stream` may take."""

_RECONNECT_S = 10.0

YIELD_S = 0.5
"""How much later one of two peers that are not connected dials: the one with the greater id.

go-libp2p dials from its listening port. If both dial at once, as they do when they hear of each other from a third, TCP
makes one connection of both in which each side takes itself for the client: the handshake fails, both back off for as
long, and fail again together, for minutes.
"""


class Node:
    """A Transport over p2pd. Made by `start`, ended by `stop`.

    identity: our key. traffic: bytes moved so far. directory: the members that the DHT knows. relays_for_others: p2pd
    does, until it is started with other settings.
    """

    def __init__(self, identity: Identity, run_id: str, options: P2pdOptions) -> None:
        self.identity = identity
        self.relays_for_others = options.relay_service
        self.traffic = Traffic()
        self.directory = Directory(identity, run_id, self.addresses)
        self._prefix = f"/p2pllm/1/{run_id[:16]}/"
        self._supervisor = Supervisor(options, identity.peer_id, self.traffic, self)
        self._book = AddressBook()
        self._calls = Calls(lambda peer: self._stream(peer, CALLS))
        self._streams: dict[str, StreamHandler] = {CALLS: self._calls.accept}
        self._direct = Direct(identity.peer_id, self.traffic, self._ask_for_direct, self._hosts, self._served)
        self._calls.serve(DIRECT, self._direct.introduce)
        self._background: set[asyncio.Task[Any]] = set()
        self.on_reconnect: Callable[[], None] = lambda: None
        """Called when a peer is reached again after p2pd was restarted; the owner may set it."""

    @classmethod
    async def start(
        cls,
        identity: Identity,
        run_id: str,
        runtime_dir: Path,
        settings: ListenSettings,
        *,
        reach: Reach = Reach.UNKNOWN,
        progress: Progress | None = None,
        member: bool = True,
    ) -> Self:
        """Start p2pd and return once it answers.

        identity: with its key file. run_id: 64 hex digits. runtime_dir: private folder of the sockets, at
        most 90 bytes. reach: who can dial us, if that is known; whoever founds a run must be PUBLIC.
        progress: called with phrases while p2pd starts. member: False for who only looks: it is in no
        directory and keeps nobody's records. Raises SettingsError (address or folder cannot be
        used) and NetworkError (port in use, p2pd does not start).
        """
        if identity.path is None:
            raise NetworkError("A node needs an identity that is in a file, because p2pd reads it.")
        options = P2pdOptions.of(settings, identity.path, runtime_dir, reach)
        self = cls(identity, run_id, options)
        self.traffic.pacer.mbit, self.traffic.intake.mbit = settings.upload_mbit, settings.download_mbit
        self.directory.member = member
        await self._supervisor.start(progress)
        try:
            await self._direct.start(runtime_dir, settings.listen_host, settings.direct_port)
        except BaseException:
            await self._supervisor.stop()
            raise
        return self

    async def stop(self) -> None:
        """End p2pd and remove its sockets, within 3 seconds. Calls in flight fail. May be called twice."""
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        await self._direct.stop()
        await self._supervisor.stop()

    @property
    def restarts(self) -> int:
        """How often p2pd had to be restarted."""
        return self._supervisor.restarts

    @property
    def failed(self) -> asyncio.Future[NetworkError]:
        """Done, with the error as its result, when p2pd cannot be restarted; cancelled by `stop`."""
        return self._supervisor.failed

    # -- who and where -------------------------------------------------------------------------------------

    @property
    def peer_id(self) -> str:
        """Our own peer id, base58."""
        return self.identity.peer_id

    def addresses(self) -> list[str]:
        """Where others can reach us, each ending in /p2p/ID; at most 8, loopback last. Refreshed every 2 s."""
        return [text for text in self._supervisor.addresses if len(text) <= MAX_ADDRESS_BYTES][:MAX_ADDRESSES]

    @property
    def reach(self) -> Reach:
        """Who can dial us, as far as is known."""
        return self._supervisor.reach

    def change_reach(self, reach: Reach, relay: str = "") -> None:
        """Go on with a p2pd that knows who can dial us, and who relays for us where nobody can."""
        self._supervisor.change(reach, relay)

    async def carries(self, peer: str) -> int:
        """Bytes that a peer relays for us on one circuit, each way; 0 if it does not. Raises NetworkError."""
        try:
            async with asyncio.timeout(OPEN_STREAM_S):
                return await carries(await self._introduced(peer), peer)
        except TimeoutError:
            raise NetworkError(f"Peer {short(peer)} does not say whether it relays.") from None

    async def seen_at(self, peer: str) -> list[str]:
        """Multiaddresses from which a connected peer is connected with us. Raises NetworkError."""
        control = await self._supervisor.up()
        found = []
        for raw in await control.remote_addresses(_peer(peer)):
            with contextlib.suppress(ValueError):  # of a kind that we do not know
                found.append(to_text(raw))
        return found

    def learn(self, peer: str, addresses: Iterable[str]) -> None:
        """Remember where a peer can be reached. Addresses are checked when they are used."""
        if peer != self.peer_id:
            self._book.learn(peer, addresses)

    async def connect(self, address: str, timeout: float = 20.0) -> str:
        """Connect to the peer at an address that ends in /p2p/ and its id; returns the id.

        Raises UnreachableError: malformed, nobody there, somebody else there, or no answer in `timeout` seconds.
        """
        try:
            peer, place = split(address)
        except ValueError as error:
            raise UnreachableError(f"This address cannot be used: {error}.") from None
        try:
            async with asyncio.timeout(timeout):
                control = await self._supervisor.up()
                await control.connect(PeerID.from_base58(peer), [place])
        except TimeoutError:
            raise UnreachableError(f"Nobody answers at {address} within {timeout:g} s.") from None
        if peer not in self._book:
            self.learn(peer, [address])
        self._meet(peer)
        return peer

    async def connect_any(self, addresses: Iterable[str], timeout: float = 20.0) -> str:
        """Try all addresses at once; returns the id of the first peer that answers.

        Raises UnreachableError that lists what was tried and why it failed.
        """
        tried = list(dict.fromkeys(addresses))
        tasks = {asyncio.create_task(self.connect(address, timeout)): address for address in tried}
        reasons = []
        try:
            for next_done in asyncio.as_completed(tasks):
                try:
                    return await next_done
                except NetworkError as error:
                    reasons.append(str(error).rstrip("."))
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        raise UnreachableError(
            f"No peer can be reached at {', '.join(tried) or 'no address at all'} ({'; '.join(reasons)}); "
            "check your connection, or ask for a fresh invite."
        )

    # -- Transport -----------------------------------------------------------------------------------------

    async def call(self, peer: str, method: str, payload: bytes, timeout: float) -> bytes:
        """See Transport. Raises UnreachableError where nobody is there, NetworkError otherwise."""
        if len(payload) > MAX_CALL_BYTES:
            raise NetworkError(f"A call of {method} has {len(payload)} bytes; {MAX_CALL_BYTES} are allowed.")
        try:
            async with asyncio.timeout(timeout):
                return await self._calls.call(peer, method, payload)
        except TimeoutError:
            raise NetworkError(f"Peer {short(peer)} did not answer {method} within {timeout:g} s.") from None
        except UnreachableError:
            self._book.lose(peer)
            raise

    async def open_stream(self, peer: str, method: str, expected: int = 0) -> tuple[StreamReader, StreamWriter]:
        """See Transport.

        An end of the stream is also what a lost connection looks like, so the data must say where they end.
        There is no half-closed state: `write_eof` ends both directions.
        """
        try:
            async with asyncio.timeout(OPEN_STREAM_S):
                if expected >= MUCH_BYTES and (stream := await self._direct.open(peer, self._prefix + method)):
                    return stream
                return await self._stream(peer, method)
        except TimeoutError:
            raise NetworkError(f"Peer {short(peer)} did not take a stream within {OPEN_STREAM_S:g} s.") from None
        except UnreachableError:
            self._book.lose(peer)
            raise

    async def _stream(self, peer: str, method: str) -> tuple[StreamReader, StreamWriter]:
        control = await self._introduced(peer)
        stream = await control.open_stream(_peer(peer), self._prefix + method)
        self._meet(peer)
        return stream

    async def serve_call(self, method: str, handler: CallHandler) -> None:
        """See Transport. Stays registered over restarts of p2pd."""
        self._calls.serve(method, handler)

    async def serve_stream(self, method: str, handler: StreamHandler) -> None:
        """See Transport. Stays registered over restarts of p2pd."""
        known = method in self._streams
        control = await self._supervisor.up()
        self._streams[method] = handler
        if not known:
            try:
                await self._serve_stream(control, method)
            except NetworkError:
                if not control.lost.is_set():  # else the next p2pd gets all handlers
                    raise

    async def _serve_stream(self, control: Control, method: str) -> None:
        async def accept(caller: PeerID, reader: StreamReader, writer: StreamWriter) -> None:
            peer = caller.to_base58()
            self._meet(peer)
            await self._streams[method](peer, reader, writer)

        await control.serve_stream(self._prefix + method, accept)

    async def _ask_for_direct(self, peer: str, payload: bytes) -> bytes:
        return await self.call(peer, DIRECT, payload, OPEN_STREAM_S)

    async def _hosts(self, peer: str) -> list[str]:
        """Where a peer may be reached: from where it is connected with us; if a relay lies between, where it says."""
        return hosts_of(await self.seen_at(peer), self._book.texts(peer))

    def _served(self, proto: str) -> StreamHandler | None:
        return self._streams.get(proto.removeprefix(self._prefix)) if proto.startswith(self._prefix) else None

    async def _introduced(self, peer: str) -> Control:
        """The connection to p2pd, which now knows the addresses that we know of the peer."""
        control = await self._supervisor.up()
        if not self._book.has_met(peer) and self.peer_id > peer:
            await asyncio.sleep(YIELD_S)
        if not self._book.has_met(peer):
            places = self._book.places(peer)
            if places:
                await control.connect(_peer(peer), places)
        return control

    def _meet(self, peer: str) -> None:
        """The peer is connected with us."""
        if self._book.meet(peer):
            self.directory.introduce(peer)

    # -- what the supervisor tells -------------------------------------------------------------------------

    async def came_up(self, control: Control) -> None:
        """See Owner."""
        await asyncio.gather(*(self._serve_stream(control, method) for method in self._streams))
        await self.directory.attach(control)

    async def went_down(self, orderly: bool) -> None:
        """See Owner."""
        await self._calls.close("p2pd is stopping on this machine." if orderly else P2PD_STOPPED)
        await self.directory.detach(alive=orderly)

    def restarted(self, reason: str) -> None:
        """See Owner."""
        for peer in self._book.forget_met():
            self._spawn(self._reconnect(peer))

    async def _reconnect(self, peer: str) -> None:
        """Dial from our side at once: after a failed attempt the others' p2pd refuse to, for seconds."""
        with contextlib.suppress(TimeoutError, NetworkError):
            async with asyncio.timeout(_RECONNECT_S):
                await self._introduced(peer)
                self._meet(peer)
                self.on_reconnect()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)


def _peer(peer: str) -> PeerID:
    if not is_peer_id(peer):
        raise NetworkError(f"{peer[:64]} is not the id of a peer.")
    return PeerID.from_base58(peer)


__all__ = ["ListenSettings", "Node", "NodeSettings", "Reach"]
