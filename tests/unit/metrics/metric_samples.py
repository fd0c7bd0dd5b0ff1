"""A status and records as daemons give them, and a machine with such peers."""

from __future__ import annotations

import json
import os
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from p2pllm.metrics import RoundRecord
from p2pllm_peers.folders import PeerFolder, RunFolder

RUN_ID = "3d69353726da86d9"

STATUS: dict[str, Any] = {
    "run_name": "stdlib-llama",
    "run_id": RUN_ID + "ab" * 24,
    "name": "founder",
    "peer_id": "12D3KooWAAAA",
    "invite": "p2pllm:aeaf",
    "phase": "collecting",
    "trouble": "",
    "paused": "",
    "round": 33,
    "rounds": 200,
    "recorded_round": 33,
    "samples": 28,
    "gathered": 53,
    "wanted": 400,
    "credit": {"complete": True, "samples": 700, "all": 1500},
    "limits": {"cpu_percent": 50.0},
    "seconds": {"compute": 1.5, "exchange": 0.25},
    "record": "8e" * 32,
    "loss": 2.7642,
    "validation_loss": 2.8887,
    "losses": [2.9, 2.7642],
    "tokens": 123456,
    "tokens_per_s": 6489.5,
    "swarm_tokens_per_s": 9967.25,
    "bytes_sent": 1111,
    "bytes_received": 2222,
    "traffic": {
        "control_sent": 11,
        "control_received": 12,
        "updates_sent": 1000,
        "updates_received": 2000,
        "state_sent": 100,
        "state_received": 210,
    },
    "links": [{"peer": "12D3KooWBBBB", "bytes": 352_140, "mbit": 3.25}],
    "parameters": 800_000,
    "device": "cpu",
    "micro_batch": 4,
    "notice": "",
    "reach": "direct",
    "disk_free": 50_000_000_000,
    "worker_restarts": 2,
    "network_restarts": 1,
    "uptime_s": 61.5,
    "peers": [
        {
            "peer": "12D3KooWBBBB",
            "phase": "collecting",
            "round": 35,
            "samples": 25,
            "tokens_per_s": 3477.75,
            "record": "8e" * 32,
        }
    ],
}

_FIRST = RoundRecord(
    round=1,
    unix_time=1_795_395_655.99365,
    samples=376,
    tokens=48_128,
    members={"12D3KooWAAAA": 208, "12D3KooWBBBB": 168},
    loss=3.5,
    validation_loss=None,
    learning_rate=3e-3,
    record_digest="90" * 32,
    aggregate_digest="a8" * 32,
    state_digest="bc" * 32,
    attempts=1,
    own_steps=[4] * 52,
    bytes_sent=352_140,
    bytes_received=352_002,
    seconds={"compute": 1.0, "exchange": 0.25},
    round_s=1.5,
    traffic=STATUS["traffic"],
)


def record(round_: int, **changes: Any) -> RoundRecord:
    """The record of a round; those of later rounds are 2 s later, and their loss is a little lower."""
    at = {"round": round_, "unix_time": _FIRST.unix_time + 2.0 * (round_ - 1), "loss": 3.5 - 0.125 * (round_ - 1)}
    return replace(_FIRST, **(at | changes))


def make_peer(home: Path, name: str = "founder", run_id: str = RUN_ID) -> PeerFolder:
    """The folder of a peer that does not run, with no record yet."""
    peer = RunFolder(home, run_id).peer(name)
    os.close(peer.lock())
    (peer.run.path / "manifest.json").write_text("{}")
    return peer


def append(peer: PeerFolder, *records: RoundRecord, end: str = "") -> None:
    """What a daemon appends to its records."""
    with (peer.path / "rounds.jsonl").open("a") as file:
        file.write("".join(record.to_json() + "\n" for record in records) + end)


def occupy(peer: PeerFolder, socket: Path) -> int:
    """Be a peer's living daemon, until the handle is closed."""
    handle = peer.lock()
    (peer.path / "daemon.json").write_text(json.dumps({"socket": str(socket)}))
    return handle


def answering(reply: dict[str, Any]) -> Callable[[dict[str, Any]], Awaitable[dict[str, Any]]]:
    """A handler of a control socket."""

    async def answer(request: dict[str, Any]) -> dict[str, Any]:
        return reply

    return answer
