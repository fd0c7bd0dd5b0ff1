"""rounds, credits, peers: what the log of rounds says, read from a peer's files, whether its daemon runs or not."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from p2pllm.errors import DaemonError, StateError
from p2pllm_cli.options import find_peer, run_options

if TYPE_CHECKING:
    from p2pllm.manifest import RunManifest
    from p2pllm.rounds.disk import Disk
    from p2pllm.rounds.log import RoundLog
    from p2pllm.rounds.record import Checkpoint, Record
    from p2pllm_peers.folders import PeerFolder

Row = dict[str, Any]
"""One record as JSON gives it."""

_MANY = 1000
"""Records from which on it is worth showing how far a command is."""

_DIGEST = re.compile(rb'"record_digest": ?"([0-9a-f]{64})"')

json_option = click.option("--json", "as_json", is_flag=True, help="One JSON object a line, the summary last.")


@click.command(short_help="List the committed rounds.")
@run_options
@click.option("--last", type=click.IntRange(min=1), default=20, show_default=True, help="Rounds to list.")
@click.option("--all", "every", is_flag=True, help="List all rounds.")
@json_option
def rounds(home: Path | None, run_prefix: str | None, name: str | None, last: int, every: bool, as_json: bool) -> None:
    """The log of rounds, the newest last.

    Bytes and time are what this peer measured in the exchange and the whole round; it has none of a round that it
    caught up with.
    """
    from p2pllm_cli.log_view import show_rounds

    peer = find_peer(home, run_prefix, name)
    with opened(peer) as disk:
        head = disk.log.branch.head[0]
        first = 1 if every else max(1, head - last + 1)
        rows = [_round_row(round_, record) for round_, record in enumerate(disk.log.records(first), first)]
        measured = _measured(peer.path / "rounds.jsonl", {row["record"].encode() for row in rows if row["record"]})
        for row in rows:
            row |= measured.get(row["record"], {"bytes": None, "round_s": None, "unix_time": None})
        summary = {
            "rounds": head,
            "missing": len(disk.log.missing()),
            "abandoned": len(disk.log.abandoned()),
            "checkpoint": checkpoint_row(disk.log, disk.log.checkpoint) if disk.log.checkpoint else None,
        }
    show_rounds(rows, summary, as_json=as_json)


def _round_row(round_: int, record: Record | None) -> Row:
    """What the log says of a round; "record" is None if that is damaged."""
    if record is None:
        return {"round": round_, "record": None}
    return {
        "round": round_,
        "record": record.body.digest.hex(),
        "members": {claim.peer: claim.samples for claim in record.body.members},
        "votes": len(set(record.voters) & set(record.body.peers)),
        "by_minority": not record.has_majority,
        "samples": record.body.samples,
        "loss": record.body.loss,
    }


def _measured(path: Path, wanted: set[bytes]) -> dict[str, Row]:
    """What this peer measured in rounds that it took part in, by the digest of their records."""
    from p2pllm.metrics import record_files

    found = dict[str, Row]()
    for file in record_files(path):
        if len(found) < len(wanted) and file.exists():
            _measured_in(file, wanted, found)
    return found


def _measured_in(path: Path, wanted: set[bytes], found: dict[str, Row]) -> None:
    """Add what one file has."""
    with path.open("rb") as file:
        for line in file:  # parsed only where it is one of those that we look for: a file may have many
            match = _DIGEST.search(line)
            if match is None or match[1] not in wanted:
                continue
            try:
                values = json.loads(line)
                moved = values["bytes_sent"] + values["bytes_received"]
                found[match[1].decode()] = {"bytes": moved, **{key: values[key] for key in ("round_s", "unix_time")}}
            except (ValueError, KeyError, TypeError):
                continue  # half a line of a killed daemon


@click.command(name="credits", short_help="Who contributed what, from signed claims.")
@run_options
@json_option
def credits_(home: Path | None, run_prefix: str | None, name: str | None, as_json: bool) -> None:
    """Samples and rounds of every peer, summed from the log.

    The signature of every claim is checked; one that does not fit ends the command with exit code 1.
    """
    from p2pllm.rounds.credit import tally
    from p2pllm_cli.log_view import follow, show_credits

    peer = find_peer(home, run_prefix, name)
    own = own_id(peer)
    with opened(peer) as disk:
        found = follow(tally(disk.log), shown=disk.log.branch.head[0] > _MANY)
    rows = [
        {
            "peer": id_,
            "own": id_ == own,
            "samples": credit.samples,
            "share": credit.samples / found.samples,
            "rounds": credit.rounds,
            "last_round": credit.last,
        }
        for id_, credit in found.credits.items()
    ]
    summary = {"peers": len(rows), "samples": found.samples, "rounds": found.rounds, "missing": found.missing}
    show_credits(rows, summary, as_json=as_json)


@click.command(short_help="Who takes part, and did.")
@run_options
@json_option
def peers(home: Path | None, run_prefix: str | None, name: str | None, as_json: bool) -> None:
    """The peers that the running daemon sees, and all that are in the log."""
    from p2pllm.network.saved import load_peers
    from p2pllm.rounds.credit import Credit, tally
    from p2pllm_cli.log_view import follow, show_peers

    peer = find_peer(home, run_prefix, name)
    status = _status(peer)
    own = own_id(peer) if status is None else status["peer_id"]
    live = {} if status is None else {seen["peer"]: seen for seen in [{**status, "peer": own}, *status["peers"]]}
    with opened(peer) as disk:
        found = follow(tally(disk.log, check=False), shown=disk.log.branch.head[0] > _MANY)
    saved = load_peers(peer.path / "peers.json")
    known = {*live, *found.credits, *saved, *([own] if own else [])}
    rows = []
    for id_ in sorted(known, key=lambda id_: (id_ not in live, -found.credits.get(id_, Credit()).samples, id_)):
        credit, seen = found.credits.get(id_, Credit()), live.get(id_, {})
        rows.append(
            {
                "peer": id_,
                "own": id_ == own,
                **{key: seen.get(key) for key in ("phase", "round", "tokens_per_s")},
                "rounds": credit.rounds,
                "samples": credit.samples,
                "last_round": credit.last,
                "addresses": len(saved.get(id_, [])),
            }
        )
    show_peers(rows, {"running": status is not None, "peers": len(rows), "alive": len(live)}, as_json=as_json)


def _status(peer: PeerFolder) -> Row | None:
    """What the daemon says; None if there is none that answers."""
    from p2pllm_peers.control import ask

    if running := peer.running():
        try:
            return ask(running["socket"], {"do": "status"})
        except DaemonError:
            pass  # it is just ending
    return None


@contextmanager
def opened(peer: PeerFolder) -> Iterator[Disk]:
    """A peer's files, to be read. Raises StateError if the run's manifest is not here."""
    from p2pllm.rounds.disk import Disk

    keep_quiet()
    disk = Disk(peer.path, manifest_of(peer), None, read_only=True)
    try:
        yield disk
    finally:
        disk.close()


def manifest_of(peer: PeerFolder) -> RunManifest:
    """The sealed manifest of a peer's run. Raises StateError if it is not here."""
    loaded = peer.run.load()
    if loaded is None:
        raise StateError(f"The manifest of run {peer.run.run_id[:16]} is missing; join again with an invite.")
    return loaded[0]


def keep_quiet() -> None:
    """Have the library's warnings go nowhere: a command says itself what is damaged."""
    logging.getLogger("p2pllm").addHandler(logging.NullHandler())


def own_id(peer: PeerFolder) -> str:
    """Id of the peer; empty if its key is not here."""
    from p2pllm.identity import Identity

    return Identity.load_or_create(peer.key).peer_id if peer.key.exists() else ""


def checkpoint_row(log: RoundLog, point: Checkpoint) -> Row:
    """A checkpoint as JSON gives it. on_branch: None for a round that the log has not come to."""
    reached = point.round <= log.branch.head[0]
    return {"round": point.round, "record": point.record.hex(), "on_branch": log.has(point.head) if reached else None}
