"""Pending: what this peer computed and no committed round holds, until one does.

What does not live here: computing updates (`update`), bringing them into a round (`round`), and what compression leaves
out of those that a round does hold (`averaging.feedback`).
"""

from __future__ import annotations

from p2pllm.averaging import Exchange
from p2pllm.rounds.record import Claim, Record
from p2pllm.rounds.update import Update, joined


class Pending:
    """Keeps an update whose round failed, or was committed without it, for a later round.

    With fragments it is one of a fragment, which is averaged again a turn later; by then, or if the same round is tried
    again, it is joined with the new one. An exchange that `keeps` what it packed has that already, without its samples:
    here is only what it did not pack.
    """

    def __init__(self, exchange: Exchange, fragments: int) -> None:
        """fragments: of the run."""
        self._exchange = exchange
        self._fragments = fragments
        self._kept: dict[int, Update] = {}  # by fragment
        self._claim: Claim | None = None  # for what was packed last, unless that was delivered or more is kept

    def samples(self, round_: int) -> int:
        """Samples that the round after `round_` would have from before."""
        kept = self._kept.get(round_ % self._fragments)
        return kept.samples if kept else 0

    def join(self, round_: int, fresh: Update | None) -> Update | None:
        """What goes into the round after `round_`: what is kept for it and what is new. It is kept no more."""
        return joined(self._kept.pop(round_ % self._fragments, None), fresh)

    def keep(self, round_: int, update: Update, claim: Claim | None) -> None:
        """The round after `round_` is without this update. claim: ours in that round; None: it was not even packed."""
        if claim is not None or not self._exchange.keeps:
            self._claim = claim
        if claim is None or not self._exchange.keeps:
            self._kept[round_ % self._fragments] = update.kept()

    def delivered(self) -> None:
        """What `join` gave last is in a committed round."""
        self._claim = None
        self._exchange.delivered()

    def note(self, record: Record | None) -> None:
        """The swarm committed this round without our knowing: if the update that we packed last is in it, all is well.

        A claim is signed for one head, so a record of another branch never has it. Another one of ours than that leaves
        everything pending: better to bring some of it twice than never.
        """
        if record is None or self._claim is None or self._claim not in record.body.members:
            return
        if not self._exchange.keeps:
            self._kept.pop((record.body.round - 1) % self._fragments, None)
        self.delivered()
