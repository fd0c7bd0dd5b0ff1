"""The daemon of a node: `python -m p2pllm_peers.daemon`, started by `launcher`.

It owns the network, the shared state and the round protocol, supervises the worker, and answers the commands of
this machine. This file is its life from the order to the exit; what it takes part with is `Membership`,
`TrainingLoop` and their kin in the library, put together in `participant`. What needs hivemind is imported inside of
functions: that takes a second, in which the worker loads its own libraries already. torch is not loaded here.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import json
import logging
import os
import shutil
import signal
import sys
from collections.abc import Awaitable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from p2pllm.errors import NetworkError, P2PLLMError, RunError, StateError
from p2pllm.identity import Identity
from p2pllm.invite import Invite
from p2pllm.manifest import RunDraft
from p2pllm.network.addresses import port_of
from p2pllm.network.lean import load_lean
from p2pllm.network.options import Reach
from p2pllm.settings import new_runtime_dir
from p2pllm_peers.commands import commands_of
from p2pllm_peers.control import ControlServer
from p2pllm_peers.devices import Devices
from p2pllm_peers.flags import Wishes
from p2pllm_peers.folders import FOUNDER, PeerFolder, RunFolder, key_file, write_whole
from p2pllm_peers.launcher import Order
from p2pllm_peers.orders import known_folder, occupy
from p2pllm_peers.reporting import silence, tell, tell_progress

if TYPE_CHECKING:
    from p2pllm.network.node import Node
    from p2pllm_peers.participant import Participant

T = TypeVar("T")

log = logging.getLogger("p2pllm.daemon")

LEAVE_ROUND_S = 4.0
"""How long a peer that was asked to leave goes on with a round that is being closed."""


class Daemon:
    """One peer of one run."""

    def __init__(self, order: Order, runtime_dir: Path) -> None:
        self._order = order
        self._settings = order.settings
        self._wishes = Wishes(order.settings, order.flags)
        self._runtime_dir = runtime_dir
        self._leaving = asyncio.Event()
        self._interrupts = 0
        self._compute: Devices | None = None
        self._node: Node | None = None
        self._participant: Participant | None = None
        self._control: ControlServer | None = None
        self._facts: dict[str, Any] = {}

    async def run(self) -> None:
        """From the order to the end of the run, or until asked to leave."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._interrupt)
        if self._order.foreground:  # leave when the program that started us hangs up, however early
            loop.add_reader(sys.stdin.fileno(), self._hung_up)
        invite = Invite.decode(self._order.invite) if self._order.invite else None
        draft = RunDraft(**self._order.draft) if self._order.draft is not None else None
        folder = known_folder(self._order, invite, draft)
        if folder is not None:
            self._settings = self._wishes.begin(folder)
        self._compute = Devices(self._settings, self._runtime_dir, self._on_compute, tell_progress)
        try:
            await self._unless_leaving(self._enter(self._compute, folder, invite, draft))
            if self._participant is not None and not self._leaving.is_set():
                await self._take_part(self._participant)
        finally:
            await self._end()

    async def _enter(
        self, compute: Devices, folder: PeerFolder | None, invite: Invite | None, draft: RunDraft | None
    ) -> None:
        """Find out what to compute, start everything, and report ready. folder: None if there is no such run yet."""
        await compute.launch()
        await asyncio.to_thread(_load_libraries)
        from p2pllm_peers.entry import fetch_manifest
        from p2pllm_peers.participant import Participant

        if folder is None:
            assert draft is not None  # noqa: S101 - every other order names a run
            folder = await self._found(compute, draft)
        identity = Identity.load_or_create(folder.key)
        # A founder that goes on with its own invite finds itself in it.
        addresses = tuple(a for a in (invite.addresses if invite else ()) if not a.endswith(identity.peer_id))
        tell_progress("starting the network")
        node = self._node = await self._start_node(folder, identity, self._reach(folder, bool(addresses)))
        sealed = folder.run.load()
        if sealed is None:
            if invite is None:
                raise StateError(f"The manifest of run {folder.run.run_id[:16]} is missing; join again with an invite.")
            sealed = await fetch_manifest(node, invite, tell_progress)
            folder.run.save(*sealed)
        participant = self._participant = Participant(folder, sealed, self._settings, node, compute)
        await participant.start(addresses, tell_progress)
        await self._open_for_commands(folder, participant)

    async def _found(self, compute: Devices, draft: RunDraft) -> PeerFolder:
        """Seal a new run and become its founder."""
        from p2pllm_peers.entry import seal

        home, name = self._settings.home, self._order.name or FOUNDER
        sealed = await seal(draft, Identity.load_or_create(key_file(home, name)), compute, self._settings)
        run = RunFolder(home, sealed[0].run_id)
        run.save(*sealed, draft_digest=draft.digest())
        folder = occupy(run.peer(name))
        self._wishes.begin(folder)
        return folder

    def _reach(self, folder: PeerFolder, knows_others: bool) -> Reach:
        return Reach.PUBLIC if self._settings.announce else folder.reach(knows_others)

    async def _start_node(self, folder: PeerFolder, identity: Identity, reach: Reach) -> Node:
        """Start the network on the port of the last time if it is free, so that old addresses of ours stay true."""
        from p2pllm.network.node import Node

        remembered, wanted = folder.path / "port", self._settings.listen_port
        with contextlib.suppress(OSError, ValueError):
            wanted = wanted or int(remembered.read_text())
        settings = self._settings.model_copy(update={"listen_port": wanted})
        try:
            node = await Node.start(
                identity,
                folder.run.run_id,
                self._runtime_dir,
                settings,
                reach=reach,
                progress=tell_progress,
            )
        except NetworkError:
            if self._settings.listen_port or not wanted:
                raise
            remembered.unlink()
            return await self._start_node(folder, identity, reach)
        if ports := [port for port in map(port_of, node.addresses()) if port]:
            write_whole(remembered, str(ports[0]).encode())
        folder.remember_reach(node.reach)
        return node

    async def _open_for_commands(self, folder: PeerFolder, participant: Participant) -> None:
        """Open the control socket, and write down where it is."""
        socket = self._runtime_dir / "control.sock"
        self._control = ControlServer(socket, commands_of(participant, self._leaving.set))
        await self._control.start()
        self._facts = {
            "pid": os.getpid(),
            "socket": str(socket),
            "runtime_dir": str(self._runtime_dir),
            "run_id": folder.run.run_id,
            "name": folder.name,
            "peer_id": self._node.peer_id if self._node else "",
            "invite": participant.invite(),
        }
        write_whole(folder.path / "daemon.json", json.dumps(self._facts).encode())
        # Who found no socket left it in files; from here on all will ask us.
        if news := self._wishes.news(folder):
            participant.set(news)
        participant.guest.recall()

    async def _tell_ready(self, compute: Devices) -> None:
        """Tell who started us, once there is nothing more that it could hear of."""
        await compute.wait_ready()
        tell("ready", **self._facts)
        if not self._order.foreground:
            silence()  # whoever reads our pipe may end before us

    async def _take_part(self, participant: Participant) -> None:
        """Train until the run is over, we are asked to leave, or something failed for good."""
        assert self._compute is not None and self._node is not None  # noqa: S101 - made before
        training = asyncio.create_task(participant.loop.run())
        telling = asyncio.create_task(self._tell_ready(self._compute))
        leaving = asyncio.create_task(self._leaving.wait())
        failed = asyncio.ensure_future(_first_failure(self._compute.failed, self._node.failed))
        await asyncio.wait({training, leaving, failed}, return_when=asyncio.FIRST_COMPLETED)
        participant.loop.stop()
        if not failed.done() and not training.done():
            await asyncio.wait({training}, timeout=LEAVE_ROUND_S)
        for task in (training, telling, leaving, failed):
            task.cancel()
        await asyncio.gather(telling, return_exceptions=True)  # what it raises, `failed` does too
        for outcome in await asyncio.gather(failed, training, return_exceptions=True):
            if isinstance(outcome, Exception):
                raise outcome

    async def _end(self) -> None:
        """Say goodbye, save, and leave no process and no socket."""
        try:
            if self._participant is not None:
                await self._participant.stop()
        finally:
            ending = [
                part for part in (self._node and self._node.stop(), self._compute and self._compute.close()) if part
            ]
            for outcome in await asyncio.gather(*ending, return_exceptions=True):
                if isinstance(outcome, Exception):
                    log.error("not ended in order: %r", outcome)
            if self._control is not None:
                await self._control.close()
            if self._participant is not None:
                with contextlib.suppress(OSError):  # a disk that can no longer be written to
                    (self._participant.folder.path / "daemon.json").unlink(missing_ok=True)
            shutil.rmtree(self._runtime_dir, ignore_errors=True)

    async def _unless_leaving(self, work: Awaitable[T]) -> T | None:
        """Await `work`, but drop it as soon as we are asked to leave or the compute process fails for good."""
        assert self._compute is not None  # noqa: S101 - made before
        task, leaving = asyncio.ensure_future(work), asyncio.ensure_future(self._leaving.wait())
        await asyncio.wait({task, leaving, self._compute.failed}, return_when=asyncio.FIRST_COMPLETED)
        leaving.cancel()
        if task.done():
            return task.result()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        if self._compute.failed.done():
            self._compute.failed.result()
        return None

    # -- what wakes us ------------------------------------------------------------------------------------------

    def _interrupt(self) -> None:
        """A first signal leaves in order, a second one at once."""
        self._interrupts += 1
        if self._interrupts > 1:
            kill_children()
            shutil.rmtree(self._runtime_dir, ignore_errors=True)
            os._exit(130)
        self._leaving.set()

    def _on_compute(self) -> None:
        if self._participant is not None:
            self._participant.view.notify()

    def _hung_up(self) -> None:
        if not os.read(sys.stdin.fileno(), 4096):
            asyncio.get_running_loop().remove_reader(sys.stdin.fileno())
            self._leaving.set()


async def _first_failure(compute: asyncio.Future[None], node: asyncio.Future[NetworkError]) -> None:
    """Raise what ends this peer: a worker or a p2pd that cannot be kept alive."""
    first: list[asyncio.Future[Any]] = [compute, node]
    await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
    if compute.done():
        compute.result()
    if node.done() and not node.cancelled():
        raise node.result()


def _load_libraries() -> None:
    """Import what takes a while; the collector would only go over what stays."""
    gc.disable()
    load_lean()
    importlib.import_module("p2pllm_peers.participant")
    gc.freeze()
    gc.enable()


def kill_children() -> None:
    """End all child processes at once."""
    import psutil

    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            child.kill()


def main() -> None:
    """Read the order, live, and exit with the code that the command shall return."""
    order = Order.from_json(sys.stdin.readline())
    runtime_dir = new_runtime_dir()
    try:
        asyncio.run(Daemon(order, runtime_dir).run())
    except P2PLLMError as error:
        log.error("%s", error)
        tell("error", kind=type(error).__name__, message=str(error))
        sys.exit(error.exit_code)
    except Exception as error:
        log.exception("the daemon failed")
        tell(
            "error",
            kind=RunError.__name__,
            message=f"The daemon failed: {error!r}; this is a defect of p2pllm.",
        )
        sys.exit(1)


if __name__ == "__main__":
    main()
