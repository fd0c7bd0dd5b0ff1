"""What the round log costs: bytes of votes and records in a roster of 64, and a joiner's time to check a long log.

    python scripts/bench/log.py [--members 64] [--records 10000]

The first part runs real peers on a network in memory and counts what each sends, by method, over some rounds in which
all take part. The second checks packed records of 3 members with the votes of 2, as a joiner does, in one thread.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter

from _table import table

from p2pllm.identity import Identity
from p2pllm.rounds.chain import check_links, check_votes, start_of
from p2pllm.rounds.record import Body, Claim, Record, genesis, pack_all, sign_vote, unpack_all
from p2pllm.testing import MemorySwarm, run

RUN = "5a" * 32
ROUNDS = 3
OF_ROUNDS = ("enrol", "roster", "vote", "fetch")


def main() -> None:
    """Measure both and print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--members", type=int, default=64)
    parser.add_argument("--records", type=int, default=10_000)
    given = parser.parse_args()
    print(f"sent by one member in one round of {given.members}, bytes; the leader sends the roster")
    print(table(("method", "mean", "most", "calls"), _bytes(given.members)))
    print(f"seconds to check {given.records:,} records")
    print(table(("part", "s"), _checking(given.records)))


def _bytes(members: int) -> list[list[str]]:
    """Bytes that one member sends in one round, by method: the mean of all, and the most of one."""
    whole = run(_count(members))
    rows = list[list[str]]()
    sums: Counter[int] = Counter()
    for method in OF_ROUNDS:
        sent = [(peer[method][1] / ROUNDS, peer[method][0] / ROUNDS) for peer in whole]
        for number, (size, _) in enumerate(sent):
            sums[number] += size
        mean, calls = sum(size for size, _ in sent) / members, sum(count for _, count in sent) / members
        rows.append([method, f"{mean:,.0f}", f"{max(sent)[0]:,.0f}", f"{calls:.1f}"])
    return [*rows, ["all", f"{sum(sums.values()) / members:,.0f}", f"{max(sums.values()):,.0f}", ""]]


async def _count(members: int) -> list[dict[str, tuple[int, int]]]:
    """(messages, bytes) by peer and method over ROUNDS rounds in which all took part."""
    swarm = MemorySwarm(rounds=10**6, samples=4 * members, min_peers=members)
    swarm.add(members)
    await swarm.start()
    await swarm.until(lambda: all(peer.keeper.head[0] >= 1 for peer in swarm.peers))
    before = [_sent(peer) for peer in swarm.peers]
    await swarm.until(lambda: all(peer.keeper.head[0] >= 1 + ROUNDS for peer in swarm.peers))
    after = [_sent(peer) for peer in swarm.peers]
    for number in range(2, 2 + ROUNDS):
        record = swarm.peers[0].disk.log.record(number)
        if record is None or len(record.body.members) != members:
            raise SystemExit(f"Not all were in round {number}; nothing is measured.")
    return [
        {m: (new[m][0] - old[m][0], new[m][1] - old[m][1]) for m in OF_ROUNDS}
        for old, new in zip(before, after, strict=True)
    ]


def _sent(peer: object) -> dict[str, tuple[int, int]]:
    counts = peer.host.sent  # type: ignore[attr-defined]
    return {m: (counts[m].messages, counts[m].bytes) if m in counts else (0, 0) for m in OF_ROUNDS}


def _checking(count: int) -> list[list[str]]:
    """Seconds to check a log of `count` records from bytes."""
    packed = _log(count)
    begin = time.perf_counter()
    records = unpack_all(packed, count)
    parsed = time.perf_counter()
    check_links(records, start_of(RUN), RUN)
    linked = time.perf_counter()
    for record in records:
        check_votes(record)
    voted = time.perf_counter()
    parts = (("parsing", parsed - begin), ("links and sums", linked - parsed), ("votes", voted - linked))
    return [[name, f"{seconds:.2f}"] for name, seconds in (*parts, ("all", voted - begin))]


def _log(count: int) -> bytes:
    """Packed records of 3 members with 2 votes each."""
    members = [Identity.generate() for _ in range(3)]
    head, total, packed = genesis(RUN), 0, list[bytes]()
    for _ in range(count):
        claims = tuple(Claim.sign(member, head, 12, 2.5, bytes(32)) for member in members)
        total += 36
        body = Body(
            run=bytes.fromhex(RUN), round=head[0] + 1, previous=head[1], total=total, members=claims,
            aggregate=bytes(32), state=bytes(32),
        )  # fmt: skip
        signed = {member.peer_id: sign_vote(member, body.digest) for member in members[:2]}
        packed.append(Record.of(body, signed).pack())
        head = body.head
    return pack_all(packed)


if __name__ == "__main__":
    main()
