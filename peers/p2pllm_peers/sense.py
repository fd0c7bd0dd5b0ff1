"""Sense: new settings that are valid one by one, but do nothing, or stop a peer for good, with the others or here.

Each rule looks only at what a change touches, so that an old line in the settings file never stands in the way of
another. What does not live here: the bounds of a single setting (`p2pllm.settings`).
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from p2pllm.errors import SettingsError
from p2pllm.network.pacing import ON_THE_LINE
from p2pllm.settings import GPU_DRIVER_GB, PeerSettings, settings_file
from p2pllm_peers.folders import PeerFolder, all_runs
from p2pllm_peers.presence import tells_idleness

_CUDA_DEVICES = ("nvidia[0-9]*", "dxg", "nvhost-gpu", "kfd")
"""What PyTorch calls CUDA, as a driver shows it under /dev: NVIDIA, the same under WSL, on Jetson, and AMD."""

LEAST_GPU_GB = 1.0
"""What is left of less is no use to a model."""

LEAST_CELSIUS = 30.0
"""A machine at work is never cooler."""


@dataclass(frozen=True)
class Here:
    """What a change must fit on this machine. Sizes in bytes; 0: not known."""

    has_sensors: bool = True
    has_cuda: bool = True
    tells_idleness: bool = True
    round_bytes: float = 0.0  # that one round of the busiest running peer moves on the line
    kept_bytes: int = 0  # of the largest aggregate that a running peer keeps to replay

    @classmethod
    def now(cls, home: Path, settings: PeerSettings) -> Here:
        """Look at this machine and the running peers of a home, as far as the settings make it matter."""
        peers = [peer for run in all_runs(home) for peer in run.peers() if peer.running()]
        return cls(
            has_sensors=any(getattr(psutil, "sensors_temperatures", dict)().values()),
            has_cuda=any(next(Path("/dev").glob(names), None) for names in _CUDA_DEVICES),
            tells_idleness=not settings.only_when_idle or tells_idleness(),
            round_bytes=max(map(_round_bytes, peers), default=0.0),
            kept_bytes=max((_size(file) for peer in peers for file in (peer.path / "aggregates").glob("*")), default=0),
        )


def check(settings: PeerSettings, changed: Collection[str], here: Here | None = None) -> None:
    """Raise SettingsError for the first thing that makes no sense. changed: the settings that are new."""
    looked = here or Here.now(settings.home, settings)
    for names, wrong in (
        *_pairs(settings, looked),
        *_folders(settings),
        *_machine(settings, looked),
        *_overruled(settings),
    ):
        if wrong and set(names) & set(changed):
            raise SettingsError(f"{wrong}; nothing was changed.")


Rule = tuple[tuple[str, ...], str]
"""The settings that it is about, and what is wrong, if anything is."""


def _pairs(settings: PeerSettings, here: Here) -> Iterable[Rule]:
    gpus = here.has_cuda if settings.device == "auto" else "cuda" in settings.device
    found = "finds none on this machine" if settings.device == "auto" else "is none"
    yield (
        ("gpu_memory_gb", "device"),
        f"gpu_memory_gb = {settings.gpu_memory_gb:g} limits CUDA devices, and device = {settings.device} {found}; "
        "set gpu_memory_gb=0 or another device"
        if settings.gpu_memory_gb and not gpus
        else "",
    )
    yield (
        ("gpu_memory_gb",),
        f"gpu_memory_gb = {settings.gpu_memory_gb:g} leaves nothing for a model, as {GPU_DRIVER_GB:g} GB are "
        f"set aside for CUDA's driver; set {LEAST_GPU_GB:g} or more, or 0 for what is free"
        if 0 < settings.gpu_memory_gb < LEAST_GPU_GB
        else "",
    )
    ported = [address for address in settings.announce if "/p2p-circuit" not in address]
    yield (
        ("announce", "listen_port"),
        f"announce names the fixed address {ported[0]}, but listen_port = 0 takes another port at each start; set "
        "listen_port, too"
        if ported and not settings.listen_port
        else "",
    )
    yield (
        ("direct_port", "listen_port"),
        f"direct_port and listen_port are both {settings.direct_port}, and one port has one listener; set another, or 0"
        if settings.direct_port and settings.direct_port == settings.listen_port
        else "",
    )
    yield (
        ("max_celsius",),
        f"max_celsius = {settings.max_celsius:g} would pause for good, as a machine at work is warmer; set "
        f"{LEAST_CELSIUS:g} or more, or 0 for no limit"
        if 0 < settings.max_celsius < LEAST_CELSIUS
        else "",
    )


def _folders(settings: PeerSettings) -> Iterable[Rule]:
    for name in ("home", "cache"):
        path = getattr(settings, name)
        relative = not path.is_absolute()
        yield (name,), f"{name} = {path} is no absolute path, so it would depend on where a peer starts" * relative
        yield (name,), f"{name} = {path} is a file, not a folder" * (_exists(path) and not path.is_dir())
    missing = bool(settings.data_path) and not _exists(Path(settings.data_path))
    yield ("data_path",), f"data_path = {settings.data_path} does not exist on this machine" * missing


def _exists(path: Path) -> bool:
    with contextlib.suppress(OSError, ValueError):  # a name that is too long, or a folder that we may not look into
        return path.exists()
    return False


def _machine(settings: PeerSettings, here: Here) -> Iterable[Rule]:
    blind = bool(settings.max_celsius) and not here.has_sensors
    yield ("max_celsius",), "max_celsius has no effect here: this machine shows no sensor of temperature" * blind
    unseen = settings.only_when_idle and not here.tells_idleness
    yield (
        ("only_when_idle",),
        "only_when_idle has no effect here: no terminal and no desktop tells when somebody used this machine" * unseen,
    )
    month = settings.monthly_gb * 1e9
    yield (
        ("monthly_gb",),
        f"monthly_gb = {settings.monthly_gb:g} is less than one round of a running peer moves, "
        f"{here.round_bytes / 1e9:.3g} GB; set more, or 0 for no limit"
        if 0 < month < here.round_bytes
        else "",
    )
    yield (
        ("disk_gb",),
        f"disk_gb = {settings.disk_gb:g} is less than a running peer keeps of one round, {here.kept_bytes / 1e9:.3g} GB"
        if settings.disk_gb * 1e9 < here.kept_bytes
        else "",
    )


def _overruled(settings: PeerSettings) -> Iterable[Rule]:
    """The environment is stronger than the file that is to be changed."""
    for name in PeerSettings.model_fields:
        variable = f"P2PLLM_{name.upper()}"
        given = next((value for key, value in os.environ.items() if key.upper() == variable), None)
        if given is not None and getattr(_taken(name, given), name, None) != getattr(settings, name):
            yield (name,), f"The environment variable {variable} is stronger than {settings_file()}; unset it first"


def _taken(name: str, value: str) -> PeerSettings | None:
    with contextlib.suppress(ValueError):
        values: dict[str, Any] = {name: value}
        return PeerSettings(**values)
    return None


def _round_bytes(peer: PeerFolder) -> float:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, IndexError):
        with (peer.path / "rounds.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - (1 << 20)))
            last = json.loads(file.read().splitlines()[-1])
        return float((last["bytes_sent"] + last["bytes_received"]) * ON_THE_LINE)
    return 0.0


def _size(path: Path) -> int:
    with contextlib.suppress(OSError):  # it has just gone
        return path.stat().st_size
    return 0
