"""Index: where each round of the branch lies in the frames of a log, and what else the frames say.

It is made by replaying all frames in order. A frame that makes no sense is skipped, with a warning, so that damage
costs what it hits and no more. What does not live here: the frames (`frames`), reading records and changing the branch
(`log`).
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable
from typing import NamedTuple, Self

import msgpack
from blake3 import blake3

from p2pllm.errors import StateError
from p2pllm.rounds.frames import HEAD, MENDED, RECORD
from p2pllm.rounds.packing import Digest, Message, MessageError, RoundNumber, Total, opened
from p2pllm.rounds.record import Checkpoint, Head, genesis

KEPT_CHECKPOINTS = 64
KEPT_ABANDONED = 1000

MISSING = -1

logger = logging.getLogger(__name__)


class Place(NamedTuple):
    """A round of the branch, as far as it is known."""

    digest: bytes = b""  # of its record; empty: nothing that is left names it
    total: int = 0  # samples up to it
    at: int = MISSING  # where the store has its frame

    @property
    def is_named(self) -> bool:
        """Whether we know which record is missing here."""
        return self.at == MISSING and bool(self.digest)


class HeadFrame(Message):
    """Payload of a HEAD frame: where the branch went back to."""

    round: RoundNumber
    digest: Digest
    total: Total


class Outline(NamedTuple):
    """What the index needs of a packed record."""

    run: bytes
    round: int
    previous: bytes
    total: int
    samples: int
    digest: bytes

    @classmethod
    def of(cls, packed: bytes) -> Self:
        """Taken out of the fields without making a Record, which takes ten times as long. Raises MessageError."""
        try:
            body, _votes = opened(packed)
            _version, run, round_, previous, total, members, *_ = body
            samples = sum(claim[1] for claim in members)
            digest = blake3(msgpack.packb(body)).digest()
        except (ValueError, TypeError, LookupError) as error:
            raise MessageError(f"it is not a record: {error}") from None
        types = [type(value) for value in (run, previous, round_, total, samples)]
        if types != [bytes, bytes, int, int, int] or round_ < 1 or not 0 <= samples <= total:
            raise MessageError("it is not a record")
        return cls(run, round_, previous, total, samples, digest)


class Index:
    """What the frames of one log add up to. source: where they come from, for sentences.

    places: by round, of the branch. Whoever reads takes the list once: a frame that shortens the branch makes a new
    list. abandoned: places of branches that were left, the newest last. checkpoints: the newest ones.
    """

    def __init__(self, run_id: str, source: str) -> None:
        self.places = [Place(genesis(run_id)[1])]
        self.abandoned = deque[Head](maxlen=KEPT_ABANDONED)
        self.checkpoints = dict[Head, Checkpoint]()
        self._run = bytes.fromhex(run_id)
        self._source = source

    def replay(self, frames: Iterable[tuple[int, int, bytes]]) -> None:
        """Take (at, kind, payload) of frames; who reads sees all of them or none.

        Raises StateError if one is a record of another run.
        """
        places = self.places
        for at, kind, payload in frames:
            try:
                places = self._after(places, at, kind, payload)
            except MessageError as error:
                logger.warning("Skipped the frame at byte %d of %s: %s", at, self._source, error)
        self.places = places

    def lose(self, places: list[Place], round_: int) -> None:
        """The record of this round was found damaged."""
        logger.warning("Round %d in %s is damaged", round_, self._source)
        places[round_] = places[round_]._replace(at=MISSING)

    def _after(self, places: list[Place], at: int, kind: int, payload: bytes) -> list[Place]:
        """The places after a frame: the same list, or a shorter copy, since others may be reading the one there is."""
        if kind in (RECORD, MENDED):
            return self._placed(places, at, Outline.of(payload), again=kind == MENDED)
        if kind == HEAD:
            head = HeadFrame.unpack(payload)
            return self._led_to(places, at, head.round, head.digest, head.total)
        point = Checkpoint.unpack(payload)
        self.checkpoints[point.head] = point
        while len(self.checkpoints) > KEPT_CHECKPOINTS:
            del self.checkpoints[min(self.checkpoints)]
        return places

    def _placed(self, places: list[Place], at: int, record: Outline, again: bool) -> list[Place]:
        if record.run != self._run:
            raise StateError(f"The log of rounds {self._source} belongs to another run; move it away.")
        place = Place(record.digest, record.total, at)
        base = (record.round - 1, record.previous, record.total - record.samples)
        # A mended record above all that is left of the branch was on it when it was written, as any other record.
        if not again or record.round >= len(places):
            places = self._led_to(places, at, *base)
            places.append(place)
        elif places[record.round].is_named and places[record.round].digest == record.digest:
            self._name(places, *base)
            places[record.round] = place
        return places

    def _led_to(self, places: list[Place], at: int, round_: int, digest: bytes, total: int) -> list[Place]:
        """The places when this was the head. Damage may have swallowed those before it, or a branch that they left."""
        if round_ - len(places) > at:  # each of those that are not there took more than a byte
            raise MessageError("it is too far from what is before it")
        if round_ + 1 < len(places):
            left = range(max(round_ + 1, len(places) - KEPT_ABANDONED), len(places))
            self.abandoned.extend((above, places[above].digest) for above in left if places[above].digest)
            places = places[: round_ + 1]
        places.extend([Place()] * (round_ + 1 - len(places)))
        self._name(places, round_, digest, total)
        return places

    def _name(self, places: list[Place], round_: int, digest: bytes, total: int) -> None:
        """The branch goes through this record; unless it is there already it is missing."""
        if places[round_].digest == digest:
            return
        if round_ == 0:
            raise MessageError("it does not begin where the run does")
        if places[round_].digest:
            self.abandoned.append((round_, places[round_].digest))
        places[round_] = Place(digest, total)
