"""Supervisor: keeps one p2pd running, with the same identity and the same port, for the life of a node.

What lives here: start, health, restart, stop, and what p2pd says of its addresses. What does not: what is
sent through it (`node`).
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from typing import Protocol

from p2pllm.errors import NetworkError, P2PLLMError
from p2pllm.network.addresses import ordered, port_of, to_text
from p2pllm.network.control import Control
from p2pllm.network.options import P2pdOptions, Reach
from p2pllm.network.p2pd import P2pd, Progress
from p2pllm.network.relays import relays_well
from p2pllm.network.streams import Traffic

log = logging.getLogger(__name__)

_PROBE_EVERY_S = 2.0
_PROBE_TIMEOUT_S = 5.0
_SECOND_PROBE_S = 1.0
_SHORT_LIFE_S = 1.0
_SHORT_LIFE_PAUSE_S = 1.0
_RESTART_DELAYS_S = (0.0, 0.5, 1.0, 2.0, 4.0)

_RELAY_STARTS = 8
"""Starts of a p2pd that is to relay, half of which go wrong; then it goes on with one that relays next to nothing."""


class Owner(Protocol):
    """Whom the supervisor tells."""

    async def came_up(self, control: Control) -> None:
        """A new p2pd answers; register everything. Raises NetworkError: this start counts as failed."""
        ...

    async def went_down(self, orderly: bool) -> None:
        """p2pd is about to be stopped (orderly), or is gone."""
        ...

    def restarted(self, reason: str) -> None:
        """After `came_up`, if it was not the first time."""
        ...


class Supervisor:
    """Runs p2pd for its owner."""

    def __init__(self, options: P2pdOptions, peer_id: str, traffic: Traffic, owner: Owner) -> None:
        self.restarts = 0
        self.addresses: list[str] = []
        self.failed: asyncio.Future[NetworkError] = asyncio.get_running_loop().create_future()
        self._options = options
        self._any_port = options.listen_port == 0
        self._peer_id = peer_id
        self._traffic = traffic
        self._owner = owner
        self._p2pd: P2pd | None = None
        self._control: Control | None = None
        self._ready = asyncio.Event()
        self._watch: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()

    async def start(self, progress: Progress | None) -> None:
        """Start p2pd and watch it. Raises SettingsError and NetworkError."""
        await self._boot(progress)
        self._watch = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """End p2pd. Who waits in `up` gets a NetworkError."""
        if not self.failed.done():
            self.failed.cancel()
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
        await self._teardown(orderly=True)
        self._ready.set()  # for those who wait

    @property
    def pid(self) -> int | None:
        """Process id of p2pd; None between two of them."""
        return self._p2pd.pid if self._p2pd is not None else None

    @property
    def reach(self) -> Reach:
        """Who can dial us, as far as is known."""
        return self._options.reach

    def change(self, reach: Reach, relay: str) -> None:
        """Have p2pd started anew with these, soon."""
        self._options = replace(self._options, reach=reach, relay=relay)
        self._changed.set()

    async def up(self) -> Control:
        """The connection to p2pd, once there is one. Raises NetworkError if there never will be."""
        while True:
            if self.failed.cancelled():
                raise NetworkError("The network of this peer has been stopped.")
            if self.failed.done():
                raise NetworkError(str(self.failed.result()))
            if self._ready.is_set() and self._control is not None:
                return self._control
            await self._ready.wait()

    async def _boot(self, progress: Progress | None = None) -> None:
        self._changed.clear()
        try:
            control = await self._launch(progress)
            if self._options.reach is Reach.PUBLIC and self._options.relay_service:
                control = await self._until_it_relays(control)
            async with asyncio.timeout(self._options.startup_timeout_s):
                await self._owner.came_up(control)
        except BaseException as error:
            await self._teardown(orderly=False)
            if isinstance(error, TimeoutError):
                raise NetworkError("p2pd has started but does not answer.") from None
            raise
        self._ready.set()

    async def _launch(self, progress: Progress | None = None) -> Control:
        """Start p2pd and connect to it. Raises NetworkError, SettingsError, TimeoutError."""
        self._p2pd = await P2pd.start(self._options, progress)
        async with asyncio.timeout(self._options.startup_timeout_s):
            self._control = control = await Control.open(
                self._p2pd.control_socket, self._p2pd.stream_socket, self._traffic
            )
            await self._look_around(control)
        return control

    async def _until_it_relays(self, control: Control) -> Control:
        """Start p2pd anew until it relays as it was told to (see `relays`)."""
        for _ in range(_RELAY_STARTS - 1):
            if await relays_well(self._options, self._peer_id):
                return control
            await control.close()
            if self._p2pd is not None:
                await self._p2pd.stop()
            control = await self._launch()
        return control

    async def _teardown(self, *, orderly: bool) -> None:
        self._ready.clear()
        await self._owner.went_down(orderly and self._control is not None)
        control, self._control = self._control, None
        p2pd, self._p2pd = self._p2pd, None
        if control is not None:
            await control.close()
        if p2pd is not None:
            await p2pd.stop()

    async def _run(self) -> None:
        """Keep p2pd alive; if that cannot be done, the owner must know."""
        try:
            await self._keep_alive()
        except Exception as error:
            log.exception("p2pd cannot be supervised")
            if not self.failed.done():
                self.failed.set_result(NetworkError(f"p2pd cannot be kept alive: {error}."))
            self._ready.set()

    async def _keep_alive(self) -> None:
        while True:
            started = asyncio.get_running_loop().time()
            reason = await self._until_broken()
            wanted = self._changed.is_set()
            log.log(logging.INFO if wanted else logging.WARNING, "%s; restarting p2pd", reason)
            await self._teardown(orderly=False)
            if asyncio.get_running_loop().time() - started < _SHORT_LIFE_S:
                await asyncio.sleep(_SHORT_LIFE_PAUSE_S)  # what dies at once each time must not use a whole core
            error = await self._revive()
            if error is not None:
                self.failed.set_result(NetworkError(f"p2pd cannot be restarted: {error}"))
                self._ready.set()  # for those who wait
                return
            self.restarts += not wanted
            self._owner.restarted(reason)

    async def _until_broken(self) -> str:
        """Wait until p2pd exits or hangs, or is to be another; why, as a phrase."""
        assert self._p2pd is not None and self._control is not None  # noqa: S101 - `_boot` has set them
        exited = asyncio.create_task(self._p2pd.wait())
        lost = asyncio.create_task(self._control.lost.wait())
        hung = asyncio.create_task(self._until_hung(self._control))
        changed = asyncio.create_task(self._changed.wait())
        tasks = (exited, lost, hung, changed)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if lost.done():
                await asyncio.wait({exited}, timeout=_SECOND_PROBE_S)  # the better reason comes a moment later
            if exited.done():
                return exited.result()
            if changed.done():
                return f"who can dial us: {self._options.reach.value}"
            return hung.result() if hung.done() else "p2pd closed its connection"
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _until_hung(self, control: Control) -> str:
        while True:
            await asyncio.sleep(_PROBE_EVERY_S)
            # the second one is for ourselves: if it was we who did not run for so long, it passes at once
            if not await self._probe(control, _PROBE_TIMEOUT_S) and not await self._probe(control, _SECOND_PROBE_S):
                return f"p2pd did not answer for {_PROBE_TIMEOUT_S:g} s"

    async def _probe(self, control: Control, timeout: float) -> bool:
        try:
            async with asyncio.timeout(timeout):
                await self._look_around(control)
        except (TimeoutError, NetworkError):
            return False
        return True

    async def _revive(self) -> P2PLLMError | None:
        """Boot again, up to five times; the error if none worked."""
        error: P2PLLMError | None = None
        for number, delay in enumerate(_RESTART_DELAYS_S):
            await asyncio.sleep(delay)
            if self._any_port and number == len(_RESTART_DELAYS_S) - 1:
                self._options = replace(self._options, listen_port=0)  # somebody took our port: better moved than gone
            try:
                await self._boot()
                return None
            except P2PLLMError as failure:
                log.warning("p2pd did not restart: %s", failure)
                error = failure
                if self._options.relay:  # what others say must not keep it from starting
                    self._options = replace(self._options, reach=Reach.UNKNOWN, relay="")
        return error

    async def _look_around(self, control: Control) -> None:
        """Ask p2pd who and where it is. Raises NetworkError."""
        peer, found = await control.identify()
        if peer.to_base58() != self._peer_id:
            raise NetworkError(f"p2pd runs as {peer}, not as {self._peer_id}; the key file was replaced.")
        places = []
        for raw in found:
            try:
                places.append(to_text(raw))
            except ValueError as error:
                log.debug("p2pd listens on an address of an unknown kind: %s", error)
        if self._options.listen_port == 0:
            # others know us by this port, so the next p2pd shall have it too
            port = next((port for place in places if (port := port_of(place))), 0)
            self._options = replace(self._options, listen_port=port)
        self.addresses = [f"{place}/p2p/{self._peer_id}" for place in ordered(self._options.announce or places)]
