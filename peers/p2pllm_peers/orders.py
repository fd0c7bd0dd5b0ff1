"""What an order means: which run, and as which of this machine's peers.

What does not live here: the order itself (`launcher`), the folders (`folders`), and carrying it out (`daemon`).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil

from p2pllm.errors import UsageError
from p2pllm.identity import Identity
from p2pllm.invite import Invite
from p2pllm.manifest import RunDraft
from p2pllm_peers.folders import FOUNDER, PeerFolder, RunFolder, founded_from, key_file, name_to_join_as
from p2pllm_peers.launcher import Order
from p2pllm_peers.reporting import log_into


def known_folder(order: Order, invite: Invite | None, draft: RunDraft | None) -> PeerFolder | None:
    """Become the peer that the order means; None if it is the founder of a run that has yet to be sealed.

    Raises UsageError if there is no such peer here.
    """
    home, name = order.settings.home, order.name
    if draft is None:
        run = RunFolder(home, invite.run_id if invite else order.run_id)
        peer = run.peer(name or name_to_join_as(run))
        if invite is None and not peer.path.exists():
            raise UsageError(
                f"'{peer.name}' has not taken part in run {run.run_id[:16]} yet; give it the invite that "
                f"`p2pllm status` shows."
            )
        return occupy(peer)
    identity = Identity.load_or_create(key_file(home, name or FOUNDER))
    founded = founded_from(home, draft.digest(), identity.peer_id)
    return occupy(founded.peer(name or FOUNDER)) if founded else None


def occupy(folder: PeerFolder) -> PeerFolder:
    """Become the peer's only daemon, clean up behind a killed one, and log into its folder from here on."""
    handle = folder.lock()
    with contextlib.suppress(OSError):  # on a full disk only `leave` misses it
        os.pwrite(handle, str(os.getpid()).encode(), 0)
    facts = folder.path / "daemon.json"
    with contextlib.suppress(OSError, ValueError, KeyError):
        left = json.loads(facts.read_bytes())["runtime_dir"]
        shutil.rmtree(left, ignore_errors=True)
    with contextlib.suppress(OSError):
        facts.unlink()  # who looks shall see that we are only starting
    log_into(folder.path / "daemon.log")
    return folder
