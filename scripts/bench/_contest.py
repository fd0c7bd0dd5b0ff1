"""Contest: how each system trains on the machines of one scenario.

What does not live here: the other systems (`baselines`), and what is made of the records (`systems`).
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from baselines.figures import Round, Wire, rounds_of
from baselines.fleet import Fleet, System

from p2pllm.errors import RunError
from p2pllm.manifest import RunDraft
from p2pllm.settings import PeerSettings
from p2pllm_peers.lab.alone import measure_alone
from p2pllm_peers.lab.machines import Machines
from p2pllm_peers.lab.swarm import Swarm

STEPS = 10
"""Local steps a peer and round, about, if nobody says otherwise."""

BATCH = 8
"""Samples of a local step."""

LOCAL = {"overlap": True, "deadline_s": 300.0}
OURS: dict[str, dict[str, dict[str, Any]]] = {
    "p2pllm sync": {},
    "p2pllm diloco": {
        "round": {"strategy": "diloco", "codec": "int8", **LOCAL},
        "outer": {"learning_rate": 1.0, "momentum": 0.0},
    },
    "p2pllm sparse_loco": {
        "round": {"strategy": "sparse_loco", "error_decay": 0.7, **LOCAL},
        "outer": {"learning_rate": 2.1},
    },
}
"""What changes in the run file of a scenario, beside samples, batch and rate, which is that of `losses.py --search`."""

BASELINES = {
    "torch DDP, gloo": System("baselines.ddp"),
    "hivemind, tuned": System("baselines.hivemind_optimizer", {"settings": "tuned"}),
    "hivemind, defaults": System("baselines.hivemind_optimizer", {"settings": "defaults"}),
    "one machine alone": System("baselines.solo", machines=1),
}
BASE = next(iter(OURS))

MICRO_BATCH = 8
"""Samples that every system computes at once: the fastest for the default model on a core of a 2020s server."""

VALIDATION_EVERY = 3
"""Rounds. Fewer than the scenarios have, as there are only some ten rounds; it costs each peer 3 % of its time."""

LOOK_EVERY_S = 0.5
SLACK_S = 10.0
"""Baselines go on for so long after the clock has stopped, so that none ends while another still counts on it."""


@dataclass(frozen=True)
class Trained:
    """What one system did. began: unix time at which all were ready."""

    began: float
    rounds: list[Round]
    wire: Wire


class Contest:
    """The systems on the machines of one scenario, which are there."""

    def __init__(self, machines: Machines, draft: RunDraft, settings: PeerSettings, folder: Path, steps: int) -> None:
        """folder: for records and logs of the baselines. steps: local ones a peer and round, about."""
        peers = len(machines.specs)
        # The first round begins when all are there, as it does for the other systems.
        self._draft = changed(draft, round={"min_peers": peers}, data={"validation_every": VALIDATION_EVERY})
        self._machines = machines
        self._settings = settings
        self._folder = folder
        self._steps = steps

    def draft(self, name: str) -> RunDraft:
        """The run file of one of ours."""
        if name == BASE:
            return self._draft
        samples = self._steps * BATCH * len(self._machines.specs)
        return changed(
            changed(self._draft, **OURS[name]),
            round={"samples": samples},
            data={"validation_every": max(1, 2 * VALIDATION_EVERY * STEPS // self._steps)},
            optimizer={"batch": BATCH, "warmup_rounds": 3, "learning_rate": 2e-3},
        )

    def alone(self, name: str, seconds: float) -> dict[str, float]:
        """Tokens/s of each machine alone, with the work that one of ours has."""
        return measure_alone(self._machines, self.draft(name), self._settings, seconds, say, time.sleep)

    def train(self, name: str, seconds: float) -> Trained:
        """One system for so long. Raises P2PLLMError if it fails."""
        say(f"{name}: starting")
        trained = self._ours(name, seconds) if name in OURS else self._baseline(name, seconds)
        in_time = [each for each in trained.rounds if each.unix_time <= trained.began + seconds]
        return replace(trained, rounds=in_time)

    def _ours(self, name: str, seconds: float) -> Trained:
        with Swarm(self._machines, self.draft(name), self._settings) as swarm:
            swarm.start(list(swarm.peers), say)

            def check() -> None:
                for peer in swarm.peers.values():
                    if not peer.is_up:
                        raise RunError(f"{name}: {peer.name} ended: {'; '.join(peer.crashes) or 'no message'}.")

            began, wire = self._watch(seconds, check)
            records = [row for peer in swarm.peers.values() for row in peer.records()]
        by_number = {row["round"]: row for row in sorted(records, key=lambda row: -row["unix_time"])}
        rounds = [
            Round(number, row["unix_time"], row["tokens"], row["loss"], row["validation_loss"])
            for number, row in sorted(by_number.items())
        ]
        return Trained(began, rounds, wire)

    def _baseline(self, name: str, seconds: float) -> Trained:
        system, settings = BASELINES[name], self._settings
        folder = self._folder / name.replace(" ", "-").replace(",", "")
        with Fleet(system, self._machines, self._draft, folder, settings.cache, settings.micro_batch) as fleet:
            fleet.start(say)
            began, wire = self._watch(seconds, fleet.check, lambda: fleet.go(seconds + SLACK_S))
            rounds = rounds_of(fleet.rows())
        return Trained(began, rounds, wire)

    def _watch(
        self, seconds: float, check: Callable[[], None], go: Callable[[], None] = lambda: None
    ) -> tuple[float, Wire]:
        """Let the peers train under their budgets; returns when that began, and what the wires counted."""
        wire: list[tuple[float, int]] = []
        with self._budgets():
            go()
            began, end = time.time(), time.monotonic() + seconds
            say(f"training for {seconds:g} s")
            while time.monotonic() < end:
                counted = self._machines.counters()
                if counted:
                    wire.append((time.time(), sum(up for up, _ in counted.values())))
                time.sleep(min(LOOK_EVERY_S, max(0.0, end - time.monotonic())))
                check()
        return began, wire

    @contextlib.contextmanager
    def _budgets(self) -> Iterator[None]:
        """Each machine has its share of a core."""
        for name, spec in self._machines.specs.items():
            self._machines.limit(name, spec.cores)
        try:
            yield
        finally:
            for name in self._machines.specs:
                self._machines.limit(name, 0)


def changed(draft: RunDraft, **sections: dict[str, Any]) -> RunDraft:
    """A run file with other values in some sections. What it left out is chosen anew."""
    values = draft.model_dump(exclude_unset=True)
    for section, over in sections.items():
        values[section] = {**values.get(section, {}), **over}
    return RunDraft.model_validate(values)


def say(text: str) -> None:
    """Progress, apart from the table."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)
