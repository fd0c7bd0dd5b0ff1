"""The settings file as a command changes it: checked before a byte of it moves, its comments kept.

What does not live here: what settings there are (`settings`), and telling running daemons (the programs).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tomlkit

from p2pllm.errors import SettingsError
from p2pllm.settings import PeerSettings, load_settings, settings_file

LIVE = frozenset(
    {
        "upload_mbit",
        "download_mbit",
        "monthly_gb",
        "disk_gb",
        "cpu_percent",
        "duty_percent",
        "hours",
        "only_on_mains",
        "only_when_idle",
        "max_celsius",
        "nice",
        "io_idle",
    }
)
"""Settings that a running peer takes at once; the others count from its next start."""


def change_settings(
    changes: dict[str, str], check: Callable[[PeerSettings, set[str]], None] = lambda settings, changed: None
) -> dict[str, Any]:
    """Check new values, given as text, and write them to the settings file; returns them as TOML has them.

    check: gets all settings as they would be, and the names of the new ones; raises SettingsError if they make no
    sense. Raises SettingsError for that, for a name or a value that is not valid, and for a file that cannot be read or
    written; then nothing has changed.
    """
    settings = load_settings(**changes)
    for name in changes.keys() - PeerSettings.model_fields.keys():  # which pydantic takes in capital letters, too
        raise SettingsError(f"There is no setting {name}; write it as {name.lower()}.")
    check(settings, set(changes))
    values = {name: _plain(getattr(settings, name)) for name in changes}
    path = settings_file()
    try:
        document = tomlkit.parse(path.read_text(encoding="utf-8")) if path.exists() else tomlkit.document()
        document.update(values)
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, tomlkit.dumps(document))
    except OSError as error:
        raise SettingsError(f"The settings file {path} cannot be changed: {error.strerror or error}.") from None
    except UnicodeEncodeError:
        raise SettingsError(
            "A value is no Unicode text, which the settings file cannot hold; choose another."
        ) from None
    return values


def with_changes(settings: PeerSettings, values: dict[str, Any]) -> PeerSettings:
    """Settings with those of `values` that a running peer can take. Raises SettingsError if they are not valid."""
    live = {name: value for name, value in values.items() if name in LIVE}
    return load_settings(**{**settings.model_dump(), **live})


def limits_of(settings: PeerSettings) -> dict[str, Any]:
    """What of LIVE is not as it is by default, by name."""
    default = {name: field.default for name, field in PeerSettings.model_fields.items()}
    return {name: value for name in sorted(LIVE) if (value := _plain(getattr(settings, name))) != default[name]}


def _plain(value: object) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value


def _write(path: Path, text: str) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(temporary).replace(path)
    finally:
        Path(temporary).unlink(missing_ok=True)
