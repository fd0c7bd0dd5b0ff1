"""What a user tells the peers of this machine while they run: pause, go on, take other settings.

What does not live here: how it is asked for (commands and the page), and carrying it out (`guest`, `participant`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from p2pllm.errors import DaemonError, P2PLLMError, StateError
from p2pllm.settings import load_settings
from p2pllm.settings_file import LIVE, change_settings
from p2pllm_peers.control import ask
from p2pllm_peers.flags import forget
from p2pllm_peers.folders import PeerFolder, all_runs
from p2pllm_peers.guest import PAUSE_FILE, note_pause
from p2pllm_peers.sense import Here, check


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


def pause(peer: PeerFolder, seconds: float | None) -> None:
    """Have a peer pause for so long, None: until `resume`; one that is still starting, too. Raises DaemonError."""
    if peer.running() == {}:
        note_pause(peer.path / PAUSE_FILE, seconds)
    if peer.running() != {}:
        tell(peer, {"do": "pause", "seconds": seconds})


def resume(peer: PeerFolder) -> str:
    """End a pause; returns why the peer does not compute all the same, or nothing. Raises DaemonError, StateError."""
    if peer.running() == {}:
        try:
            (peer.path / PAUSE_FILE).unlink(missing_ok=True)
        except OSError as error:
            raise StateError(f"The pause of '{peer.name}' cannot be taken back: {error}.") from None
    return "" if peer.running() == {} else str(tell(peer, {"do": "resume"})["paused"])


def change(changes: dict[str, str], home: Path | None = None) -> dict[str, Any]:
    """Change the settings file; returns the values as TOML has them. Raises SettingsError; then nothing has changed.

    home: whose running peers the new values must suit; None: that of the settings.
    """
    given = {name.strip().replace("-", "_"): value.strip() for name, value in changes.items()}
    return change_settings(given, lambda new, names: check(new, names, Here.now(home or new.home, new)))


def tell_running(values: dict[str, Any], home: Path | None) -> tuple[dict[PeerFolder, list[str]], list[str]]:
    """Have the peers of this machine go by new values in the place of flags of theirs, and the running ones at once.

    Returns who goes by those that a running peer can take, each with a sentence for whatever has to wait for its next
    start all the same; and sentences on the others, so that one that does not answer keeps nothing from the rest.
    """
    live = {name: value for name, value in values.items() if name in LIVE}
    told: dict[PeerFolder, list[str]] = {}
    notes: list[str] = []
    for peer in [peer for run in all_runs(home or load_settings().home) for peer in run.peers()]:
        try:
            if gone := forget(peer, values):
                flags = ", ".join(f"{name} = {value}" for name, value in gone.items())
                notes.append(f"{_named(peer)} was started with {flags}, which holds no more.")
            running = peer.running()
            if live and running:
                told[peer] = tell(peer, {"do": "set", "values": live}).get("later", [])
            elif live and running is not None:
                notes.append(f"{_named(peer)} is still starting, and goes by it when it has.")
        except P2PLLMError as error:
            notes.append(f"{_named(peer)} does not go by it yet: {error}")
    return told, notes


def _named(peer: PeerFolder) -> str:
    return f"'{peer.name}' in run {peer.run.run_id[:16]}"
