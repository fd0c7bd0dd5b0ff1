"""What all peers hold bit-identically, and how it moves forward: flat vectors, the outer step, files.

`layout` says where a parameter lies in the flat vectors, `shared` is the state, `header` and `chunks` what its digest
is made of, `outers` which deterministic optimizer moves it. On disk: `snapshot` holds whole states (`saved` is the
form of a file, `incoming` a download), `blobs` the aggregates that lead from one to the next, both on `files`. All of
it is NumPy, since it runs in the daemon, which imports no torch. What does not live here: models
(`training`), moving states between peers and the log (`rounds`).
"""

from p2pllm.state.adamw import AdamW
from p2pllm.state.blobs import BlobStore
from p2pllm.state.chunks import CHUNK_BYTES, Chunk, ChunkPlan, chunk_count, chunk_of
from p2pllm.state.fragments import Span, span_of
from p2pllm.state.incoming import Incoming
from p2pllm.state.layout import FLOAT, Entry, Layout
from p2pllm.state.nesterov import Nesterov, Sgd
from p2pllm.state.outer import OuterOptimizer
from p2pllm.state.outers import check_arithmetic, moments_of, outer_optimizer
from p2pllm.state.saved import Snapshot
from p2pllm.state.shared import SharedState
from p2pllm.state.snapshot import SnapshotStore

__all__ = [
    "CHUNK_BYTES",
    "FLOAT",
    "AdamW",
    "BlobStore",
    "Chunk",
    "ChunkPlan",
    "Entry",
    "Incoming",
    "Layout",
    "Nesterov",
    "OuterOptimizer",
    "Sgd",
    "SharedState",
    "Snapshot",
    "SnapshotStore",
    "Span",
    "check_arithmetic",
    "chunk_count",
    "chunk_of",
    "moments_of",
    "outer_optimizer",
    "span_of",
]
