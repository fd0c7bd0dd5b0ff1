"""What a snapshot file says about itself before the vectors, and the names of such files.

A file is in the safetensors format with the tensor params and those of the outer optimizer: any tool that knows the
format can open it, and none can run code from it. Its metadata hold the run id, the state's header, layout and digest,
the record that the state belongs to, and a digest of all these. We write and read the format ourselves: the library
hides errno, copies the whole state first, and takes files of other forms. What does not live here: the files
themselves (`snapshot`).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from p2pllm.errors import StateError
from p2pllm.state.chunks import digest_of
from p2pllm.state.files import Reader
from p2pllm.state.header import parse_header
from p2pllm.state.layout import Layout

_FORMAT = "p2pllm state 3"
_MAX_HEAD_BYTES = 1 << 24  # the layout of the largest models needs a tenth of it
_DIGEST_BYTES = 32


@dataclass(frozen=True)
class Snapshot:
    """A saved state: its round, the digests of the record that it belongs to and of the state, and its file."""

    round: int
    record: bytes
    state: bytes
    name: str  # of the file in its folder


@dataclass(frozen=True)
class Head:
    """What a file says before the vectors. Two heads are equal if their files are."""

    run_id: str
    layout: Layout
    header: dict[str, str | int]  # as SharedState.header gives it
    state: bytes
    record: bytes

    @property
    def snapshot(self) -> Snapshot:
        """What is known of the file from outside."""
        round_ = int(self.header["round"])
        name = f"{prefix_of(self.run_id)}round-{round_:08d}-{self.state.hex()[:16]}.safetensors"
        return Snapshot(round_, self.record, self.state, name)

    def pack(self) -> bytes:
        """The first bytes of the file; those of the vectors follow at once."""
        metadata = {
            "format": _FORMAT,
            "run_id": self.run_id,
            "header": json.dumps(self.header, sort_keys=True),
            "layout": self.layout.to_json(),
            "digest": self.state.hex(),
            "record": self.record.hex(),
        }
        # the state's digest does not cover the record: a flipped bit there would go unnoticed
        metadata["check"] = digest_of(json.dumps(metadata, sort_keys=True).encode()).hex()
        values: dict[str, Any] = {"__metadata__": metadata}
        size = self.layout.nbytes
        for number, name in enumerate(self.layout.vectors):
            offsets = [number * size, (number + 1) * size]
            values[name] = {"dtype": "F32", "shape": [self.layout.size], "data_offsets": offsets}
        head = json.dumps(values).encode()
        head += b" " * (-len(head) % 8)  # the format wants the tensors aligned to 8 bytes
        return len(head).to_bytes(8, "little") + head

    @classmethod
    def read(cls, file: Reader) -> Head:
        """The head of a file. Raises StateError unless it is as `pack` writes it and the file has the right size."""
        raw = bytes(file.read(0, vectors_at(file)))
        try:
            tensors = json.loads(raw[8:])
            values, moments = tensors["__metadata__"], tuple(tensors)[2:]
            if values["format"] != _FORMAT:
                raise StateError(f"it is not in the format '{_FORMAT}'.")
            header = json.loads(values["header"])
            layout = Layout.from_json(values["layout"]).with_moments(moments)
            run_id, state, record = values["run_id"], *(bytes.fromhex(values[name]) for name in ("digest", "record"))
        except (ValueError, KeyError, TypeError, RecursionError):
            raise StateError("its head is damaged.") from None
        parse_header(layout, header)
        head = cls(run_id, layout, header, state, record)
        if len(state) != _DIGEST_BYTES or len(record) != _DIGEST_BYTES or head.pack() != raw:
            raise StateError("its head is damaged.")
        if file.size != len(raw) + len(layout.vectors) * layout.nbytes:
            raise StateError(f"it has {file.size} bytes instead of {len(raw) + len(layout.vectors) * layout.nbytes}.")
        return head


def vectors_at(file: Reader) -> int:
    """The byte of a file at which the vectors begin. Raises StateError if the file cannot be a snapshot."""
    at = 8 + int.from_bytes(file.read(0, 8), "little")
    if at > _MAX_HEAD_BYTES:
        raise StateError("its head is damaged.")
    return at


def prefix_of(run_id: str) -> str:
    """How the names of a run's snapshots begin."""
    return f"state-{run_id[:16]}-"
