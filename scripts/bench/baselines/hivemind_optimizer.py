"""hivemind.Optimizer 1.1, twice: as its quick start begins, and with all that its guide and example recommend.

    python -m baselines.hivemind_optimizer        started by `fleet`; option "settings": "defaults" or "tuned"

"By default, Optimizer is configured to be exactly equivalent to synchronous training with target_batch_size"
(docstring of hivemind.Optimizer), which is what the other systems do, too. `defaults` is that, with the numbers of the
quick start (learning-at-home.readthedocs.io/en/latest/user/quickstart.html); its use_local_updates=True would be
another algorithm and is left out.

`tuned` follows the "Configuration guide" in the same docstring and examples/albert/run_trainer.py of its repository:

- "grad_compression=Float16Compression(), state_averaging_compression=Float16Compression()": both.
- "offload_optimizer=True, delay_optimizer_step=True, delay_grad_averaging=True" (the example; the guide: "train faster,
  but with 1 round of staleness").
- average_state_every: "If peers hardly ever skip averaging rounds, they can average state less frequently"
  (docstring). It halves what is sent.
- target_group_size: "Maximum group size for all-reduce" (the example). The number of peers here, without which every
  group waits out matchmaking_time. The Optimizer hands averager_opts to its state averager only, so the gradient
  averager gets it through grad_averager_factory.

Gradients are clipped inside the wrapped optimizer, as its users do (LambWithGradientClipping of sahajBERT).
"""

from __future__ import annotations

import multiprocessing
import os
from functools import partial
from typing import Any

import hivemind
from hivemind.compression import Float16Compression
from hivemind.optim.grad_averager import GradientAverager
from hivemind.p2p import P2P

from baselines.peer import ClippedAdamW, Peer, groups, schedule

SAMPLES_A_STEP = 32
"""The quick start's batch_size_per_step. Every step is told to all peers, so smaller ones cost more."""

MATCHMAKING_S = 3.0
"""The quick start's matchmaking_time; the guide: "3-5s for small local runs, 10-15s for training over the internet".
The longer it is, the longer `defaults` waits in each round, so this is the best of what is recommended."""

AVERAGING_TIMEOUT_S = 60.0
"""The guide's and the constructor's; the quick start's 10 s would end all-reduces that slow lines still carry."""

STATE_EVERY = 5

STARTUP_S = 120.0


def settings(kind: str, peers: int) -> dict[str, Any]:
    """Arguments of the Optimizer beside those that every run must give."""
    common = {"matchmaking_time": MATCHMAKING_S, "averaging_timeout": AVERAGING_TIMEOUT_S, "verbose": True}
    if kind == "defaults":
        return common
    group = {"target_group_size": peers, "request_timeout": MATCHMAKING_S / 2}  # must be below the matchmaking time
    return {
        **common,
        "grad_compression": Float16Compression(),
        "state_averaging_compression": Float16Compression(),
        "load_state_compression": Float16Compression(),
        "offload_optimizer": True,
        "delay_optimizer_step": True,
        "delay_grad_averaging": True,
        "average_state_every": STATE_EVERY,
        "averager_opts": group,
        "grad_averager_factory": partial(GradientAverager, **group),
    }


class Training:
    """The Optimizer and what this peer has put into the round under way."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        section = peer.draft.optimizer
        self.optimizer = hivemind.Optimizer(
            dht=find_peers(peer),
            run_id="baseline",
            target_batch_size=peer.draft.round.samples,
            batch_size_per_step=SAMPLES_A_STEP,
            params=groups(peer.model),
            optimizer=lambda params: ClippedAdamW(params, section),
            scheduler=lambda optimizer: schedule(optimizer, peer.draft),
            **settings(peer.order.options["settings"], peer.order.peers),
        )
        self._samples, self._loss = 0, 0.0
        reload = self.optimizer.load_state_from_peers

        def reloaded(**arguments: Any) -> None:
            self._samples, self._loss = 0, 0.0  # it drops what it has gathered
            self._dropped = True
            reload(**arguments)

        self.optimizer.load_state_from_peers = reloaded

    def step(self) -> None:
        """One call of `Optimizer.step`, and a record if it began a new epoch, which is what we call a round."""
        epoch, self._dropped = self.optimizer.local_epoch, False
        self.optimizer.zero_grad()
        windows = self._peer.micro_batches(SAMPLES_A_STEP)
        loss = sum(self._peer.backward(self._peer.model, part, SAMPLES_A_STEP) for part in windows)
        self.optimizer.step()
        if self._dropped:
            return
        self._samples += SAMPLES_A_STEP
        self._loss += loss * SAMPLES_A_STEP
        if self.optimizer.local_epoch != epoch:
            samples, total = self._samples, self._loss
            self._samples, self._loss = 0, 0.0
            self._peer.commit(self.optimizer.local_epoch, samples, total / samples)


def find_peers(peer: Peer) -> hivemind.DHT:
    """A DHT that knows the first peer. There is no router here that could forward ports."""
    # p2pd's sockets go where the rest of this machine's go, so that a killed one leaves nothing in /tmp.
    P2P._UNIX_SOCKET_PREFIX = f"/unix{os.environ['TMPDIR']}/hivemind-"
    start = partial(
        hivemind.DHT,
        host_maddrs=[f"/ip4/{peer.order.host}/tcp/0"],
        startup_timeout=STARTUP_S,
        nat_port_map=False,
        auto_nat=False,
        start=True,
    )
    first: list[hivemind.DHT] = []

    def announce() -> str:
        first.append(start())
        return " ".join(map(str, first[0].get_visible_maddrs()))

    contact = peer.meet(announce)
    return first[0] if first else start(initial_peers=contact.split())


def main() -> None:
    """Train until ended."""
    multiprocessing.set_start_method("fork", force=True)  # its classes cannot be pickled for spawn
    peer = Peer()
    training = Training(peer)
    peer.wait_go()
    # Its estimate of our speed shall not count the time that we waited for the others.
    training.optimizer.tracker.report_local_progress(training.optimizer.local_epoch, 0)
    while True:
        training.step()


if __name__ == "__main__":
    main()
