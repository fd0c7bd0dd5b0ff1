"""What one run of the lab leaves in its folder, typed; everything that a report says is computed from this.

    out/lab.json         `Facts`: the scenario, what was asked and measured of machines and links, what struck when
    out/samples.jsonl    `Sample`: about one a second
    out/records/<peer>.jsonl    `p2pllm.metrics.RoundRecord`s of all its lives
    out/logs/<peer>.log  what its daemons wrote
    out/peers/<peer>/    its disk at the end

All times are seconds since `began_unix`, the moment when the first peers were ready. What does not live here: making
these files (`experiment`) and drawing conclusions (`reporting`).
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from p2pllm.errors import UsageError
from p2pllm.explain import explain
from p2pllm_peers.lab.logs import DiskLog, read_log
from p2pllm_peers.lab.scenario import Scenario

PEERS = "peers"
"""Folder of the peers' disks in the folder of a run."""


class _Row(BaseModel):
    model_config = ConfigDict(extra="forbid")


class LinkCheck(_Row):
    """One peer's line, as asked and as measured before the start. Loss is a share of packets there and back."""

    peer: str
    asked_up_mbit: float
    measured_up_mbit: float
    asked_down_mbit: float
    measured_down_mbit: float
    asked_delay_ms: float  # one way
    measured_delay_ms: float
    asked_loss: float = 0.0
    measured_loss: float = 0.0


class Emulator(_Row):
    """What made the links, and what it cost."""

    kind: str  # "tun box", "netem", or "none" (loopback)
    cpu_s: float = 0.0
    wall_s: float = 0.0
    frames: int = 0
    bytes: int = 0
    late_p99_ms: float = 0.0  # how much later than due frames were handed over
    late_max_ms: float = 0.0


class PeerFacts(_Row):
    """One peer. peer_id is "" if it never got ready."""

    name: str
    peer_id: str = ""
    former_ids: list[str] = []  # of earlier lives, whose disk it lost
    cores: float = 0.0  # 0: no limit
    link: str = ""
    records: str = ""  # its rounds.jsonl, relative to out/
    log: str = ""  # its daemon.log, relative to out/
    ready_s: list[float] = []  # each time it became ready
    ended_s: list[float] = []  # each time that it ended, by whatever
    alone_tokens_per_s: float | None = None
    crashes: list[str] = []  # what it said when it ended with an error that no event explains


class Strike(_Row):
    """One planned event; the same seed gives the same list. `args` depends on `do`, see `timeline`."""

    at_s: float  # with a phase the earliest time; of what undoes such a one, as long after it as here
    do: str
    peer: str = ""  # with a phase also who leads, or another one, see `aiming`
    args: dict[str, Any] = {}
    phase: str = ""  # of a round, in which its victim is to be
    undoes: int | None = None  # index of the event with a phase that it ends, on the same peer


class Struck(_Row):
    """What became of a planned event: index in `events`, when it was carried out, what went wrong.

    With a phase: whom it struck, and what that peer had said last: its phase, its round (of its head), and how old
    that was at most when the strike was done, seconds.
    """

    event: int
    at_s: float
    error: str = ""
    peer: str = ""
    phase: str = ""
    round: int | None = None
    age_s: float | None = None


class Facts(_Row):
    """Everything of a run that is not in the peers' own records."""

    version: str
    scenario: Scenario
    short: bool = False
    began_unix: float
    ended_s: float = 0.0
    interrupted: bool = False
    cpus: int = 0
    links: list[LinkCheck] = []
    emulator: Emulator = Emulator(kind="none")
    parameters: int = 0  # of the model; 0: no peer told
    peers: list[PeerFacts] = []
    events: list[Strike] = []
    struck: list[Struck] = []
    left_over: list[str] = []
    notes: list[str] = []  # what a reader must know, for example that there was no root and so no shaping


class PeerSample(_Row):
    """One peer at one moment. Bytes and CPU since the swarm was started; None where it could not be read."""

    wire_up: int | None = None  # interface counters
    wire_down: int | None = None
    cpu_s: float | None = None
    phase: str = ""  # "" if it is not there
    round: int = 0
    digest: str = ""
    samples: int = 0
    tokens_per_s: float = 0.0
    traffic: dict[str, int] = {}  # its own counters: <control|updates|state>_<sent|received>, bytes of payload


class Sample(_Row):
    """All peers at one moment."""

    t: float
    peers: dict[str, PeerSample]


class Evidence:
    """One run of the lab, read from its folder."""

    def __init__(self, out: Path) -> None:
        """Raises UsageError if `out` is not the folder of a run of this version of the lab."""
        model: type[_Row] = Facts
        file = out / "lab.json"
        try:
            self.facts = Facts.model_validate_json(file.read_bytes())
            model, file = Sample, out / "samples.jsonl"
            self.samples = [Sample.model_validate(row) for row in read_lines(file)]
        except OSError:
            raise UsageError(f"There is no readable {file}; name the folder that `p2pllm lab run` wrote.") from None
        except ValidationError as error:
            problem = f"{file} is damaged or of another version of p2pllm: {explain(error, model)}"
            raise UsageError(f"{problem}; read it with the p2pllm that wrote it.") from None
        self.records: dict[str, list[dict[str, Any]]] = {
            peer.name: read_lines(out / peer.records) for peer in self.facts.peers if peer.records
        }
        found = {peer.name: read_log(out / PEERS / peer.name) for peer in self.facts.peers}
        self.logs: dict[str, DiskLog] = {name: log for name, log in found.items() if log is not None}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a JSONL file; one that is being written, or was torn, is left out."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return []
    rows = []
    for line in lines:
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows
