"""The round protocol: how peers turn their updates into one step that all of them take, and a log of these steps.

README.md beside this file has the protocol on one page, what it guarantees, and where that ends. `plan` and `chain`
hold the decisions as pure functions; the others are the thin shells that gather what these need and act on the answer.
Start reading at `loop.TrainingLoop.run`.

How long one peer can delay a round for the others, in seconds. Deadlines follow what was measured (`pace`): W, the wait
for a roster, is 3 times what it lately took, at least 2 and at most the manifest's roster_wait_s (5); S, the silence
after which a member of an exchange has failed, twice the longest that one came back from, 3 to 20, and 5 before
anything was measured; V, the wait for votes, 4 times what it took, 8 to 60; E, an exchange in which bytes move, 4 times
what it took, 15 to 3600. Constants: membership notices a death after a beat and a retry (1.2) and a freeze after
ALIVE_S (5); a small call takes CALL_TIMEOUT_S (2) at most; a check for silence comes every S/8; a notice travels within
1; LEADER_GRACE_S is 3. With more than 64 members the times of membership grow as their number does, to four times these
with 256.

- dead: collecting or waiting for the roster 1.2; in the exchange, where its streams break at once, 1 + 1.2;
  voting or committing 1.2.
- frozen: collecting or enrolled min(W, 5); as leader, before it answers 2, after it has answered min(W + 3, 5); in
  the exchange S + S/8 + 1, or 5 where there is nobody else; between enrolment and exchange 1.5 S + S/8 + 1; voting 2.
- slow, or alive with nothing to give: W, or W + 3 while it leads; then the round goes on without its update.
- in an attempt of its own, with a member that stalls it: BUSY_S (10) longer than that, so that nobody goes on alone
  beside an exchange that is about to commit.
- more than half of the last roster gone at once: those who are left wait MINORITY_WAIT_S (15) before they go on.
- cut off from some: as frozen, once a round; in a roster twice, since it is not dead for everybody.
- in the attempt after one that failed by it: SUSPECT_WAIT_S (0.5), if those it failed by are fewer than half.
- lying: an attempt fails after E at worst, and a vote after V. MAX_STRIKES (2) failed attempts that speak against a
  peer leave it out of the round, as many pass over who led them, and as many drop a proposal, so 2 (W + 3 + E + V) for
  each liar. If it holds a proposal and trickles it, E is once as long for each member that lacks it.
- arriving, and too slow for it: W, the first, second, fourth, eighth ... time that it is near the head.
- claiming a branch that it cannot show: one fetch, at most OPEN_STREAM_S (10) and the time-outs of `bulk`, holds up
  those whom the claim moves; then it is not believed for DOUBT_S (60). If it only fails, FOLLOW_TRIES (3) fetches.
"""
