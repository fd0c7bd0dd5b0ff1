"""PeerSettings: what one peer may choose, and where this machine keeps things.

Sources, strongest first: command-line flags (given as arguments), environment variables `P2PLLM_<FIELD>`, the
TOML file `settings.toml` in the configuration folder, defaults. But for `announce`, nothing here is sent to other
peers, and nothing changes what the run computes. What all peers must agree on is in `manifest`.
"""

from __future__ import annotations

import datetime
import difflib
import ipaddress
import os
import re
import secrets
import tempfile
import tomllib
from pathlib import Path
from typing import Annotated

import platformdirs
from pydantic import Field, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from p2pllm.errors import SettingsError
from p2pllm.explain import explain

GPU_DRIVER_GB = 0.6
"""Set aside of each GPU for what CUDA's driver keeps for a process, some hundred MB: torch neither counts nor
limits it. Not measured by us."""

_RUNTIME_DIR_BUDGET = 60
"""Longest base of the runtime folder, in bytes: a Unix socket's whole path must stay under 104 (macOS)."""


def settings_file() -> Path:
    """Where the optional settings file lies."""
    return Path(os.environ.get("P2PLLM_CONFIG", platformdirs.user_config_dir("p2pllm"))) / "settings.toml"


class PeerSettings(BaseSettings):
    """What one peer may choose; every field has a default that works."""

    model_config = SettingsConfigDict(env_prefix="P2PLLM_", extra="forbid", frozen=True, validate_default=True)

    home: Path = Field(
        Path(platformdirs.user_data_dir("p2pllm")),
        description="folder of keys, runs, states and logs of this machine",
    )
    cache: Path = Field(Path(platformdirs.user_cache_dir("p2pllm")), description="folder of tokenised text")
    device: str = Field(
        "auto",
        pattern=r"^(auto|(cpu|mps|cuda(:\d+)?)(,(cpu|cuda(:\d+)?))*)$",
        description="auto, cpu, mps, cuda or cuda:N; several with commas work side by side, as cuda:0,cuda:1",
    )
    threads: int = Field(
        0, ge=0, le=1024, description="CPU threads of the worker; 0 = as many as other programs leave cores"
    )
    nice: int = Field(10, ge=0, le=19, description="how far the worker stands back for the machine's other programs")
    io_idle: bool = Field(True, description="the worker reads the disk only while nobody else does (Linux)")
    micro_batch: int = Field(0, ge=0, le=65536, description="samples computed at once; 0 = found by itself")
    listen_host: str = Field("0.0.0.0", description="IP address to listen on")  # noqa: S104 - peers must reach it
    listen_port: int = Field(0, ge=0, le=65535, description="TCP port to listen on; 0 = any free one")
    direct_port: int = Field(
        0, ge=0, le=65535, description="TCP port for updates and states, if others reach it; 0 = any free one"
    )
    announce: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="multiaddresses that others shall use instead of the found ones; commas between them"
    )
    nat: bool = Field(True, description="open a port on the router and use relays when behind one")
    upload_mbit: float = Field(
        0.0,
        ge=0,
        le=10**6,
        description="Mbit/s that all peers here may take of the line up, best a tenth below what it has; 0 = all",
    )
    download_mbit: float = Field(
        0.0, ge=0, le=10**6, description="Mbit/s that all peers here may take of the line down; 0 = all"
    )
    monthly_gb: float = Field(
        0.0,
        ge=0,
        le=10**6,
        description="GB that all peers here may move a month, both ways; then they pause, and serve nothing; 0 = any",
    )
    data_path: str = Field("", description='where this machine keeps the text of a "text:" source')
    disk_gb: float = Field(
        10.0, gt=0, le=10**6, description="GB on disk for what each peer replays; its log and two states come on top"
    )
    cpu_percent: float = Field(
        100.0, ge=1, le=100, description="how much of all cores the peers here may take together, in percent"
    )
    duty_percent: float = Field(
        100.0, ge=1, le=100, description="how much of the time the worker computes, in percent; for GPUs, too"
    )
    gpu_memory_gb: float = Field(
        0.0,
        ge=0,
        le=10**4,
        description="GB of each CUDA GPU's memory for the worker, 0.6 of them for the driver; 0 = what is free",
    )
    hours: str = Field("", description="when the peer may compute, local time, as 22-7 or 22:30-07:00; empty = always")
    only_on_mains: bool = Field(False, description="compute only while the machine is not on battery")
    only_when_idle: bool = Field(False, description="compute only when nobody has used this machine for five minutes")
    max_celsius: float = Field(
        0.0, ge=0, le=150, description="pause while a sensor of the machine shows more than this; 0 = never"
    )
    startup_timeout_s: float = Field(
        120.0, ge=1, le=3600, description="seconds that p2pd may take to start, and the worker may be silent"
    )

    @field_validator("listen_host")
    @classmethod
    def _ip_address(cls, host: str) -> str:
        try:
            ipaddress.ip_address(host)
        except ValueError:
            raise ValueError("must be an IP address of this machine, such as 0.0.0.0 or 127.0.0.1") from None
        return host

    @field_validator("device")
    @classmethod
    def _each_gpu_once(cls, device: str) -> str:
        names = [name for name in device.split(",") if name != "cpu"]
        if len(set(names)) < len(names):
            raise ValueError("names a device twice; one worker is enough for each")
        return device

    @field_validator("hours")
    @classmethod
    def _hours(cls, hours: str) -> str:
        if hours:
            begin, end = _times(hours)
            if begin == end:
                raise ValueError("begins when it ends; leave it empty to compute always")
        return hours

    def is_in_hours(self, now: datetime.time) -> bool:
        """Whether the peer may compute at this time of the day."""
        if not self.hours:
            return True
        begin, end = _times(self.hours)
        return begin <= now < end if begin < end else now >= begin or now < end

    @field_validator("announce", mode="before")
    @classmethod
    def _comma_separated(cls, given: object) -> object:
        return [part.strip() for part in given.split(",") if part.strip()] if isinstance(given, str) else given

    @field_validator("announce")
    @classmethod
    def _multiaddresses(cls, addresses: tuple[str, ...]) -> tuple[str, ...]:
        for address in addresses:
            # p2pd takes them in one argument with commas between; it checks the rest itself
            if not address.startswith("/") or "," in address:
                raise ValueError(f'"{address}" is no multiaddress such as /ip4/192.0.2.1/tcp/4001')
        return addresses

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags, then environment, then the file."""
        return (
            init_settings,
            env_settings,
            TomlConfigSettingsSource(settings_cls, toml_file=settings_file()),
        )


def load_settings(**flags: object) -> PeerSettings:
    """Settings from all sources; a flag of None was not given.

    Raises SettingsError with the field and what is wrong with it.
    """
    given = {name: value for name, value in flags.items() if value is not None}
    _check_environment()
    try:
        return PeerSettings(**given)  # type: ignore[arg-type]  # validated by pydantic
    except ValidationError as error:
        raise SettingsError(
            f"A setting is not valid: {explain(error, PeerSettings)}; look at the flags, the P2PLLM_ environment "
            f"variables and {settings_file()}."
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"The settings file {settings_file()} is not valid TOML: {error}; mend it.") from None
    except OSError as error:
        raise SettingsError(f"The settings file {settings_file()} cannot be read: {error.strerror or error}.") from None


def _check_environment() -> None:
    """A mistyped variable would be ignored in silence."""
    known = {"P2PLLM_CONFIG", *(f"P2PLLM_{name.upper()}" for name in PeerSettings.model_fields)}
    for name in os.environ:
        if name.startswith("P2PLLM_") and name not in known:
            close = difflib.get_close_matches(name, sorted(known), n=1)
            hint = f"perhaps you mean {close[0]}" if close else "unset it"
            raise SettingsError(f"There is no setting for the environment variable {name}; {hint}.")


def _times(hours: str) -> tuple[datetime.time, datetime.time]:
    """Begin and end of a span as 22-7 or 22:30-07:00. Raises ValueError."""
    try:
        begin, end = (_time(moment) for moment in hours.split("-"))
    except ValueError:
        raise ValueError("must be two times of the day, such as 22-7 or 22:30-07:00") from None
    return begin, end


def _time(moment: str) -> datetime.time:
    if not (found := re.fullmatch(r"([0-9]{1,2})(?::([0-9]{2}))?", moment.strip())):
        raise ValueError("no time of the day")
    return datetime.time(int(found[1]), int(found[2] or 0))


def new_runtime_dir() -> Path:
    """A path for the sockets of one daemon: short, of this user, used by nobody else. It is not created."""
    base = Path(os.environ.get("XDG_RUNTIME_DIR") or Path(tempfile.gettempdir()) / f"p2pllm-{os.getuid()}")
    if len(os.fsencode(base)) > _RUNTIME_DIR_BUDGET:
        base = Path(f"/tmp/p2pllm-{os.getuid()}")  # noqa: S108 - made with mode 0700, and only used if it is ours
    return base / f"p2pllm-{secrets.token_hex(6)}"
