"""Runs of the lab that never happened, as folders: small ones made by hand, and a long one with everything in it."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from p2pllm_peers.lab.evidence import Evidence, Facts, LinkCheck, PeerFacts, PeerSample, Sample, Strike, Struck
from p2pllm_peers.lab.scenario import Scenario
from p2pllm_peers.lab.timeline import timeline

BEGAN = 1_700_000_000.0
CONTEXT = 32
PARTS = {"compute": 1.0, "roster": 0.1, "exchange": 0.2, "vote": 0.05, "outer_step": 0.03, "digest": 0.02}
COUNTERS = tuple(f"{kind}_{way}" for kind in ("control", "updates", "state") for way in ("sent", "received"))


def digest(number: int, branch: str = "main") -> str:
    """The state's digest after a round, on one branch."""
    return hashlib.sha256(f"{branch}/{number}".encode()).hexdigest()


def record(number: int, time_s: float, roster: Sequence[str] = ("a", "b"), **changes: Any) -> dict[str, Any]:
    """One line of rounds.jsonl: 4 samples a member, a round of 2 s."""
    samples = 4 * len(roster)
    return {
        "round": number,
        "unix_time": BEGAN + time_s,
        "samples": samples,
        "tokens": samples * CONTEXT,
        "members": {f"id-{name}": 4 for name in roster},
        "loss": 6.0 - 0.1 * number,
        "validation_loss": None,
        "learning_rate": 1e-3,
        "aggregate_digest": digest(number, "aggregate"),
        "record_digest": digest(number),
        "attempts": 1,
        "own_steps": [4],
        "bytes_sent": 1000,
        "bytes_received": 1000,
        "seconds": PARTS | {"validation": 0.1},
        "round_s": 2.0,
        "traffic": {},
    } | changes


def peer(name: str, **changes: Any) -> PeerFacts:
    """A peer that was there from the beginning and left after 100 s."""
    fields = {"peer_id": f"id-{name}", "records": f"{name}.jsonl", "ready_s": [-1.0], "ended_s": [100.0]}
    return PeerFacts(name=name, **(fields | changes))


def sample(t: float, **peers: Mapping[str, Any]) -> Sample:
    """All peers at one moment."""
    return Sample(t=t, peers={name: PeerSample(**row) for name, row in peers.items()})


def strikes(*planned: tuple[Any, ...]) -> dict[str, Any]:
    """Events (time, what, peer and perhaps args) that were carried out just when they were due."""
    events = [Strike(at_s=row[0], do=row[1], peer=row[2], args=row[3] if len(row) > 3 else {}) for row in planned]
    return {"events": events, "struck": [Struck(event=place, at_s=row.at_s) for place, row in enumerate(events)]}


def evidence(
    out: Path,
    records: Mapping[str, Sequence[dict[str, Any] | str]],
    *,
    peers: Sequence[PeerFacts] = (),
    samples: Sequence[Sample] = (),
    scenario: Mapping[str, Any] | None = None,
    **facts: Any,
) -> Evidence:
    """A run of 99 s, written to a folder and read back. A record that is text is written as it is."""
    out.mkdir(parents=True, exist_ok=True)
    rows = list(peers) or [peer(name) for name in records]
    fields = {"version": "0", "began_unix": BEGAN, "ended_s": 99.0, "cpus": 2} | facts
    made = Facts(scenario=Scenario.model_validate({"name": "made-up"} | dict(scenario or {})), peers=rows, **fields)
    (out / "lab.json").write_text(made.model_dump_json())
    (out / "samples.jsonl").write_text("".join(row.model_dump_json() + "\n" for row in samples))
    for name, lines in records.items():
        text = [line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines]
        (out / f"{name}.jsonl").write_text("".join(text))
    return Evidence(out)


SCENARIO: dict[str, Any] = {
    "name": "everything",
    "about": "six peers on home lines: a kill, a freeze, a partition, a slow line, a joiner and a cut",
    "seed": 7,
    "duration_s": 300,
    "alone_s": 20,
    "run": {"data": {"validation_every": 5}, "round": {"rounds": 100000, "samples": 48}},
    "links": {
        "fibre": {"up_mbit": 50, "down_mbit": 100, "delay_ms": 8},
        "adsl": {"up_mbit": 5, "down_mbit": 20, "delay_ms": [15, 40], "loss": 0.002},
    },
    "peers": [
        {"name": "fibre", "count": 3, "link": "fibre"},
        {"name": "adsl", "count": 2, "link": "adsl", "cores": 0.5},
        {"name": "late", "link": "adsl", "start_s": 200},
    ],
    "events": [
        {"at_s": 40, "do": "kill", "peer": "fibre-1", "for_s": 20},
        {"at_s": 85, "do": "freeze", "peer": "adsl-0", "for_s": 12},
        {"at_s": 125, "do": "partition", "groups": [["adsl-0", "adsl-1"]], "for_s": 25},
        {"at_s": 180, "do": "slow_link", "peer": "fibre-2", "link": {"up_mbit": 1}, "for_s": 30},
        {"at_s": 240, "do": "cut", "peer": "adsl-1", "for_s": 15},
        {"at_s": 262, "do": "kill", "peer": "fibre-2"},
    ],
    "verdict": {"max_recovery_s": 15, "min_efficiency": 0.5, "min_rounds": 60, "max_validation_loss": 3.0},
}
"""Something of everything that the lab can do."""

STALLS = ("kill", "freeze", "cut", "partition")
STALL_S = 5.2


class FakeSwarm:
    """A swarm that lives through a scenario in tenths of a second, by the rules of what each fault takes away."""

    def __init__(self, scenario: Scenario, seed: int) -> None:
        self.scenario, self.draws, self.events = scenario, random.Random(seed), timeline(scenario)
        specs = scenario.peer_specs()
        self.names = [spec.name for spec in specs]
        self.speed = {spec.name: 20.0 * (spec.cores or 1.0) * self.draws.uniform(0.9, 1.1) for spec in specs}
        self.ready = {spec.name: [] if spec.start_s else [-self.draws.uniform(0, 3)] for spec in specs}
        self.ended: dict[str, list[float]] = {name: [] for name in self.names}
        self.away: dict[str, set[str]] = {name: set() for name in self.names}
        self.starting: dict[str, float] = {}
        self.head = dict.fromkeys(self.names, (0, "main"))
        self.apart: list[list[str]] = []
        self.slowed: set[str] = set()
        self.traffic = {name: [0] * len(COUNTERS) for name in self.names}
        self.records: dict[str, list[str | dict[str, Any]]] = {name: [] for name in self.names}
        self.samples: list[Sample] = []
        self.began: dict[str, float] = {}
        """When each branch began its round."""

    def live(self) -> None:
        """From the first moment to the last."""
        due = list(self.events)
        for tick in range(int(self.scenario.duration_s * 10)):
            t = tick / 10
            while due and due[0].at_s <= t:
                self._strike(due.pop(0))
            for name in [name for name, at_s in self.starting.items() if at_s <= t]:
                del self.starting[name]
                self.away[name].discard("down")
                self.ready[name].append(t)
                self._catch_up(name)
            for group in self._groups():
                self._work(group, t)
            if tick % 10 == 0:
                self._sample(t)
        for name in self.names:
            if "down" not in self.away[name]:
                self.ended[name].append(self.scenario.duration_s + self.draws.uniform(0.5, 2))

    def _strike(self, strike: Strike) -> None:
        state = {"kill": "down", "freeze": "frozen", "thaw": "frozen", "cut": "cut", "mend": "cut"}.get(strike.do, "")
        if strike.do in ("kill", "freeze", "cut"):
            self.away[strike.peer].add(state)
        if strike.do == "kill":
            self.ended[strike.peer].append(strike.at_s + 0.05)
            self.traffic[strike.peer] = [0] * len(COUNTERS)
        elif strike.do in ("thaw", "mend"):
            self.away[strike.peer].discard(state)
            self._catch_up(strike.peer)
        elif strike.do in ("restart", "join"):
            self.starting[strike.peer] = strike.at_s + 7.4
        elif strike.do == "partition":
            self.apart = strike.args["groups"]
            for name in self.apart[0]:
                self.head[name] = (self.head[name][0], "side")
            self.began["side"] = strike.at_s
        elif strike.do == "heal":
            for name in self.apart[0]:
                self._catch_up(name)
            self.apart = []
        elif strike.do in ("slow_link", "restore_link"):
            self.slowed = {strike.peer} if strike.do == "slow_link" else set()

    def _catch_up(self, name: str) -> None:
        self.head[name] = max(head for head in self.head.values() if head[1] == "main")
        self.traffic[name][5] += 9_700_000

    def _groups(self) -> list[list[str]]:
        there = [name for name in self.names if self.ready[name] and not self.away[name]]
        groups = [[name for name in there if name in group] for group in self.apart] or [there]
        return [group for group in groups if group]

    def _work(self, group: list[str], t: float) -> None:
        branch = self.head[group[0]][1]
        compute = 48 / sum(self.speed[name] for name in group)
        exchange = 0.45 + 0.08 * len(group) + (3.1 if self.slowed & set(group) else 0.0)
        began = self.began.setdefault(branch, t)
        stalled = any(began <= event.at_s <= t for event in self.events if event.do in STALLS)
        if t - began < compute + exchange + 0.25 + (STALL_S if stalled else 0.0):
            return
        self.began[branch] = t
        number = max(self.head[name][0] for name in group) + 1
        for name in group:
            self._commit(name, group, (number, branch), t, (compute, exchange + (STALL_S if stalled else 0.0)))

    def _commit(
        self, name: str, group: list[str], head: tuple[int, str], t: float, seconds: tuple[float, float]
    ) -> None:
        number, size = head[0], int(3_300_000 * (len(group) - 1) / len(group))
        self.head[name] = head
        moved = (9_000, 9_500, 2 * size, 2 * size, 0, 0)
        self.traffic[name] = [before + more for before, more in zip(self.traffic[name], moved, strict=True)]
        loss = 1.7 + 3.9 * math.exp(-number / 38)
        share = {member: round(48 * self.speed[member] / sum(self.speed[m] for m in group)) for member in group}
        evaluated = number == 1 or number % 5 == 0
        parts = {
            "compute": seconds[0] * self.draws.uniform(0.97, 1.03),
            "roster": self.draws.uniform(0.02, 0.12),
            "exchange": seconds[1] * self.draws.uniform(0.9, 1.1),
            "vote": self.draws.uniform(0.02, 0.06),
            "outer_step": 0.012,
            "digest": 0.004,
            "validation": 0.11 if evaluated else 0.0,
        }
        changes = {
            "samples": 48,
            "tokens": 48 * 128,
            "members": {f"id-{member}": count for member, count in share.items()},
            "loss": loss + random.Random(number).gauss(0, 0.04),
            "validation_loss": loss + 0.08 if evaluated else None,
            "record_digest": digest(*head),
            "own_steps": [share[name]],
            "seconds": parts,
            "round_s": sum(parts.values()) + self.draws.uniform(0.01, 0.09),
            "traffic": self._counters(name),
        }
        self.records[name].append(record(number, t + self.draws.uniform(0, 0.05), group, **changes))

    def _counters(self, name: str) -> dict[str, int]:
        return dict(zip(COUNTERS, self.traffic[name], strict=True))

    def _sample(self, t: float) -> None:
        self.samples.append(Sample(t=t, peers={name: self._peer_sample(name) for name in self.names}))

    def _peer_sample(self, name: str) -> PeerSample:
        before = self.samples[-1].peers[name] if self.samples else PeerSample(wire_up=0, wire_down=0, cpu_s=0.0)
        own, up = self._counters(name), bool(self.ready[name]) and "down" not in self.away[name]
        gone = {way: sum(max(0, own[key] - before.traffic.get(key, 0)) for key in COUNTERS if key.endswith(way))
                for way in ("sent", "received")}  # fmt: skip
        assert before.wire_up is not None and before.wire_down is not None and before.cpu_s is not None
        return PeerSample(
            wire_up=before.wire_up + int(1.07 * gone["sent"] + 2500 * up),
            wire_down=before.wire_down + int(1.07 * gone["received"] + 2500 * up),
            cpu_s=before.cpu_s + (0.7 if up and "frozen" not in self.away[name] else 0.0),
            phase="collecting" if up else "",
            round=self.head[name][0] if up else 0,
            digest=digest(*self.head[name]) if up and self.head[name][0] else "",
            traffic=own if up else {},
        )


def long_run(out: Path, *, seed: int = 7, **changes: Any) -> Evidence:
    """Five minutes of six peers with all kinds of faults, a partition and a joiner. changes: of the facts."""
    scenario = Scenario.model_validate(SCENARIO)
    swarm = FakeSwarm(scenario, seed)
    swarm.live()
    peers = [
        peer(spec.name, cores=spec.cores, link=spec.link_name, log=f"logs/{spec.name}.log",
             ready_s=swarm.ready[spec.name], ended_s=swarm.ended[spec.name],
             alone_tokens_per_s=128 * swarm.speed[spec.name])
        for spec in scenario.peer_specs()
    ]  # fmt: skip
    facts = {
        "links": [_check(spec.name, spec.link) for spec in scenario.peer_specs()],
        "events": swarm.events,
        "struck": [Struck(event=place, at_s=event.at_s) for place, event in enumerate(swarm.events)],
        "ended_s": scenario.duration_s,
        "emulator": {"kind": "tun box", "cpu_s": 31.5, "wall_s": 300.0, "frames": 812_345, "bytes": 912_345_678,
                     "late_p99_ms": 0.4, "late_max_ms": 3.9},
    }  # fmt: skip
    return evidence(out, swarm.records, peers=peers, samples=swarm.samples, scenario=SCENARIO, **(facts | changes))


def _check(name: str, link: Any) -> LinkCheck:
    """A line as it should be, but for the way down of adsl-1."""
    return LinkCheck(
        peer=name,
        asked_up_mbit=link.up_mbit,
        measured_up_mbit=link.up_mbit * 0.985,
        asked_down_mbit=link.down_mbit,
        measured_down_mbit=link.down_mbit * (0.91 if name == "adsl-1" else 0.99),
        asked_delay_ms=link.delay_ms,
        measured_delay_ms=link.delay_ms + 0.6,
        asked_loss=2 * link.loss,
        measured_loss=2 * link.loss,
    )
