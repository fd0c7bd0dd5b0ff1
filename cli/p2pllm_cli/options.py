"""Options that several commands share: the settings of a peer, and which run is meant."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from p2pllm.errors import UsageError

if TYPE_CHECKING:
    from p2pllm.settings import PeerSettings
    from p2pllm_peers.folders import PeerFolder, RunFolder

F = TypeVar("F", bound=Callable[..., Any])

_HOME = click.option("--home", type=click.Path(path_type=Path), help="Folder of keys, runs and states of this machine.")


def peer_options(function: F) -> F:
    """The settings that a flag can set; the rest is in the settings file and the environment."""
    for option in reversed(
        (
            click.option("--name", help="Name of this peer on this machine; needed for a further one of the same run."),
            click.option("--detach", is_flag=True, help="Run in the background; see `p2pllm status`."),
            click.option("--device", help="auto, cpu, mps, cuda or cuda:N."),
            click.option("--threads", type=int, help="CPU threads to compute with."),
            click.option("--micro-batch", type=int, help="Samples computed at once; 0 finds out by itself."),
            click.option("--listen", "listen_host", help="IP address to listen on; 127.0.0.1 stays on this machine."),
            click.option("--port", "listen_port", type=int, help="TCP port to listen on; 0 takes any free one."),
            click.option("--announce", multiple=True, help="Multiaddress that others shall use; may be repeated."),
            click.option("--nat/--no-nat", default=None, help="Open a port on the router, use relays if needed."),
            click.option("--upload", "upload_mbit", type=float, help="Mbit/s for updates and states; 0 takes all."),
            click.option("--data", "data_path", help='Where this machine keeps the text of a "text:" source.'),
            click.option("--disk", "disk_gb", type=float, help="GB on disk for rounds to replay."),
            _HOME,
        )
    ):
        function = option(function)
    return function


def run_options(function: F) -> F:
    """Which peer of which run on this machine."""
    for option in reversed(
        (
            click.option("--run", "run_prefix", help="Run id or its beginning; default: the run used last."),
            click.option("--name", help="Name of the peer; default: the one that runs, or ran last."),
            _HOME,
        )
    ):
        function = option(function)
    return function


def settings_of(flags: dict[str, Any]) -> PeerSettings:
    """Settings from the flags that were given, the environment and the file."""
    from p2pllm.settings import load_settings

    given = {key: value for key, value in flags.items() if value not in (None, ())}
    return load_settings(**given)


def home_folder(home: Path | None) -> Path:
    """Where this machine keeps its runs; it may not exist yet. Raises UsageError if it is no folder."""
    folder = settings_of({"home": home}).home
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file, not a folder; choose another one with --home.")
    return folder


def find_runs(home: Path | None, run_prefix: str | None) -> list[RunFolder]:
    """The runs of this machine that are meant, the one used last first. Raises UsageError if there is none."""
    from p2pllm_peers.folders import all_runs

    folder = home_folder(home)
    found = all_runs(folder)
    if run_prefix:
        found = [run for run in found if run.run_id.startswith(run_prefix)]
        if not found:
            raise UsageError(f"No run on this machine begins with {run_prefix}; `p2pllm status` lists them.")
    if not found:
        raise UsageError(
            f"This machine takes part in no run yet (there is none in {folder}); `p2pllm join` an invite, "
            f"`p2pllm start` a run file, or name another folder with --home."
        )
    return found


def find_peers(home: Path | None, run_prefix: str | None, name: str | None) -> list[PeerFolder]:
    """All peers of this machine that are meant, those of the run used last first. Raises UsageError if none is."""
    runs = find_runs(home, run_prefix)
    peers = [peer for run in runs for peer in run.peers() if name in (None, peer.name)]
    if not peers:
        which = f"run {runs[0].run_id[:16]}" if len(runs) == 1 else "any of its runs"
        who = "no peer" if name is None else f"no peer named '{name}'"
        raise UsageError(f"This machine has {who} in {which}; `p2pllm status` lists those it has.")
    return peers


def find_peer(home: Path | None, run_prefix: str | None, name: str | None) -> PeerFolder:
    """The one peer that is meant: a running one if there is any. Raises UsageError if there is none."""
    peers = find_peers(home, run_prefix, name)
    return next((peer for peer in peers if peer.running() is not None), peers[0])
