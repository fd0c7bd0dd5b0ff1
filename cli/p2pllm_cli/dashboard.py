"""dashboard: the page of a run in the browser."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from p2pllm.errors import UsageError
from p2pllm_cli.options import find_peer, find_peers, home_folder, run_options

if TYPE_CHECKING:
    from p2pllm_peers.folders import PeerFolder


@click.command(short_help="See and steer the peers of this machine in the browser.")
@run_options
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="TCP port; default: a free one.")
@click.option("--host", help="IP address to listen on; default: 127.0.0.1, and 0.0.0.0 with --public.")
@click.option("--public", is_flag=True, help="For everybody who reaches the port, to read only.")
@click.option("--no-open", is_flag=True, help="Print the address, and open no browser.")
def dashboard(
    home: Path | None,
    run_prefix: str | None,
    name: str | None,
    port: int,
    host: str | None,
    public: bool,
    no_open: bool,
) -> None:
    """Show how a run goes, live: loss, rounds, peers, credit, traffic; pause and limit this machine's peers.

    Only who has the printed address can use it, on this machine. With --public everybody can see the run, and nobody
    can change anything. It is a program of its own beside the daemons, and goes on when they stop. Ctrl+C ends it.
    """
    from p2pllm_peers.dashboard.server import Dashboard
    from p2pllm_peers.dashboard.serving import open_browser, run

    address = _address(host, public)
    first = find_peer(home, run_prefix, name)

    def peers() -> list[PeerFolder]:
        found = find_peers(home, run_prefix, name)
        return sorted(found, key=lambda peer: peer != first)

    def ready(url: str) -> None:
        click.echo(f"The page is at {url}")
        if public:
            click.echo("Others put this machine's name or address in place of the one above.")
        click.echo("Ctrl+C ends it.")
        if not no_open:
            open_browser(url)

    run(Dashboard(peers, home_folder(home), public), address, port, ready)


def _address(host: str | None, public: bool) -> str:
    """Where to listen. Raises UsageError for an address that others reach without --public."""
    import ipaddress

    if host is None:
        return "0.0.0.0" if public else "127.0.0.1"  # noqa: S104 - public is what was asked for
    try:
        is_ours = ipaddress.ip_address(host).is_loopback
    except ValueError:
        raise UsageError(f"'{host}' is no IP address; name one of this machine's with --host.") from None
    if not is_ours and not public:
        raise UsageError(f"{host} can be reached by others; add --public, which lets them read only.")
    return host
