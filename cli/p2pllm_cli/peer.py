"""new, start, join: commands that make a run or take part in one."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from p2pllm.errors import DaemonError, ManifestError, UsageError
from p2pllm_cli.options import peer_options, settings_of

KILLED_S = 5.0
"""How long a killed daemon may take to be gone; the kernel may still be busy with its memory or a disk."""


@click.command()
@click.argument("path", type=click.Path(path_type=Path), default=Path("run.toml"))
@click.option(
    "--strategy",
    type=click.Choice(["sync", "diloco", "sparse_loco"]),
    default="sync",
    show_default=True,
    help="How updates are averaged; sparse_loco suits home lines.",
)
def new(path: Path, strategy: str) -> None:
    """Write a commented run file to edit."""
    from p2pllm.manifest import draft_template

    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(draft_template(strategy))
    except FileExistsError:
        raise ManifestError(f"{path} exists already; choose another name or delete it first.") from None
    except OSError as error:
        raise ManifestError(f"{path} cannot be written: {error.strerror}.") from None
    click.echo(f"Wrote {path}. Edit it if you like, then: p2pllm start {path}")


@click.command(short_help="Found the run of a run file, or go on with it.")
@click.argument("path", type=click.Path(path_type=Path))
@peer_options
def start(path: Path, detach: bool, name: str | None, **flags: Any) -> None:
    """Found the run of a run file, or go on with it, and become its first peer."""
    from p2pllm.manifest import load_draft
    from p2pllm_peers.launcher import Order

    draft = load_draft(path)
    order = Order(settings_of(flags), _checked(name), foreground=not detach, flags=_kept(flags))
    _take_part(replace(order, draft=draft.model_dump(mode="json")), detach=detach)


@click.command()
@click.argument("invite", required=False)
@click.option("--run", "run_prefix", help="Go on with a run that this machine knows, without an invite.")
@peer_options
def join(invite: str | None, run_prefix: str | None, detach: bool, name: str | None, **flags: Any) -> None:
    """Take part in the run of an INVITE. Without one: go on with a run that this machine knows."""
    from p2pllm.invite import Invite
    from p2pllm_cli.options import find_runs
    from p2pllm_peers.launcher import Order

    if invite and run_prefix:
        raise UsageError("Give an invite or --run, not both.")
    order = Order(settings_of(flags), _checked(name), foreground=not detach, flags=_kept(flags))
    if invite:
        Invite.decode(invite)  # a mistyped invite is reported before anything is started
        order = replace(order, invite=invite)
    else:
        order = replace(order, run_id=find_runs(order.settings.home, run_prefix)[0].run_id)
    _take_part(order, detach=detach)


def _kept(flags: dict[str, Any]) -> dict[str, Any]:
    """Of the flags, those that are kept with the peer: it may be started next from another folder."""
    given = {name: value for name, value in flags.items() if value not in (None, ()) and name != "home"}
    if text := given.get("data_path"):
        given["data_path"] = str(Path(text).absolute())
    return given


def _checked(name: str | None) -> str:
    from p2pllm_peers.folders import is_peer_name

    if name and not is_peer_name(name):
        raise UsageError(
            f"'{name}' cannot name a peer; use up to 32 letters without accents, digits, dashes and underscores."
        )
    return name or ""


def _take_part(order: Any, *, detach: bool) -> None:
    """Start the daemon, wait until it takes part, then show it until it ends."""
    from p2pllm_cli.view import LiveView, StartView
    from p2pllm_peers.launcher import DaemonProcess

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)  # a closed terminal is a Ctrl+C
    with StartView() as starting:
        daemon = DaemonProcess(order)
        try:
            ready = daemon.wait_ready(starting.progress)
        except KeyboardInterrupt:
            starting.progress("stopping")
            daemon.end()
            raise
        except DaemonError:
            if daemon.poll() == 0:  # nothing failed: `p2pllm leave` while it started
                raise SystemExit(130) from None
            raise
    if order.draft is not None:
        click.echo(f"Invite: {ready['invite']}")
    taking_part = f"Taking part in run {ready['run_id'][:16]} as '{ready['name']}'"
    if detach:
        click.echo(f"{taking_part} in the background; see p2pllm status.")
        return
    leaving = False

    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def on_interrupt(*_: object) -> None:
        nonlocal leaving
        if not leaving:
            leaving = True
            daemon.leave()
            return
        for number in signals:  # a third must not strike in the middle of what the second began
            signal.signal(number, signal.SIG_IGN)
        daemon.kill()
        raise SystemExit(130)

    for number in signals:
        signal.signal(number, on_interrupt)
    click.echo(f"{taking_part}; Ctrl+C leaves.")
    try:
        LiveView(ready["socket"], lambda: "leaving: finishing the round ..." if leaving else "Ctrl+C leaves").show()
        daemon.wait_end()
    except SystemExit:
        daemon.is_gone(KILLED_S)  # whoever is told that we ended may trust that it is, too
        raise
    click.echo(f"Left run {ready['run_id'][:16]}; its state is saved, and `p2pllm join` goes on with it.")
