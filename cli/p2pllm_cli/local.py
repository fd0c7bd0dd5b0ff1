"""status, leave, logs: commands that talk to the daemons of this machine."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import click

from p2pllm.errors import DaemonError
from p2pllm_cli.options import find_peer, find_peers, run_options

if TYPE_CHECKING:
    from p2pllm_peers.folders import PeerFolder


@click.command(short_help="Show round, loss, peers and speed.")
@run_options
@click.option("--json", "as_json", is_flag=True, help="One JSON object a peer and line.")
@click.option("-f", "--follow", is_flag=True, help="Go on showing one peer; Ctrl+C ends the view alone.")
def status(home: Path | None, run_prefix: str | None, name: str | None, as_json: bool, follow: bool) -> None:
    """Peers, round, loss, tokens/s and bytes of the runs of this machine."""
    from p2pllm_cli.view import print_status

    if follow:
        _follow_peer(find_peer(home, run_prefix, name), as_json)
        return
    for peer in find_peers(home, run_prefix, name):
        report = _report(peer)
        if as_json:
            click.echo(json.dumps(report))
        else:
            print_status(report)


def _follow_peer(peer: PeerFolder, as_json: bool) -> None:
    """Show a peer as `join` does in the foreground, and leave it alone. Raises DaemonError if there is none to ask."""
    from p2pllm_cli.view import LiveView
    from p2pllm_peers.control import watch

    running = peer.running()
    if not running:
        state = "not running" if running is None else "still starting"
        raise DaemonError(f"'{peer.name}' is {state} in run {peer.run.run_id[:16]}; there is nothing to follow.")
    try:
        if as_json:
            for report in watch(running["socket"]):
                click.echo(json.dumps(report))
        else:
            LiveView(running["socket"], lambda: "Ctrl+C ends this view, and not the peer").show()
    except KeyboardInterrupt:
        return
    click.echo(f"'{peer.name}' has ended, or does not answer.", err=True)


def _report(peer: PeerFolder) -> dict[str, Any]:
    """The daemon's own status, or only its phase where it cannot be asked."""
    from p2pllm_peers.control import ask

    running = peer.running()
    phase = "stopped" if running is None else "starting"
    if running:
        try:
            return ask(running["socket"], {"do": "status"})
        except DaemonError:
            phase = "not answering" if peer.running() else "stopped"  # it may have ended just now
    return {"run_id": peer.run.run_id, "name": peer.name, "phase": phase}


@click.command(short_help="Leave a run in order and stop its daemon.")
@run_options
def leave(home: Path | None, run_prefix: str | None, name: str | None) -> None:
    """Leave the run: finish or hand off the round, save the state, stop the daemon."""
    from p2pllm_peers.control import ask

    peer = find_peer(home, run_prefix, name)
    run_id, running = peer.run.run_id[:16], peer.running()
    if running is None:
        raise DaemonError(f"'{peer.name}' is not running in run {run_id}; there is nothing to leave.")
    pid = running.get("pid") or peer.starting_pid()
    if pid is None:
        raise DaemonError(f"'{peer.name}' has only just been started in run {run_id}; leave in a moment.")
    try:
        if running:
            ask(running["socket"], {"do": "leave"})
        else:  # it does not listen yet, but knows the signal
            os.kill(pid, signal.SIGTERM)
    except (DaemonError, ProcessLookupError):
        if peer.running() is not None:  # else it has just ended by itself
            raise
    end = time.monotonic() + 15
    while peer.running() is not None:
        if time.monotonic() > end:
            raise DaemonError(f"The daemon has not ended after 15 s; see `p2pllm logs`, or end it with `kill {pid}`.")
        time.sleep(0.1)  # another process ends; there is no event to wait for
    click.echo(f"'{peer.name}' has left run {run_id}.")


@click.command()
@run_options
@click.option("-f", "--follow", is_flag=True, help="Go on printing what is added.")
@click.option("-n", "--lines", type=click.IntRange(min=0), default=50, show_default=True, help="Lines to begin with.")
def logs(home: Path | None, run_prefix: str | None, name: str | None, follow: bool, lines: int) -> None:
    """What the daemon wrote to its log."""
    peer = find_peer(home, run_prefix, name)
    path = peer.path / "daemon.log"
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in deque(file, maxlen=lines):
                click.echo(line, nl=False)
            if follow:
                _follow(path, file)
    except FileNotFoundError:
        raise DaemonError(f"'{peer.name}' has no log yet in {peer.path}.") from None


def _follow(path: Path, file: TextIO) -> None:
    """Print what is added, and what comes after it in a new file when this one is full; until Ctrl+C."""
    while True:
        for line in file:
            click.echo(line, nl=False)
        try:
            put_away = path.stat().st_ino != os.fstat(file.fileno()).st_ino
        except FileNotFoundError:
            put_away = False
        if put_away and not (rest := file.read()):
            with path.open(encoding="utf-8", errors="replace") as following:
                return _follow(path, following)
        elif put_away:
            click.echo(rest, nl=False)
        time.sleep(0.2)  # a file has no event that works everywhere
