"""Flags: settings that a peer was given when it was started. They stay with it, in `flags.json` of its folder.

So a bare `join` and the service start it as it was. What was said last holds: a flag that is given anew, or `p2pllm
set`, takes the place of a kept one. What does not live here: which flags there are (the commands).
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Collection
from typing import Any

from p2pllm.errors import SettingsError
from p2pllm.settings import PeerSettings, load_settings
from p2pllm.settings_file import LIVE
from p2pllm_peers.folders import PeerFolder, write_whole

log = logging.getLogger(__name__)

FILE = "flags.json"


def kept(folder: PeerFolder) -> dict[str, Any]:
    """Flags that the peer starts with, by the name of the setting, as JSON has them; none if the file is damaged."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        found = json.loads((folder.path / FILE).read_bytes())
        return {name: value for name, value in found.items() if name in PeerSettings.model_fields and name != "home"}
    return {}


def keep(folder: PeerFolder, given: dict[str, Any]) -> dict[str, Any]:
    """Keep flags with the peer, beside those that it has; returns all. Raises StateError."""
    flags = {**kept(folder), **given}
    if given:
        write_whole(folder.path / FILE, json.dumps(flags).encode())
    return flags


def forget(folder: PeerFolder, names: Collection[str]) -> dict[str, Any]:
    """Keep these no more; returns those that were. Raises StateError."""
    flags = kept(folder)
    gone = {name: flags.pop(name) for name in sorted(names) if name in flags}
    if gone:
        write_whole(folder.path / FILE, json.dumps(flags).encode())
    return gone


class Wishes:
    """What the user wants of one peer, when it starts and once it can be told."""

    def __init__(self, settings: PeerSettings, given: dict[str, Any] | None) -> None:
        """settings: as ordered, the flags that were `given` among them. None: they hold whatever this machine says."""
        self._given = given
        self._settings = settings

    def begin(self, folder: PeerFolder) -> PeerSettings:
        """Keep the flags, and go by all that are kept. Raises StateError, and SettingsError for one of another time."""
        if self._given is not None:
            flags = keep(folder, self._given)
            self._settings = load_settings(**{**self._settings.model_dump(), **flags})
        return self._settings

    def news(self, folder: PeerFolder) -> dict[str, Any]:
        """The settings for a running peer that a command has changed since they were read."""
        if self._given is None:
            return {}
        try:
            now = load_settings(**{**kept(folder), "home": self._settings.home})
        except SettingsError as error:
            log.warning("what was changed while this peer started is not taken: %s", error)
            return {}
        return {name: value for name in LIVE if (value := getattr(now, name)) != getattr(self._settings, name)}
