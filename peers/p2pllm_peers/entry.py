"""Ways into a run: sealing a new one, and fetching the manifest of one that others started.

Both end with the same three things: the sealed manifest, the founder's signature, and the tokenizer's bytes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from blake3 import blake3

from p2pllm.errors import ManifestError, NetworkError, UnreachableError
from p2pllm.identity import Identity
from p2pllm.invite import Invite
from p2pllm.manifest import MAX_MANIFEST_BYTES, RunDraft, RunManifest
from p2pllm.network.bulk import Blob, fetch
from p2pllm.network.messages import pack, unpack
from p2pllm.network.node import Node
from p2pllm.network.transport import Transport
from p2pllm.settings import PeerSettings
from p2pllm.state.shared import SharedState
from p2pllm.training.sources import documents
from p2pllm.training.tokenizer import MAX_TOKENIZER_BYTES
from p2pllm_peers.devices import Devices
from p2pllm_peers.folders import SIGNING_DOMAIN, check_signature

CALL_TIMEOUT_S = 20.0

Sealed = tuple[RunManifest, bytes, bytes | None]
"""Manifest, signature, tokenizer.json (None: the built-in one)."""


async def seal(draft: RunDraft, identity: Identity, compute: Devices, settings: PeerSettings) -> Sealed:
    """Turn a draft into a run: build its model once, and sign what came out.

    Raises ManifestError, DataError: the draft names what cannot be used.
    """
    tokenizer = None
    if draft.tokenizer.source != "bytes":
        tokenizer = _read_tokenizer(Path(draft.tokenizer.source.removeprefix("file:")))
    if draft.data.source != "stdlib":
        # a mistyped path is worth a sentence before the seconds that a model takes
        await asyncio.to_thread(documents, draft.data.source, settings.data_path)
    layout = await compute.build(draft, tokenizer, settings.startup_timeout_s)
    manifest = draft.seal(
        founder=identity.peer_id,
        initial_state=SharedState.initial(layout, compute.params).digest(),
        tokenizer="bytes" if tokenizer is None else f"blake3:{blake3(tokenizer).hexdigest()}",
        data_digest=compute.data_digest,
    )
    if len(manifest.canonical_bytes()) > MAX_MANIFEST_BYTES:
        raise ManifestError(f"The run file is larger than {MAX_MANIFEST_BYTES} bytes; shorten model.config.")
    return manifest, identity.sign(SIGNING_DOMAIN, manifest.canonical_bytes()), tokenizer


async def serve_manifest(transport: Transport, sealed: Sealed) -> None:
    """Give the manifest to whoever joins."""
    reply = pack([sealed[0].canonical_bytes(), sealed[1]])

    async def answer(peer: str, payload: bytes) -> bytes:
        return bytes(reply)

    await transport.serve_call("manifest", answer)


def tokenizer_blob(sealed: Sealed, request: dict[str, Any]) -> Blob | None:
    """Answer a fetch of {"what": "tokenizer"}."""
    if request.get("what") != "tokenizer" or sealed[2] is None:
        return None
    return Blob({}, [sealed[2]])


async def fetch_manifest(node: Node, invite: Invite, progress: Callable[[str], None]) -> Sealed:
    """Get and check the manifest of an invite from whoever answers at its addresses.

    Raises UnreachableError if nobody does, ManifestError if what comes is not the invite's run.
    """
    progress("looking for the run")
    peer = await node.connect_any(invite.addresses)
    progress("fetching the manifest")
    return await _fetch_from(node, peer, invite)


async def _fetch_from(node: Node, peer: str, invite: Invite) -> Sealed:
    try:
        reply = await node.call(peer, "manifest", b"", CALL_TIMEOUT_S)
    except NetworkError as error:
        raise UnreachableError(
            f"Peer {peer[-8:]} answers, but not for run {invite.run_id[:16]} ({str(error).rstrip('.')}); the run may "
            f"have ended, so ask for a fresh invite."
        ) from None
    try:
        data, signature = unpack(reply, 2 * MAX_MANIFEST_BYTES)
        if not isinstance(data, bytes) or not isinstance(signature, bytes):
            raise TypeError
    except (ValueError, TypeError):
        raise ManifestError(f"Peer {peer[-8:]} sent something that is no manifest.") from None
    manifest = RunManifest.from_bytes(data, invite.run_id)
    if manifest.founder != invite.founder:
        raise ManifestError("The manifest names another founder than the invite.")
    check_signature(manifest, signature)
    if manifest.tokenizer.source == "bytes":
        return manifest, signature, None
    got = await fetch(node, peer, {"what": "tokenizer"}, MAX_TOKENIZER_BYTES)
    if got is None or f"blake3:{blake3(got[1]).hexdigest()}" != manifest.tokenizer.source:
        raise ManifestError(f"The tokenizer that peer {peer[-8:]} sent is not the one of this run.")
    return manifest, signature, bytes(got[1])


def _read_tokenizer(path: Path) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ManifestError(f"The tokenizer {path} cannot be read: {error.strerror}.") from None
    if len(data) > MAX_TOKENIZER_BYTES:
        raise ManifestError(
            f"The tokenizer {path} has {len(data)} bytes; at most {MAX_TOKENIZER_BYTES} travel with a run."
        )
    return data
