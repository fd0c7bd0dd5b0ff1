"""peers.json: the peers of former sessions, so that a run is found again without its founder.

What does not live here: which peers are worth remembering (`membership`).
"""

from __future__ import annotations

import json
import logging
import secrets
from pathlib import Path

from p2pllm.identity import is_peer_id
from p2pllm.network.addresses import checked_addresses

log = logging.getLogger(__name__)

MAX_SAVED_PEERS = 64
"""Peers that are remembered."""

_MAX_FILE_BYTES = 256 * 1024


def save_peers(path: Path, peers: dict[str, list[str]]) -> None:
    """Replace the file in one step: addresses by peer id, the first 64. Raises OSError."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        draft.write_text(json.dumps(dict(list(peers.items())[:MAX_SAVED_PEERS]), indent=1), encoding="utf-8")
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def load_peers(path: Path | None) -> dict[str, list[str]]:
    """What was saved; nothing, and a warning in the log, where the file is damaged."""
    if path is None:
        return {}
    try:
        with path.open("rb") as file:
            data = json.loads(file.read(_MAX_FILE_BYTES))
        if not isinstance(data, dict):
            raise ValueError("it is no dictionary")
        entries = list(data.items())[:MAX_SAVED_PEERS]
        return {peer: checked_addresses(known) for peer, known in entries if is_peer_id(peer)}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        log.warning("ignored the saved peers in %s: %s", path, error)
        return {}
