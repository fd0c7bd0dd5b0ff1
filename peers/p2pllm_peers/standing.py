"""Standing: the orders that hold for a worker, told again to each that is started in its place.

What does not live here: the process (`worker_process`) and when which order is given (`compute`).
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

from p2pllm.manifest import RunDraft
from p2pllm.settings import PeerSettings

Event = dict[str, Any]


class Standing:
    """Of one worker. Each call that gives an order returns what the worker that lives now must hear."""

    def __init__(self) -> None:
        self.job: Event = {}
        """What it builds; empty while there is nothing to do yet."""
        self.begun: Event | None = None
        """The round that it works on."""
        self._held: Event = {"do": "hold", "held": False}
        self._share: Event = {"do": "share", "share": 1.0, "cores": None}
        self._drawn_for: Event = {}

    @property
    def all(self) -> list[Event]:
        """What one that was started again must hear to be where we are; the job first."""
        return [self.job, *([] if self.begun is None else [self.begun]), self._held, self._share]

    def build(self, draft: RunDraft, tokenizer: bytes | None, settings: PeerSettings, **rest: object) -> Event:
        """Build the model of this run. rest: what else belongs to a job, see `worker`."""
        self.job = {
            "draft": draft.model_dump(mode="json", include=set(RunDraft.model_fields)),
            "tokenizer": base64.b64encode(tokenizer).decode() if tokenizer is not None else "",
            "settings": settings.model_dump(mode="json"),
            **rest,
        }
        return self.job

    def draw_for(self, run_id: str, peer_id: str, folder: Path) -> None:
        """Whose samples to draw, and where what is this peer's own is kept, from the next round on."""
        self._drawn_for = {"run_id": run_id, "peer": peer_id, "moments": str(folder / "moments.safetensors")}

    def begin(self, round_number: int) -> Event:
        """Work on this round."""
        self.begun = {"do": "begin", "round": round_number, **self._drawn_for}
        return self.begun

    def hold(self, held: bool) -> Event:
        """Compute nothing, or go on."""
        self._held = {"do": "hold", "held": held}
        return self._held

    def share(self, share: float, cores: float | None) -> Event:
        """Compute in so much of the time, 0 to 1, and take so many cores on average, None: all."""
        self._share = {"do": "share", "share": share, "cores": cores}
        return self._share
