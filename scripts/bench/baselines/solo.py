"""One process alone on one machine: what a volunteer would do without the others.

python -m baselines.solo        started by `fleet`
"""

from __future__ import annotations

import itertools

from baselines.peer import ClippedAdamW, Peer, groups, schedule


def main() -> None:
    """Train with the whole global batch until ended."""
    peer = Peer()
    optimizer = ClippedAdamW(groups(peer.model), peer.draft.optimizer)
    scheduler = schedule(optimizer, peer.draft)
    samples = peer.draft.round.samples
    peer.wait_go()
    for number in itertools.count(1):
        optimizer.zero_grad()
        loss = sum(peer.backward(peer.model, windows, samples) for windows in peer.micro_batches(samples))
        optimizer.step()
        scheduler.step()
        peer.commit(number, samples, loss)


if __name__ == "__main__":
    main()
