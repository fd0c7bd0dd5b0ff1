"""set, pause, resume: what this machine's user allows its peers, also while they run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from p2pllm.errors import P2PLLMError, UsageError
from p2pllm_cli.options import find_peer, find_peers, run_options, settings_of

if TYPE_CHECKING:
    from p2pllm_peers.folders import PeerFolder


@click.command("set", short_help="Change what peers of this machine may take.")
@click.argument("changes", metavar="[NAME=VALUE]...", nargs=-1)
@click.option("--home", type=click.Path(path_type=Path), help="Folder of keys, runs and states of this machine.")
def set_(changes: tuple[str, ...], home: Path | None) -> None:
    """Change settings, in the settings file and in the peers that run. Without any: show them all.

    \b
    p2pllm set cpu_percent=50 upload_mbit=5
    p2pllm set hours=22-7 only_on_mains=true
    """
    from p2pllm.settings_file import LIVE
    from p2pllm_peers.steering import change, tell_running

    if not changes:
        return _show(home)
    values = change(_pairs(changes), home)
    for name, value in values.items():
        click.echo(f"{name} = {value}{'' if name in LIVE else '   from the next start of a peer'}")
    told, notes = tell_running(values, home)
    for peer, later in told.items():
        click.echo(f"'{peer.name}' in run {peer.run.run_id[:16]} goes by it now.")
        for sentence in later:
            click.echo(f"    But {sentence}")
    for note in notes:
        click.echo(note)
    return None


def _pairs(changes: tuple[str, ...]) -> dict[str, str]:
    pairs = {}
    for change in changes:
        name, equals, value = change.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name:
            raise UsageError(f"'{change}' is no setting; write NAME=VALUE, as cpu_percent=50.")
        if name in pairs:
            raise UsageError(f"'{name}' is given twice; once is enough.")
        pairs[name] = value
    return pairs


def _show(home: Path | None) -> None:
    from p2pllm.settings import PeerSettings, settings_file
    from p2pllm_peers.flags import kept
    from p2pllm_peers.folders import all_runs

    settings = settings_of({"home": home})
    for name, field in PeerSettings.model_fields.items():
        click.echo(f"{name} = {getattr(settings, name)}")
        click.echo(f"    {field.description}")
    click.echo(f"They are in {settings_file()}, but for what the environment says.")
    for peer in (peer for run in all_runs(settings.home) for peer in run.peers()):
        if flags := kept(peer):
            shown = ", ".join(f"{name} = {value}" for name, value in sorted(flags.items()))
            click.echo(f"'{peer.name}' in run {peer.run.run_id[:16]} was started with {shown}, and keeps to that.")


@click.command(short_help="Compute nothing for a while.")
@run_options
@click.option("--for", "duration", help="For how long, as 90s, 30m, 2h or 1d; default: until `p2pllm resume`.")
def pause(home: Path | None, run_prefix: str | None, name: str | None, duration: str | None) -> None:
    """Compute nothing for a while. What was gathered goes into the round under way; nobody waits for this peer.

    Without --run and --name all peers that run on this machine pause.
    """
    from p2pllm_peers import steering

    seconds = None if duration is None else _seconds(duration)

    def one(peer: PeerFolder) -> str:
        steering.pause(peer, seconds)
        return f"'{peer.name}' pauses{f' for {duration}' if duration else ' until `p2pllm resume`'}."

    _each(_meant(home, run_prefix, name), one)


@click.command()
@run_options
def resume(home: Path | None, run_prefix: str | None, name: str | None) -> None:
    """End a pause. Without --run and --name that of all peers that run on this machine."""
    from p2pllm_peers import steering

    def one(peer: PeerFolder) -> str:
        reason = steering.resume(peer)
        return f"'{peer.name}' goes on{f' later; for now it pauses: {reason}' if reason else ''}."

    _each(_meant(home, run_prefix, name), one)


def _meant(home: Path | None, run_prefix: str | None, name: str | None) -> list[PeerFolder]:
    """Those that run, if nobody is named: who wants the machine for themselves wants it whole."""
    running = [peer for peer in find_peers(home, run_prefix, name) if peer.running() is not None]
    return running if running and not (run_prefix or name) else [find_peer(home, run_prefix, name)]


def _each(peers: list[PeerFolder], one: Callable[[PeerFolder], str]) -> None:
    """Print what came of each; one that does not answer keeps nothing from the others. Raises P2PLLMError for it."""
    failed = []
    for peer in peers:
        try:
            click.echo(one(peer))
        except P2PLLMError as error:
            failed.append(error)
    if failed:
        raise failed[0]


def _seconds(duration: str) -> float:
    """What a duration as 30m means. Raises UsageError."""
    number, unit = duration[:-1], duration[-1:]
    try:
        seconds = float(number) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[unit]
    except (KeyError, ValueError):
        seconds = 0.0
    if not 0 < seconds <= 366 * 86400:
        raise UsageError(f"'{duration}' is no duration; write 90s, 30m, 2h or 1d, up to a year.")
    return seconds
