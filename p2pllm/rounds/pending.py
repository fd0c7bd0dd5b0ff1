"""Pending: what this peer computed and no committed round holds, until one does.

What does not live here: computing updates (`update`), bringing them into a round (`round`), and what compression leaves
out of those that a round does hold (`averaging.feedback`).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from p2pllm.averaging import Exchange
from p2pllm.rounds.record import Head, Record
from p2pllm.rounds.update import Packed, Update, joined


class Pending:
    """Keeps an update whose round failed, or was committed without it, for a later round.

    For one head a peer packs once. Others may hold what it packed in a proposal, and may yet commit that: so until the
    head moves it is offered as it is, and what was computed since waits for the next round; else it could count twice.

    With fragments an update is one of a fragment, which is averaged again a turn later. An exchange that `keeps` what
    it packed has that already, without its samples: of it nothing is kept here once the head has moved.
    """

    def __init__(self, exchange: Exchange, fragments: int, record: Callable[[int], Record | None]) -> None:
        """fragments: of the run. record: of a round, in our log."""
        self._exchange = exchange
        self._fragments = fragments
        self._record = record
        self._kept: dict[int, Update] = {}  # by fragment, not packed
        self._packed: Packed | None = None  # for the head that we were at last

    def samples(self, head: Head, fresh: int) -> int:
        """Samples that we would bring to the round after `head`, with so many that are new."""
        self._leave(head)
        if self._packed is not None:
            return self._packed.update.samples
        kept = self._kept.get(head[0] % self._fragments)
        return fresh + (kept.samples if kept else 0)

    async def offer(
        self, head: Head, fresh: Update | None, pack: Callable[[Update], Awaitable[Packed]]
    ) -> Packed | None:
        """What goes into the round after `head`: what was packed for it before, or else all there is, packed now."""
        self._leave(head)
        if self._packed is not None:
            self.keep(head, fresh)
            return self._packed
        update = joined(self._kept.pop(head[0] % self._fragments, None), fresh)
        if update is not None:
            self._packed = await pack(update)
        return self._packed

    def keep(self, head: Head, fresh: Update | None) -> None:
        """This cannot go into the round after `head`."""
        if fresh is not None:
            self._add(head[0] % self._fragments, fresh)

    def settle(self, head: Head) -> None:
        """We are at `head` now, whatever became of the round that we packed for.

        Where that is not beyond it, as after damage that took us back, what was packed may be in a round yet.
        """
        if self._packed is not None and head[0] <= self._packed.head[0]:
            self._packed = self._packed.kept()  # the worker may write there again
        else:
            self._leave(head)

    def _leave(self, head: Head) -> None:
        """What was packed for another head than this is in the round after that one, or is free to be packed anew.

        A claim is signed for one head, so a record of another branch never has it.
        """
        packed = self._packed
        if packed is None or packed.head == head:
            return
        self._packed = None
        record = self._record(packed.head[0] + 1)
        if record is not None and packed.claim in record.body.members:
            self._exchange.delivered()
        elif not self._exchange.keeps:
            self._add(packed.head[0] % self._fragments, packed.update)

    def _add(self, fragment: int, update: Update) -> None:
        both = joined(self._kept.get(fragment), update)
        self._kept[fragment] = update.kept() if both is None or both is update else both
