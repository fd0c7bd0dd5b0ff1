"""service: have this machine start a peer by itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from p2pllm_cli.options import find_peer, run_options

if TYPE_CHECKING:
    from p2pllm_peers.folders import PeerFolder


@click.group(short_help="Have this machine start a peer by itself.")
def service() -> None:
    """Have this machine start a peer by itself, after a reboot and after a crash."""


@service.command()
@run_options
def install(home: Path | None, run_prefix: str | None, name: str | None) -> None:
    """Start a peer now and whenever this machine starts. It must have joined its run once."""
    from p2pllm_peers.service import manager

    peer, system = find_peer(home, run_prefix, name), manager()
    running = peer.running() is not None
    advice = system.install(peer)
    click.echo(f"'{peer.name}' of run {peer.run.run_id[:16]} is a service: {system.file(peer)}")
    if running and not system.state(peer).startswith(("active", "running")):
        which = f"--run {peer.run.run_id[:16]} --name {peer.name}"
        click.echo(
            "It runs now as it was started; the service starts it from the next start of this machine on. To hand it "
            f"over at once: `p2pllm leave {which}`, then `p2pllm service install {which}` again."
        )
    if advice:
        click.echo(f"Note: {advice}")


@service.command()
@run_options
def remove(home: Path | None, run_prefix: str | None, name: str | None) -> None:
    """Stop a peer that is a service, and start it no more; also one whose files are gone."""
    from p2pllm.errors import DaemonError
    from p2pllm_peers.service import manager

    system = manager()
    peers = _meant(system.installed(), home, run_prefix, name)
    if not peers:
        raise DaemonError("No peer of this machine that you name is a service; `p2pllm service status` lists them.")
    if len(peers) > 1:
        names = ", ".join(f"--run {peer.run.run_id[:16]} --name {peer.name}" for peer in peers)
        raise DaemonError(f"Several peers are services; say which one: {names}.")
    system.remove(peers[0])
    state = "its state is kept" if peers[0].path.exists() else "its state was gone already"
    click.echo(f"'{peers[0].name}' of run {peers[0].run.run_id[:16]} is no service any more; {state}.")


@service.command()
@run_options
def status(home: Path | None, run_prefix: str | None, name: str | None) -> None:
    """Which peers this machine starts by itself."""
    from p2pllm_peers.service import manager

    system = manager()
    peers = _meant(system.installed(), home, run_prefix, name)
    for peer in peers:
        gone = "" if peer.path.exists() else "; its files are gone, so `p2pllm service remove` it"
        click.echo(f"'{peer.name}' of run {peer.run.run_id[:16]}: {system.state(peer)}  {system.file(peer)}{gone}")
    if not peers:
        click.echo("No peer of this machine is a service; `p2pllm service install` makes one.")


def _meant(peers: list[PeerFolder], home: Path | None, run_prefix: str | None, name: str | None) -> list[PeerFolder]:
    """Those of any home that the options leave."""
    return [
        peer
        for peer in peers
        if (home is None or peer.run.home == home.absolute())
        and peer.run.run_id.startswith(run_prefix or "")
        and name in (None, peer.name)
    ]
