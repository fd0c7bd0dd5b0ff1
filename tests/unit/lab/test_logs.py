"""What a report reads from the logs on the peers' disks: real logs, in the folder of a run that never happened."""

from __future__ import annotations

from pathlib import Path

from fake_runs import evidence, record, strikes

from p2pllm.manifest import RunManifest
from p2pllm.rounds.log import RoundLog
from p2pllm.rounds.record import Body, Claim, Record, sign_vote
from p2pllm.testing import LAYOUT, identity_number, make_manifest, peer_number
from p2pllm_peers.lab.logs import read_log
from p2pllm_peers.lab.reporting.report import report
from p2pllm_peers.lab.reporting.verdict import judge
from p2pllm_peers.lab.scenario import Verdict

NUMBERS = {"a": 1, "b": 2, "c": 3}


def disk(out: Path, peer: str) -> Path:
    return out / "peers" / peer


def opened(out: Path, peer: str, manifest: RunManifest) -> RoundLog:
    """The log of a peer on its disk, for writing, with the manifest beside it."""
    folder = disk(out, peer) / "runs" / manifest.run_id[:16]
    (folder / "volunteer").mkdir(parents=True)
    (folder / "manifest.json").write_bytes(manifest.canonical_bytes())
    return RoundLog(folder / "volunteer" / "log", manifest.run_id, manifest.founder)


def following(log: RoundLog, peers: str, samples: int = 4) -> Record:
    """The record of the next round of a log: `peers` are its members, and voted for it."""
    (round_, digest), total, _ = log.branch
    numbers = [NUMBERS[peer] for peer in peers]
    claims = tuple(Claim.sign(identity_number(n), (round_, digest), samples, 1.0, bytes(32)) for n in numbers)
    body = Body(
        run=bytes.fromhex(RUN.run_id), round=round_ + 1, previous=digest,
        total=total + samples * len(claims), members=claims, aggregate=bytes(32), state=bytes(32),
    )  # fmt: skip
    return Record.of(body, {peer_number(n): sign_vote(identity_number(n), body.digest) for n in numbers})


RUN = make_manifest(LAYOUT, rounds=10**6)


def grown(log: RoundLog, count: int, peers: str) -> list[Record]:
    """The records of so many more rounds, on the disk."""
    records = []
    for _ in range(count):
        records.append(following(log, peers))
        log.append(records[-1])
    return records


def told(records: list[Record], peers: str, begin_s: float) -> list[dict]:
    """The rounds as a peer recorded them, 2 s each."""
    rows = []
    for place, made in enumerate(records):
        round_, digest = made.head
        rows.append(record(round_, begin_s + 2.0 * place, tuple(peers), record_digest=digest.hex()))
    return rows


def heads_of(records: list[Record]) -> list[tuple[int, str]]:
    return [(made.head[0], made.head[1].hex()) for made in records]


def forked(out: Path) -> tuple[dict[str, list[dict]], list[Record], list[Record]]:
    """c goes on alone after round 3 for two rounds and is back in round 7; a and b commit all the time."""
    logs = {peer: opened(out, peer, RUN) for peer in "abc"}
    common = grown(logs["a"], 3, "abc")
    for peer in "bc":
        logs[peer].switch(logs[peer].branch.head, common)
    alone = grown(logs["c"], 2, "c")
    kept = [*grown(logs["a"], 3, "ab"), *grown(logs["a"], 1, "abc")]
    logs["b"].switch(common[-1].head, kept)
    logs["c"].switch(common[-1].head, kept)
    for log in logs.values():
        log.close()
    rows = {peer: told(common, "abc", 2.0) for peer in "abc"}
    for peer in "ab":
        rows[peer] += told(kept[:3], "ab", 8.0)
        rows[peer] += told(kept[3:], "abc", 14.0)
    rows["c"] += told(alone, "c", 8.5)
    return rows, alone, kept


def test_a_log_is_read_as_it_is(tmp_path: Path) -> None:
    _, alone, kept = forked(tmp_path)
    found = read_log(disk(tmp_path, "c"))
    assert found is not None and found.problem == ""
    assert found.head == 7 and [found.chain[made.head[0]] for made in kept] == [made.head[1].hex() for made in kept]
    assert found.missing == () and found.abandoned == tuple(heads_of(alone))
    assert read_log(tmp_path / "peers" / "d") is None


def test_history_is_what_the_logs_say_even_where_nobody_was_seen(tmp_path: Path) -> None:
    """a lost what it recorded, b's records have a hole, and c's own rounds are all that is known of rounds 4 and 5."""
    rows, alone, _ = forked(tmp_path)
    rows["a"], rows["b"] = [], [row for row in rows["b"] if row["round"] not in (4, 5, 6)]
    cut = {"other": ""}
    planned = strikes((7.0, "cut", "c", cut), (12.0, "mend", "c", cut))
    found = report(evidence(tmp_path, rows, **planned))
    assert found["lost"] == [] and found["abandoned"] == [4, 5]
    assert [(row["kind"], row["peers"], row["rounds"]) for row in found["branches"]] == [("fork", ["c"], [4, 5])]
    assert [row["round"] for row in found["rounds"]] == [1, 2, 3, 7], "of those between nobody left a record"
    assert found["logs"]["c"] == {
        "round": 7, "rounds_of_history": 7, "problem": "", "missing": [],
        "abandoned": [list(head) for head in heads_of(alone)],
    }  # fmt: skip
    guessed = report(evidence(tmp_path / "guess", rows, **planned))
    assert guessed["abandoned"] == [], "without logs, what c recorded passes for the history"


def test_a_log_that_is_not_whole_at_the_end_is_a_loss(tmp_path: Path) -> None:
    rows, _, kept = forked(tmp_path)
    (path,) = disk(tmp_path, "b").glob("runs/*/*/log")
    data = path.read_bytes()
    place = data.index(kept[0].pack())
    path.write_bytes(data[: place + 40] + bytes([data[place + 40] ^ 1]) + data[place + 41 :])
    made = evidence(tmp_path, rows, **strikes((7.0, "cut", "c", {"other": ""}), (12.0, "mend", "c", {"other": ""})))
    found = report(made)
    assert found["logs"]["b"]["missing"] == [4] and found["logs"]["a"]["missing"] == []
    (lost,) = (check for check in judge(found, Verdict()) if check.name == "nothing lost")
    assert not lost.passed and lost.measured == "the log on the disk of b is not whole"


def test_a_log_that_cannot_be_read_is_said_to_be_so(tmp_path: Path) -> None:
    forked(tmp_path)
    (manifest,) = disk(tmp_path, "b").glob("runs/*/manifest.json")
    manifest.write_bytes(b"{")
    found = read_log(disk(tmp_path, "b"))
    assert found is not None and found.problem and found.chain == {}
