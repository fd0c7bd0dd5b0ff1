"""The network: p2pd and its supervision, calls and streams between peers, the directory, and who is alive.

Importing this package is cheap: what needs hivemind (which imports torch) lives in `node`, `dht`, `control`,
`calls`, `wire` and `supervisor`, to be imported by name where a network is started; with `lean` a program does without
torch. What does not live here: what peers say to each other about rounds (`rounds`) and what is averaged (`averaging`).
"""

from __future__ import annotations

from p2pllm.network.transport import MAX_CALL_BYTES, CallHandler, StreamHandler, Transport

__all__ = ["MAX_CALL_BYTES", "CallHandler", "StreamHandler", "Transport"]
