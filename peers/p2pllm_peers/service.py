"""Service: a peer that this machine starts by itself, after a reboot and after a crash.

A unit of the user's systemd, or an agent of launchd on macOS; both run `p2pllm join --run RUN --name NAME`. What does
not live here: that command, and what it starts.
"""

from __future__ import annotations

import contextlib
import getpass
import itertools
import os
import plistlib
import re
import shlex
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.parsers.expat import ExpatError

from p2pllm.errors import DaemonError
from p2pllm_peers.folders import PeerFolder, RunFolder, is_peer_name, write_whole

FIRST_DELAY_S, MAX_DELAY_S, DELAY_STEPS = 5, 600, 7
"""A peer that failed is started again after so long, after the longest when it failed so often in a row."""

STOP_S = 20
"""How long a peer may take to leave in order."""

_BACKOFF_SINCE = 254
"""Version of systemd that knows growing delays; an older one always waits a minute."""

_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Answer:
    """What a program of the system said."""

    code: int
    text: str


Run = Callable[[Sequence[str]], Answer]


def run_program(arguments: Sequence[str]) -> Answer:
    """Run it and wait. A program that is not there, or hangs, has failed."""
    try:
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    except OSError as error:
        return Answer(127, f"{arguments[0]}: {error.strerror}")
    except subprocess.TimeoutExpired:
        return Answer(124, f"{arguments[0]} does not answer")
    return Answer(done.returncode, (done.stdout + done.stderr).strip())


def command_of(peer: PeerFolder) -> list[str]:
    """What the service runs."""
    home = ["--home", str(peer.run.home.absolute())]
    return [sys.executable, "-m", "p2pllm_cli.main", "join", "--run", peer.run.run_id, "--name", peer.name, *home]


def environment() -> dict[str, str]:
    """Of this process, what concerns p2pllm: a service starts without it."""
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith("P2PLLM_")}


class Manager(ABC):
    """What starts services on this machine."""

    suffix: str

    def __init__(self, run: Run = run_program) -> None:
        self._run = run

    def file(self, peer: PeerFolder) -> Path:
        """The service's own file."""
        return self.folder / f"{self.label(peer)}{self.suffix}"

    def installed(self) -> list[PeerFolder]:
        """The peers that have a service, by the files of the services: the folder of one may be gone."""
        files = sorted(self.folder.glob(f"*p2pllm*{self.suffix}"))
        return [peer for file in files if (peer := _peer_of(self.command_in(file))) and self.file(peer) == file]

    def install(self, peer: PeerFolder) -> str:
        """Have the peer started from now on; returns what is still to be done by hand, or nothing.

        Raises DaemonError, with what the system says; then all is as it was.
        """
        if not is_peer_name(peer.name):
            raise DaemonError(f"The system takes no service of the name '{peer.name}'; use `p2pllm join --detach`.")
        path = self.file(peer)
        path.parent.mkdir(parents=True, exist_ok=True)
        before = path.read_bytes() if path.exists() else None
        write_whole(path, self.content(peer))
        try:
            return self.enable(peer)
        except DaemonError:
            if before is None:
                path.unlink(missing_ok=True)
            else:
                write_whole(path, before)
            raise

    def remove(self, peer: PeerFolder) -> None:
        """Stop the service and forget it. Raises DaemonError if there is none, or the system refuses."""
        path = self.file(peer)
        if not path.exists():
            raise DaemonError(f"'{peer.name}' of run {peer.run.run_id[:16]} is no service; `p2pllm service status`.")
        self.disable(peer)
        path.unlink(missing_ok=True)

    def ask(self, *arguments: str) -> str:
        """What the system answers. Raises DaemonError with it if it refuses."""
        answer = self._run(arguments)
        if answer.code:
            said = answer.text.splitlines()[-1] if answer.text else f"code {answer.code}"
            raise DaemonError(
                f"The system refuses `{' '.join(arguments)}`: {said.rstrip('.')}; use `p2pllm join --detach` instead."
            )
        return answer.text

    @property
    @abstractmethod
    def folder(self) -> Path: ...

    @abstractmethod
    def label(self, peer: PeerFolder) -> str: ...

    @abstractmethod
    def content(self, peer: PeerFolder) -> bytes: ...

    @abstractmethod
    def command_in(self, file: Path) -> list[str]:
        """What a service runs, by its file; nothing if that cannot be read."""

    @abstractmethod
    def enable(self, peer: PeerFolder) -> str: ...

    @abstractmethod
    def disable(self, peer: PeerFolder) -> None: ...

    @abstractmethod
    def state(self, peer: PeerFolder) -> str:
        """In a phrase: whether it runs, and whether it starts by itself."""


class Systemd(Manager):
    """The user's own systemd."""

    suffix = ".service"

    @property
    def folder(self) -> Path:
        """Where it looks for a user's units."""
        return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "systemd" / "user"

    def label(self, peer: PeerFolder) -> str:
        """Name of the unit."""
        return f"p2pllm-{peer.run.run_id[:16]}-{peer.name}"

    def content(self, peer: PeerFolder) -> bytes:
        """The unit."""
        lines = [
            "[Unit]",
            f"Description=p2pllm: {peer.name} of run {peer.run.run_id[:16]}",
            "StartLimitIntervalSec=0",
            "",
            "[Service]",
            f"ExecStart={' '.join(_quoted(word).replace('$', '$$') for word in command_of(peer))}",
            *(f"Environment={_quoted(f'{name}={value}')}" for name, value in environment().items()),
            "Environment=PYTHONUNBUFFERED=1",
            "KillMode=mixed",
            "OOMPolicy=continue",  # the kernel ends the worker, and the daemon starts a smaller one
            f"TimeoutStopSec={STOP_S}",
            "Restart=on-failure",
            "SuccessExitStatus=130",  # it was told to stop while it was still starting
            "RestartPreventExitStatus=2",  # a setting that cannot be right, which another start does not mend
            *self._delays(),
            "",
            "[Install]",
            "WantedBy=default.target",
            "",
        ]
        return "\n".join(lines).encode()

    def command_in(self, file: Path) -> list[str]:
        """See Manager."""
        with contextlib.suppress(OSError, ValueError):
            lines = [line for line in file.read_text().splitlines() if line.startswith("ExecStart=")]
            plain = "".join(lines[:1]).removeprefix("ExecStart=").replace("%%", "%").replace("$$", "$")
            return shlex.split(plain)
        return []

    def _delays(self) -> list[str]:
        found = re.search(r"systemd (\d+)", self._run(["systemctl", "--version"]).text)
        if found is None or int(found[1]) < _BACKOFF_SINCE:
            return ["RestartSec=60"]
        return [f"RestartSec={FIRST_DELAY_S}", f"RestartSteps={DELAY_STEPS}", f"RestartMaxDelaySec={MAX_DELAY_S}"]

    def enable(self, peer: PeerFolder) -> str:
        """See Manager."""
        self.ask("systemctl", "--user", "daemon-reload")
        now = [] if peer.running() is not None else ["--now"]  # its folder has room for one daemon
        self.ask("systemctl", "--user", "enable", *now, self.label(peer))
        user = getpass.getuser()
        if self._run(["loginctl", "enable-linger", user]).code:
            return f"it starts when you log in; to have it start at boot: sudo loginctl enable-linger {user}"
        return ""

    def disable(self, peer: PeerFolder) -> None:
        """See Manager."""
        self.ask("systemctl", "--user", "disable", "--now", self.label(peer))
        self._run(["systemctl", "--user", "daemon-reload"])

    def state(self, peer: PeerFolder) -> str:
        """See Manager."""
        runs, starts = (
            (self._run(["systemctl", "--user", verb, self.label(peer)]).text.splitlines() or ["unknown"])[-1]
            for verb in ("is-active", "is-enabled")
        )
        return f"{runs}, {starts}"


class Launchd(Manager):
    """launchd of macOS, for the user who is logged in."""

    suffix = ".plist"

    @property
    def folder(self) -> Path:
        """Where it looks for a user's agents."""
        return Path.home() / "Library" / "LaunchAgents"

    def label(self, peer: PeerFolder) -> str:
        """Label of the agent."""
        return f"org.p2pllm.{peer.run.run_id[:16]}.{peer.name}"

    def content(self, peer: PeerFolder) -> bytes:
        """The agent's property list."""
        # What it prints is of its first moments; a file that begins anew at each start does not grow for good.
        begin_anew = ["/bin/sh", "-c", 'exec "$@" > "$0" 2>&1', str(peer.path.absolute() / "service.log")]
        return plistlib.dumps(
            {
                "Label": self.label(peer),
                "ProgramArguments": [*begin_anew, *command_of(peer)],
                "EnvironmentVariables": {**environment(), "PYTHONUNBUFFERED": "1"},
                "RunAtLoad": True,
                "KeepAlive": {"SuccessfulExit": False},
                "ThrottleInterval": 60,  # launchd knows no growing delays
                "ExitTimeOut": STOP_S,
                "ProcessType": "Background",
            }
        )

    def command_in(self, file: Path) -> list[str]:
        """See Manager."""
        with contextlib.suppress(OSError, ValueError, plistlib.InvalidFileException, ExpatError):
            found = plistlib.loads(file.read_bytes())
            return [str(word) for word in found.get("ProgramArguments", [])] if isinstance(found, dict) else []
        return []

    def enable(self, peer: PeerFolder) -> str:
        """See Manager."""
        if self._is_loaded(peer):
            return "launchd has it loaded already, and goes by the new file from your next login"
        self.ask("launchctl", "bootstrap", f"gui/{os.getuid()}", str(self.file(peer)))
        return ""

    def disable(self, peer: PeerFolder) -> None:
        """See Manager."""
        if self._is_loaded(peer):
            self.ask("launchctl", "bootout", f"gui/{os.getuid()}/{self.label(peer)}")

    def _is_loaded(self, peer: PeerFolder) -> bool:
        return not self._run(["launchctl", "print", f"gui/{os.getuid()}/{self.label(peer)}"]).code

    def state(self, peer: PeerFolder) -> str:
        """See Manager."""
        answer = self._run(["launchctl", "print", f"gui/{os.getuid()}/{self.label(peer)}"])
        found = re.search(r"state = (.+)", answer.text)
        return found[1] if found else "not loaded"


def manager() -> Manager:
    """Of this system."""
    return Launchd() if sys.platform == "darwin" else Systemd()


def _peer_of(command: Sequence[str]) -> PeerFolder | None:
    """Of which peer `command_of` is this; None if it is none."""
    values = {option: value for option, value in itertools.pairwise(command) if option in ("--run", "--name", "--home")}
    if len(values) < 3:
        return None
    return RunFolder(Path(values["--home"]), values["--run"]).peer(values["--name"])


def _quoted(text: str) -> str:
    """As systemd reads a word in which `%` means nothing."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{escaped}"' if re.search(r"[^\w@%+=:,./-]", text) else escaped
