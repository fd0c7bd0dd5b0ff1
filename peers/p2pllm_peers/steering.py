"""What a user tells the peers of this machine while they run: pause, go on, take other settings.

What does not live here: how it is asked for (commands and the page), and carrying it out (`guest`, `participant`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from p2pllm.errors import DaemonError
from p2pllm.settings import load_settings
from p2pllm.settings_file import LIVE, change_settings
from p2pllm_peers.control import ask
from p2pllm_peers.folders import PeerFolder, all_runs
from p2pllm_peers.sense import check


def tell(peer: PeerFolder, request: dict[str, Any]) -> dict[str, Any]:
    """What the peer's daemon answers. Raises DaemonError if it does not run, and with what it reports."""
    running = peer.running()
    if not running:
        state = "not running" if running is None else "still starting"
        raise DaemonError(f"'{peer.name}' is {state} in run {peer.run.run_id[:16]}; look with `p2pllm status`.")
    reply = ask(running["socket"], request)
    if "error" in reply:
        raise DaemonError(f"'{peer.name}' cannot do that: {reply['error']}")
    return reply


def change(changes: dict[str, str]) -> dict[str, Any]:
    """Change the settings file; returns the values as TOML has them. Raises SettingsError; then nothing has changed."""
    given = {name.strip().replace("-", "_"): value.strip() for name, value in changes.items()}
    return change_settings(given, check)


def tell_running(values: dict[str, Any], home: Path | None) -> dict[PeerFolder, list[str]]:
    """Have the running peers of this machine go by those values that they can take at once.

    Returns who does, each with a sentence for whatever has to wait for its next start all the same.
    """
    live = {name: value for name, value in values.items() if name in LIVE}
    folder = load_settings(**({} if home is None else {"home": home})).home
    peers = [peer for run in all_runs(folder) for peer in run.peers() if peer.running()] if live else []
    return {peer: tell(peer, {"do": "set", "values": live}).get("later", []) for peer in peers}
