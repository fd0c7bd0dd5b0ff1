"""Directory: who is in the run, as small signed records in hivemind's Kademlia DHT.

Each peer announces one record under the run's key, with its peer id as the subkey. Every node refuses records
that are not signed by the peer that they name, so a stranger can announce itself and nobody else. What does
not live here: whether a member is alive (`membership`) and p2pd (`node`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from hivemind.dht.crypto import DHTRecord, RecordValidatorBase
from hivemind.dht.node import DHTNode
from hivemind.dht.routing import DHTID
from hivemind.p2p import P2P, PeerID
from hivemind.utils.logging import use_hivemind_log_handler
from hivemind.utils.multiaddr import Multiaddr

from p2pllm.identity import Identity, is_peer_id, verify
from p2pllm.network.addresses import MAX_ADDRESSES, checked_addresses
from p2pllm.network.control import Control
from p2pllm.network.messages import pack, unpack

log = logging.getLogger(__name__)

RECORD_SECONDS = 60.0
"""How long a record is kept after it was signed."""

ANNOUNCE_SECONDS = 20.0
"""Time between announcements of a running node."""

MAX_RECORD_BYTES = 1024
"""Bound on one packed record."""

MAX_STATUS_BYTES = 160
"""Bound on the status in a record."""

MAX_RECORDS = 1024
"""Members that one node stores; further ones are refused until some expire."""

_CLOCK_SKEW_S = 60.0
"""Clocks may differ by this much; a record that lasts longer than both together is refused."""

_TIMEOUT_S = 10.0
"""One lookup or announcement; hivemind gives up on one peer after 3 seconds."""

_DOMAIN = "member-record"


@dataclass(frozen=True)
class MemberRecord:
    """Where a peer can be reached, and its status, opaque here. `issued` is Unix time in seconds by its clock."""

    peer: str
    addresses: tuple[str, ...]
    status: bytes
    issued: float
    signature: bytes

    @classmethod
    def sign(
        cls, identity: Identity, run_id: str, addresses: Sequence[str], now: float, status: bytes = b""
    ) -> MemberRecord:
        """A record of ourselves with a status of at most MAX_STATUS_BYTES.

        Addresses that do not fit into MAX_RECORD_BYTES are left out, the last ones first.
        """
        fitting = list(addresses)[:MAX_ADDRESSES]
        while True:
            body = _body(run_id, identity.peer_id, fitting, status, now)
            record = cls(identity.peer_id, tuple(fitting), status, now, identity.sign(_DOMAIN, body))
            if len(record.encode()) <= MAX_RECORD_BYTES:
                return record
            fitting.pop()

    def encode(self) -> bytes:
        """The packed record."""
        return pack([self.peer, list(self.addresses), self.status, self.issued, self.signature])

    @classmethod
    def decode(cls, data: bytes, run_id: str) -> MemberRecord:
        """Open and check a packed record. Raises ValueError: malformed, too long, or not signed by its peer."""
        fields = unpack(data, MAX_RECORD_BYTES)
        if not isinstance(fields, list) or len(fields) != 5:
            raise ValueError("not a member record")
        peer, addresses, status, issued, signature = fields
        if not is_peer_id(peer) or not isinstance(issued, float) or not isinstance(signature, bytes):
            raise ValueError("a member record has a field of a wrong type")
        if not isinstance(status, bytes) or len(status) > MAX_STATUS_BYTES:
            raise ValueError("a member record has a status that cannot be right")
        known = checked_addresses(addresses)
        if not verify(peer, _DOMAIN, _body(run_id, peer, known, status, issued), signature):
            raise ValueError("a member record is not signed by its peer")
        return cls(peer, tuple(known), status, issued, signature)


def _body(run_id: str, peer: str, addresses: Sequence[str], status: bytes, issued: float) -> bytes:
    return pack([run_id, peer, list(addresses), status, issued])


class MemberValidator(RecordValidatorBase):  # type: ignore[misc]  # hivemind has no types
    """Accepts member records of one run and nothing else, at every node that stores or looks up."""

    def __init__(self, run_id: str, clock: Callable[[], float] = time.time) -> None:
        self._run_id = run_id
        self._key = DHTID.generate(source=directory_key(run_id)).to_bytes()
        self._clock = clock
        self._stored: dict[bytes, float] = {}

    def validate(self, record: DHTRecord) -> bool:
        """Whether the record may be stored or believed. Never raises."""
        try:
            return record.key == self._key and self._is_valid(record) and self._has_room(record)
        except (ValueError, TypeError) as error:
            log.debug("refused a DHT record: %s", error)
            return False

    def _is_valid(self, record: DHTRecord) -> bool:
        if not record.expiration_time <= self._clock() + RECORD_SECONDS + _CLOCK_SKEW_S:
            return False
        value = unpack(record.value, MAX_RECORD_BYTES + 8)
        if not isinstance(value, bytes):
            return False
        member = MemberRecord.decode(value, self._run_id)
        # bound to what was signed: nobody else can prolong an old record
        lasts = abs(record.expiration_time - member.issued - RECORD_SECONDS) < 1
        return lasts and bool(record.subkey == pack(member.peer))

    def _has_room(self, record: DHTRecord) -> bool:
        now = self._clock()
        if record.subkey not in self._stored and len(self._stored) >= MAX_RECORDS:
            self._stored = {peer: until for peer, until in self._stored.items() if until > now}
            if len(self._stored) >= MAX_RECORDS:
                return False
        self._stored[record.subkey] = record.expiration_time
        return True


def directory_key(run_id: str) -> str:
    """The DHT key of a run's members."""
    return f"{run_id}/members"


class _SharedP2P(P2P):  # type: ignore[misc]  # hivemind has no types
    """hivemind's P2P on top of our control connection; its life is the node's business."""

    def __init__(self, control: Control, peer_id: str) -> None:
        super().__init__()
        self._client = control
        self.peer_id = PeerID.from_base58(peer_id)
        self._alive = True
        self._visible_maddrs: tuple[Multiaddr, ...] = ()

    def _start_listening(self) -> None:
        """Our control listens already."""

    def _terminate(self) -> None:
        """The node ends p2pd; hivemind would when this object is collected."""


class Directory:
    """Announces ourselves and finds the others. One for the life of a node; `attach` again after p2pd
    restarts.
    """

    def __init__(
        self,
        identity: Identity,
        run_id: str,
        addresses: Callable[[], Sequence[str]],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._identity = identity
        self._run_id = run_id
        self._addresses = addresses
        self._clock = clock
        self.status: Callable[[], bytes] = lambda: b""
        """What our record says of us, beside where we are: where we are in the run."""
        self.member = True
        """False: we only look, announce nothing and store nothing."""
        self._dht: DHTNode | None = None
        self._tasks: set[asyncio.Task[Any]] = set()

    async def attach(self, control: Control) -> None:
        """Start a DHT node on p2pd and announce from now on. Raises NetworkError."""
        use_hivemind_log_handler("nowhere")  # else it prints to stderr by itself
        self._dht = await DHTNode.create(
            p2p=_SharedP2P(control, self._identity.peer_id),
            node_id=DHTID.generate(source=self._identity.peer_id),  # the same after a restart
            record_validator=MemberValidator(self._run_id, self._clock),
            cache_locally=False,  # a lookup shall see who came since the last one
            cache_nearest=0,
            cache_on_store=False,
            client_mode=not self.member,
        )
        if self.member:
            self._spawn(self._announce_forever())

    async def detach(self, *, alive: bool) -> None:
        """Stop announcing; with a living p2pd also stop answering."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        dht, self._dht = self._dht, None
        if dht is None:
            return
        dht.is_alive = False
        if alive:
            try:
                async with asyncio.timeout(1):
                    await dht.shutdown()
            except Exception as error:  # noqa: BLE001 - hivemind raises anything, and p2pd must be ended all the same
                log.debug("the DHT node did not end in order: %r", error)

    def introduce(self, peer: str) -> None:
        """Tell the DHT of a peer that we are connected with."""
        if self._dht is not None:
            self._spawn(self._dht.protocol.call_ping(PeerID.from_base58(peer)))

    async def announce(self) -> bool:
        """Store our record now, with our status; whether somebody (or we ourselves) keeps it. Never raises."""
        if self._dht is None:
            return False
        record = MemberRecord.sign(self._identity, self._run_id, self._addresses(), self._clock(), self.status())
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                stored = await self._dht.store(
                    directory_key(self._run_id),
                    record.encode(),
                    record.issued + RECORD_SECONDS,
                    subkey=self._identity.peer_id,
                )
        except Exception:  # hivemind raises all kinds on what strangers send; the next attempt is 20 s away
            log.debug("announcing failed", exc_info=True)
            return False
        return bool(stored)

    async def members(self) -> list[MemberRecord]:
        """The valid records of the run, our own among them, at most MAX_RECORDS; what did not answer is
        missing.
        """
        if self._dht is None:
            return []
        try:
            async with asyncio.timeout(_TIMEOUT_S):
                found = await self._dht.get(directory_key(self._run_id), latest=True)
        except Exception:  # hivemind raises all kinds on what strangers send
            log.debug("a lookup failed", exc_info=True)
            return []
        values = found.value if found is not None and isinstance(found.value, dict) else {}
        records = []
        for item in list(values.values())[:MAX_RECORDS]:
            try:
                records.append(MemberRecord.decode(item.value, self._run_id))
            except (ValueError, TypeError) as error:
                log.debug("ignored a member record: %s", error)
        return records

    async def _announce_forever(self) -> None:
        while True:
            await self.announce()
            await asyncio.sleep(ANNOUNCE_SECONDS)

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
