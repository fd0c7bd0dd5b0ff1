"""Commands: what a running daemon does for the programs of this machine, by the name of the request.

Each takes the request, a dictionary from a JSON line, and returns the reply; one that cannot be carried out replies
with "error" and a sentence. What does not live here: the socket (`control`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from p2pllm.errors import SettingsError, StateError
from p2pllm_peers.control import Handler, Reply

if TYPE_CHECKING:
    from p2pllm_peers.participant import Participant

_REFUSED = (ValueError, TypeError, KeyError, AttributeError, SettingsError, StateError)
"""What a request that makes no sense, or a full disk, raises."""


def commands_of(participant: Participant, leave: Callable[[], None]) -> dict[str, Handler]:
    """Handlers by name. leave: called when the daemon shall leave the run."""

    async def status(request: dict[str, Any]) -> Reply:
        return participant.status()

    async def links(request: dict[str, Any]) -> Reply:
        return participant.links.look()

    async def leaving(request: dict[str, Any]) -> Reply:
        leave()
        return {"leaving": True}

    async def checkpoint(request: dict[str, Any]) -> Reply:
        return {"new": await participant.anchor(bytes.fromhex(request["checkpoint"]))}

    async def pause(request: dict[str, Any]) -> Reply:
        seconds = request["seconds"]
        participant.guest.pause(None if seconds is None else float(seconds))
        return {"paused": True}

    async def resume(request: dict[str, Any]) -> Reply:
        return {"paused": participant.guest.resume()}

    async def change(request: dict[str, Any]) -> Reply:
        return {"set": True, "later": participant.set(dict(request["values"]))}

    commands: dict[str, Handler] = {
        "status": status,
        "links": links,
        "leave": leaving,
        "checkpoint": checkpoint,
        "pause": pause,
        "resume": resume,
        "set": change,
    }
    return {name: _checked(handler) for name, handler in commands.items()}


def _checked(handler: Handler) -> Handler:
    async def checked(request: dict[str, Any]) -> Reply:
        try:
            return await handler(request)
        except _REFUSED as error:
            return {"error": str(error)}

    return checked
