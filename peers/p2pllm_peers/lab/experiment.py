"""One run of a scenario from its start to its evidence.

    machines -> lines measured -> each peer alone -> the swarm -> events as they are due -> everything gone

`run` writes `evidence.Facts` and samples into the folder as it goes, so that a run that was interrupted can be looked
at, too. What does not live here: conclusions (`report`, `verdict`) and showing it (`p2pllm_cli`).
"""

from __future__ import annotations

import os
import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from p2pllm import __version__
from p2pllm.errors import P2PLLMError, UsageError
from p2pllm.settings import PeerSettings
from p2pllm_peers.lab.alone import measure_alone
from p2pllm_peers.lab.cleanup import claims
from p2pllm_peers.lab.disturbance import Disturbance
from p2pllm_peers.lab.evidence import Facts, PeerFacts, PeerSample, Sample, Strike, Struck
from p2pllm_peers.lab.faults import Faults
from p2pllm_peers.lab.machines import Machines
from p2pllm_peers.lab.reporting.report import link_is_right
from p2pllm_peers.lab.scenario import Scenario
from p2pllm_peers.lab.swarm import LEAVE_TIMEOUT_S, Swarm
from p2pllm_peers.lab.timeline import timeline

TICK_S = 0.1
SAMPLE_EVERY_S = 1.0
MAX_STRIKES_AT_ONCE = 32
LINK_TRIES = 3
"""Measurements of the lines, until all are as asked for; the last one counts."""


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


class Experiment:
    """Use once: make it, then `run`."""

    def __init__(
        self, scenario: Scenario, out: Path, settings: PeerSettings, watcher: Watcher, *, short: bool = False
    ) -> None:
        """out: a new or empty folder. Raises UsageError if it is neither."""
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UsageError(f"The folder {out} is not empty; name another one with --out.")
        self._scenario = scenario
        self._out = out
        self._settings = settings
        self._watcher = watcher
        self.facts = Facts(
            version=__version__,
            scenario=scenario,
            short=short,
            began_unix=time.time(),
            cpus=os.cpu_count() or 1,
            events=timeline(scenario),
        )

    def run(self) -> Facts:
        """The whole of it. Raises P2PLLMError if it cannot even begin; an interrupted run returns what there is."""
        facts, scenario = self.facts, self._scenario
        for undone in claims.sweep():
            self._watcher.say(f"removed what an earlier lab left: {undone}")
        machines = Machines(scenario, self._out.absolute())
        facts.notes = machines.notes
        for note in machines.notes:
            self._watcher.say(note)
        self._out.mkdir(parents=True, exist_ok=True)
        try:
            with machines:
                self._measure(machines)
                with Swarm(machines, scenario.run, self._settings) as swarm:
                    self._live(machines, swarm)
        except KeyboardInterrupt:
            facts.interrupted = True
        finally:
            facts.left_over += machines.left_over
            self._write()
        return facts

    def _measure(self, machines: Machines) -> None:
        """Lines and lone speeds, before the swarm runs."""
        for _ in range(LINK_TRIES if machines.links is not None else 0):
            self._watcher.say("measuring the lines")
            self.facts.links = machines.check_links()
            if all(link_is_right(link) for link in self.facts.links):
                break  # else a busy machine may have disturbed it
        self.facts.peers = [
            PeerFacts(name=spec.name, cores=spec.cores, link=spec.link_name) for spec in machines.specs.values()
        ]
        if self._scenario.alone_s:
            seconds, say = self._scenario.alone_s, self._watcher.say
            disturbance = Disturbance(machines)
            rates = measure_alone(machines, self._scenario.run, self._settings, seconds, say, time.sleep)
            self.facts.notes += [f"While each peer trained alone: {note}" for note in disturbance.notes()]
            for peer in self.facts.peers:
                peer.alone_tokens_per_s = rates[peer.name]

    def _live(self, machines: Machines, swarm: Swarm) -> None:
        """From the first daemon to the last."""
        facts, scenario = self.facts, self._scenario
        first = [spec.name for spec in machines.specs.values() if not spec.start_s]
        life = _Life(self._watcher, machines, swarm, facts, self._out)
        disturbance = Disturbance(machines)
        try:
            swarm.start(first, self._watcher.say)
            for spec in machines.specs.values():
                machines.limit(spec.name, spec.cores)
            facts.began_unix = time.time()
            self._write()
            disturbance = Disturbance(machines)
            life.until(scenario.duration_s)
        finally:
            facts.notes += disturbance.notes()
            facts.ended_s = time.time() - facts.began_unix
            self._watcher.say("ending the peers")
            for spec in machines.specs.values():
                machines.limit(spec.name, 0)  # how fast a peer leaves is not what a scenario is about
            stuck = swarm.stop()
            life.close()
            facts.notes += [f"{name} did not leave within {LEAVE_TIMEOUT_S:g} s and was killed." for name in stuck]
            facts.left_over = machines.still_there([name for name, peer in swarm.peers.items() if peer.left_in_order])
            self._collect(machines, swarm)

    def _collect(self, machines: Machines, swarm: Swarm) -> None:
        """Bring the peers' own records together."""
        facts = self.facts
        facts.emulator = machines.emulator()
        for row in facts.peers:
            peer = swarm.peers[row.name]
            peer.keep(self._out)
            row.records, row.log = f"records/{row.name}.jsonl", f"logs/{row.name}.log"
            row.peer_id, row.former_ids = (peer.peer_ids or [""])[-1], peer.peer_ids[:-1]
            row.ready_s = [at - facts.began_unix for at in peer.ready_unix]
            row.ended_s = [at - facts.began_unix for at in peer.ended_unix]
            row.crashes = peer.crashes

    def _write(self) -> None:
        (self._out / "lab.json").write_text(self.facts.model_dump_json(indent=1))


class _Life:
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
        self._due = deque(enumerate(facts.events))
        self._strikes: list[Future[None]] = []
        self._last: dict[str, Future[None]] = {}  # the newest strike on a peer, which the next one on it follows

    def until(self, duration_s: float) -> None:
        """Go on for so long; 0: until every peer has ended by itself."""
        next_sample, self._began = 0.0, time.monotonic()
        while (t := self._t()) < duration_s or not duration_s:
            while self._due and self._due[0][1].at_s <= t:
                self._strike(*self._due.popleft())
            if t >= next_sample:
                next_sample = max(next_sample + SAMPLE_EVERY_S, t)
                self._sample(t)
            for strike in self._strikes:
                if strike.done():
                    strike.result()  # a defect of ours must not pass for a fault that struck
            peers = self._swarm.peers.values()
            someone = any(peer.is_up for peer in peers)
            if not duration_s and any(peer.crashes for peer in peers):
                break  # the others would wait for it
            if not someone and not self._due and all(strike.done() for strike in self._strikes):
                break  # nobody is left and nobody will come
            time.sleep(TICK_S)
        self._sample(self._t())

    def close(self) -> None:
        """Wait for strikes that are under way, and end the peers that these have started meanwhile."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        rows = zip(self._facts.struck, self._strikes, strict=True)
        self._facts.struck = [row for row, strike in rows if not strike.cancelled()]
        self._swarm.stop()

    def _t(self) -> float:
        return time.monotonic() - self._began

    def _strike(self, index: int, strike: Strike) -> None:
        before = self._last.get(strike.peer) if strike.peer else None
        row = Struck(event=index, at_s=self._t())
        self._facts.struck.append(row)
        self._last[strike.peer] = future = self._pool.submit(self._carry_out, strike, row, before)
        self._strikes.append(future)

    def _carry_out(self, strike: Strike, row: Struck, before: Future[None] | None) -> None:
        if before is not None:
            before.exception()  # waits; its own row says what became of it
        row.at_s = self._t()
        self._watcher.event(row.at_s, in_words(strike))
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


def in_words(strike: Strike) -> str:
    """An event as one line."""
    details = ", ".join(f"{key} {value}" for key, value in strike.args.items() if value not in (None, "", []))
    return " ".join(part for part in (strike.do.replace("_", " "), strike.peer, details and f"({details})") if part)
