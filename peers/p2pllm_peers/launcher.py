"""Starting a daemon from another program and hearing how its start goes.

The daemon is given its order as one JSON line on standard input and reports its start on standard output, one
JSON object a line: progress, then ready or error. In the foreground standard input stays open: when its other
end closes, the daemon leaves the run in order.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import IO, Any

from p2pllm import errors
from p2pllm.errors import DaemonError, P2PLLMError
from p2pllm.invite import Invite
from p2pllm.settings import PeerSettings
from p2pllm_peers.folders import RunFolder


@dataclass(frozen=True)
class Order:
    """What a daemon shall do. Exactly one of `draft`, `invite` and `run_id` is given."""

    settings: PeerSettings
    name: str = ""  # of the peer; "" chooses
    draft: dict[str, Any] | None = None  # found this run, or go on with it
    invite: str = ""  # join this run
    run_id: str = ""  # go on with a run that this machine knows
    foreground: bool = True
    flags: dict[str, Any] | None = None  # that the user gave, to be kept with the peer; None: the settings are final

    def to_json(self) -> str:
        """One line."""
        fields = {**asdict(self), "settings": json.loads(self.settings.model_dump_json())}
        return json.dumps(fields)

    @classmethod
    def from_json(cls, line: str) -> Order:
        """What `to_json` wrote."""
        fields = json.loads(line)
        return cls(**{**fields, "settings": PeerSettings(**fields["settings"])})


class DaemonProcess:
    """A daemon that this program started."""

    def __init__(self, order: Order, prefix: Sequence[str] = ()) -> None:
        """prefix: a command that becomes the daemon, for example one that enters a namespace first."""
        self._order = order
        self._process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "p2pllm_peers.daemon"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl+C in the terminal is for the view, which asks the daemon to leave
            text=True,
        )
        with contextlib.suppress(OSError):  # a daemon that died at once; `wait_ready` says so
            self._stdin.write(order.to_json() + "\n")
            self._stdin.flush()

    @property
    def pid(self) -> int:
        """Process id of the daemon."""
        return self._process.pid

    @property
    def _stdin(self) -> IO[str]:
        assert self._process.stdin is not None  # noqa: S101 - it was asked for
        return self._process.stdin

    def wait_ready(self, on_progress: Callable[[str], None]) -> dict[str, Any]:
        """Wait until the daemon takes part in the run; returns {"socket", "invite", "run_id", "name", ...}.

        Raises the error that the daemon reports, or DaemonError if it dies without a word.
        """
        try:
            for event in self._events():
                if event["event"] == "progress":
                    on_progress(event["text"])
                elif event["event"] == "ready":
                    if not self._order.foreground:
                        self._stdin.close()
                    return event
        except P2PLLMError:
            self._forget_run()
            raise
        code = self._process.wait()
        self._forget_run()
        stderr = self._process.stderr.read().strip().splitlines() if self._process.stderr else []
        raise DaemonError(
            f"The daemon ended with code {code} before it was ready: {stderr[-1] if stderr else 'no message'}."
        )

    def wait_end(self) -> None:
        """Wait until the daemon has ended. Raises the error that it reports."""
        for _ in self._events():
            pass
        if code := self._process.wait():
            raise DaemonError(f"The daemon ended with code {code}; look at `p2pllm logs`.")

    def _events(self) -> Iterator[dict[str, Any]]:
        """What the daemon reports, until it closes the pipe; an error is raised."""
        assert self._process.stdout is not None  # noqa: S101 - it was asked for
        for line in self._process.stdout:
            try:
                event: dict[str, Any] = json.loads(line)
            except ValueError:
                continue  # a library that prints
            if event["event"] == "error":
                self._reap(15)
                kind = getattr(errors, event["kind"], DaemonError)
                error: P2PLLMError = kind(event["message"])
                raise error
            yield event

    def leave(self) -> None:
        """Ask the daemon to leave the run in order; it does so by itself when this program dies."""
        if not self._stdin.closed:
            self._stdin.close()

    def end(self) -> None:
        """Stop a daemon that is still starting: in order within 10 seconds, else at once."""
        try:
            self._process.terminate()
            self._reap(10)
        except KeyboardInterrupt:
            self._process.terminate()  # at the second signal the daemon cleans up and exits at once
            self._reap(3)
        self._forget_run()

    def _forget_run(self) -> None:
        """Leave no folder of a run that the daemon could not enter."""
        if self._order.invite:
            RunFolder(self._order.settings.home, Invite.decode(self._order.invite).run_id).discard_unsaved()

    def is_gone(self, within: float) -> bool:
        """Whether it has ended; waits for that, at most so many seconds."""
        try:
            self._process.wait(within)
        except subprocess.TimeoutExpired:
            return False
        return True

    def _reap(self, timeout: float) -> None:
        if not self.is_gone(timeout):
            self.kill()
            self._process.wait()

    def poll(self) -> int | None:
        """Exit code, or None while it runs."""
        return self._process.poll()

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end; returns the exit code."""
        return self._process.wait(timeout)

    def kill(self) -> None:
        """End it at once; its children end by themselves. Does not wait, so that a signal's handler may call it."""
        self._process.kill()
