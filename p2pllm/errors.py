"""The exception tree. Every message is one sentence: what is wrong, where, and what to do.

P2PLLMError                  anything that we raise on purpose; `exit_code` is what the command returns
├── UsageError               exit 2: what the user gave cannot be used
│   ├── ManifestError        a run file or a received manifest
│   ├── SettingsError        a flag, an environment variable or the settings file
│   ├── InviteError          an invite that is mistyped or damaged
│   └── DataError            training text that cannot be read
└── RunError                 exit 1: the run failed although what was given is fine
    ├── NetworkError         p2pd, the DHT, or other peers
    │   └── UnreachableError nobody answers at the given addresses
    ├── StateError           a snapshot that is damaged, or a disk that cannot be used
    │   └── DiskError        a round that the disk does not take
    ├── WorkerError          the compute process failed for good
    └── DaemonError          the daemon on this machine: not running, running twice, not answering

What lives here: the tree alone. What does not: catching; only the outermost layer of a program catches
`P2PLLMError`, prints the sentence and returns the exit code.
"""

from __future__ import annotations


class P2PLLMError(Exception):
    """Base of every error raised on purpose; its text is one sentence for the user."""

    exit_code = 1


class UsageError(P2PLLMError):
    """What the user gave cannot be used."""

    exit_code = 2


class ManifestError(UsageError):
    """A run file or a manifest received from peers is not valid."""


class SettingsError(UsageError):
    """A flag, an environment variable or the settings file is not valid."""


class InviteError(UsageError):
    """An invite is mistyped, cut off, or of another version."""


class DataError(UsageError):
    """Training text cannot be found, read, or is not what the manifest names."""


class RunError(P2PLLMError):
    """The run failed although the input was fine."""


class NetworkError(RunError):
    """p2pd, the DHT or a peer failed in a way that cannot be retried."""


class UnreachableError(NetworkError):
    """No peer answers at the given addresses."""


class StateError(RunError):
    """A snapshot is damaged or cannot be written."""


class DiskError(StateError):
    """The disk does not take what must be on it before a round counts."""


class WorkerError(RunError):
    """The compute process failed for good."""


class DaemonError(RunError):
    """The daemon of this machine is not running, runs already, or does not answer."""
