"""Targets: what peers say about rounds, the records that they give, and the file in which we keep them."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgpack

from fuzzing.promise import check, parts_of, target
from p2pllm.errors import StateError
from p2pllm.rounds.chain import Branch, check_claims, check_links, check_votes, newest_checkpoint, start_of
from p2pllm.rounds.frames import CHECKPOINT, HEAD, MENDED, RECORD, frame
from p2pllm.rounds.index import HeadFrame, Outline
from p2pllm.rounds.log import RoundLog
from p2pllm.rounds.messages import Enrol, EnrolReply, Roster, Status, Vote
from p2pllm.rounds.packing import MAX_ROSTER, Message, MessageError
from p2pllm.rounds.record import (
    MAX_RECORD_BYTES,
    Body,
    Checkpoint,
    Claim,
    Head,
    Record,
    genesis,
    pack_all,
    sign_holding,
    sign_vote,
    unpack_all,
)
from p2pllm.rounds.serving import MAX_PAGE_RECORDS
from p2pllm.rounds.vote import Ballot
from p2pllm.testing import identity_number

RUN = "5a" * 32
FOUNDER = identity_number(0)


def claims_of(head: Head, members: int) -> tuple[Claim, ...]:
    """What so many peers bring to the round after `head`."""
    return tuple(Claim.sign(identity_number(at), head, 10 + at, 2.5, bytes([at]) * 32) for at in range(members))


def following(base: Branch, members: int = 2, salt: int = 0) -> Record:
    """A right record after `base`."""
    claims = claims_of(base.head, members)
    total = base.total + sum(claim.samples for claim in claims)
    body = Body(
        run=bytes.fromhex(RUN),
        round=base.head[0] + 1,
        previous=base.head[1],
        total=total,
        members=claims,
        aggregate=bytes([salt]) * 32,
        state=bytes(32),
    )
    votes = {identity_number(at).peer_id: sign_vote(identity_number(at), body.digest) for at in range(members)}
    return Record.of(body, votes)


def end_of(record: Record) -> Branch:
    """The branch that a record leads to."""
    return Branch(record.head, record.body.total, 0)


def grown(count: int) -> list[Record]:
    """A right log from its beginning."""
    records = list[Record]()
    for salt in range(count):
        records.append(following(end_of(records[-1]) if records else start_of(RUN), salt=salt))
    return records


def taken_by(kinds: list[type[Message]], data: bytes) -> list[Message]:
    """What the data is; every message has one spelling."""
    found = list[Message]()
    for kind in kinds:
        with suppress(MessageError):
            message = kind.unpack(data)
            check(
                message.pack() == data and kind.unpack(message.pack()) == message, f"{kind.__name__} has two spellings"
            )
            found.append(message)
    return found


# -- record ------------------------------------------------------------------------------------------------------------


def _records() -> list[bytes]:
    records = [*grown(3), following(start_of(RUN), MAX_ROSTER)]
    point = Checkpoint.sign(FOUNDER, RUN, records[0].head)
    joined = pack_all([each.pack() for each in records[:3]])
    return [*(each.pack() for each in records), records[0].body.pack(), point.pack(), joined]


@target(_records, max_bytes=2 * MAX_RECORD_BYTES, memory=32 * MAX_RECORD_BYTES)
def record(data: bytes) -> bool:
    """Records, bodies and checkpoints, alone and joined, and what `chain` makes of them.

    Memory: 32 x MAX_RECORD_BYTES, 768 KiB.
    """
    found = taken_by([Record, Body, Checkpoint], data)
    records = [each for each in found if isinstance(each, Record)]
    with suppress(MessageError):
        records += unpack_all(data, MAX_PAGE_RECORDS)
    for each in records:
        _look_at(each)
    with suppress(MessageError):
        check_links(records, start_of(RUN), RUN)
    newest_checkpoint((each for each in found if isinstance(each, Checkpoint)), FOUNDER.peer_id, RUN)
    return bool(found or records)


def _look_at(each: Record) -> None:
    """The index and the record itself must not differ about what it says."""
    body, outline = each.body, Outline.of(each.pack())
    said = (outline.run, outline.round, outline.previous, outline.total, outline.samples, outline.digest)
    check(said == (body.run, body.round, body.previous, body.total, body.samples, body.digest), "two readings")
    check(0 <= body.loss <= 1e6 and len(each.voters) == len(each.votes), "a record that cannot be")
    check(not each.has_majority or bool(set(each.voters) & set(body.peers)), "a majority of nobody")
    with suppress(MessageError):
        check_votes(each)
        check_claims(each.body)


# -- roster and vote ---------------------------------------------------------------------------------------------------


def _rosters() -> list[bytes]:
    head = grown(1)[0].head
    claims = claims_of(head, 3)
    plain: dict[str, Any] = {"round": head[0], "digest": head[1], "nonce": bytes(16), "claims": claims}
    status = Status(round=1, digest=head[1], total=9, anchor=1, phase="vote", samples=3, tokens_per_s=1.5)
    messages = [
        Roster(**plain, proposal=b"", holders=()),
        Roster(
            **plain,
            proposal=bytes(32),
            holders=((0, bytes(64)), (2, sign_holding(identity_number(2), head, bytes(32)))),
        ),
        Roster(**plain | {"claims": claims_of(head, MAX_ROSTER)}, proposal=b"", holders=()),
        Enrol(round=head[0], digest=head[1], claim=claims[0], holding=b"", proof=b""),
        Enrol(round=head[0], digest=head[1], claim=claims[1], holding=bytes(32), proof=bytes(64)),
        EnrolReply(accepted=True),
        status,
    ]
    return [message.pack() for message in messages]


@target(_rosters, max_bytes=Roster.max_bytes + 64, memory=32 * Roster.max_bytes)
def roster(data: bytes) -> bool:
    """Rosters, enrolments, replies to them, and statuses. Memory: 32 x Roster.max_bytes, 512 KiB."""
    found = taken_by([Roster, Enrol, EnrolReply, Status], data)
    for message in found:
        if isinstance(message, Roster):
            check(len(set(message.members)) == len(message.claims), "a member twice")
            check(set(message.holding) <= set(message.members), "a holder that is no member")
            check(message.is_signed in (True, False), "a roster that is neither signed nor not")
        elif isinstance(message, Enrol):
            message.is_signed(message.claim.peer)
        elif isinstance(message, Status):
            check(message.branch.rank > start_of(RUN).rank or message.total == 0, "a branch below that of a newcomer")
    return bool(found)


def _votes() -> list[bytes]:
    body = grown(1)[0].body.digest
    signature = sign_vote(identity_number(1), body)
    votes = [(body, signature), (b"", b""), (body, bytes(64))]
    return [Vote(group=bytes(32), body=voted, signature=signed).pack() for voted, signed in votes]


@target(_votes, max_bytes=Vote.max_bytes + 64, memory=512 * Vote.max_bytes)
def vote(data: bytes) -> bool:
    """Votes, and a ballot that takes them. Memory: 512 x Vote.max_bytes, half of it for msgpack to pack anything."""
    (message,) = taken_by([Vote], data) or (None,)
    if not isinstance(message, Vote):
        return False
    members = tuple(identity_number(at).peer_id for at in range(2))
    ballot = Ballot(members)
    for peer in (*members, identity_number(2).peer_id):
        with suppress(MessageError):
            ballot.take(peer, message)
    check(set(ballot.votes) <= set(members), "a stranger's vote counts")
    check(all(voted in (b"", message.body) for voted in ballot.votes.values()), "a vote for something else")
    return True


# -- log ---------------------------------------------------------------------------------------------------------------


def _logs() -> list[bytes]:
    records = grown(3)
    other = following(end_of(records[0]), 1, salt=9)
    back = HeadFrame(round=1, digest=records[0].head[1], total=records[0].body.total).pack()
    point = Checkpoint.sign(FOUNDER, RUN, records[1].head).pack()
    straight = [[RECORD, each.pack()] for each in records]
    scripts: list[Any] = [
        straight,
        [*straight, [CHECKPOINT, point], [HEAD, back], [RECORD, other.pack()]],
        [straight[0], straight[2], [MENDED, records[1].pack()]],
    ]
    raw = b"".join(frame(kind, payload) for kind, payload in scripts[1])
    return [*map(msgpack.packb, scripts), raw, raw[:-7], raw[:100] + raw[101:]]


@target(_logs, max_bytes=8 * 1024, memory=4 << 20)
def log(data: bytes) -> bool:
    """A log opens any file, shows nothing that it cannot have, and goes on from there.

    An input is msgpack [[kind, payload], ...] of frames whose checks are right, or else the bytes of the file.
    Memory: 4 MiB, of which each opening's buffer takes 1.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log"
        path.write_bytes(_file_of(data))
        try:
            log = RoundLog(path, RUN, FOUNDER.peer_id)
        except StateError:
            return False
        head, total = log.branch.head, log.branch.total
        shown = _shown(log)
        rounds = dict(enumerate(log.records(), 1))
        check(all(each is None or log.digest(at) == each.body.digest for at, each in rounds.items()), "another record")
        check(all(rounds[at] is None for at, _ in log.missing()), "missing, and there")
        if 0 <= total < 10**18 - 100:
            log.append(following(Branch(head, total, 0)))
            check(log.branch.head[0] == head[0] + 1, "no longer than before")
            log.rewind(head)
        check(log.branch.head == head, "the branch has moved")
        log.close()
        again = RoundLog(path, RUN, FOUNDER.peer_id, read_only=True)
        check(_shown(again) == shown, "reopened it shows something else")
        again.close()
        return any(rounds.values())


def _file_of(data: bytes) -> bytes:
    try:
        return b"".join(frame(kind, payload) for kind, payload in parts_of(data))
    except (ValueError, TypeError):  # anything that is no list of frames is a file as it is
        return data


def _shown(log: RoundLog) -> Any:
    log.abandoned()
    log.sample()
    log.packed_after(genesis(RUN), 1 << 20)
    return log.branch, list(log.records()), log.missing(), log.checkpoints
