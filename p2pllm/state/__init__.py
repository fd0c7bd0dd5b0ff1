"""What all peers hold bit-identically, and how it moves forward: flat vectors, the outer step, snapshots.

`layout` says where a parameter lies in the flat vectors, `shared` is the state and its digest, `outer` the
deterministic optimizer, `snapshot` the files. All of it is NumPy, since it runs in the daemon, which imports
no torch. What does not live here: models (`training`), moving states between peers (`rounds`).
"""

from p2pllm.state.layout import Entry, Layout
from p2pllm.state.outer import AdamW, learning_rate
from p2pllm.state.shared import FLOAT, SharedState
from p2pllm.state.snapshot import newest, save

__all__ = ["FLOAT", "AdamW", "Entry", "Layout", "SharedState", "learning_rate", "newest", "save"]
