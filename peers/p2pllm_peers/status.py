"""Status: what a peer answers whoever asks how it is, and what it keeps of its rounds for that.

What does not live here: showing it (`p2pllm_cli`), and what every round measured (`rounds.jsonl`, `participant`).
"""

from __future__ import annotations

import shutil
import time
from collections import deque
from pathlib import Path
from typing import Any

from p2pllm.averaging.attempt import STREAM_METHOD as REDUCED
from p2pllm.averaging.gather import STREAM_METHOD as GATHERED
from p2pllm.manifest import RunManifest
from p2pllm.metrics import RoundRecord
from p2pllm.network.addresses import reach
from p2pllm.network.node import Node
from p2pllm.rounds import plan
from p2pllm.rounds.credit import Ledger
from p2pllm.rounds.loop import TrainingLoop
from p2pllm.rounds.swarm import SwarmView
from p2pllm.settings import PeerSettings
from p2pllm.settings_file import limits_of
from p2pllm_peers.devices import Devices
from p2pllm_peers.links import Links

SHOWN_LOSSES = 200


class Status:
    """Of one peer while its daemon lives."""

    def __init__(self, manifest: RunManifest, name: str, node: Node, view: SwarmView, compute: Devices) -> None:
        self._manifest = manifest
        self._run_id = manifest.run_id  # which hashes the manifest
        self._name = name
        self._node = node
        self._view = view
        self._compute = compute
        self._losses: deque[float] = deque(maxlen=SHOWN_LOSSES)
        self._last: RoundRecord | None = None
        self.links = Links()
        self._validation_loss: float | None = None
        self._started = time.time()

    def note(self, record: RoundRecord) -> None:
        """A round was committed."""
        self._last = record
        self.links.note(record, self._node.traffic.peers)
        self._losses.append(record.loss)
        if record.validation_loss is not None:
            self._validation_loss = record.validation_loss

    def traffic(self) -> dict[str, int]:
        """Payload bytes so far by kind: control (all calls, the DHT's too), updates (exchanges), state (the rest)."""
        traffic = self._node.traffic
        updates = [moved for proto, moved in traffic.streams.items() if proto.endswith((REDUCED, GATHERED))]
        sent, received = sum(moved.sent for moved in updates), sum(moved.received for moved in updates)
        return {
            "control_sent": traffic.calls.sent,
            "control_received": traffic.calls.received,
            "updates_sent": sent,
            "updates_received": received,
            "state_sent": traffic.sent - traffic.calls.sent - sent,
            "state_received": traffic.received - traffic.calls.received - received,
        }

    def answer(self, loop: TrainingLoop, ledger: Ledger, settings: PeerSettings, invite: str) -> dict[str, Any]:
        """What `p2pllm status` shows of a peer with this loop; every number is measured or counted by this daemon."""
        own, others = self._view.own, self._view.statuses()
        return {
            "run_name": self._manifest.name,
            "run_id": self._run_id,
            "name": self._name,
            "peer_id": self._node.peer_id,
            "invite": invite,
            "phase": own.phase,
            "trouble": loop.trouble,
            "paused": loop.paused,
            "round": own.round,
            "rounds": self._manifest.round.rounds,
            "recorded_round": own.round if self._last is None else self._last.round,  # what loss and curve belong to
            "samples": own.samples,
            "gathered": plan.gathered(own.head, self._view.with_own()),  # by the swarm, towards the round under way
            "wanted": self._manifest.round.samples,
            "credit": {"complete": ledger.update(), "samples": ledger.samples, "all": ledger.of_all},
            "limits": limits_of(settings),
            "record": own.digest.hex(),
            "seconds": {} if self._last is None else self._last.seconds,
            "loss": None if self._last is None else self._last.loss,
            "validation_loss": self._validation_loss,
            "losses": [round(loss, 4) for loss in self._losses],
            "tokens": self._compute.tokens,
            "tokens_per_s": self._compute.tokens_per_s,
            "swarm_tokens_per_s": self._compute.tokens_per_s + sum(s.tokens_per_s for s in others.values()),
            "bytes_sent": self._node.traffic.sent,
            "bytes_received": self._node.traffic.received,
            "traffic": self.traffic(),
            "links": self.links.rows(),
            "parameters": self._compute.layout.size,
            "device": self._compute.device,
            "micro_batch": self._compute.micro_batch,
            "notice": self._compute.notice,
            "reach": reach(self._node.addresses()),
            "disk_free": _free(settings.home),
            "worker_restarts": self._compute.restarts,
            "network_restarts": self._node.restarts,
            "uptime_s": time.time() - self._started,
            "peers": [
                {
                    "peer": peer,
                    "phase": status.phase,
                    "round": status.round,
                    "samples": status.samples,
                    "tokens_per_s": status.tokens_per_s,
                    "record": status.digest.hex(),
                }
                for peer, status in sorted(others.items())
            ],
        }


def _free(folder: Path) -> int | None:
    """Bytes that the disk of this folder has left; None if it is gone, which is no reason not to answer."""
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None
