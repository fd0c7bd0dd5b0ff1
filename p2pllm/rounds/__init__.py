"""The round protocol: how peers turn their updates into one step that all of them take.

`plan` holds the decisions as pure functions; `roster`, `vote`, `round`, `keeper` and `loop` are the thin shells
that gather what `plan` needs and act on its answer. Start reading at `loop.TrainingLoop.run`.

How long one peer can delay a round for the others, in seconds. Of the manifest: roster_wait_s (W, 5 by default),
exchange_deadline_s (E, 60). Constants: membership notices a death after a beat and a retry (1.2) and a freeze after
ALIVE_S (5); a small call takes CALL_TIMEOUT_S (2) at most; the all-reduce calls a peer stalled after 5 and a check
(5.6), while streams open after 7.5 and a check (8.1), and tells so within 1; VOTE_WAIT_S is 8, LEADER_GRACE_S 3.
With more than 64 members the times of membership grow as their number does, to four times these with 256.

- dead: collecting or waiting for the roster 1.2; in the exchange, where its streams break at once, 1 + 1.2;
  voting or committing 1.2.
- frozen: collecting or enrolled min(W, 5); as leader, before it answers 2, after it has answered min(W + 3, 5); in
  the exchange 5.6 + 1, by when membership has noticed too; between enrolment and exchange 8.1 + 1; voting 2.
- slow, or alive with nothing to give: W, or W + 3 while it leads; then the round goes on without its update.
- in an attempt of its own, with a member that stalls it: BUSY_S (10) longer than that, so that nobody goes on alone
  beside an exchange that is about to commit.
- cut off from some: as frozen, once a round; in a roster twice, since it is not dead for everybody.
- lying: an attempt fails after E at worst, and a vote after 8. MAX_STRIKES (2) failed attempts that speak against a
  peer leave it out of the round, and as many pass over who led them, so 2 (W + 3 + E + 8) for each liar.
- claiming a head that it cannot show: FOLLOW_TRIES (3) fetches, each at most OPEN_STREAM_S (10) and the time-outs of
  `bulk`, hold up those whom the claim moves; then it is not believed for DOUBT_S (60). Two that agree are not moved.

What is not defended against: invented gradients and weights of a member, invented states of a majority.
"""
