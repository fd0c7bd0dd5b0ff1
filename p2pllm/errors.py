"""The exception tree. Every message is one sentence: what is wrong, where, and what to do.

P2PLLMError                  anything that we raise on purpose; `exit_code` is what the command returns
├── UsageError               exit 2: what the user gave cannot be used
│   ├── ManifestError        a run file or a received manifest
│   ├── SettingsError        a flag, an environment variable or the settings file
│   ├── InviteError          an invite that is mistyped or damaged
│   └── DataError            training text that cannot be read
└── RunError                 exit 1: the run failed although what was given is fine
    ├── NetworkError         p2pd, the DHT, or other peers
    │   ├── UnreachableError nobody answers at the given addresses
    │   └── PortError        another program listens there
    ├── StateError           files or numbers of this machine that are damaged or missing
    │   ├── DiskError        a round that the disk does not take
    │   ├── NoRoomError      a file that cannot be written: the disk is full, or it is not allowed
    │   └── ArithmeticsError this machine computes other numbers than all others
    ├── WorkerError          the compute process failed for good
    │   ├── OutOfMemoryError for want of memory
    │   └── VersionError     its libraries build another model than the run's
    └── DaemonError          the daemon on this machine: not running, not answering
        └── OccupiedError    it runs already

Each has a page in `p2pllm explain`. What lives here: the tree alone. What does not: catching; only the outermost layer
of a program catches `P2PLLMError`, prints the sentence and returns the exit code.
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


class PortError(NetworkError):
    """Another program listens where this peer was told to."""


class StateError(RunError):
    """A file or a number of this machine is damaged or missing, or a file cannot be written."""


class DiskError(StateError):
    """The disk does not take what must be on it before a round counts."""


class NoRoomError(StateError):
    """A file cannot be written: the disk or a quota is full, or it is not permitted."""


class ArithmeticsError(StateError):
    """This machine computes other numbers than all others, so it would hold another state."""


class WorkerError(RunError):
    """The compute process failed for good."""


class OutOfMemoryError(WorkerError):
    """The model does not fit into the memory of the machine or its device."""


class VersionError(WorkerError):
    """The libraries of this machine build another model than the run's."""


class DaemonError(RunError):
    """The daemon of this machine is not running, or does not answer."""


class OccupiedError(DaemonError):
    """The daemon of this machine runs already."""
