"""checkpoint: how the organiser of a run anchors the branch that all peers follow."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from p2pllm.errors import DaemonError, StateError, UsageError
from p2pllm_cli.log import checkpoint_row, json_option, keep_quiet, manifest_of, opened, own_id
from p2pllm_cli.options import find_peer, run_options

if TYPE_CHECKING:
    from p2pllm.manifest import RunManifest
    from p2pllm.rounds.log import RoundLog
    from p2pllm.rounds.record import Checkpoint
    from p2pllm_peers.folders import PeerFolder


@click.group(short_help="Anchor the run's branch, as its organiser.")
def checkpoint() -> None:
    """Checkpoints: records that the organiser signed. Of two branches all peers follow the one with the newest."""


@checkpoint.command(short_help="Sign a record, the newest one by default.")
@run_options
@click.option("--round", "round_", type=click.IntRange(min=1), help="Round to sign; default: the newest.")
@json_option
def sign(home: Path | None, run_prefix: str | None, name: str | None, round_: int | None, as_json: bool) -> None:
    """Sign a record of this machine's log, so that no peer leaves the branch that leads to it.

    It takes the key of the run's founder. A running daemon tells the other peers at once, else the next one will.
    """
    keep_quiet()
    peer = find_peer(home, run_prefix, name)
    manifest = manifest_of(peer)
    if name is None:  # another peer of this machine may be the one that runs
        peer = next((other for other in peer.run.peers() if own_id(other) == manifest.founder), peer)
    if own_id(peer) != manifest.founder:
        raise UsageError(
            f"Only the founder of run {manifest.run_id[:16]} can sign a checkpoint of it, and {peer.key} is not its "
            f"key; sign on the founder's machine, or name its peer with --name."
        )
    running = peer.running()
    if running:
        with opened(peer) as disk:
            point = _signed(peer, manifest, disk.log, round_)
        new = _told(running["socket"], point)
    elif running is None:
        point, new = _written(peer, manifest, round_)
    else:
        raise DaemonError(f"'{peer.name}' is still starting; sign when `p2pllm status` shows its round.")
    if as_json:
        click.echo(json.dumps({"round": point.round, "record": point.record.hex(), "new": new}))
    else:
        done = "Signed" if new else "Already signed:"
        click.echo(f"{done} round {point.round}, record {point.record.hex()[:16]}.")


def _signed(peer: PeerFolder, manifest: RunManifest, log: RoundLog, round_: int | None) -> Checkpoint:
    """A checkpoint of a round of the log."""
    from p2pllm.identity import Identity
    from p2pllm.rounds.record import Checkpoint

    head = log.branch.head[0]
    if not head:
        raise StateError(f"'{peer.name}' has no round in its log yet; sign after the first one.")
    record = log.record(round_ or head)
    if record is None:
        raise UsageError(
            f"Round {round_ or head} is not in the log of '{peer.name}', which goes from 1 to {head}, or is damaged "
            f"there; sign another one."
        )
    return Checkpoint.sign(Identity.load_or_create(peer.key), manifest.run_id, record.head)


def _told(socket: str, point: Checkpoint) -> bool:
    """Have the running daemon keep it and tell the others; whether it was new."""
    from p2pllm_peers.control import ask

    reply = ask(socket, {"do": "checkpoint", "checkpoint": point.pack().hex()})
    if "error" in reply:
        raise DaemonError(f"The daemon did not take the checkpoint: {reply['error'].rstrip('.')}; see `p2pllm logs`.")
    return bool(reply["new"])


def _written(peer: PeerFolder, manifest: RunManifest, round_: int | None) -> tuple[Checkpoint, bool]:
    """Put it into the log of a peer that is not running; whether it was new."""
    from p2pllm.rounds.log import RoundLog

    handle = peer.lock()  # so that no daemon starts to write there meanwhile
    try:
        log = RoundLog(peer.path / "log", manifest.run_id, manifest.founder)
        try:
            point = _signed(peer, manifest, log, round_)
            return point, log.add_checkpoint(point)
        finally:
            log.close()
    finally:
        os.close(handle)


@checkpoint.command(short_help="List the checkpoints that are known.")
@run_options
@json_option
def show(home: Path | None, run_prefix: str | None, name: str | None, as_json: bool) -> None:
    """The organiser's checkpoints in this machine's log, the newest last."""
    from p2pllm_cli.log_view import show_checkpoints

    with opened(find_peer(home, run_prefix, name)) as disk:
        rows = [checkpoint_row(disk.log, point) for point in disk.log.checkpoints]
    show_checkpoints(rows, as_json=as_json)
