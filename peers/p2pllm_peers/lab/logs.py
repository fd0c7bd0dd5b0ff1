"""What the logs of rounds on the peers' disks say when a run of the lab is over: what became history, and what did not.

Records name the one before them, so here nothing has to be guessed. What does not live here: the rounds as peers
recorded them, with times (`reporting.commits`), and what caused a fork (`reporting.history`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from p2pllm.errors import P2PLLMError, StateError
from p2pllm.manifest import RunManifest
from p2pllm.rounds.log import RoundLog

Node = tuple[int, str]
"""(round, digest of its record, in hex)."""


@dataclass(frozen=True)
class DiskLog:
    """One peer's log. chain: digest of the record of each round of its branch, as far as they are known.

    missing: rounds of the branch whose records are damaged and were not given back. abandoned: records of branches
    that it left. problem: why it cannot be read; the rest is empty then.
    """

    chain: dict[int, str]
    missing: tuple[int, ...] = ()
    abandoned: tuple[Node, ...] = ()
    problem: str = ""

    @property
    def head(self) -> int:
        """Its newest round."""
        return max(self.chain, default=0)


def read_log(disk: Path) -> DiskLog | None:
    """The log on the disk of one peer, in one run; None if there is none."""
    for path, manifest_file in _logs(disk):
        try:
            manifest = RunManifest.from_bytes(manifest_file.read_bytes())
            log = RoundLog(path, manifest.run_id, manifest.founder, read_only=True)
        except (P2PLLMError, OSError) as error:
            return DiskLog({}, problem=str(error))
        try:
            return _read(log)
        except StateError as error:
            return DiskLog({}, problem=str(error))
        finally:
            log.close()
    return None


def _read(log: RoundLog) -> DiskLog:
    head = log.branch.head[0]
    digests = ((round_, log.digest(round_)) for round_ in range(1, head + 1))
    return DiskLog(
        {round_: digest.hex() for round_, digest in digests if digest},
        tuple(round_ for round_ in range(1, head + 1) if log.record(round_) is None),
        tuple((round_, digest.hex()) for round_, digest in log.abandoned()),
    )


def _logs(disk: Path) -> Iterator[tuple[Path, Path]]:
    for path in sorted(disk.glob("runs/*/*/log")):
        yield path, path.parent.parent / "manifest.json"
