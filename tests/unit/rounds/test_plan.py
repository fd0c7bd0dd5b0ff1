"""Every rule of the protocol alone, and properties that hold whatever peers say."""

from __future__ import annotations

from itertools import permutations
from random import Random
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pllm.rounds import plan
from p2pllm.rounds.chain import Branch
from p2pllm.rounds.messages import Enrol, Phase, Roster, Status
from p2pllm.rounds.plan import NEAR_ROUNDS, Decision, Step, Verdict
from p2pllm.rounds.record import Claim
from p2pllm.testing import branch, head, identity_number, status

A, B = b"a" * 32, b"b" * 32
MEMBERS = "vwxyz"

Votes = dict[str, bytes]

votes_of = st.dictionaries(st.sampled_from(MEMBERS), st.sampled_from([A, B, b""]))
absent_of = st.frozensets(st.sampled_from(MEMBERS))
phases: st.SearchStrategy[Phase] = st.sampled_from(get_args(Phase))
# Rounds, samples and checkpoints need not go together: what one claims may be nonsense.
branches = st.builds(
    branch, st.integers(0, 3), st.integers(0, 2), total=st.integers(0, 4), anchor=st.sampled_from([0, 0, 1, 2])
)


def at(where: Branch, phase: Phase = "collecting") -> Status:
    """A peer that says that it is on this branch."""
    found = status(where.head[0], where.head[1], phase, total=where.total)
    return found.model_copy(update={"anchor": where.anchor})


statuses_of = st.dictionaries(st.sampled_from(MEMBERS), st.builds(at, branches, phases), max_size=5)


def claim(number: int) -> Claim:
    return Claim.sign(identity_number(number), (1, A), 4, 1.0, B)


def enrol(number: int, holding: bytes = b"") -> Enrol:
    return Enrol(round=1, digest=A, claim=claim(number), holding=holding, proof=bytes(64) if holding else b"")


# -- who takes part ----------------------------------------------------------------------------------------------


def test_who_works_on_the_round_is_waited_for_and_who_is_about_to_come() -> None:
    statuses = {
        "at": status(3, 1),
        "soon": status(2, 7, "vote"),
        "late": status(2, 7, "exchange"),
        "comes": status(1, 7, "arriving"),
        "far": status(3, 7, "arriving"),
        "other": status(3, 2),
        "down": status(3, 1, "starting"),
        "joins": status(3, 1, "joining"),
        "done": status(3, 1, "done"),
    }
    assert plan.at_head(head(3, 1), statuses) == {"at"}
    assert plan.taking_part(head(3, 1), statuses) == {"at", "soon", "comes"}
    assert "comes" not in plan.taking_part(head(1 + NEAR_ROUNDS + 1, 1), statuses)


def test_others_are_asked_to_wait_by_who_is_near_and_less_and_less_often() -> None:
    asked = [tries for tries in range(20) if plan.may_arrive(branch(5), branch(6), tries)]
    assert asked == [0, 1, 3, 7, 15]
    assert plan.may_arrive(branch(0), branch(NEAR_ROUNDS), 0)
    assert not plan.may_arrive(branch(0), branch(NEAR_ROUNDS + 1), 0)
    assert not plan.may_arrive(branch(5, 1), branch(5, 2), 0), "it is another branch, not a missing round"
    assert not plan.may_arrive(None, branch(1), 0)


def test_samples_count_at_the_head_alone() -> None:
    statuses = {
        "a": status(3, 1, samples=5),
        "b": status(3, 1, "vote", 6),
        "c": status(3, 2, samples=100),
        "d": status(3, 1, "joining", 100),
    }
    assert plan.gathered(head(3, 1), statuses) == 11


def test_samples_are_told_more_often_towards_the_end_of_a_round() -> None:
    """Four peers in step, eight samples at once: ten of thirty steps are told, and at the end nothing is untold."""
    told: list[int] = []
    for mine in range(8, 248, 8):
        if plan.worth_telling(mine - (told[-1] if told else 0), 4, 4 * mine, 960):
            told.append(mine)
    assert told[0] == 80 and told[-4:] == [216, 224, 232, 240]
    assert len(told) <= 12
    assert not plan.worth_telling(0, 4, 2000, 960), "there is nothing to tell"


def test_a_round_is_over_when_most_others_are_ready() -> None:
    ready, working, evaluating = status(3, 1, "roster"), status(3, 1), status(3, 1, "commit")
    assert not plan.is_over(head(3, 1), {})
    assert plan.is_over(head(3, 1), {"a": ready})
    assert not plan.is_over(head(3, 1), {"a": ready, "b": working})
    assert plan.is_over(head(3, 1), {"a": ready, "b": working, "c": ready})
    assert not plan.is_over(head(3, 1), {"a": evaluating})
    assert not plan.is_over(head(3, 2), {"a": ready})


def test_leadership_changes_from_round_to_round_and_is_the_same_for_all() -> None:
    firsts = {plan.ranked("run", head(round_), MEMBERS)[0] for round_ in range(30)}
    assert len(firsts) > 2
    for order in permutations("xyz"):
        assert plan.ranked("run", head(4), order) == plan.ranked("run", head(4), "xyz")
    assert plan.ranked("run", head(4), MEMBERS) != plan.ranked("other", head(4), MEMBERS)


def test_every_attempt_has_a_group_of_its_own() -> None:
    one = Roster(round=1, digest=A, nonce=bytes(16), claims=(claim(0),), proposal=b"", holders=())
    two = one.model_copy(update={"nonce": bytes(15) + b"2"})
    settling = one.model_copy(update={"proposal": B, "holders": (0,)})
    assert len({plan.group_id("run", roster) for roster in (one, two, settling)}) == 3
    assert plan.group_id("run", one) != plan.group_id("nur", one)
    assert plan.group_id("run", one) == plan.group_id("run", Roster.unpack(one.pack()))


# -- votes -------------------------------------------------------------------------------------------------------


def test_more_than_half_of_the_roster_commits() -> None:
    assert plan.decide("xy", {"x": A}, frozenset()) == Decision(Verdict.WAIT)
    assert plan.decide("xy", {"x": A, "y": A}, frozenset()) == Decision(Verdict.COMMIT, A)
    assert plan.decide("xy", {"x": A, "y": B}, frozenset()) == Decision(Verdict.RETRY)
    assert plan.decide("xyz", {"x": A, "y": A}, frozenset()) == Decision(Verdict.COMMIT, A)
    assert plan.decide("xyz", {"x": A}, frozenset("yz")) == Decision(Verdict.RETRY)
    assert plan.decide("x", {"x": A}, frozenset()) == Decision(Verdict.COMMIT, A)


def test_empty_votes_and_strangers_hold_nothing() -> None:
    assert plan.decide("xy", {"x": b"", "y": b""}, frozenset()).verdict is Verdict.RETRY
    assert plan.decide("xy", {"x": A, "p": A, "q": A}, frozenset("y")).verdict is Verdict.RETRY


@given(votes_of, absent_of, st.permutations(MEMBERS))
def test_the_order_of_votes_and_members_changes_nothing(votes: Votes, absent: frozenset[str], order: list[str]) -> None:
    turned = {peer: votes[peer] for peer in reversed(votes)}
    assert plan.decide(MEMBERS, votes, absent) == plan.decide(order, turned, absent)


@given(votes_of, st.frozensets(st.sampled_from(MEMBERS)), st.frozensets(st.sampled_from(MEMBERS)), absent_of)
def test_members_that_see_parts_of_the_same_votes_never_commit_two_bodies(
    votes: Votes, seen_1: frozenset[str], seen_2: frozenset[str], absent: frozenset[str]
) -> None:
    decisions = [
        plan.decide(MEMBERS, {peer: vote for peer, vote in votes.items() if peer in seen}, absent)
        for seen in (seen_1, seen_2)
    ]
    committed = {decision.body for decision in decisions if decision.verdict is Verdict.COMMIT}
    assert len(committed) <= 1


@given(votes_of, votes_of, absent_of)
def test_more_votes_never_undo_a_commit(votes: Votes, more: Votes, absent: frozenset[str]) -> None:
    before = plan.decide(MEMBERS, votes, absent)
    if before.verdict is Verdict.COMMIT:
        assert plan.decide(MEMBERS, {**more, **votes}, absent) == before


@given(votes_of, absent_of)
def test_when_all_voted_or_are_gone_there_is_a_decision(votes: Votes, absent: frozenset[str]) -> None:
    gone = absent | (frozenset(MEMBERS) - votes.keys())
    assert plan.decide(MEMBERS, votes, gone).verdict is not Verdict.WAIT


# -- culprits ----------------------------------------------------------------------------------------------------


def test_own_sight_goes_before_hearsay() -> None:
    accused = {"y": frozenset("z")}
    votes = {"x": b"", "y": b"", "z": b""}
    assert plan.culprits("x", "xyz", votes, frozenset("y"), accused) == {"y"}
    assert plan.culprits("x", "xyz", votes, frozenset(), accused) == {"z"}


def test_who_does_not_vote_or_votes_otherwise_is_suspected() -> None:
    assert plan.culprits("x", "xy", {"x": A}, frozenset(), {}) == {"y"}
    assert plan.culprits("x", "xyz", {"x": A, "y": B, "z": b""}, frozenset(), {}) == {"y", "z"}


def test_a_vote_that_no_longer_mattered_may_be_on_its_way() -> None:
    votes = {"v": b"", "w": b"", "x": b""}
    assert plan.culprits("v", MEMBERS, votes, frozenset("x"), {}) == {"x"}


def test_most_accusations_win_and_who_accuses_only_us_is_suspected_itself() -> None:
    votes = dict.fromkeys("wxyz", b"")
    accused = {"x": frozenset("z"), "y": frozenset("z"), "z": frozenset("xw")}
    assert plan.culprits("w", "wxyz", votes, frozenset(), accused) == {"z"}
    assert plan.culprits("w", "wxyz", votes, frozenset(), {"x": frozenset("w")}) == {"x"}
    assert plan.culprits("w", "wxyz", votes, frozenset(), {"x": frozenset()}) == {"x"}


@given(votes_of, absent_of, st.dictionaries(st.sampled_from(MEMBERS), absent_of))
def test_we_never_suspect_ourselves_nor_strangers(
    votes: Votes, failed: frozenset[str], accused: dict[str, frozenset[str]]
) -> None:
    suspects = plan.culprits("v", "vwx", votes, failed, accused)
    assert suspects <= {"w", "x"}


@pytest.mark.parametrize(("members", "accused", "suspects"), [("xyz", "y", "y"), ("xyz", "yz", ""), ("xy", "y", "")])
def test_whom_half_or_more_would_do_without_is_not_suspected(members: str, accused: str, suspects: str) -> None:
    assert plan.suspects(tuple(members), frozenset(accused)) == set(suspects)


# -- what a new attempt settles -----------------------------------------------------------------------------------


def test_what_a_member_voted_for_is_settled_first() -> None:
    assert plan.proposal({}) == b""
    assert plan.proposal({"x": enrol(0), "y": enrol(1)}) == b""
    assert plan.proposal({"x": enrol(0), "y": enrol(1, A)}) == A
    assert plan.proposal({"x": enrol(0, A), "y": enrol(1, B), "z": enrol(2, A)}) == A
    assert plan.proposal({"x": enrol(0, A), "y": enrol(1, B)}) == B, "ties go to the greater digest"


def test_what_failed_is_settled_no_more() -> None:
    enrolled = {"x": enrol(0, A), "y": enrol(1, B), "z": enrol(2, A)}
    assert plan.proposal(enrolled, frozenset({A})) == B
    assert plan.proposal(enrolled, frozenset({A, B})) == b""


# -- branches ----------------------------------------------------------------------------------------------------


def test_the_branch_with_more_samples_wins_however_many_hold_the_other() -> None:
    light, heavy = branch(5, 1), branch(4, 2, total=100)
    statuses = {"a": at(light), "b": at(light), "c": at(heavy)}
    assert plan.branch_to_follow(light, statuses) == heavy
    assert plan.branch_to_follow(heavy, statuses) is None
    assert plan.branch_to_follow(light, {peer: statuses[peer] for peer in "ab"}) is None


def test_of_two_with_the_same_samples_the_smaller_name_wins() -> None:
    small, great = branch(5, 1), branch(5, 2)
    assert plan.branch_to_follow(great, {"a": at(small)}) == small
    assert plan.branch_to_follow(small, {"a": at(great)}) is None


def test_a_newer_checkpoint_wins_over_any_samples() -> None:
    anchored, heavy = branch(5, 2, anchor=3), branch(9, 1, total=10**12, anchor=2)
    assert plan.branch_to_follow(heavy, {"a": at(anchored)}) == anchored
    assert plan.branch_to_follow(anchored, {"a": at(heavy)}) is None


def test_who_goes_on_where_we_end_is_followed_and_who_is_behind_is_not() -> None:
    assert plan.branch_to_follow(branch(5, 1), {"a": at(branch(6, 9))}) == branch(6, 9)
    assert plan.branch_to_follow(branch(6, 9), {"a": at(branch(5, 1)), "b": at(branch(5, 1))}) is None


def test_fresh_peers_are_harmless() -> None:
    fresh = {peer: at(branch(0, 1)) for peer in "abc"}
    assert plan.branch_to_follow(branch(3, 1), fresh) is None
    assert plan.branch_to_follow(branch(0, 1), fresh) is None
    assert plan.branch_to_follow(branch(0, 1), {**fresh, "d": at(branch(3, 1))}) == branch(3, 1)
    assert plan.branch_to_follow(None, fresh) == branch(0, 1), "who makes other initial weights needs theirs"
    assert plan.branch_to_follow(None, {}) is None


def test_who_starts_or_joins_claims_nothing_and_serves_nothing() -> None:
    statuses = {"a": at(branch(5, 1), "joining"), "b": at(branch(5, 1), "starting")}
    assert plan.branch_to_follow(branch(4, 0), statuses) is None
    assert plan.donors(branch(5, 1), {**statuses, "c": at(branch(5, 1))}) == ["c"]


def test_who_holds_just_the_branch_is_asked_first_then_who_is_further() -> None:
    statuses = {"a": at(branch(7, 1)), "b": at(branch(5, 1)), "c": at(branch(5, 1), "done"), "d": at(branch(4, 1))}
    assert plan.donors(branch(5, 1), statuses) == ["b", "c", "a"]


@given(branches, statuses_of)
def test_a_branch_that_is_followed_is_better_and_one_that_somebody_holds(
    own: Branch, statuses: dict[str, Status]
) -> None:
    target = plan.branch_to_follow(own, statuses)
    assert target is None or target.rank > own.rank
    assert target is None or plan.donors(target, statuses)


@given(st.dictionaries(st.sampled_from(MEMBERS), branches, min_size=1), st.randoms(use_true_random=False))
def test_peers_that_follow_one_after_another_come_to_rest_on_one_branch(
    where: dict[str, Branch], random: Random
) -> None:
    """Everybody sees everybody, and moves as it likes: each moves once at most, then all are on the best branch."""
    best = max(where.values(), key=lambda branch: branch.rank)
    for _ in where:
        moves = {}
        for peer, own in where.items():
            others = {name: at(other) for name, other in where.items() if name != peer}
            if (target := plan.branch_to_follow(own, others)) is not None:
                moves[peer] = target
        if moves:
            peer = random.choice(sorted(moves))
            where = {**where, peer: moves[peer]}
    # Two branches may have one rank only if they have one name, too, and then they are one.
    assert {own.rank for own in where.values()} == {best.rank}


# -- the next step -----------------------------------------------------------------------------------------------


def test_the_next_step_follows_from_what_is_known() -> None:
    own, ahead = branch(3, 1), {"a": at(branch(4, 1))}
    assert plan.next_step(own, 9, {}, turned_away=False, paused=False) is Step.TRAIN
    assert plan.next_step(own, 3, {}, turned_away=False, paused=False) is Step.SEE_OFF
    assert plan.next_step(own, 3, ahead, turned_away=False, paused=False) is Step.FOLLOW
    assert plan.next_step(None, 9, {}, turned_away=False, paused=False) is Step.FOLLOW, "it has nothing to train on"
    assert plan.next_step(own, 9, ahead, turned_away=True, paused=False) is Step.WAIT_FOR_ROOM
    for state in (own, None):
        assert plan.next_step(state, 9, ahead, turned_away=True, paused=True) is Step.PAUSE, "it fetches nothing"


def test_fewer_than_half_of_the_last_roster_are_a_minority() -> None:
    former = frozenset("abcd")
    assert plan.is_minority("a", former)
    assert plan.is_minority("axyz", former)
    assert not plan.is_minority("ab", former), "half of them go on"
    assert not plan.is_minority("a", frozenset("ab")), "one of two goes on: the other is likely dead"
    assert not plan.is_minority("a", frozenset()), "there was no round before"


@pytest.mark.parametrize(
    ("samples", "gathered", "fields", "ends"),
    [
        (4, 11, {}, False),
        (4, 12, {}, True),
        (0, 12, {}, False),  # it has nothing to bring yet
        (4, 4, {"deadline_passed": True}, True),
        (0, 4, {"deadline_passed": True}, False),
        (4, 4, {"others_are_over": True}, True),
        (0, 4, {"others_are_over": True}, False),
        (4, 4, {"alone": True}, False),
        (4, 4, {"paused": True}, False),  # the others go on gathering, and ours is for their round
        (4, 4, {"paused": True, "alone": True}, True),
        (0, 4, {"paused": True}, True),
    ],
)
def test_when_a_peer_has_gathered_enough(samples: int, gathered: int, fields: dict[str, bool], ends: bool) -> None:
    usual = {"deadline_passed": False, "others_are_over": False, "paused": False, "alone": False}
    assert plan.is_collected(samples, gathered, 12, **{**usual, **fields}) is ends


@pytest.mark.parametrize(
    ("proposed", "roster", "expected"),
    [
        ("a", "abc", False),
        ("a", "ab", False),  # half is not more than half
        ("ab", "abc", True),
        ("abcd", "a", True),  # the others are gone
        ("xyz", "abc", False),
        ("axyz", "abc", False),
    ],
)
def test_a_proposal_speaks_for_a_roster_with_more_than_half_of_it_in_it(
    proposed: str, roster: str, expected: bool
) -> None:
    assert plan.speaks_for(proposed, roster) is expected
