"""Every rule of a log has a record that breaks it, and of two branches all peers choose the same."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from p2pllm.identity import Identity
from p2pllm.rounds.chain import Branch, check_claims, check_links, check_votes, newest_checkpoint, start_of
from p2pllm.rounds.packing import MessageError
from p2pllm.rounds.record import Body, Checkpoint, Claim, Record, genesis, sign_vote


def identity(seed: int) -> Identity:
    """The same keys in every run: random bytes would look like something else once in a while."""
    return Identity(Ed25519PrivateKey.from_private_bytes(bytes([seed]) * 32))


RUN, OTHER_RUN = "5a" * 32, "5b" * 32
PEERS = [identity(seed) for seed in range(3)]
STRANGER = identity(9)


def following(base: Branch, samples: int = 5, **changes: Any) -> Record:
    """A right record after `base`, but for the `changes` to its body, which the members sign as it is."""
    claims = tuple(Claim.sign(peer, base.head, samples, 1.5, bytes(32)) for peer in PEERS)
    fields = {
        "run": bytes.fromhex(RUN),
        "round": base.head[0] + 1,
        "previous": base.head[1],
        "total": base.total + 3 * samples,
        "members": claims,
        "aggregate": bytes(32),
        "state": bytes(32),
    }
    return voted(Body(**(fields | changes)), PEERS)


def voted(body: Body, voters: list[Identity]) -> Record:
    return Record.of(body, {peer.peer_id: sign_vote(peer, body.digest) for peer in voters})


def grown(base: Branch, samples: list[int]) -> list[Record]:
    """A right log after `base`."""
    records = list[Record]()
    for each in samples:
        records.append(following(base, each))
        base = Branch(records[-1].head, records[-1].body.total, 0)
    return records


START = start_of(RUN)
LOG = grown(START, [5, 1, 7, 2])


def test_a_right_log_passes_whole_and_in_pieces() -> None:
    check_links([], START, RUN)
    check_links(LOG, START, RUN)
    for at in range(1, len(LOG)):
        check_links(LOG[at:], Branch(LOG[at - 1].head, LOG[at - 1].body.total, 0), RUN)
    for record in LOG:
        check_votes(record)
        check_claims(record.body)
    assert LOG[-1].body.total == 3 * (5 + 1 + 7 + 2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"run": bytes.fromhex(OTHER_RUN)}, "record 1 is of another run"),
        ({"round": 2}, "record 2 does not follow record 0"),
        ({"previous": bytes(32)}, "record 1 does not follow record 0"),
        ({"previous": genesis(OTHER_RUN)[1]}, "record 1 does not follow record 0"),
        ({"total": 16}, "record 1 does not add up"),
        ({"total": 10**9}, "record 1 does not add up"),
    ],
)
def test_a_record_that_does_not_belong_is_named(changes: dict[str, Any], words: str) -> None:
    check_links([following(START)], START, RUN)
    with pytest.raises(MessageError, match=words):
        check_links([following(START, **changes)], START, RUN)


@given(st.permutations(LOG), st.integers(0, len(LOG)))
def test_no_other_order_and_no_gap_passes(records: list[Record], many: int) -> None:
    chosen = records[:many]
    if chosen == LOG[:many]:
        check_links(chosen, START, RUN)
    else:
        with pytest.raises(MessageError, match="does not follow"):
            check_links(chosen, START, RUN)


def test_the_total_of_the_base_counts() -> None:
    with pytest.raises(MessageError, match="record 2 does not add up"):
        check_links(LOG[1:], Branch(LOG[0].head, LOG[0].body.total + 1, 0), RUN)


def test_votes_must_be_signed_by_who_is_named() -> None:
    body = LOG[0].body
    check_votes(voted(body, PEERS[:1]))  # those who are left of a roster go on
    right = {peer.peer_id: sign_vote(peer, body.digest) for peer in PEERS}
    for peer in PEERS:
        for wrong in (bytes(64), sign_vote(STRANGER, body.digest), sign_vote(peer, LOG[1].body.digest)):
            with pytest.raises(MessageError, match=f"record 1 has a vote that {peer.peer_id[-8:]} did not sign"):
                check_votes(Record.of(body, right | {peer.peer_id: wrong}))


def test_somebody_of_the_members_must_have_voted() -> None:
    check_votes(voted(LOG[0].body, [PEERS[2], STRANGER]))
    with pytest.raises(MessageError, match="no member of record 1 voted for it"):
        check_votes(voted(LOG[0].body, [STRANGER]))


def test_what_a_record_says_of_a_member_must_be_signed_by_it() -> None:
    body = LOG[0].body
    for at, changes in itertools.product(
        range(3), [{"samples": 4}, {"loss": 0.5}, {"update": bytes([1]) * 32}, {"signature": bytes(64)}]
    ):
        members = list(body.members)
        members[at] = members[at].model_copy(update=changes)
        forged = voted(body.model_copy(update={"members": tuple(members)}), PEERS)
        check_votes(forged)
        with pytest.raises(MessageError, match=f"record 1 has a claim that {PEERS[at].peer_id[-8:]} did not sign"):
            check_claims(forged.body)


def test_a_claim_for_another_place_does_not_count() -> None:
    elsewhere = following(Branch(LOG[0].head, 15, 0)).body.members
    with pytest.raises(MessageError, match="did not sign"):
        check_claims(following(START, members=elsewhere).body)


LIGHT, HEAVY = Branch((9, b"b" * 32), 90, 0), Branch((5, b"c" * 32), 91, 0)


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        (HEAVY, LIGHT),  # samples count, not rounds
        (LIGHT._replace(anchor=3), HEAVY),  # a checkpoint outweighs samples
        (LIGHT._replace(anchor=4), HEAVY._replace(anchor=3)),  # and the newer one the older
        (HEAVY._replace(anchor=3), LIGHT._replace(anchor=3)),  # of two with the same one the samples decide
        (LIGHT._replace(head=(9, b"a" * 32)), LIGHT),  # the smaller digest breaks ties
        (LIGHT._replace(head=(4, b"a" * 32)), LIGHT),  # whatever the round
        (LIGHT, START),
    ],
)
def test_which_branch_to_follow(better: Branch, worse: Branch) -> None:
    assert better.rank > worse.rank
    assert not worse.rank > better.rank


branches = st.builds(
    Branch, st.tuples(st.integers(0, 3), st.binary(min_size=32, max_size=32)), st.integers(0, 3), st.integers(0, 2)
)


@given(st.lists(branches, min_size=1, max_size=6, unique_by=lambda branch: branch.head[1]), st.randoms())
def test_all_peers_choose_the_same_whatever_they_heard_first(known: list[Branch], random: Any) -> None:
    best = max(known, key=lambda branch: branch.rank)
    shuffled = list(known)
    random.shuffle(shuffled)
    assert max(shuffled, key=lambda branch: branch.rank) == best
    assert all(best.rank > other.rank for other in known if other != best)


def test_the_newest_checkpoint_is_the_founders_for_this_run() -> None:
    founder = PEERS[0]
    old, new = (Checkpoint.sign(founder, RUN, (round_, b"m" * 32)) for round_ in (3, 8))
    forged = Checkpoint.sign(PEERS[1], RUN, (99, bytes(32)))
    elsewhere = Checkpoint.sign(founder, OTHER_RUN, (98, bytes(32)))
    twin = Checkpoint.sign(founder, RUN, (8, b"l" * 32))
    for known in itertools.permutations([old, new, forged, elsewhere]):
        assert newest_checkpoint(known, founder.peer_id, RUN) == new
    for known in itertools.permutations([old, new, twin]):
        assert newest_checkpoint(known, founder.peer_id, RUN) == twin
    assert newest_checkpoint([forged, elsewhere], founder.peer_id, RUN) is None
    assert newest_checkpoint([], founder.peer_id, RUN) is None
