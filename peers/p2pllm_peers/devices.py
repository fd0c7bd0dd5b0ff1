"""Devices: the workers of one peer, one a device; to the swarm they are one peer with one update a round.

What each device has is averaged here, weighed by samples, before the peer brings it. What does not live here: a single
worker (`compute`), and how a device is chosen (`p2pllm.training.device`).
"""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import numpy as np

from p2pllm.errors import VersionError, WorkerError
from p2pllm.manifest import RunDraft
from p2pllm.rounds.update import Update, joined
from p2pllm.settings import PeerSettings
from p2pllm.state import Layout
from p2pllm_peers.compute import ComputeProcess

log = logging.getLogger(__name__)

T = TypeVar("T")

Progress = Callable[[str], None]


class Devices:
    """Starts and supervises one worker a device; implements `p2pllm.rounds.update.Compute`.

    The state's parameters are those of the first device, `params`; the others copy them when a round begins.
    """

    def __init__(
        self, settings: PeerSettings, runtime_dir: Path, on_change: Callable[[], None], on_progress: Progress
    ) -> None:
        """on_change: called when samples or readiness change. on_progress: called with phrases while they build."""
        self.own_steps: list[int] = []
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        names = settings.device.split(",")
        self._all = [
            ComputeProcess(
                settings.model_copy(update={"device": name}),
                runtime_dir,
                on_change,
                _unheard if at else on_progress,
                workers=names.count(name),
            )
            for at, name in enumerate(names)
        ]
        self._first = self._all[0]
        self._lost: dict[str, str] = {}  # what became of each device that failed, by its name
        self._ending = set[asyncio.Future[None]]()
        for at, (name, process) in enumerate(zip(names, self._all, strict=True)):
            process.failed.add_done_callback(functools.partial(self._on_failed, at, name))

    def _on_failed(self, at: int, name: str, failed: asyncio.Future[None]) -> None:
        """A device that fails leaves the others, where there are any; a model that is not the run's is so on all."""
        if failed.cancelled() or self.failed.done():
            return
        error = failed.exception()
        assert error is not None  # noqa: S101 - it ends no other way
        if not self._living or not isinstance(error, WorkerError) or isinstance(error, VersionError):
            self.failed.set_exception(error)
            return
        self._lost[name] = f"The device {name} failed, and the others go on without it until the next start: {error}"
        log.error("%s", self._lost[name])
        # it may only be slow, and would join in later
        self._ending.add(asyncio.ensure_future(self._all[at].give_up()))

    @property
    def _living(self) -> list[ComputeProcess]:
        """Those that have not failed for good."""
        return [process for process in self._all if not process.failed.done()]

    # -- the start -----------------------------------------------------------------------------------------------------

    async def launch(self) -> None:
        """Start the processes; they load their libraries while the daemon finds out what to compute."""
        await self._each_of(lambda process: process.launch())

    def belongs_to(self, run_id: str, peer_id: str, folder: Path) -> None:
        """Whose samples are drawn, each device others, and where what is this peer's own is kept."""
        self._first.belongs_to(run_id, peer_id, folder)
        for at, process in enumerate(self._all[1:], 1):
            own = folder / f"device{at}"
            own.mkdir(exist_ok=True)
            process.belongs_to(run_id, f"{peer_id}/{at}", own)

    def remembered_layout(self, draft: RunDraft) -> Layout | None:
        """See ComputeProcess."""
        return self._first.remembered_layout(draft)

    async def build(self, draft: RunDraft, tokenizer: bytes | None, timeout: float) -> Layout:
        """See ComputeProcess; all build at the same time."""
        return (await self._each_of(lambda process: process.build(draft, tokenizer, timeout)))[0]

    async def resume(self, draft: RunDraft, tokenizer: bytes | None, timeout: float, layout: Layout) -> None:
        """See ComputeProcess."""
        await self._each_of(lambda process: process.resume(draft, tokenizer, timeout, layout))

    async def wait_ready(self) -> None:
        """See ComputeProcess."""
        outcomes = await asyncio.gather(*(one.wait_ready() for one in self._all), return_exceptions=True)
        if self.failed.done():
            self.failed.result()
        for outcome in outcomes:
            if isinstance(outcome, BaseException) and not isinstance(outcome, WorkerError):
                raise outcome

    async def close(self) -> None:
        """End them and give their memory back, whatever they are doing; takes at most 2 seconds."""
        await self._each_of(lambda process: process.close())
        if self.failed.done() and not self.failed.cancelled():
            self.failed.exception()  # seen; the owner may be leaving for another reason

    async def _each_of(self, call: Callable[[ComputeProcess], Awaitable[T]]) -> list[T]:
        return list(await asyncio.gather(*map(call, self._all)))

    # -- what they are -------------------------------------------------------------------------------------------------

    @property
    def layout(self) -> Layout:
        """Of the model."""
        return self._first.layout

    @property
    def params(self) -> np.ndarray:
        """The state's parameters, float32 of shape (layout.size,)."""
        return self._first.params

    @property
    def data_digest(self) -> str:
        """Of the run's text as the first device read it."""
        return self._first.data_digest

    @property
    def device(self) -> str:
        """Their names, with commas between them."""
        return ", ".join(process.device for process in self._living if process.device)

    @property
    def micro_batch(self) -> int:
        """Of the first device that has not failed."""
        return next(iter(self._living), self._first).micro_batch

    @property
    def notice(self) -> str:
        """Sentences for the user about memory that is short and devices that failed; else empty."""
        found = [*self._lost.values(), *(process.notice for process in self._living)]
        return " ".join(dict.fromkeys(sentence for sentence in found if sentence))

    @property
    def pids(self) -> frozenset[int]:
        """Process ids of those that run."""
        return frozenset(process.pid for process in self._all if process.pid is not None)

    @property
    def restarts(self) -> int:
        """How often a process had to be started again."""
        return sum(process.restarts for process in self._all)

    @property
    def tokens(self) -> int:
        """Computed so far, those of dropped rounds included."""
        return sum(process.tokens for process in self._all)

    @property
    def tokens_per_s(self) -> float:
        """Tokens computed a second of wall time over the last half minute."""
        return sum(process.tokens_per_s for process in self._all)

    # -- what the loop uses --------------------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        """One at least is up and has a model."""
        return any(process.ready for process in self._all)

    @property
    def samples(self) -> int:
        """Samples gathered in the round that was begun."""
        return sum(process.samples for process in self._all)

    async def begin(self, round_number: int) -> None:
        """See Compute."""
        for process in self._all[1:]:
            np.copyto(process.params, self.params)
        await self._each_of(lambda process: process.begin(round_number))

    async def finish(self, go_on: bool = False) -> Update | None:
        """See Compute: the mean of what the devices have; None if none has anything."""
        updates = await self._each_of(lambda process: process.finish(go_on))
        self.own_steps = [
            step
            for process, update in zip(self._all, updates, strict=True)
            if update is not None
            for step in process.own_steps
        ]
        return joined(*updates)

    async def abandon(self) -> None:
        """See Compute."""
        await self._each_of(lambda process: process.abandon())

    async def hold(self, held: bool) -> None:
        """See Compute."""
        await self._each_of(lambda process: process.hold(held))

    async def share(self, share: float, cores: float | None) -> None:
        """Compute in so much of the time, 0 to 1, take so many cores together (None: all), and rest in between."""
        each = None if cores is None else cores / max(1, len(self._living))
        await self._each_of(lambda process: process.share(share, each))

    def stand_back(self, nice: int, io_idle: bool) -> bool:
        """See ComputeProcess."""
        outcomes = [process.stand_back(nice, io_idle) for process in self._all]
        return all(outcomes)

    async def park(self) -> None:
        """See Compute."""
        await self._each_of(lambda process: process.park())

    async def evaluate(self) -> float | None:
        """See Compute: by the first device that has not failed, from its own copy of the parameters."""
        one = next(iter(self._living), self._first)
        if one is not self._first:
            np.copyto(one.params, self.params)
        return await one.evaluate()


def _unheard(text: str) -> None:
    """Progress of a device that does what the first does."""
