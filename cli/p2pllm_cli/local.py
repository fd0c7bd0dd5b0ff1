"""status, leave, logs: commands that talk to the daemons of this machine."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click

from p2pllm.errors import DaemonError
from p2pllm_cli.options import find_peer, find_runs, run_options


@click.command()
@run_options
@click.option("--json", "as_json", is_flag=True, help="One JSON object a peer and line.")
def status(home: Path | None, run_prefix: str | None, name: str | None, as_json: bool) -> None:
    """Peers, round, loss, tokens/s and bytes of the runs of this machine."""
    from p2pllm_cli.view import print_status
    from p2pllm_peers.control import ask

    for run in find_runs(home, run_prefix):
        for peer in run.peers():
            if name not in (None, peer.name):
                continue
            running = peer.running()
            report: dict[str, Any] = {"run_id": run.run_id, "name": peer.name, "phase": "stopped"}
            if running:
                report = ask(running["socket"], {"do": "status"})
            elif running is not None:
                report["phase"] = "starting"
            if as_json:
                click.echo(json.dumps(report))
            else:
                print_status(report)


@click.command()
@run_options
def leave(home: Path | None, run_prefix: str | None, name: str | None) -> None:
    """Leave the run: finish or hand off the round, save the state, stop the daemon."""
    from p2pllm_peers.control import ask

    peer = find_peer(home, run_prefix, name)
    running = peer.running()
    if not running:
        raise DaemonError(f"'{peer.name}' is not running in run {peer.run.run_id[:16]}; there is nothing to leave.")
    ask(running["socket"], {"do": "leave"})
    end = time.monotonic() + 15
    while peer.running() is not None:
        if time.monotonic() > end:
            raise DaemonError(f"The daemon (process {running['pid']}) has not ended after 15 s; see `p2pllm logs`.")
        time.sleep(0.1)  # another process ends; there is no event to wait for
    click.echo(f"'{peer.name}' has left run {peer.run.run_id[:16]}.")


@click.command()
@run_options
@click.option("-f", "--follow", is_flag=True, help="Go on printing what is added.")
@click.option("-n", "--lines", default=50, show_default=True, help="Lines to begin with.")
def logs(home: Path | None, run_prefix: str | None, name: str | None, follow: bool, lines: int) -> None:
    """What the daemon wrote to its log."""
    peer = find_peer(home, run_prefix, name)
    try:
        with (peer.path / "daemon.log").open(encoding="utf-8", errors="replace") as file:
            for line in file.readlines()[-lines:]:
                click.echo(line, nl=False)
            while follow:
                line = file.readline()
                if line:
                    click.echo(line, nl=False)
                else:
                    time.sleep(0.2)  # a file has no event that works everywhere
    except FileNotFoundError:
        raise DaemonError(f"'{peer.name}' has no log yet in {peer.path}.") from None
