"""service: have this machine start a peer by itself."""

from __future__ import annotations

from pathlib import Path

import click

from p2pllm_cli.options import find_peer, find_peers, run_options


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
    if running:
        click.echo("It runs already, so the service takes over at the next start of this machine, or leave it first.")
    if advice:
        click.echo(f"Note: {advice}")


@service.command()
@run_options
def remove(home: Path | None, run_prefix: str | None, name: str | None) -> None:
    """Stop a peer that is a service, and start it no more."""
    from p2pllm.errors import DaemonError
    from p2pllm_peers.service import manager

    system = manager()
    peers = system.installed(find_peers(home, run_prefix, name))
    if not peers:
        raise DaemonError("No peer of this machine that you name is a service; `p2pllm service status` lists them.")
    if len(peers) > 1:
        names = ", ".join(f"--run {peer.run.run_id[:16]} --name {peer.name}" for peer in peers)
        raise DaemonError(f"Several peers are services; say which one: {names}.")
    system.remove(peers[0])
    click.echo(f"'{peers[0].name}' of run {peers[0].run.run_id[:16]} is no service any more; its state is kept.")


@service.command()
@run_options
def status(home: Path | None, run_prefix: str | None, name: str | None) -> None:
    """Which peers this machine starts by itself."""
    from p2pllm_peers.service import manager

    system = manager()
    peers = system.installed(find_peers(home, run_prefix, name))
    for peer in peers:
        click.echo(f"'{peer.name}' of run {peer.run.run_id[:16]}: {system.state(peer)}  {system.file(peer)}")
    if not peers:
        click.echo("No peer of this machine is a service; `p2pllm service install` makes one.")
