"""An audit passes what a swarm committed, and names the first thing that is wrong with it, whatever that is."""

from __future__ import annotations

import random
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pytest
from blake3 import blake3
from log_samples import after, filled, grown

from p2pllm.errors import StateError
from p2pllm.identity import Identity, peer_id_of
from p2pllm.manifest import RunManifest
from p2pllm.rounds import credit
from p2pllm.rounds.audit import Report, Step, audit
from p2pllm.rounds.chain import Branch
from p2pllm.rounds.credit import Credit, Ledger, tally
from p2pllm.rounds.disk import Disk
from p2pllm.rounds.log import MAGIC, RoundLog
from p2pllm.rounds.record import Body, Checkpoint, Record, genesis, sign_vote
from p2pllm.state import AdamW, SharedState
from p2pllm.testing import LAYOUT, MemorySwarm, identity_number, make_state, peer_number, run

ROUNDS = 6
RECORD, CHECKPOINT = 1, 3  # kinds of frames, see `log`
T = TypeVar("T")


class Committed(NamedTuple):
    """What a swarm of three committed in ROUNDS rounds."""

    manifest: RunManifest
    records: list[Record]
    aggregates: list[bytes]


@pytest.fixture(scope="module")
def committed() -> Committed:
    async def train() -> Committed:
        swarm = MemorySwarm(rounds=ROUNDS)
        swarm.add(3)
        await swarm.start()
        await swarm.finish()
        disk = swarm.peers[1].disk
        records = [record for record in disk.log.records() if record]
        aggregates = [bytes(disk.aggregates.get(record.body.aggregate) or b"") for record in records]
        return Committed(swarm.manifest, records, aggregates)

    found = run(train())
    assert len(found.records) == ROUNDS and all(found.aggregates)
    return found


class Files:
    """The files of a peer, as a daemon would leave them."""

    def __init__(self, folder: Path, committed: Committed, snapshots: set[int]) -> None:
        self.folder, self.committed, self.manifest = folder, committed, committed.manifest
        disk = Disk(folder, self.manifest, LAYOUT)
        optimizer = AdamW(self.manifest.optimizer, ROUNDS, LAYOUT)
        state = make_state()
        for round_, record in enumerate([None, *committed.records]):
            if record is not None:
                disk.log.append(record)
                disk.aggregates.put(record.body.aggregate, committed.aggregates[round_ - 1])
                disk.replay(state, optimizer, round_)
            if round_ in snapshots:
                disk.snapshots.save(state, disk.head_at(round_)[1])
        disk.close()

    @property
    def log(self) -> Path:
        return self.folder / "log"

    def aggregate(self, round_: int) -> Path:
        return self.folder / "aggregates" / self.committed.records[round_ - 1].body.aggregate.hex()

    def snapshot(self, round_: int) -> Path:
        (found,) = (self.folder / "state").glob(f"*round-{round_:08d}-*")
        return found

    def state(self, round_: int) -> SharedState:
        snapshots = Disk(self.folder, self.manifest, LAYOUT, read_only=True).snapshots
        return next(snapshots.load(found) for found in snapshots.all() if found.round == round_)

    def audit(self, manifest: RunManifest | None = None) -> Report:
        return end_of(audit(self.folder, manifest or self.manifest))

    def rewrite(self, *records: Record) -> None:
        """A log of the first records and these, which RoundLog might refuse."""
        kept = self.committed.records[: ROUNDS - len(records)]
        self.log.write_bytes(b"".join(frame(RECORD, record.pack()) for record in [*kept, *records]))


def frame(kind: int, payload: bytes) -> bytes:
    checked = bytes([kind]) + len(payload).to_bytes(4, "big") + payload
    return MAGIC + checked + blake3(checked).digest(16)


def end_of(steps: Generator[Step, None, T]) -> T:
    while True:
        try:
            step = next(steps)
        except StopIteration as end:
            found: T = end.value
            return found
        assert 0 <= step.done <= step.of, step


def flip(path: Path, at: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


def forged(body: Body, voters: tuple[int, ...] = (0, 1, 2), **fields: Any) -> Record:
    """A body with other fields, for which all its members voted again."""
    changed = Body.model_validate({**{name: getattr(body, name) for name in type(body).model_fields}, **fields})
    signers = [identity_number(number) for number in voters]
    return Record.of(changed, {signer.peer_id: sign_vote(signer, changed.digest) for signer in signers})


@pytest.fixture
def files(tmp_path: Path, committed: Committed) -> Files:
    return Files(tmp_path, committed, {0, 1, 4})


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# -- what is right ---------------------------------------------------------------------------------------------------


def test_all_right(files: Files, committed: Committed) -> None:
    before = contents(files.folder)
    report = files.audit()
    assert report.head == committed.records[-1].head
    assert report.samples == committed.records[-1].body.total > 0
    assert (report.records, report.replayed, report.first_state) == (ROUNDS, ROUNDS, 0)
    assert (report.claims, report.by_minority) == (sum(len(each.body.members) for each in committed.records), 0)
    assert report.votes == sum(len(each.votes) for each in committed.records) > ROUNDS
    assert (report.snapshots, report.aggregates, report.checkpoints) == (3, ROUNDS, 0)
    assert len(report.unchecked) == 1 and "mean of the members' updates" in report.unchecked[0]
    assert contents(files.folder) == before


def test_files_of_a_peer_that_has_no_round_yet(tmp_path: Path, committed: Committed) -> None:
    files = Files(tmp_path, committed._replace(records=[], aggregates=[]), {0})
    report = files.audit()
    assert (report.head, report.records, report.snapshots) == (genesis(files.manifest.run_id), 0, 1)
    assert report.unchecked == []


def test_without_early_snapshots_it_says_what_it_could_not_check(tmp_path: Path, committed: Committed) -> None:
    report = Files(tmp_path, committed, {4}).audit()
    assert (report.records, report.first_state, report.replayed, report.aggregates) == (ROUNDS, 4, 2, ROUNDS)
    assert any("before round 4" in text for text in report.unchecked)


def test_without_any_snapshot_no_state_is_checked(tmp_path: Path, committed: Committed) -> None:
    report = Files(tmp_path, committed, set()).audit()
    assert (report.records, report.snapshots, report.first_state, report.replayed) == (ROUNDS, 0, None, 0)
    assert any("no snapshot" in text for text in report.unchecked)


def test_a_gap_between_two_snapshots(files: Files) -> None:
    files.aggregate(3).unlink()
    report = files.audit()
    assert (report.snapshots, report.replayed, report.aggregates) == (3, ROUNDS - 2, ROUNDS - 1)
    assert any("from round 3 to 3" in text for text in report.unchecked)


def test_votes_of_half_a_roster_are_counted(files: Files, committed: Committed) -> None:
    body = committed.records[-1].body
    files.rewrite(Record.of(body, {peer_number(0): sign_vote(identity_number(0), body.digest)}))
    report = files.audit()
    assert (report.by_minority, report.votes) == (1, sum(len(each.votes) for each in committed.records[:-1]) + 1)


def test_damage_that_was_mended_is_said_and_no_fault(files: Files, committed: Committed) -> None:
    flip(files.log, files.log.read_bytes().index(committed.records[2].pack()) + 50)
    log = RoundLog(files.log, files.manifest.run_id, files.manifest.founder)
    assert log.mend(committed.records[2])
    log.close()
    assert any("damaged bytes" in text for text in files.audit().unchecked)


def test_abandoned_rounds_and_their_states_are_said(files: Files, committed: Committed) -> None:
    log = RoundLog(files.log, files.manifest.run_id, files.manifest.founder)
    log.rewind(committed.records[2].head)
    log.close()
    report = files.audit()
    assert (report.records, report.snapshots, report.aggregates) == (3, 2, ROUNDS)
    assert any("branches that were left: 3" in text for text in report.unchecked)
    assert any(text.startswith("saved states") and text.endswith(": 1") for text in report.unchecked)


def test_checkpoints(files: Files, committed: Committed) -> None:
    log = RoundLog(files.log, files.manifest.run_id, files.manifest.founder)
    for head in (committed.records[2].head, (ROUNDS + 3, bytes(32))):
        assert log.add_checkpoint(Checkpoint.sign(identity_number(0), files.manifest.run_id, head))
    log.close()
    report = files.audit()
    assert report.checkpoints == 2 and any("checkpoints of rounds beyond 6" in text for text in report.unchecked)


def audit_while(files: Files, act: Callable[[], None]) -> Report:
    """What an audit finds if the daemon does something after its snapshots were listed."""
    steps = audit(files.folder, files.manifest)
    while next(steps).what != "rounds to replay":
        pass
    act()
    return end_of(steps)


def test_a_daemon_drops_a_snapshot_meanwhile(files: Files) -> None:
    report = audit_while(files, files.snapshot(0).unlink)
    assert (report.snapshots, report.first_state, report.replayed) == (2, 1, ROUNDS - 1)


def test_a_daemon_goes_on_meanwhile(files: Files) -> None:
    def go_on() -> None:
        disk = Disk(files.folder, files.manifest, LAYOUT)
        disk.snapshots.save(make_state(ROUNDS + 2), bytes(32))
        disk.close()
        files.aggregate(6).unlink()

    report = audit_while(files, go_on)
    assert report.replayed == ROUNDS - 1
    assert any("after round 5" in text and "running peer" in text for text in report.unchecked)


# -- what is wrong ---------------------------------------------------------------------------------------------------


def flip_record(files: Files, round_: int) -> None:
    packed = files.committed.records[round_ - 1].pack()
    flip(files.log, files.log.read_bytes().index(packed) + len(packed) // 2)


def lose_the_end(files: Files) -> None:
    files.log.write_bytes(files.log.read_bytes()[:-1])


def false_claim(files: Files) -> None:
    body = files.committed.records[-1].body
    first, *others = body.members
    more = first.model_copy(update={"samples": first.samples + 1})
    files.rewrite(forged(body, members=(more, *others), total=body.total + 1))


def false_vote(files: Files) -> None:
    body = files.committed.records[-1].body
    votes = {peer_number(0): sign_vote(identity_number(0), body.digest), peer_number(1): bytes(64)}
    files.rewrite(Record.of(body, votes))


def vote_of_a_stranger(files: Files) -> None:
    files.rewrite(forged(files.committed.records[-1].body, voters=(7,)))


def false_total(files: Files) -> None:
    body = files.committed.records[-1].body
    files.rewrite(forged(body, total=body.total + 1))


def false_link(files: Files) -> None:
    *_, before, last = files.committed.records
    files.rewrite(forged(before.body, aggregate=bytes(32)), last)


def false_state(files: Files) -> None:
    files.rewrite(forged(files.committed.records[-1].body, state=bytes(32)))


def add_checkpoint(files: Files, signer: Identity, run_id: str = "") -> None:
    point = Checkpoint.sign(signer, run_id or files.manifest.run_id, files.committed.records[2].head)
    files.log.write_bytes(files.log.read_bytes() + frame(CHECKPOINT, point.pack()))


def checkpoint_of_another_branch(files: Files) -> None:
    log = RoundLog(files.log, files.manifest.run_id, files.manifest.founder)
    assert log.add_checkpoint(Checkpoint.sign(identity_number(0), files.manifest.run_id, (3, bytes(32))))
    log.close()


def save_another(files: Files, state: SharedState, record: bytes) -> None:
    """A snapshot in the place of the one of its round."""
    files.snapshot(state.round).unlink()
    disk = Disk(files.folder, files.manifest, LAYOUT)
    disk.snapshots.save(state, record)
    disk.close()


def leave_an_unknown_aggregate(files: Files) -> None:
    (files.folder / "aggregates" / ("ab" * 32)).write_bytes(b"something")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda files: flip_record(files, 3), ["Record 3 in", "/log", "damaged or missing"]),
        (lambda files: flip_record(files, ROUNDS), ["/log", "no whole record", "behind round 5"]),
        (lose_the_end, ["/log", "no whole record", "behind round 5"]),
        (false_claim, ["/log", "record 6 has a claim that", "did not sign"]),
        (false_vote, ["/log", f"record 6 has a vote that {peer_number(1)[-8:]} did not sign"]),
        (vote_of_a_stranger, ["/log", "no member of record 6 voted"]),
        (false_total, ["/log", "record 6 does not add up"]),
        (false_link, ["Record 5", "/log"]),
        (false_state, ["round 6", "another state than its record names"]),
        (lambda files: flip(files.aggregate(5), 9), ["/aggregates/", "of round 5", "damaged"]),
        (lambda files: flip(files.aggregate(2), 9), ["/aggregates/", "of round 2", "damaged"]),
        (lambda files: files.aggregate(5).unlink(), ["aggregate of round 5 is not in", "lead to round 4 only, not 6"]),
        (leave_an_unknown_aggregate, ["/aggregates/abab", "damaged"]),
        (lambda files: flip(files.snapshot(4), -9), ["round 4", "/state", "damaged"]),
        (lambda files: flip(files.snapshot(0), -9), ["round 0", "/state", "damaged"]),
        (lambda files: flip(files.snapshot(4), 40), ["/state/state-", "round-00000004", "damaged"]),
        (lambda files: save_another(files, files.state(4), bytes(32)), ["round 4 led to", "/state/state-"]),
        (
            lambda files: save_another(files, make_state(4), files.committed.records[3].body.digest),
            ["round 4 led to", "/state/state-"],
        ),
        (
            lambda files: save_another(files, make_state(seed=1), genesis(files.manifest.run_id)[1]),
            ["round 0 led to", "/state/state-"],
        ),
        (lambda files: add_checkpoint(files, identity_number(1)), ["checkpoint of round 3", "/log", "organiser"]),
        (
            lambda files: add_checkpoint(files, identity_number(0), "5a" * 32),
            ["checkpoint of round 3", "/log", "organiser"],
        ),
        (checkpoint_of_another_branch, ["checkpoint of round 3", "/log", "not on the run's branch"]),
    ],
)
def test_what_is_wrong_is_named(files: Files, spoil: Callable[[Files], None], words: list[str]) -> None:
    files.audit()
    spoil(files)
    with pytest.raises(StateError) as caught:
        files.audit()
    sentence = str(caught.value)
    assert sentence.endswith(".") and "\n" not in sentence
    for word in words:
        assert word in sentence, sentence


def test_manifest_of_another_run(files: Files) -> None:
    with pytest.raises(StateError, match="belongs to another run"):
        files.audit(files.manifest.model_copy(update={"seed": 1}))


def test_manifest_of_another_run_before_the_first_round(tmp_path: Path, committed: Committed) -> None:
    """Then there is no record that could tell, but a saved state."""
    files = Files(tmp_path, committed._replace(records=[], aggregates=[]), {0})
    with pytest.raises(StateError, match="another run"):
        files.audit(files.manifest.model_copy(update={"seed": 1}))


def test_no_flipped_bit_goes_unnoticed(files: Files) -> None:
    chance = random.Random(1)
    for path in sorted(path for path in files.folder.rglob("*") if path.is_file()):
        size = path.stat().st_size
        for at in [0, size - 1, *(chance.randrange(size) for _ in range(10))]:
            bit = chance.randrange(8)
            flip(path, at, bit)
            with pytest.raises(StateError):
                pytest.fail(f"bit {bit} of byte {at} of {path}: {files.audit()}")
            flip(path, at, bit)
    files.audit()


# -- credit ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("check", [True, False])
def test_tally(committed: Committed, check: bool) -> None:
    log = RoundLog(None, committed.manifest.run_id, committed.manifest.founder)
    for record in committed.records:
        log.append(record)
    found = end_of(tally(log, check=check))
    expected = dict[str, Credit]()
    for record in committed.records:
        for claim in record.body.members:
            before = expected.get(claim.peer, Credit())
            expected[claim.peer] = Credit(before.samples + claim.samples, before.rounds + 1, record.body.round)
    assert found.credits == expected and len(expected) == 3
    assert list(found.credits) == sorted(expected, key=lambda peer: (-expected[peer].samples, peer))
    assert (found.samples, found.rounds, found.missing) == (committed.records[-1].body.total, ROUNDS, 0)


def test_tally_of_an_empty_log(committed: Committed) -> None:
    log = RoundLog(None, committed.manifest.run_id, committed.manifest.founder)
    assert end_of(tally(log)) == ({}, 0, 0, 0)


def test_tally_names_the_round_and_peer_of_a_false_claim(files: Files) -> None:
    false_claim(files)
    log = RoundLog(files.log, files.manifest.run_id, files.manifest.founder, read_only=True)
    liar = files.committed.records[-1].body.members[0].peer
    with pytest.raises(StateError, match=f"record 6 has a claim that {liar[-8:]} did not sign"):
        end_of(tally(log))
    log.close()


def test_tally_counts_a_damaged_round_for_nobody(files: Files) -> None:
    flip_record(files, 2)
    log = RoundLog(files.log, files.manifest.run_id, files.manifest.founder, read_only=True)
    found = end_of(tally(log))
    log.close()
    assert (found.rounds, found.missing) == (ROUNDS - 1, 1)
    assert found.samples == files.committed.records[-1].body.total - files.committed.records[1].body.samples


def test_a_ledger_grows_with_its_log_and_follows_it_to_another_branch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(credit, "COUNTED_AT_ONCE", 2)
    log = filled(None, [0, 0, 0, 0, 9])
    ledger, other = Ledger(log, peer_id_of(bytes(32))), Ledger(log, "nobody")
    assert [ledger.update(), ledger.update(), ledger.update()] == [False, False, True]
    assert ledger.samples == ledger.of_all == log.branch.total == 14
    log.append(after(log.branch, 3))
    assert ledger.update() and ledger.samples == log.branch.total
    third = log.digest(3)
    assert third is not None
    log.switch((3, third), grown(Branch((3, third), 3, 0), [40, 50]))
    while not ledger.update():
        pass
    assert ledger.samples == log.branch.total == 3 + 41 + 51
    while not other.update():
        pass
    assert other.samples == 0 and other.of_all == log.branch.total
    counted = ledger.samples
    ledger.close()
    log.close()
    assert ledger.update() and ledger.samples == counted, "who asks while a peer leaves reads no closed log"
