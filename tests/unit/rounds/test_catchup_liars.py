"""Who claims a better branch and cannot show it changes nothing: every way to lie about records, states and chunks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from histories import EVERY, Node, changed, claims_of, commit, frozen, make_nodes, record_of, saved, train

from p2pllm.network.bulk import Blob
from p2pllm.rounds import catchup
from p2pllm.rounds.chain import Branch
from p2pllm.rounds.record import Body, Checkpoint, Head, Record, pack_all, sign_vote, unpack_all
from p2pllm.rounds.serving import MAX_PAGE_RECORDS
from p2pllm.testing import LAYOUT, MemoryNetwork, identity_number, peer_number, virtual

LIAR = 1

Lie = Callable[[Blob, list[Record]], Blob | None]


def says(node: Node, what: str, lie: Callable[[Blob], Blob | None]) -> None:
    """The node answers one kind of request with a lie, and all others as it should."""

    async def answer(request: dict[str, Any]) -> Blob | None:
        blob = await node.keeper.serve(request)
        return lie(blob) if blob is not None and request["what"] == what else blob

    node.answer = answer


def records_in(blob: Blob) -> list[Record]:
    return unpack_all(bytes(blob.buffers[0]), 10**6)


def page(blob: Blob, records: list[Record], **header: Any) -> Blob:
    return Blob({**blob.header, **header}, [pack_all([record.pack() for record in records])])


def made_up(base: Head, total: int, samples: int = 10**9, state: bytes = bytes(32)) -> Record:
    """A right record of the liar alone, whose aggregate nobody has."""
    body = Body(
        run=bytes.fromhex(RUN_ID),
        round=base[0] + 1,
        previous=base[1],
        total=total + samples,
        members=claims_of(base, LIAR, samples=samples),
        aggregate=bytes(32),
        state=state,
    )
    return record_of(body, LIAR)


RUN_ID = Node(MemoryNetwork(), 0, snapshot_every=EVERY).disk.run_id


def first_with(records: list[Record], **fields: Any) -> list[Record]:
    """The first record with another body, signed by the liar as it is."""
    return [record_of(changed(records[0].body, **fields), LIAR)]


def forged(record: Record) -> Record:
    """With a vote of somebody who never gave one."""
    right = dict(zip(record.voters, (vote for _, vote in record.votes), strict=True))
    return Record.of(record.body, right | {peer_number(0): sign_vote(identity_number(LIAR), record.body.digest)})


LIES: dict[str, Lie] = {
    "no log": lambda blob, records: None,
    "no base": lambda blob, records: Blob({}, blob.buffers),
    "strange base": lambda blob, records: page(blob, records, base=["x", 7]),
    "base that is not ours": lambda blob, records: page(blob, records, base=[2, bytes(32)]),
    "no records": lambda blob, records: page(blob, []),
    "nonsense": lambda blob, records: Blob(blob.header, [b"\xff" * 1000]),
    "half a record": lambda blob, records: Blob(blob.header, [bytes(blob.buffers[0])[:-1]]),
    "first one missing": lambda blob, records: page(blob, records[1:]),
    "middle one missing": lambda blob, records: page(blob, [*records[:1], *records[2:]]),
    "turned": lambda blob, records: page(blob, records[::-1]),
    "another run": lambda blob, records: page(blob, first_with(records, run=bytes(32))),
    "another round": lambda blob, records: page(blob, first_with(records, round=9)),
    "more than adds up": lambda blob, records: page(blob, first_with(records, total=10**18)),
    "forged vote": lambda blob, records: page(blob, [*records[:-1], forged(records[-1])]),
    "vote for another body": lambda blob, records: page(
        blob, [Record(body=changed(records[0].body, state=bytes(32)), votes=records[0].votes)]
    ),
    "no member voted": lambda blob, records: page(blob, [record_of(records[0].body, 7)]),
    "fewer samples than ours": lambda blob, records: page(blob, records[:1] if len(records) == 3 else []),
    "strange checkpoints": lambda blob, records: page(blob, records, checkpoints=[b"nonsense"]),
}


@pytest.mark.parametrize("lie", LIES)
@virtual
async def test_a_log_that_cannot_be_right_changes_nothing_and_is_remembered(lie: str) -> None:
    honest, liar, other = await make_nodes(3)
    await train(honest, liar, other, rounds=2)
    await train(honest, other, rounds=2, samples=3)
    await train(liar, rounds=3, samples=5)
    says(liar, "log", lambda blob: LIES[lie](blob, records_in(blob)))
    before = frozen(honest)
    claimed = Branch((9, b"y" * 32), 10**9, 0)
    assert not await honest.keeper.follow(claimed, [liar.id])
    assert frozen(honest) == before
    assert honest.keeper.refuted == {liar.id}
    await commit(honest, other)


@virtual
async def test_the_same_log_without_a_lie_is_followed() -> None:
    """Else the test above would show nothing."""
    honest, liar = await make_nodes(2)
    await train(honest, liar, rounds=2)
    await train(honest, rounds=2, samples=3)
    await train(liar, rounds=3, samples=5)
    says(liar, "log", lambda blob: page(blob, records_in(blob)))
    assert await honest.follow(liar)
    assert frozen(honest) == frozen(liar)


@virtual
async def test_checkpoints_that_the_organiser_did_not_sign_move_nobody() -> None:
    honest, liar = await make_nodes(2)
    await train(honest, rounds=3, samples=9)
    await train(liar, rounds=2, samples=1)
    record = liar.disk.log.record(2)
    assert record is not None
    fake = Checkpoint.sign(identity_number(LIAR), RUN_ID, record.head).pack()
    says(liar, "log", lambda blob: page(blob, records_in(blob), checkpoints=[fake]))
    before = frozen(honest)
    assert not await honest.keeper.follow(liar.keeper.branch._replace(anchor=2), [liar.id])
    assert frozen(honest) == before
    assert honest.keeper.refuted == {liar.id}


@virtual
async def test_pages_without_end_are_broken_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each record is right, of the liar's key alone, and leads on and on."""
    monkeypatch.setattr(catchup, "MAX_TAKEN", 25)
    honest, liar = await make_nodes(2)
    await train(honest, liar, rounds=2)
    at = [(liar.head, liar.keeper.branch.total)]

    def another(blob: Blob) -> Blob:
        base, total = at[-1]
        records = []
        for _ in range(4):
            records.append(made_up(base, total))
            base, total = records[-1].head, records[-1].body.total
        at.append((base, total))
        return Blob({**blob.header, "base": list(at[-2][0])}, [pack_all([record.pack() for record in records])])

    says(liar, "log", another)
    before = frozen(honest)
    assert not await honest.keeper.follow(Branch((10**6, b"y" * 32), 10**17, 0), [liar.id])
    assert frozen(honest) == before
    assert liar.what.count("log") == 7


@virtual
async def test_a_page_that_comes_again_and_again_is_refuted() -> None:
    honest, liar = await make_nodes(2)
    await train(liar, rounds=3)
    packed: list[Blob] = []

    def same(blob: Blob) -> Blob:
        packed.append(blob)
        return packed[0]

    says(liar, "log", same)
    assert not await honest.keeper.follow(Branch((100, b"y" * 32), 10**6, 0), [liar.id])
    assert honest.keeper.refuted == {liar.id}
    assert len(packed) == 2


@virtual
async def test_a_page_that_is_too_long_is_not_read() -> None:
    honest, liar = await make_nodes(2)
    await train(liar, rounds=1)
    says(liar, "log", lambda blob: page(blob, records_in(blob) * MAX_PAGE_RECORDS))
    before = frozen(honest)
    assert not await honest.follow(liar)
    assert frozen(honest) == before


@pytest.mark.parametrize("voters", [(LIAR,), (LIAR, 7)])
@virtual
async def test_a_state_that_a_record_does_not_lead_to_is_refused(voters: tuple[int, ...]) -> None:
    """A key costs nothing: two votes for it may be of one liar, and we have trained with others, so it is not us."""
    honest, liar, good = await make_nodes(3)
    await train(honest, liar, good, rounds=2)
    await train(good, rounds=2)
    claims = claims_of(liar.head, *voters, samples=10**6)
    body = await liar.keeper.propose(claims, np.ones(LAYOUT.size, np.float32))
    wrong = record_of(changed(body, state=bytes(32)), *voters)
    says(liar, "log", lambda blob: page(blob, [wrong]))
    before = frozen(honest)
    assert not await honest.keeper.follow(Branch(wrong.head, wrong.body.total, 0), [liar.id])
    assert frozen(honest) == before
    assert honest.keeper.refuted == {liar.id}
    assert await honest.follow(good)
    assert frozen(honest) == frozen(good)


# -- snapshots and chunks --------------------------------------------------------------------------------------------


async def trained_with_snapshot(*nodes: Node) -> None:
    await train(*nodes, rounds=EVERY + 1)
    await saved(*nodes)


PLANS: dict[str, Callable[[Blob], Blob | None]] = {
    "nothing": lambda blob: None,
    "nonsense": lambda blob: Blob({}, [b"\xff" * 100]),
    "short": lambda blob: Blob({}, [bytes(blob.buffers[0])[:-1]]),
    "of another state": lambda blob: Blob({}, [bytes(blob.buffers[0])[:-32] + bytes(32)]),
}


@pytest.mark.parametrize("lie", PLANS)
@virtual
async def test_a_plan_that_does_not_fit_is_had_from_another_one(lie: str) -> None:
    fresh, liar, good = await make_nodes(3)
    await trained_with_snapshot(liar, good)
    says(liar, "plan", PLANS[lie])
    assert await fresh.follow(liar, good)
    assert frozen(fresh) == frozen(good)
    assert good.id not in fresh.keeper.refuted


@virtual
async def test_nobody_takes_wrong_chunks_from_the_only_one_who_has_them() -> None:
    fresh, liar = await make_nodes(2)
    await trained_with_snapshot(liar)
    says(liar, "chunk", lambda blob: Blob({}, [bytes(len(bytes(blob.buffers[0])))]))
    before = frozen(fresh)
    assert not await fresh.follow(liar)
    assert frozen(fresh) == before
    assert fresh.keeper.refuted == {liar.id}


OFFERS: dict[str, Any] = {
    "none": None,
    "no list": 7,
    "strange": [[1], "x", [b"", b"", b""], [9, bytes(32), bytes(32)], [True, None, {}]],
    "many": [[number, bytes(32), bytes(32)] for number in range(1000)],
}


@pytest.mark.parametrize("lie", OFFERS)
@virtual
async def test_snapshots_that_the_log_does_not_name_are_not_asked_for(lie: str) -> None:
    fresh, liar, good = await make_nodes(3)
    await trained_with_snapshot(liar, good)
    says(liar, "snapshots", lambda blob: Blob({"snapshots": OFFERS[lie]}))
    assert await fresh.follow(liar, good)
    assert frozen(fresh) == frozen(good)
    assert "chunk" not in liar.what and "chunk" in good.what


@pytest.mark.parametrize("lie", ["no plan", "wrong plan", "wrong chunks"])
@virtual
async def test_who_alone_offers_a_newer_snapshot_and_gives_none_keeps_nobody_out(lie: str) -> None:
    fresh, liar, good = await make_nodes(3)
    await trained_with_snapshot(liar, good)
    await train(liar, good, rounds=1)
    newest = liar.disk.log.record(EVERY + 2)
    assert newest is not None
    offer = [newest.body.round, newest.body.digest, newest.body.state]

    async def answer(request: dict[str, Any]) -> Blob | None:
        match request["what"]:
            case "snapshots":
                return Blob({"snapshots": [offer]})
            case "plan":
                return None if lie == "no plan" else Blob({}, [b"x"]) if lie == "wrong plan" else await plan()
            case "chunk":
                return Blob({}, [b"x"])
        return await liar.keeper.serve(request)

    async def plan() -> Blob:
        saved = liar.disk.snapshots.save(liar.keeper.state, newest.body.digest)
        return Blob({}, [liar.disk.snapshots.plan(saved).pack()])

    liar.answer = answer
    assert await fresh.follow(good, liar)
    assert frozen(fresh) == frozen(good)
    assert good.id not in fresh.keeper.refuted
