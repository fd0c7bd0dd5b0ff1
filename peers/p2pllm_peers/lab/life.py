"""The swarm of one run of the lab while it trains: what strikes it when, and a look at it once a second.

What lives here: keeping time. What does not: what comes before and after (`experiment`), what an event does
(`faults`), and awaiting a phase (`aiming`).
"""

from __future__ import annotations

import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from p2pllm.errors import P2PLLMError
from p2pllm_peers.lab.aiming import Aiming
from p2pllm_peers.lab.evidence import Facts, PeerSample, Sample, Strike, Struck
from p2pllm_peers.lab.faults import Faults
from p2pllm_peers.lab.machines import Machines
from p2pllm_peers.lab.swarm import Swarm

TICK_S = 0.1
SAMPLE_EVERY_S = 1.0
MAX_STRIKES_AT_ONCE = 32


class Watcher(Protocol):
    """Whoever shows a run of the lab."""

    def say(self, text: str) -> None:
        """A step of the preparation or of the end."""
        ...

    def event(self, t: float, text: str) -> None:
        """Something struck, `t` seconds after the beginning."""
        ...

    def show(self, t: float, swarm: Swarm, sample: Sample) -> None:
        """How things are; about once a second."""
        ...


class Life:
    """The swarm while it trains: events when they are due, samples once a second."""

    def __init__(self, watcher: Watcher, machines: Machines, swarm: Swarm, facts: Facts, out: Path) -> None:
        self._watcher = watcher
        self._machines = machines
        self._swarm = swarm
        self._facts = facts
        self._faults = Faults(swarm, machines, out, facts.scenario.seed)
        self._samples = out / "samples.jsonl"
        self._wire = machines.counters()  # before the swarm: measuring the lines moved bytes, too
        self._cpu = {name: machines.cpu_s(name) or 0.0 for name in machines.specs}
        self._pool = ThreadPoolExecutor(MAX_STRIKES_AT_ONCE)
        self._began = time.monotonic()
        timed = ((index, strike) for index, strike in enumerate(facts.events) if not _waits(strike))
        self._due = deque(timed)
        self._aiming = Aiming(facts.events, swarm, machines.specs, self._carry_out, self._t)
        self._strikes: list[Future[None]] = []
        self._last: dict[str, Future[None]] = {}  # the newest strike on a peer, which the next one on it follows

    def until(self, duration_s: float) -> None:
        """Go on for so long; 0: until every peer has ended by itself."""
        next_sample, self._began = 0.0, time.monotonic()
        aiming = self._pool.submit(self._aiming.run)
        while (t := self._t()) < duration_s or not duration_s:
            while self._due and self._due[0][1].at_s <= t:
                self._strike(*self._due.popleft())
            if t >= next_sample:
                next_sample = max(next_sample + SAMPLE_EVERY_S, t)
                self._sample(t)
            for strike in [aiming, *self._strikes]:
                if strike.done():
                    strike.result()  # a defect of ours must not pass for a fault that struck
            peers = self._swarm.peers.values()
            someone = any(peer.is_up for peer in peers)
            if not duration_s and any(peer.crashes for peer in peers):
                break  # the others would wait for it
            if not someone and not self._due and all(strike.done() for strike in [aiming, *self._strikes]):
                break  # nobody is left and nobody will come
            time.sleep(TICK_S)
        self._sample(self._t())

    def close(self) -> None:
        """Wait for strikes that are under way, and end the peers that these have started meanwhile."""
        self._aiming.stop()
        self._pool.shutdown(wait=True, cancel_futures=True)
        rows = zip(self._facts.struck, self._strikes, strict=True)
        self._facts.struck = [row for row, strike in rows if not strike.cancelled()] + self._aiming.rows
        self._swarm.stop()

    def _t(self) -> float:
        return time.monotonic() - self._began

    def _strike(self, index: int, strike: Strike) -> None:
        before = self._last.get(strike.peer) if strike.peer else None
        row = Struck(event=index, at_s=self._t())
        self._facts.struck.append(row)
        self._last[strike.peer] = future = self._pool.submit(self._carry_out, strike, row, before)
        self._strikes.append(future)

    def _carry_out(self, strike: Strike, row: Struck, before: Future[None] | None = None) -> None:
        if before is not None:
            before.exception()  # waits; its own row says what became of it
        row.at_s = self._t()
        seen = f", {strike.phase} after round {row.round}" if strike.phase else ""
        self._watcher.event(row.at_s, in_words(strike) + seen)
        try:
            self._faults.carry_out(strike, self._watcher.say)
        except (P2PLLMError, OSError) as error:
            row.error = str(error)
            self._watcher.event(self._t(), row.error)

    def _sample(self, t: float) -> None:
        wire = self._machines.counters()
        sample = Sample(t=round(t, 3), peers={})
        for name, peer in self._swarm.peers.items():
            row = PeerSample()
            if (cpu_s := self._machines.cpu_s(name)) is not None:
                row.cpu_s = round(cpu_s - self._cpu[name], 3)
            if name in wire:
                row.wire_up, row.wire_down = (
                    now - then for now, then in zip(wire[name], self._wire[name], strict=True)
                )
            if peer.is_up and peer.last:
                said = peer.last
                row.phase, row.round, row.digest = said["phase"], said["round"], said["record"]
                row.samples, row.tokens_per_s, row.traffic = said["samples"], said["tokens_per_s"], said["traffic"]
            sample.peers[name] = row
        with self._samples.open("a") as file:
            file.write(sample.model_dump_json() + "\n")
        self._watcher.show(t, self._swarm, sample)


def _waits(strike: Strike) -> bool:
    """It strikes after a phase was seen, not at a time."""
    return bool(strike.phase) or strike.undoes is not None


def in_words(strike: Strike) -> str:
    """An event as one line."""
    details = ", ".join(f"{key} {value}" for key, value in strike.args.items() if value not in (None, "", []))
    return " ".join(part for part in (strike.do.replace("_", " "), strike.peer, details and f"({details})") if part)
