"""What a node and its p2pd are started with. What does not live here: where a user writes it (`settings`)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Protocol


class ListenSettings(Protocol):
    """The settings that concern the network; PeerSettings has them."""

    @property
    def listen_host(self) -> str: ...
    @property
    def listen_port(self) -> int: ...
    @property
    def direct_port(self) -> int: ...
    @property
    def announce(self) -> tuple[str, ...]: ...
    @property
    def nat(self) -> bool: ...
    @property
    def startup_timeout_s(self) -> float: ...
    @property
    def upload_mbit(self) -> float: ...
    @property
    def download_mbit(self) -> float: ...
    @property
    def monthly_gb(self) -> float: ...


@dataclass(frozen=True)
class NodeSettings:
    """ListenSettings of a node that listens on loopback only and asks nobody; for tests and the lab."""

    listen_host: str = "127.0.0.1"
    listen_port: int = 0
    direct_port: int = 0
    announce: tuple[str, ...] = ()
    nat: bool = False
    startup_timeout_s: float = 120.0
    upload_mbit: float = 0.0
    download_mbit: float = 0.0
    monthly_gb: float = 0.0


class Reach(Enum):
    """What is known of who can dial us from outside."""

    UNKNOWN = "unknown"
    PUBLIC = "public"
    """Anybody can."""
    PRIVATE = "private"
    """Nobody can, as behind a router: relays are needed."""


@dataclass(frozen=True)
class P2pdOptions:
    """What p2pd is started with. Addresses are multiaddresses."""

    identity: Path
    runtime_dir: Path
    listen_host: str = "0.0.0.0"  # noqa: S104 - peers must reach it
    listen_port: int = 0
    announce: tuple[str, ...] = ()
    nat: bool = True
    relay_service: bool = True
    """Relay for others behind routers, once we are PUBLIC. Of what is relayed we see nothing: it is neither slowed nor
    counted."""
    reach: Reach = Reach.UNKNOWN
    relay: str = ""
    """Who relays for us while we are PRIVATE: its address, if there is one."""
    startup_timeout_s: float = 120.0

    @classmethod
    def of(cls, settings: ListenSettings, identity: Path, runtime_dir: Path, reach: Reach) -> P2pdOptions:
        """What the settings say, for one key file and one folder."""
        return cls(
            identity=identity,
            runtime_dir=runtime_dir,
            listen_host=settings.listen_host,
            listen_port=settings.listen_port,
            announce=settings.announce,
            nat=settings.nat,
            relay_service=settings.nat and not settings.upload_mbit and not settings.monthly_gb,
            reach=reach if settings.nat else Reach.UNKNOWN,
            startup_timeout_s=settings.startup_timeout_s,
        )
