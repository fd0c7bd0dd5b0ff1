"""Scenario: one experiment in a TOML file: the run, its peers, their links, what befalls them, and what must hold.

What lives here: the fields, their bounds, and what follows from them for each peer. What does not: reading a file
(`reading`, behind `load_scenario`), checks of the whole (`checks`), what happens when (`timeline`), making it happen
(`machines`, `faults`), and the shipped files (`scenarios/`).
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from p2pllm.manifest import RunDraft
from p2pllm.settings_file import LIVE

MAX_DELAY_MS = 10_000.0
LAB_CORES = 0.3
"""Share of a core that links, measurement and the lab itself are left with."""
PEER_MB = 450
"""Memory of one peer with a small model, most of it torch, measured."""

PeerName = Annotated[str, Field(pattern=r"^[a-z][a-z0-9-]{0,11}$")]
Seconds = Annotated[float, Field(ge=0, le=1e6)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Link(_Section):
    """The line between one peer and the middle of the network. A path between two peers crosses both their lines."""

    up_mbit: float = Field(gt=0.1, le=10_000, description="rate from the peer, Mbit/s on the wire")
    down_mbit: float = Field(gt=0.1, le=10_000, description="rate to the peer, Mbit/s on the wire")
    delay_ms: float | tuple[float, float] = Field(0.0, description="one way; [low, high] draws one a peer")
    jitter_ms: float = Field(0.0, ge=0, le=1000, description="each frame is up to this much later")
    loss: float = Field(0.0, ge=0, le=0.5, description="share of packets lost, each way")
    nat: bool = Field(False, description="nobody can open a connection to this peer")

    @field_validator("delay_ms", mode="before")
    @classmethod
    def _one_or_a_range(cls, given: object) -> object:
        ends = given if isinstance(given, (list, tuple)) else (given, given)
        numbers = [end for end in ends if isinstance(end, (int, float)) and not isinstance(end, bool)]
        if len(ends) != 2 or len(numbers) != 2:
            raise ValueError(f"is {given}, but must be milliseconds, or [low, high]")
        if not 0 <= numbers[0] <= numbers[1] <= MAX_DELAY_MS:
            raise ValueError(f"is {given}, but must be from 0 to {MAX_DELAY_MS:g}, the lower end first")
        return given


class Peers(_Section):
    """Some like peers."""

    name: PeerName = Field("peer", description="1 to 12 of a-z, 0-9 and -; several are NAME-0, NAME-1, ...")
    count: int = Field(1, ge=1, le=64, description="how many like this")
    cores: float = Field(0.0, ge=0, le=64, description="share of one core, for all processes of a peer; 0: no limit")
    link: str = Field("", description="name of a [links.NAME]; left out: loopback")
    start_s: Seconds = Field(0.0, description="when it joins; those at 0 are there before the clock starts")
    disk_mb: int = Field(0, ge=0, le=10_000, description="size of its disk; 0: that of this machine")
    micro_batch: int = Field(
        4, ge=0, le=65536, description="samples computed at once; 0: found by each peer, so that runs differ"
    )

    settings: dict[str, Any] = Field(
        default={}, description="what its user allows, as for `p2pllm set`; shares of a core are still those of `cores`"
    )

    @field_validator("settings")
    @classmethod
    def _of_a_guest(cls, given: dict[str, Any]) -> dict[str, Any]:
        for name in given:
            if name not in LIVE:
                raise ValueError(f"{name} is none of {', '.join(sorted(LIVE))}")
        return given

    def names(self) -> list[str]:
        """Each one's name."""
        return [self.name] if self.count == 1 else [f"{self.name}-{number}" for number in range(self.count)]


Action = Literal[
    "kill", "freeze", "thaw", "stop", "restart", "cut", "mend", "partition", "heal", "slow_link", "restore_link",
    "slow_machine", "fill_disk", "free_disk", "corrupt", "pause", "resume",
]  # fmt: skip
Phase = Literal["", "collecting", "roster", "exchange", "vote", "commit"]

OPPOSITE = {
    "kill": "restart", "stop": "restart", "freeze": "thaw", "cut": "mend", "partition": "heal",
    "slow_link": "restore_link", "slow_machine": "slow_machine", "fill_disk": "free_disk",
    "pause": "resume",
}  # fmt: skip
"""What undoes what."""

ANYONE, LEADER, MEMBER = "any", "leader", "member"
"""Victims without a name: one that nothing else touches; the first of those there to lead the round, and the last."""


class Event(_Section):
    """Something that befalls a peer, at a time or in a phase of a round. With `for_s` its opposite follows."""

    at_s: Seconds = Field(0.0, description="when, seconds from when the first peers are ready; needed without phase")
    phase: Phase = Field(
        "", description="instead of at_s: once the peer says that it is in this phase, one event after the other"
    )
    after_s: Seconds = Field(0.0, description="with phase: not before")
    do: Action = Field(description="one of the following; each takes only the fields that are named with it")
    peer: str = Field(
        "",
        description="whom; 'any' draws one that nothing else touches meanwhile; with phase also 'leader' of the round, "
        "or 'member', another one",
    )
    other: str = Field("", description="cut and mend: only the path to this peer")
    groups: tuple[tuple[str, ...], ...] = Field(
        (), description="partition: who can still reach each other; those in no group make one more"
    )
    for_s: Seconds = Field(0.0, description="undone after this long; 0: never")
    keep_disk: bool = Field(True, description="restart, also the one after for_s: with the files it had")
    link: dict[str, Any] = Field(default={}, description="slow_link: what changes of its link")
    cores: float = Field(0.0, ge=0, le=64, description="slow_machine: its new share of a core; 0: no limit")
    file: str = Field("", description="corrupt: pattern under the peer's folder; the newest match gets a bit flipped")


class Churn(_Section):
    """Faults at random, from the seed. One that nobody may suffer is left out."""

    faults_per_hour: float = Field(0.0, ge=0, le=3600, description="in the whole swarm, at independent times")
    mean_down_s: float = Field(20.0, gt=0, le=3600, description="mean seconds until one is undone; exponential")
    kinds: tuple[Literal["kill", "freeze", "stop", "cut"], ...] = Field(
        ("kill", "freeze", "stop"),
        min_length=1,
        description="drawn from these; one that is named twice comes twice as often",
    )
    least_up: int = Field(1, ge=0, le=64, description="peers that are always left untouched at any time")
    lose_disk: float = Field(0.0, ge=0, le=1, description="share of restarts without the files it had")
    back_s: Seconds = Field(15.0, description="a peer counts as touched for so long after, until it has caught up")
    calm_s: Seconds = Field(30.0, description="seconds before the end by when all are undone, and no more come")


Limits = dict[Action, Annotated[float, Field(gt=0, le=1e6)]]


class Verdict(_Section):
    """What must hold at the end. A limit that is left out is not checked."""

    no_divergence: bool = Field(True, description="equal state digests at every round, or repaired by the next one")
    agree_at_end: bool = Field(True, description="peers that live, or are done, at the same round hold the same state")
    nothing_lost: bool = Field(True, description="no round that was committed is missing from the survivors' history")
    nothing_left: bool = Field(True, description="no process, socket, namespace or cgroup after the end")
    max_rounds_behind: int | None = Field(
        1, ge=0, description="peers that live, or are done, are at most so far from the head"
    )
    max_validation_loss: float | None = Field(None, gt=0, description="newest validation loss, nats a token")
    min_rounds: int | None = Field(None, ge=1, description="rounds that were committed")
    min_efficiency: float | None = Field(
        None, ge=0, le=1, description="tokens/s of the swarm by the sum of what its peers make alone"
    )
    max_recovery_s: float | None = Field(None, gt=0, description="survivors' next commit after any fault, seconds")
    survivors_within_s: Limits = Field(
        {}, description="by fault: survivors' next commit, seconds beyond the median round that no fault touched"
    )
    stalls_within_s: Limits = Field(
        {}, description="by fault: what it cost the survivors beside computing in that round or the next, seconds"
    )
    returns_within_s: Limits = Field(
        {}, description="by fault: from its end until the struck are members of a committed round, seconds"
    )
    min_pace: float | None = Field(
        None,
        ge=0,
        le=1,
        description="rounds by those of a run without faults that lasts as long; 0: any",
    )
    max_idle: float | None = Field(
        None, ge=0, le=1, description="share of its time that any peer neither gathered samples nor closed a round"
    )
    min_attendance: float | None = Field(
        None, ge=0, le=1, description="share of the rounds that every peer was a member of; 1: nobody was ever left out"
    )


@dataclass(frozen=True)
class PeerSpec:
    """One peer as it begins. `link` is None on loopback, and its `delay_ms` is one number; 0 cores: no limit."""

    name: str
    cores: float
    link: Link | None
    link_name: str
    start_s: float
    disk_mb: int
    micro_batch: int
    settings: dict[str, Any] = field(default_factory=dict, hash=False)


class Scenario(_Section):
    """A whole experiment."""

    name: PeerName = Field(description="1 to 12 of a-z, 0-9 and -")
    about: str = Field("", max_length=200, description="one line for `p2pllm lab scenarios`")
    seed: int = Field(0, ge=0, lt=2**32, description="of delays, churn and 'any'; the run has one of its own")
    duration_s: Seconds = Field(0.0, description="seconds from when the first peers are ready; 0: the run's rounds")
    alone_s: Seconds = Field(
        0.0, description="seconds that each peer trains alone, before the swarm and after it, for the efficiency"
    )
    run: RunDraft = RunDraft()
    links: dict[str, Link] = {}
    peers: tuple[Peers, ...] = (Peers(),)
    events: tuple[Event, ...] = ()
    churn: Churn = Churn()
    verdict: Verdict = Verdict()

    def names(self) -> list[str]:
        """All peers, in the order of the file."""
        return [name for peers in self.peers for name in peers.names()]

    def peer_specs(self) -> list[PeerSpec]:
        """All peers, in the order of the file; delays are drawn from the seed and the peer's name."""
        return [
            PeerSpec(
                name=name,
                cores=peers.cores,
                link=self._line(peers.link, name),
                link_name=peers.link,
                start_s=peers.start_s,
                disk_mb=peers.disk_mb,
                micro_batch=peers.micro_batch,
                settings=peers.settings,
            )
            for peers in self.peers
            for name in peers.names()
        ]

    def draws(self, purpose: str) -> random.Random:
        """Random numbers for one purpose. Only `random()` is the same in every version of Python."""
        return random.Random(f"{self.seed}/{purpose}")  # noqa: S311 - nothing secret

    def _line(self, link_name: str, peer: str) -> Link | None:
        if not link_name:
            return None
        link = self.links[link_name]
        if not isinstance(link.delay_ms, tuple):
            return link
        low, high = link.delay_ms
        delay = round(low + (high - low) * self.draws(f"delay/{peer}").random(), 3)
        return link.model_copy(update={"delay_ms": delay})


def load_scenario(name_or_path: str, *, short: bool = False, seed: int | None = None) -> Scenario:
    """Read and check a scenario: a shipped one by name, or any by the path of its file.

    short: with what its [short] says instead. seed: instead of its own.
    Raises UsageError with the file, the place in it, what is wrong and what would be right.
    """
    from p2pllm_peers.lab.reading import read_scenario  # it needs the fields above

    return read_scenario(name_or_path, short=short, seed=seed)


def shipped() -> list[tuple[str, str]]:
    """(name, what it shows) of the scenarios that come with the program, by name."""
    from p2pllm_peers.lab.reading import SHIPPED

    return [(path.stem, load_scenario(path.stem).about) for path in sorted(SHIPPED.glob("*.toml"))]


def describe() -> list[tuple[str, str, str]]:
    """(place, default, meaning) of every field of the format and of every action, in the order of a file."""
    from p2pllm_peers.lab.reading import describe as describe_format

    return describe_format()


def fits(scenario: Scenario, cpus: float, free_mb: float) -> str:
    """Why this machine cannot hold all the peers as asked, as one sentence; "" if it can.

    cpus: cores of this machine. free_mb: memory that it has available. Peers without a limit ask for no cores.
    """
    specs = scenario.peer_specs()
    cores = sum(spec.cores for spec in specs)
    if cores > cpus - LAB_CORES + 1e-9:
        return (
            f"The peers of {scenario.name} have {cores:g} cores in all, but this machine has {cpus:g} and the lab "
            f"itself needs {LAB_CORES:g}; give them at most {max(0.0, cpus - LAB_CORES):g}, or take fewer peers."
        )
    if len(specs) * PEER_MB > free_mb:
        return (
            f"The {len(specs)} peers of {scenario.name} need about {len(specs) * PEER_MB:,} MB of memory, but this "
            f"machine has {free_mb:,.0f} MB available; take at most {int(free_mb // PEER_MB)}, or free some."
        )
    return ""
