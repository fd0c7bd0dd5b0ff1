"""dashboard: the page of a run in the browser."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import click

from p2pllm.errors import UsageError
from p2pllm_cli.options import find_peer, find_peers, find_runs, home_folder, run_options

if TYPE_CHECKING:
    from p2pllm_peers.dashboard.server import Peers


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

    Only who has the printed address can use it, on this machine. With --public everybody can see one peer of one run,
    and nobody can change anything. It is a program of its own beside the daemons, and goes on when they stop. Ctrl+C
    ends it.
    """
    import webbrowser

    from p2pllm_peers.dashboard.server import Dashboard
    from p2pllm_peers.dashboard.serving import door, has_screen, run

    address = _address(host, public)
    peers = _shown_to_all(home, run_prefix, name) if public else _shown_to_us(home, run_prefix, name)

    def ready(url: str) -> None:
        click.echo(f"The page is at {url}" + ("" if public else " ; open that if no browser does."))
        if public:
            click.echo("Others put this machine's name or address in place of the one above.")
        click.echo("Ctrl+C ends it.")
        if not no_open and has_screen():
            webbrowser.open(url if public else open_files.enter_context(door(url, home_folder(home))).as_uri())

    with ExitStack() as open_files:
        run(Dashboard(peers, home_folder(home), public), address, port, ready)


def _shown_to_us(home: Path | None, run_prefix: str | None, name: str | None) -> Peers:
    """All peers that are meant, whenever it is called: those that come later, too. The page begins with the first."""
    first = find_peer(home, run_prefix, name)
    return lambda: sorted(find_peers(home, run_prefix, name), key=lambda peer: peer != first)


def _shown_to_all(home: Path | None, run_prefix: str | None, name: str | None) -> Peers:
    """One peer of one run, whatever else this machine has. Raises UsageError if more than one run is meant."""
    runs = find_runs(home, run_prefix)
    if len(runs) > 1:
        raise UsageError(f"This machine knows {len(runs)} runs; say with --run which one everybody may see.")
    find_peer(home, runs[0].run_id, name)
    return lambda: [find_peer(home, runs[0].run_id, name)]


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
