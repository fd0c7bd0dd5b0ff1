"""Introductions: what peers tell each other in a call, which p2pd has authenticated, before they meet directly.

A caller sends {certificate}, and is answered {certificate, port}. What does not live here: the call (`direct`).
"""

from __future__ import annotations

from p2pllm.network.certificates import owner_of
from p2pllm.network.messages import pack, unpack

METHOD = "direct/2"
"""The call."""

_MAX_CERTIFICATE_BYTES = 1024
_MAX_BYTES = 2048


def introduction(certificate: bytes, port: int | None = None) -> bytes:
    """What a caller sends, or with a port the answer."""
    return pack({"certificate": certificate} | ({} if port is None else {"port": port}))


def certificate_of(payload: bytes, peer: str) -> bytes:
    """The certificate, DER, that this peer says is its own. Raises ValueError."""
    found = _unpack(payload).get("certificate")
    if not isinstance(found, bytes) or not 0 < len(found) <= _MAX_CERTIFICATE_BYTES:
        raise ValueError("there is no certificate in an introduction")
    # made out to the peer, which p2pd has authenticated: nobody takes another one's
    if owner_of(found) != peer:
        raise ValueError("this is the certificate of somebody else")
    return found


def port_of(payload: bytes) -> int:
    """The port on which it listens. Raises ValueError."""
    port = _unpack(payload).get("port")
    if type(port) is not int or not 0 < port < 1 << 16:
        raise ValueError("it listens on no port for that")
    return port


def _unpack(payload: bytes) -> dict[str, object]:
    value = unpack(payload, _MAX_BYTES)
    if not isinstance(value, dict):
        raise ValueError("an introduction is not a map")
    return value
