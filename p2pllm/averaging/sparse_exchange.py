"""SparseExchange: everybody's compressed update, for `sparse_loco`; what compression leaves out goes into the next one.

What does not live here: the compression (`sparse`, `feedback`) and how bytes move (`gather`).
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from p2pllm.averaging.exchange import Exchange, Payload, in_one
from p2pllm.averaging.feedback import ErrorBuffer
from p2pllm.averaging.form import SparseForm
from p2pllm.averaging.gather import Gather
from p2pllm.averaging.group import ExchangeResult, Group
from p2pllm.network.transport import Transport


class SparseExchange(Exchange):
    """Updates of the largest elements, gathered whole; see Exchange."""

    keeps = True

    def __init__(
        self, transport: Transport, form: SparseForm, run_id: str, error_decay: float, file: Path | None = None
    ) -> None:
        """file: keeps what compression left out from one session to the next."""
        self._form = form
        self._buffer = ErrorBuffer(self._form.codec, run_id, error_decay)
        self._file = file
        self._gather = Gather(transport, self._form.codec.max_bytes)

    async def start(self) -> None:
        """See Exchange."""
        if self._file is not None:
            await asyncio.to_thread(self._buffer.load, self._file)
            self._file.unlink(missing_ok=True)  # a peer that is killed later begins with nothing rather than this
        await self._gather.start()

    def pack(self, update: NDArray[np.float32]) -> Payload:
        """See Exchange."""
        return self._buffer.compress(update)

    def delivered(self) -> None:
        """See Exchange."""
        self._buffer.commit()

    def close(self) -> None:
        """See Exchange."""
        if self._file is not None:
            self._buffer.save(self._file)

    async def run(self, group: Group, payload: Payload, deadline: float) -> ExchangeResult:
        """See Exchange."""
        if not isinstance(payload, bytes):
            raise ValueError("A sparse exchange takes what it packed.")
        got = await self._gather.run(group, payload, deadline)
        refused = await asyncio.to_thread(self._refused, got.arrived)
        return ExchangeResult(
            aggregate=self._form.pack(got.updates) if got.updates and not refused else None,
            failed=got.failed | refused.keys(),
            reason=in_one([got.reason, *refused.values()]),
            bytes_sent=got.bytes_sent,
            bytes_received=got.bytes_received,
            seconds=got.seconds,
        )

    def _refused(self, arrived: dict[str, bytes]) -> dict[str, str]:
        """Members whose updates are none, which they signed all the same; and what is wrong with each."""
        members = list(arrived)
        wrong = {members[place]: why for place, why in self._form.refusals(list(arrived.values())).items()}
        return {member: f"The update of {member} is refused: {why}" for member, why in wrong.items()}
