"""The p2pd process: its arguments, its start, its death.

p2pd is hivemind's build of the go-libp2p daemon. We start it ourselves, because hivemind leaves it alive when
its parent is killed, leaves its sockets in /tmp, and reports a failed start as a bare time-out. What does not
live here: talking to p2pd (`control`) and restarting it (`node`).
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import importlib.util
import logging
import os
import re
import signal
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path

from p2pllm.errors import NetworkError
from p2pllm.network.host import check_listen, port_in_use, prepare_runtime_dir, raise_file_limit
from p2pllm.network.options import P2pdOptions, Reach

log = logging.getLogger(__name__)

CONTROL_SOCKET = "d.sock"
"""p2pd listens on it."""

STREAM_SOCKET = "c.sock"
"""We listen on it; p2pd hands over incoming streams."""

_IDLE_TIMEOUT_S = 30
"""p2pd exits when it has had no persistent connection for so long after its start, or as soon as it loses the
last one. On Linux the kernel kills it when we die; elsewhere this is what ends it."""

_STOP_TIMEOUT_S = 1.0

_ENVIRONMENT = {"GOMAXPROCS": "1"}
"""What a user may set otherwise. One core encrypts some 3 Gbit/s, at a tenth less processor time than two, and the
others are left to those who compute."""

_RELAYING = {
    "relayDataLimit": str(1 << 40),
    "relayTimeLimit": "168h",
    "relayMaxCircuits": "256",  # of one peer: to all others of a group
    "relayMaxReservations": "4096",  # whoever asks what we carry takes one, too, for half an hour
    "relayBufferSize": str(1 << 16),  # two of them a circuit; the default is 16 MiB
}
"""What we relay for others: a circuit that ends in the middle of an exchange fails it."""

Progress = Callable[[str], None]


class P2pd:
    """A running p2pd. Made by `start`."""

    def __init__(self, options: P2pdOptions) -> None:
        self.options = options
        self.control_socket = options.runtime_dir / CONTROL_SOCKET
        self.stream_socket = options.runtime_dir / STREAM_SOCKET
        self._process: asyncio.subprocess.Process | None = None
        self._output: asyncio.Task[None] | None = None
        self._ready = asyncio.Event()
        self._lines: deque[str] = deque(maxlen=5)

    @classmethod
    async def start(cls, options: P2pdOptions, progress: Progress | None = None) -> P2pd:
        """Start p2pd and wait until it takes requests.

        progress: called with a phrase at the start and every 5 seconds. Raises SettingsError: an address that
        this machine does not have, or a runtime folder that is no private one. Raises NetworkError: the port
        is in use, p2pd cannot be run, exits, or is not ready within `startup_timeout_s` seconds.
        """
        self = cls(options)
        prepare_runtime_dir(options.runtime_dir)
        self._remove_files()
        check_listen(options.listen_host, options.listen_port)
        raise_file_limit()
        try:
            await self._spawn()
            await self._wait_ready(progress or (lambda _: None))
        except BaseException:
            await self.stop()
            raise
        return self

    @property
    def pid(self) -> int:
        """Process id."""
        assert self._process is not None  # noqa: S101 - `start` returns only running ones
        return self._process.pid

    async def wait(self) -> str:
        """Wait until p2pd has exited; returns why, as a phrase."""
        assert self._process is not None  # noqa: S101 - `start` returns only running ones
        code = await self._process.wait()
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"exited with status {code}"
        return f"p2pd {how}"

    async def stop(self) -> None:
        """End p2pd, by SIGKILL after 1 second, and remove its sockets."""
        process = self._process
        if process is not None and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            try:
                async with asyncio.timeout(_STOP_TIMEOUT_S):
                    await process.wait()
            except TimeoutError:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
        if self._output is not None:
            self._output.cancel()
        self._remove_files()

    def _remove_files(self) -> None:
        for path in (self.control_socket, self.stream_socket):
            path.unlink(missing_ok=True)

    async def _spawn(self) -> None:
        binary = p2pd_file()
        try:
            self._process = await asyncio.create_subprocess_exec(
                str(binary),
                *_arguments(self.options, self.control_socket),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                env={**_ENVIRONMENT, **os.environ, "GOLOG_LOG_FMT": "nocolor", "GOLOG_LOG_LEVEL": "error"},
                # Ctrl+C in a terminal reaches the whole foreground group; p2pd must outlive it to say goodbye
                start_new_session=True,
                preexec_fn=_die_with(os.getpid()) if sys.platform == "linux" else None,
            )
        except OSError as error:
            raise NetworkError(
                f"p2pd at {binary} cannot be run ({error.strerror or error}); reinstall hivemind for this machine."
            ) from None
        self._output = asyncio.create_task(self._read_output())

    async def _read_output(self) -> None:
        assert self._process is not None and self._process.stdout is not None  # noqa: S101 - started just before
        while True:
            try:
                line = await self._process.stdout.readline()
            except ValueError:  # a line above the buffer's limit; asyncio has dropped it
                continue
            if not line:
                return
            text = line.decode(errors="replace").strip()[:500]
            log.debug("p2pd: %s", text)
            self._lines.append(text)
            if text.startswith("Peer ID:"):  # printed once the control socket listens
                self._ready.set()

    async def _wait_ready(self, progress: Progress) -> None:
        assert self._process is not None and self._output is not None  # noqa: S101 - started just before
        timeout = self.options.startup_timeout_s
        started = asyncio.get_running_loop().time()
        ready = asyncio.create_task(self._ready.wait())
        ended = asyncio.create_task(self._process.wait())
        try:
            while True:
                waited = asyncio.get_running_loop().time() - started
                if waited >= timeout:
                    raise NetworkError(
                        f"p2pd was not ready after {timeout:g} s; raise startup_timeout_s if this machine is slow."
                    )
                progress(f"starting p2pd ({waited:.0f} of at most {timeout:g} s)")
                await asyncio.wait({ready, ended}, timeout=min(5, timeout - waited), return_when="FIRST_COMPLETED")
                if ready.done():
                    return
                if ended.done():
                    await asyncio.wait({self._output}, timeout=1)
                    raise NetworkError(self._why_failed())
        finally:
            ready.cancel()
            ended.cancel()

    def _why_failed(self) -> str:
        said = "; ".join(line for line in self._lines if line) or "it said nothing"
        if re.search(r"address already in use", said):
            return port_in_use(self.options.listen_host, self.options.listen_port)
        if re.search(r"unmarshal|proto:|key", said, re.IGNORECASE):
            return f"p2pd does not accept the key file {self.options.identity}: {said}."
        return f"p2pd did not start: {said}."


def p2pd_file() -> Path:
    """Where hivemind keeps p2pd, found without importing hivemind."""
    spec = importlib.util.find_spec("hivemind")
    if spec is None or spec.origin is None:
        raise NetworkError("hivemind is not installed; reinstall p2pllm.")
    return Path(spec.origin).parent / "hivemind_cli" / "p2pd"


def _arguments(options: P2pdOptions, control_socket: Path) -> list[str]:
    kind = "ip6" if ":" in options.listen_host else "ip4"
    private = options.reach is Reach.PRIVATE
    switches = {
        # libp2p's own DHT finds the addresses of a peer of which hivemind's DHT told only the id
        "dhtServer": True,
        "connManager": True,
        # TLS alone: offered both, p2pd takes Noise, which has no help from the processor and costs a quarter more
        "tls": True,
        "noise": False,
        "relay": True,
        "relayService": options.relay_service,
        "natPortMap": options.nat,
        "autonat": options.nat,
        # p2pd's own way to find out takes minutes, and never comes to an end where all others are behind routers
        "forceReachabilityPublic": options.reach is Reach.PUBLIC,
        "forceReachabilityPrivate": private,
        # without a relay of our own p2pd would ask the public IPFS nodes, and with a search for more wait for minutes
        "autoRelay": private and bool(options.relay),
        "relayDiscovery": False,
    }
    values = {
        "listen": f"/unix{control_socket}",
        "id": str(options.identity),
        "hostAddrs": f"/{kind}/{options.listen_host}/tcp/{options.listen_port}",
        "idleTimeout": f"{max(_IDLE_TIMEOUT_S, options.startup_timeout_s):.0f}s",
        **_RELAYING,
    }
    if options.announce:
        values["announceAddrs"] = ",".join(options.announce)
    if private and options.relay:
        values["trustedRelays"] = options.relay
    return [f"-{name}={int(on)}" for name, on in switches.items()] + [f"-{n}={v}" for n, v in values.items()]


def _die_with(parent: int) -> Callable[[], None]:
    """A function for the child that ties its life to the thread that starts it. Linux only."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl  # looked up here: the child shall do as little as possible

    def tie() -> None:
        prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # died before the line above
            os._exit(1)

    return tie
