"""What this machine must give before p2pd starts: a private folder, a free port, open files, no leftover
p2pd.

What lives here: checks and preparations, each with a sentence for the user when it fails. What does not: the
process.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import resource
import socket
import stat
from pathlib import Path

from p2pllm.errors import PortError, SettingsError

_LONGEST_RUNTIME_DIR = 90
"""Bytes; with the name of a socket it must stay under the 104 of a socket address on macOS."""

_OPEN_FILES = 65536
"""Wanted limit of open files; every stream takes one here and two in p2pd."""


def prepare_runtime_dir(path: Path) -> None:
    """Make the folder of the sockets with mode 0700.

    Raises SettingsError if its path is too long, or if others could put something in its place.
    """
    if len(os.fsencode(path)) > _LONGEST_RUNTIME_DIR:
        raise SettingsError(f"The runtime folder {path} has a longer path than {_LONGEST_RUNTIME_DIR} bytes.")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        above = path.parent.lstat()
        open_to_others = above.st_mode & 0o022 and not above.st_mode & stat.S_ISVTX
        if above.st_uid not in (0, os.getuid()) or open_to_others:
            raise SettingsError(
                f"The runtime folder {path.parent} belongs to somebody else; set XDG_RUNTIME_DIR to a folder of yours."
            )
        path.mkdir(mode=0o700, exist_ok=True)
        status = path.lstat()
        if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
            raise SettingsError(f"The runtime folder {path} belongs to somebody else; set XDG_RUNTIME_DIR.")
        path.chmod(0o700)
    except OSError as error:
        raise SettingsError(f"The runtime folder {path} cannot be made: {error.strerror or error}.") from None


def check_listen(host: str, port: int) -> None:
    """Fail where p2pd would not: it shares ports (SO_REUSEPORT), so a second one on a port starts and
    disturbs both.
    """
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        raise SettingsError(f'The listen_host "{host}" is not an IP address.') from None
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT is free
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise PortError(port_in_use(host, port)) from None
            raise SettingsError(
                f"This machine cannot listen on {host} port {port}: {error.strerror}; give another with --listen."
            ) from None


def port_in_use(host: str, port: int) -> str:
    return f"Port {port} on {host} is in use by another program; choose another with --port, or 0 for any free one."


def raise_file_limit() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # macOS refuses some values; the old limit then stays
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
