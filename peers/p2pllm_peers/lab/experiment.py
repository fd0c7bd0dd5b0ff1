"""One run of a scenario from its start to its evidence.

    machines -> lines measured -> each peer alone -> the swarm, events as they are due -> each peer alone -> all gone

`run` writes `evidence.Facts` and samples into the folder as it goes, so that a run that was interrupted can be looked
at, too. What does not live here: conclusions (`report`, `verdict`) and showing it (`p2pllm_cli`).
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from p2pllm import __version__
from p2pllm.errors import UsageError
from p2pllm.settings import PeerSettings
from p2pllm_peers.lab.alone import measure_alone
from p2pllm_peers.lab.cleanup import claims
from p2pllm_peers.lab.disturbance import Disturbance
from p2pllm_peers.lab.evidence import Facts, PeerFacts
from p2pllm_peers.lab.life import Life, Watcher
from p2pllm_peers.lab.machines import Machines
from p2pllm_peers.lab.reporting.lines import link_is_right
from p2pllm_peers.lab.scenario import Scenario
from p2pllm_peers.lab.swarm import LEAVE_TIMEOUT_S, Swarm
from p2pllm_peers.lab.timeline import timeline

LINK_TRIES = 5
"""Measurements of the lines, until each was as asked for once."""

LATE_MS = 2.0
"""A line whose frames are later than that does not do what was asked, and the machine is why."""

STEADY = 0.1
"""A run says so if what its peers make alone changed by more than this share while it lasted."""


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
                facts.peers = [
                    PeerFacts(name=spec.name, cores=spec.cores, link=spec.link_name) for spec in machines.specs.values()
                ]
                self._measure_lines(machines)
                before = self._measure_alone(machines)
                with Swarm(machines, scenario.run, self._settings) as swarm:
                    self._live(machines, swarm)
                self._compare_alone(before, self._measure_alone(machines))
        except KeyboardInterrupt:
            facts.interrupted = True
        finally:
            facts.left_over += machines.left_over
            self._write()
        return facts

    def _measure_lines(self, machines: Machines) -> None:
        """Whether they are as asked for; each counts as it was at its best."""
        if machines.links is None:
            return
        disturbance = Disturbance(machines, of_children=True)
        for _ in range(LINK_TRIES):
            self._watcher.say("measuring the lines")
            right = {link.peer: link for link in self.facts.links if link_is_right(link)}
            self.facts.links = [right.get(link.peer, link) for link in machines.check_links()]
            if all(map(link_is_right, self.facts.links)):
                return  # else a busy machine may have disturbed it
        notes, late = disturbance.notes(), machines.emulator().late_p99_ms
        if late > LATE_MS:
            notes.append(f"One frame of a hundred was {late:.0f} ms late or more: times and speeds do not hold.")
        self.facts.notes += [f"While the lines were measured: {note}" for note in notes]

    def _measure_alone(self, machines: Machines) -> dict[str, float]:
        """Tokens/s of each peer alone; nothing if the scenario does not ask for it."""
        seconds, say = self._scenario.alone_s, self._watcher.say
        if not seconds:
            return {}
        disturbance = Disturbance(machines)
        rates = measure_alone(machines, self._scenario.run, self._settings, seconds, say, time.sleep)
        self.facts.notes += [f"While each peer trained alone: {note}" for note in disturbance.notes()]
        for peer in self.facts.peers:
            peer.alone_tokens_per_s = rates[peer.name]
        return rates

    def _compare_alone(self, before: dict[str, float], after: dict[str, float]) -> None:
        """The mean counts: the speed of a shared machine changes from one minute to the next."""
        for peer in self.facts.peers if before else ():
            peer.alone_tokens_per_s = (before[peer.name] + after[peer.name]) / 2
        first, last = sum(before.values()), sum(after.values())
        if abs(last - first) > STEADY * (first + last) / 2:
            self.facts.notes.append(
                f"Alone the peers made {first:,.0f} tokens/s before the swarm and {last:,.0f} after it: the speed of "
                "this machine changed, and efficiency is as uncertain."
            )

    def _live(self, machines: Machines, swarm: Swarm) -> None:
        """From the first daemon to the last."""
        facts, scenario = self.facts, self._scenario
        first = [spec.name for spec in machines.specs.values() if not spec.start_s]
        life = Life(self._watcher, machines, swarm, facts, self._out)
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
        facts.parameters = max(peer.last.get("parameters", 0) for peer in swarm.peers.values())
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
