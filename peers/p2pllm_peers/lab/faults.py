"""What an event of a scenario does to a running swarm.

What does not live here: which event comes when (`timeline`), and how a peer or a line obeys (`swarm`, `links`).
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

from p2pllm.errors import RunError
from p2pllm_peers.lab.evidence import Strike
from p2pllm_peers.lab.machines import FILLER, Machines
from p2pllm_peers.lab.network.links import Links
from p2pllm_peers.lab.scenario import Link
from p2pllm_peers.lab.swarm import LEAVE_TIMEOUT_S, Swarm, SwarmPeer

_BLOCK = 1 << 16


class Faults:
    """Carries out strikes, each in a thread of its caller's; those on one peer in their order."""

    def __init__(self, swarm: Swarm, machines: Machines, out: Path, seed: int) -> None:
        """seed: chooses what byte of a file is corrupted."""
        self._swarm = swarm
        self._machines = machines
        self._out = out
        self._random = random.Random(seed)  # noqa: S311 - a fault, not a secret

    def carry_out(self, strike: Strike, progress: Callable[[str], None]) -> None:
        """Do it and return when it is done. Raises RunError if it cannot be done."""
        if strike.do in ("join", "restart"):
            self._start(self._swarm.peers[strike.peer], bool(strike.args.get("keep_disk", True)), progress)
        elif strike.do in _ON_PEERS:
            _ON_PEERS[strike.do](self._swarm.peers[strike.peer])
        elif strike.do in _ON_MACHINES:
            _ON_MACHINES[strike.do](self, strike)
        else:
            self._on_links(strike)

    def _start(self, peer: SwarmPeer, keep_disk: bool, progress: Callable[[str], None]) -> None:
        peer.wait_gone(LEAVE_TIMEOUT_S)  # one that was asked to leave may still be at it
        if not keep_disk:
            peer.keep(self._out)
            peer.wipe()
        if peer.folder is not None:
            peer.start(progress)
        else:
            self._swarm.join(peer.name, progress)

    def _on_links(self, strike: Strike) -> None:
        links = self._links()
        if strike.do in ("cut", "mend"):
            change = links.cut if strike.do == "cut" else links.mend
            change(strike.peer, strike.args["other"] or None)
        elif strike.do == "partition":
            links.partition([list(group) for group in strike.args["groups"]])
        elif strike.do == "heal":
            links.heal()
        else:  # slow_link and restore_link
            links.change(strike.peer, Link.model_validate(strike.args["link"]))

    def _links(self) -> Links:
        if self._machines.links is None:
            raise RunError("There are no links to cut or to slow down.")
        return self._machines.links

    def _slow_machine(self, strike: Strike) -> None:
        self._machines.limit(strike.peer, strike.args["cores"])

    def _fill_disk(self, strike: Strike) -> None:
        """Take the last byte; what the peer frees meanwhile is its own."""
        home = self._machines[strike.peer].home
        with (home / FILLER).open("wb", buffering=0) as file:
            size = _BLOCK
            while size:
                try:
                    file.write(bytes(size))
                except OSError:
                    size //= 2
        if (free := shutil.disk_usage(home).free) > _BLOCK:
            raise RunError(f"The disk of {strike.peer} is not full: {free} bytes are free.")

    def _free_disk(self, strike: Strike) -> None:
        (self._machines[strike.peer].home / FILLER).unlink(missing_ok=True)

    def _corrupt(self, strike: Strike) -> None:
        """Flip one bit somewhere in the newest file that matches and holds something."""
        folder = self._swarm.peers[strike.peer].folder
        files = [path for path in folder.path.glob(strike.args["file"]) if path.is_file()] if folder else []
        found = [path for path in files if path.stat().st_size]
        if not found:
            raise RunError(f"{strike.peer} has no file {strike.args['file']} to corrupt, or only empty ones.")
        path = max(found, key=lambda file: file.stat().st_mtime_ns)
        with path.open("r+b") as file:
            place = self._random.randrange(path.stat().st_size)
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ 1 << self._random.randrange(8)]))


_ON_MACHINES: dict[str, Callable[[Faults, Strike], None]] = {
    "slow_machine": Faults._slow_machine,
    "fill_disk": Faults._fill_disk,
    "free_disk": Faults._free_disk,
    "corrupt": Faults._corrupt,
}
_ON_PEERS: dict[str, Callable[[SwarmPeer], None]] = {
    "kill": SwarmPeer.kill,
    "freeze": SwarmPeer.freeze,
    "thaw": SwarmPeer.thaw,
    "stop": SwarmPeer.leave,
    "pause": SwarmPeer.pause,
    "resume": SwarmPeer.resume,
}
