"""rounds, credits, verify, peers, checkpoint: what they show of a real log, and what they refuse."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from p2pllm.network.saved import save_peers
from p2pllm.rounds.audit import Step
from p2pllm.rounds.disk import Disk
from p2pllm.rounds.log import RoundLog
from p2pllm.rounds.record import Checkpoint, Record, sign_vote
from p2pllm.testing import LAYOUT, MemorySwarm, identity_number, make_state, peer_number, run
from p2pllm_cli import log_view
from p2pllm_peers.control import ControlServer
from p2pllm_peers.folders import SIGNING_DOMAIN, PeerFolder, RunFolder, write_whole

ROUNDS = 6
MISSED = 4  # a round that the peer caught up with: it measured nothing there


@pytest.fixture(scope="module")
def swarm() -> MemorySwarm:
    async def train() -> MemorySwarm:
        swarm = MemorySwarm(rounds=ROUNDS)
        swarm.add(3)
        await swarm.start()
        await swarm.finish()
        return swarm

    return run(train())


@pytest.fixture
def founder(peer_env: Any, swarm: MemorySwarm) -> PeerFolder:
    """Peer 0 of the swarm on a disk, as a daemon that has ended leaves it."""
    peer = make_peer(peer_env.home, swarm, "founder", 0)
    save_peers(peer.path / "peers.json", {peer_number(9): ["/ip4/127.0.0.1/tcp/4001"]})
    return peer


def make_peer(home: Path, swarm: MemorySwarm, name: str, number: int) -> PeerFolder:
    manifest, source = swarm.manifest, swarm.peers[number]
    run_folder = RunFolder(home, manifest.run_id)
    signature = identity_number(0).sign(SIGNING_DOMAIN, manifest.canonical_bytes())
    run_folder.save(manifest, signature, None)
    peer = run_folder.peer(name)
    os.close(peer.lock())
    seed = (number + 1).to_bytes(32, "big")
    peer.key.parent.mkdir(exist_ok=True)
    write_whole(peer.key, b"\x08\x01\x12\x40" + seed + identity_number(number).public_key)  # libp2p's form
    peer.key.chmod(0o600)
    disk = Disk(peer.path, manifest, LAYOUT)
    disk.snapshots.save(make_state(), disk.head_at(0)[1])
    for record in source.disk.log.records():
        assert record is not None
        body = record.body
        if body.round == ROUNDS:  # here only one of three voted
            record = Record.of(body, {peer_number(0): sign_vote(identity_number(0), body.digest)})
        disk.log.append(record)
        disk.aggregates.put(body.aggregate, source.disk.aggregates.get(body.aggregate) or b"")
    disk.close()
    lines = [record.to_json() for record in source.records if record.round != MISSED]
    half = len(lines) // 2  # the older ones have been put away
    (peer.path / "rounds.jsonl.1").write_text("\n".join([lines[0][:50], *lines[:half], ""]))
    (peer.path / "rounds.jsonl").write_text("\n".join([*lines[half:], '{"record_digest":"' + "5a" * 32]))
    return peer


def opened(peer: PeerFolder, swarm: MemorySwarm) -> RoundLog:
    return RoundLog(peer.path / "log", swarm.manifest.run_id, swarm.manifest.founder)


def record_of(log: RoundLog, round_: int) -> Record:
    record = log.record(round_)
    assert record is not None
    return record


def lines_of(env: Any, *arguments: object) -> list[str]:
    result = env.p2pllm_here(*arguments)
    assert (result.returncode, result.stderr) == (0, ""), result.stderr
    assert "\x1b" not in result.stdout
    return list(result.stdout.splitlines())


def objects_of(env: Any, *arguments: object) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lines_of(env, *arguments, "--json")]


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """Makes the views think that they write to a terminal of 80 columns; gives what they wrote there."""
    file = io.StringIO()
    console = Console(file=file, width=80, force_terminal=True, color_system=None, markup=False)
    monkeypatch.setattr(log_view, "console", console)

    def written() -> list[str]:
        shown = re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", file.getvalue().replace("\r", "\n"))  # what moves the cursor
        lines = [line.rstrip() for line in shown.splitlines()]
        assert lines and max(map(len, lines)) <= 80, shown
        assert "…" not in file.getvalue()
        return lines

    return written


@contextmanager
def daemon(peer: PeerFolder, **replies: dict[str, Any]) -> Iterator[list[dict[str, Any]]]:
    """A control socket that gives these replies, behind the lock of a living daemon; yields what it is asked."""
    asked, ready, loop = list[dict[str, Any]](), threading.Event(), asyncio.new_event_loop()
    socket = Path(os.environ.get("TMPDIR", "/tmp")) / f"p2pllm-test-{os.getpid()}.sock"  # noqa: S108 - a short path

    def answering(name: str) -> Callable[[dict[str, Any]], Any]:
        async def answer(request: dict[str, Any]) -> dict[str, Any]:
            asked.append(request)
            return replies[name]

        return answer

    server = ControlServer(socket, {name: answering(name) for name in replies})

    def serve() -> None:
        loop.run_until_complete(server.start())
        ready.set()
        loop.run_forever()
        loop.run_until_complete(server.close())

    thread = threading.Thread(target=serve)
    handle = peer.lock()
    thread.start()
    assert ready.wait(10)
    write_whole(peer.path / "daemon.json", json.dumps({"socket": str(socket), "pid": 1}).encode())
    try:
        yield asked
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()
        os.close(handle)
        (peer.path / "daemon.json").unlink()


# -- rounds ----------------------------------------------------------------------------------------------------------


def test_rounds_in_a_pipe(peer_env: Any, founder: PeerFolder, swarm: MemorySwarm) -> None:
    lines = lines_of(peer_env, "rounds")
    assert len(lines) == ROUNDS + 2
    first = swarm.peers[0].records[0]
    assert lines[0].startswith(f"round 1 members {len(first.members)} samples {first.samples} loss 1.0000 bytes ")
    assert f"time {first.round_s:,.1f} s at " in lines[0] and lines[0].endswith(first.record_digest[:16])
    assert f"round {MISSED} " in lines[MISSED - 1] and " bytes - time - at - record " in lines[MISSED - 1]
    assert f"round {ROUNDS} members 3* " in lines[ROUNDS - 1], "only one of three voted"
    assert lines[-2].startswith("* committed by those who were left")
    assert lines[-1] == f"rounds committed: {ROUNDS}, abandoned: 0; no checkpoint"


def test_rounds_as_json(peer_env: Any, founder: PeerFolder, swarm: MemorySwarm) -> None:
    *rows, last = objects_of(peer_env, "rounds", "--last", 3)
    assert [row["round"] for row in rows] == [4, 5, 6]
    assert [row["by_minority"] for row in rows] == [False, False, True]
    measured = swarm.peers[0].records[4]
    assert rows[1] == {
        "round": 5,
        "record": measured.record_digest,
        "members": measured.members,
        "votes": rows[1]["votes"],
        "by_minority": False,
        "samples": measured.samples,
        "loss": measured.loss,
        "bytes": measured.bytes_sent + measured.bytes_received,
        "round_s": measured.round_s,
        "unix_time": measured.unix_time,
    }
    assert (rows[0]["bytes"], rows[0]["round_s"], rows[0]["unix_time"]) == (None, None, None)
    assert last == {"summary": {"rounds": 6, "missing": 0, "abandoned": 0, "checkpoint": None}}
    assert len(objects_of(peer_env, "rounds", "--last", 1, "--all")) == ROUNDS + 1


def test_rounds_in_a_terminal(peer_env: Any, founder: PeerFolder, terminal: Callable[[], list[str]]) -> None:
    lines_of(peer_env, "rounds")
    lines = terminal()
    assert lines[0].split() == ["round", "members", "samples", "loss", "bytes", "time", "at"]
    assert lines[MISSED].split()[:2] == [str(MISSED), "3"] and lines[MISSED].split()[4:7] == ["-", "-", "-"]


def test_a_wide_round_fits_a_terminal(terminal: Callable[[], list[str]]) -> None:
    row = {
        "round": 123_456_789,
        "record": "ab" * 32,
        "members": dict.fromkeys(map(peer_number, range(64)), 1),
        "by_minority": True,
        "samples": 1_000_000,
        "loss": 12.3456,
        "bytes": 999_900_000,
        "round_s": 12_345.6,
        "unix_time": 1.7e9,
    }
    summary = {"rounds": 123_456_789, "missing": 1_000, "abandoned": 1_000, "checkpoint": None}
    log_view.show_rounds([row, {**row, "record": None}], summary, as_json=False)
    lines = terminal()
    assert lines[1].split()[:8] == ["123456789", "64*", "1,000,000", "12.3456", "999.9", "MB", "12,345.6", "s"]
    assert "damaged" in lines[2]


def test_rounds_that_are_damaged_abandoned_and_anchored(peer_env: Any, founder: PeerFolder, swarm: MemorySwarm) -> None:
    log = opened(founder, swarm)
    log.rewind(record_of(log, 5).head)
    log.add_checkpoint(Checkpoint.sign(identity_number(0), swarm.manifest.run_id, log.branch.head))
    packed = record_of(log, 3).pack()
    log.close()
    data = (founder.path / "log").read_bytes()
    (founder.path / "log").write_bytes(data.replace(packed, packed[:-1] + bytes([packed[-1] ^ 1])))
    lines = lines_of(peer_env, "rounds")
    assert lines[2] == "round 3 members damaged samples - loss - bytes - time - at - record -"
    assert lines[-2] == "rounds committed: 5, abandoned: 1; checkpoint: round 5, on this branch"
    assert lines[-1].startswith("rounds damaged here: 1;")


def test_rounds_before_the_first(peer_env: Any, founder: PeerFolder) -> None:
    (founder.path / "log").unlink()
    assert lines_of(peer_env, "rounds") == ["rounds committed: 0, abandoned: 0; no checkpoint"]
    assert lines_of(peer_env, "credits") == ["samples: 0, peers: 0, rounds: 0"]


def test_no_run_and_no_manifest(peer_env: Any, founder: PeerFolder) -> None:
    for command in ("rounds", "credits", "peers", ["checkpoint", "show"], ["checkpoint", "sign"]):
        words = [command] if isinstance(command, str) else command
        peer_env.refuses(2, ["begins with ffff"], *words, "--run", "ffff")
        peer_env.refuses(2, ["no peer named 'x'"], *words, "--name", "x")
    (founder.run.path / "manifest.json").write_bytes(b"{}")
    peer_env.refuses(2, ["not the manifest"], "rounds", "--name", "founder")


# -- credits ---------------------------------------------------------------------------------------------------------


def test_credits(peer_env: Any, founder: PeerFolder, swarm: MemorySwarm) -> None:
    total = swarm.peers[0].keeper.branch.total
    *rows, last = objects_of(peer_env, "credits")
    assert last == {"summary": {"peers": 3, "samples": total, "rounds": ROUNDS, "missing": 0}}
    assert sum(row["samples"] for row in rows) == total and sum(row["share"] for row in rows) == pytest.approx(1)
    assert [row["samples"] for row in rows] == sorted((row["samples"] for row in rows), reverse=True)
    assert [row["peer"] for row in rows if row["own"]] == [peer_number(0)]
    lines = lines_of(peer_env, "credits")
    assert lines[-1] == f"samples: {total}, peers: 3, rounds: {ROUNDS}"
    assert sum(" (this) " in line for line in lines) == 1
    best = rows[0]
    assert f"samples {best['samples']} share {best['share']:.1%} rounds {best['rounds']} last 6" in lines[0]


def test_credits_in_a_terminal(peer_env: Any, founder: PeerFolder, terminal: Callable[[], list[str]]) -> None:
    lines_of(peer_env, "credits")
    assert terminal()[0].split() == ["peer", "samples", "share", "rounds", "last"]


def test_credits_with_a_false_claim(peer_env: Any, founder: PeerFolder, swarm: MemorySwarm) -> None:
    log = opened(founder, swarm)
    body = record_of(log, ROUNDS).body
    log.rewind(body.base)
    liar = body.members[0]
    members = (liar.model_copy(update={"signature": bytes(64)}), *body.members[1:])
    changed = body.model_copy(update={"members": members})
    changed.__dict__.pop("digest", None)  # a copy takes along what was computed of the original
    log.append(Record.of(changed, {peer_number(0): sign_vote(identity_number(0), changed.digest)}))
    log.close()
    peer_env.refuses(1, ["record 6 has a claim", liar.peer[-8:]], "credits")


def test_progress_of_a_long_log_is_a_bar(terminal: Callable[[], list[str]]) -> None:
    def steps() -> Generator[Step, None, str]:
        for number in range(1, 4):
            yield Step("claims", number, 3)
        return "done"

    assert log_view.follow(steps(), shown=False) == "done"
    log_view.say("nothing yet")
    assert log_view.follow(steps()) == "done"
    lines = terminal()
    assert lines[0] == "nothing yet" and any("claims" in line and "3/3" in line for line in lines[1:])


# -- peers -----------------------------------------------------------------------------------------------------------


def test_peers_without_a_daemon(peer_env: Any, founder: PeerFolder) -> None:
    *rows, last = objects_of(peer_env, "peers")
    assert last == {"summary": {"running": False, "peers": 4, "alive": 0}}
    assert {row["peer"]: (row["rounds"] > 0, row["addresses"]) for row in rows} == {
        **{peer_number(number): (True, 0) for number in range(3)},
        peer_number(9): (False, 1),
    }
    lines = lines_of(peer_env, "peers")
    assert lines[-1].startswith("no daemon answers here")
    assert lines[-2] == f"peer {peer_number(9)} rounds 0 samples 0 last - addresses 1"


def test_peers_with_a_daemon(peer_env: Any, founder: PeerFolder, terminal: Callable[[], list[str]]) -> None:
    big = {"phase": "collecting", "round": 123_456_789, "tokens_per_s": 1_234_567.8}
    seen = [{"peer": peer_number(number), **big} for number in (1, 5)]
    with daemon(founder, status={"peer_id": peer_number(0), **big, "peers": seen}):
        *rows, last = objects_of(peer_env, "peers")
        lines_of(peer_env, "peers")
    assert last == {"summary": {"running": True, "peers": 5, "alive": 3}}
    phases = {row["peer"]: (row["phase"], row["rounds"] > 0) for row in rows}
    assert phases[peer_number(0)] == phases[peer_number(1)] == ("collecting", True)
    assert phases[peer_number(5)] == ("collecting", False)
    assert phases[peer_number(2)] == (None, True)
    lines = terminal()
    assert lines[0].split() == ["peer", "phase", "round", "tokens/s", "rounds", "samples", "last"]
    assert lines[-1] == "peers alive: 3 of 5"
    assert f"{peer_number(0)[-8:]} (this)" in lines[1] + lines[2]


# -- verify ----------------------------------------------------------------------------------------------------------


def test_verify_a_run_a_peer_and_a_copy(peer_env: Any, founder: PeerFolder, swarm: MemorySwarm, tmp_path: Path) -> None:
    make_peer(peer_env.home, swarm, "volunteer", 1)
    lines = lines_of(peer_env, "verify", founder.run.path)
    assert lines[0] == f"{founder.path}: run {swarm.manifest.run_id[:16]} up to round 6 is all right"
    assert sum(line.endswith("is all right") for line in lines) == 2
    assert "checked states: 6 computed anew from the snapshot of round 0 on, as their records name them" in lines
    assert "note records for which no more than half of the roster voted: 1" in lines
    assert lines_of(peer_env, "verify", founder.path) == lines[: len(lines) // 2]
    copy = tmp_path / "a copy"
    shutil.copytree(founder.path, copy)
    peer_env.refuses(2, ["no manifest.json", str(copy)], "verify", copy)
    shutil.copy(founder.run.path / "manifest.json", copy)
    (report,) = objects_of(peer_env, "verify", copy)
    assert (report["folder"], report["run_id"]) == (str(copy), swarm.manifest.run_id)
    assert (report["records"], report["replayed"], report["head"]["round"]) == (6, 6, 6)
    assert "no " in report["unchecked"][0] and "manifest.sig" in report["unchecked"][0]
    shutil.copy(founder.run.path / "manifest.sig", copy)
    (report,) = objects_of(peer_env, "verify", copy)
    assert len(report["unchecked"]) == 1


def test_verify_in_a_terminal(peer_env: Any, founder: PeerFolder, terminal: Callable[[], list[str]]) -> None:
    lines_of(peer_env, "verify", founder.path)
    assert "all right" in " ".join(terminal())


def test_verify_names_what_is_wrong(peer_env: Any, founder: PeerFolder, swarm: MemorySwarm) -> None:
    record = record_of(swarm.peers[0].disk.log, 2)
    aggregate = founder.path / "aggregates" / record.body.aggregate.hex()
    data = aggregate.read_bytes()
    aggregate.write_bytes(bytes(len(data)))
    peer_env.refuses(1, [str(aggregate), "round 2", "damaged"], "verify", founder.path)
    aggregate.write_bytes(data)
    log, packed = (founder.path / "log").read_bytes(), record.pack()
    assert log.count(packed) == 1
    (founder.path / "log").write_bytes(log.replace(packed, packed[:-1] + bytes([packed[-1] ^ 1])))
    peer_env.refuses(1, [f"Record 2 in {founder.path / 'log'}", "damaged"], "verify", founder.run.path)


def test_verify_checks_the_manifest(peer_env: Any, founder: PeerFolder, swarm: MemorySwarm, tmp_path: Path) -> None:
    manifest, seal = founder.run.path / "manifest.json", founder.run.path / "manifest.sig"
    good, other = manifest.read_bytes(), swarm.manifest.model_copy(update={"seed": 1})
    manifest.write_bytes(good.replace(b'"seed":0', b'"seed":1'))
    peer_env.refuses(1, [str(manifest), "not signed by its founder"], "verify", founder.path)
    seal.write_bytes(identity_number(0).sign(SIGNING_DOMAIN, other.canonical_bytes()))
    peer_env.refuses(1, [str(manifest), "not of " + founder.run.path.name], "verify", founder.path)
    shutil.copytree(founder.run.path, tmp_path / "elsewhere")
    peer_env.refuses(1, ["/log", "another run"], "verify", tmp_path / "elsewhere")
    manifest.write_bytes(good[:-1])
    peer_env.refuses(1, [str(manifest), "not valid"], "verify", founder.path)
    peer_env.refuses(2, ["no log of rounds", str(tmp_path)], "verify", tmp_path)


# -- checkpoint ------------------------------------------------------------------------------------------------------


def test_checkpoint_without_a_daemon(peer_env: Any, founder: PeerFolder, swarm: MemorySwarm) -> None:
    assert lines_of(peer_env, "checkpoint", "show") == ["the organiser has signed no checkpoint that is known here"]
    newest = swarm.peers[0].keeper.head[1].hex()
    assert lines_of(peer_env, "checkpoint", "sign") == [f"Signed round 6, record {newest[:16]}."]
    assert lines_of(peer_env, "checkpoint", "sign") == [f"Already signed: round 6, record {newest[:16]}."]
    (third,) = objects_of(peer_env, "checkpoint", "sign", "--round", 3)
    assert (third["round"], third["new"]) == (3, True)
    assert lines_of(peer_env, "checkpoint", "show") == [
        f"round 3 record {third['record']} where on this branch",
        f"round 6 record {newest} where on this branch",
    ]
    *rows, _ = objects_of(peer_env, "checkpoint", "show")
    assert rows[1] == {"round": 6, "record": newest, "on_branch": True}
    log = opened(founder, swarm)
    assert log.branch.anchor == 6 and all(point.is_signed(swarm.manifest.founder) for point in log.checkpoints)
    log.close()
    os.close(founder.lock())  # free again


def test_checkpoint_with_a_daemon(peer_env: Any, founder: PeerFolder, swarm: MemorySwarm) -> None:
    size = (founder.path / "log").stat().st_size
    with daemon(founder, checkpoint={"new": True}) as asked:
        assert lines_of(peer_env, "checkpoint", "sign", "--round", 5)[0].startswith("Signed round 5, record ")
    (request,) = asked
    point = Checkpoint.unpack(bytes.fromhex(request["checkpoint"]))
    assert point.is_signed(swarm.manifest.founder) and point.head == record_of(swarm.peers[0].disk.log, 5).head
    with daemon(founder, checkpoint={"error": "The disk is full."}):
        peer_env.refuses(1, ["did not take", "The disk is full;"], "checkpoint", "sign")
    assert (founder.path / "log").stat().st_size == size, "only the daemon writes while it lives"


def test_checkpoint_while_a_daemon_starts(peer_env: Any, founder: PeerFolder) -> None:
    handle = founder.lock()
    peer_env.refuses(1, ["'founder' is still starting"], "checkpoint", "sign")
    os.close(handle)


def test_checkpoint_takes_the_founders_key(peer_env: Any, founder: PeerFolder, swarm: MemorySwarm) -> None:
    volunteer = make_peer(peer_env.home, swarm, "volunteer", 1)
    with daemon(volunteer, checkpoint={"new": True}) as asked:
        assert lines_of(peer_env, "checkpoint", "sign")[0].startswith("Signed round 6"), "by the founder beside it"
        peer_env.refuses(2, ["Only the founder", str(volunteer.key)], "checkpoint", "sign", "--name", "volunteer")
    assert asked == []
    founder.key.unlink()
    peer_env.refuses(2, ["Only the founder"], "checkpoint", "sign")
    assert not founder.key.exists(), "no key was made"


def test_checkpoint_of_a_round_that_is_not_there(peer_env: Any, founder: PeerFolder) -> None:
    peer_env.refuses(2, ["Round 7", "from 1 to 6"], "checkpoint", "sign", "--round", 7)
    (founder.path / "log").unlink()
    peer_env.refuses(1, ["no round in its log"], "checkpoint", "sign")
