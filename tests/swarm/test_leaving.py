"""Peers that stop, crash or are killed, in a real swarm of three: the others go on, nothing is left behind."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from polling import lives, until

from p2pllm.manifest import RunDraft
from p2pllm.settings import PeerSettings
from p2pllm_peers.lab.swarm import Swarm, SwarmPeer, swarm_on_loopback

GONE_S = 10.0
"""Bound on the time until nothing is left of a peer that stopped or was killed."""

DRAFT = RunDraft.model_validate(
    {
        "name": "leaving",
        "model": {"config": {"hidden_size": 32, "intermediate_size": 80, "num_hidden_layers": 1,
                             "num_attention_heads": 2, "num_key_value_heads": 2}},
        "data": {"context_length": 32, "validation_samples": 4, "validation_every": 1000},
        "round": {"rounds": 1_000_000, "samples": 96, "roster_wait_s": 3},
    }
)  # fmt: skip

pytestmark = [pytest.mark.swarm, pytest.mark.alone, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def shared_swarm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swarm]:
    folder = tmp_path_factory.mktemp("leaving")
    settings = PeerSettings(cache=folder / "cache", micro_batch=4, threads=1)
    with swarm_on_loopback(DRAFT, 3, folder / "out", settings) as swarm:
        swarm.start(list(swarm.peers), quiet)
        yield swarm
        assert diverged(peers_of(swarm)) == []
    assert not any(peer.is_running for peer in peers_of(swarm))


@pytest.fixture
def swarm(shared_swarm: Swarm) -> Swarm:
    """Three peers that commit rounds together."""
    for peer in peers_of(shared_swarm):
        if not peer.is_running:
            peer.start(quiet)
    until(lambda: together(peers_of(shared_swarm)), "the three peers train together")
    return shared_swarm


def peers_of(swarm: Swarm) -> list[SwarmPeer]:
    return list(swarm.peers.values())


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_signal_leaves_in_order(swarm: Swarm, signal_number: int) -> None:
    leaver = peers_of(swarm)[2]
    before = remains_of(leaver)
    os.kill(leaver.process.pid, signal_number)
    until(lambda: leaver.process.poll() is not None, "the daemon ends", GONE_S)
    assert leaver.process.poll() == 0
    nothing_is_left(before)
    the_others_go_on(swarm, without=leaver)
    assert leaver.folder is not None
    saved = list((leaver.folder.path / "state").glob("*.safetensors"))
    assert saved, "the state was not saved on leaving"


def test_second_signal_ends_at_once(swarm: Swarm) -> None:
    leaver = peers_of(swarm)[2]
    before = remains_of(leaver)
    os.kill(leaver.process.pid, signal.SIGSTOP)  # so that both signals are there before it acts on the first
    os.kill(leaver.process.pid, signal.SIGINT)
    os.kill(leaver.process.pid, signal.SIGTERM)
    os.kill(leaver.process.pid, signal.SIGCONT)
    until(lambda: leaver.process.poll() is not None, "the daemon ends", GONE_S)
    nothing_is_left(before)
    the_others_go_on(swarm, without=leaver)


@pytest.mark.parametrize("index", [2, 0], ids=["ordinary", "founder"])
def test_killed_daemon_leaves_nothing(swarm: Swarm, index: int) -> None:
    victim = peers_of(swarm)[index]
    before = remains_of(victim)
    assert len(before["processes"]) >= 3, "a daemon has p2pd and a worker"
    os.kill(victim.process.pid, signal.SIGKILL)
    nothing_is_left(before)
    the_others_go_on(swarm, without=victim)
    others = [peer for peer in peers_of(swarm) if peer is not victim]
    until(lambda: all(len(status(peer)["peers"]) == 1 for peer in others), "the victim is known dead", GONE_S)


def test_killed_worker_comes_back(swarm: Swarm) -> None:
    victim = peers_of(swarm)[1]
    restarts = status(victim)["worker_restarts"]
    os.kill(child(victim, "p2pllm_peers.worker"), signal.SIGKILL)
    the_others_go_on(swarm, without=victim)
    until(lambda: status(victim)["worker_restarts"] == restarts + 1, "the worker is started again")
    assert "for want of memory" in status(victim)["notice"], "nobody else kills a worker uninvited"
    until(lambda: together(peers_of(swarm)), "the victim contributes again")


def test_killed_p2pd_comes_back(swarm: Swarm) -> None:
    victim = peers_of(swarm)[1]
    before = status(victim)
    os.kill(child(victim, "p2pd"), signal.SIGKILL)
    the_others_go_on(swarm, without=victim)
    until(lambda: status(victim)["network_restarts"] == before["network_restarts"] + 1, "p2pd is started again")
    assert status(victim)["peer_id"] == before["peer_id"]
    until(lambda: together(peers_of(swarm)), "the victim contributes again")


def quiet(text: str) -> None:
    """Progress that nobody reads."""


def status(peer: SwarmPeer) -> dict[str, Any]:
    return peer.status()


def diverged(peers: list[SwarmPeer]) -> list[int]:
    """Rounds after which two of these peers recorded different states."""
    digests: dict[int, set[str]] = {}
    for peer in peers:
        for record in peer.records():
            digests.setdefault(record["round"], set()).add(record["state_digest"])
    return [number for number, found in digests.items() if len(found) > 1]


def last_record(peer: SwarmPeer) -> dict[str, Any]:
    records = peer.records()
    return records[-1] if records else {"round": 0, "members": {}, "unix_time": 0.0}


def together(peers: list[SwarmPeer]) -> bool:
    """Every peer has lately committed a round in which all took part, and none is far behind."""
    last = [last_record(peer) for peer in peers]
    rounds = [record["round"] for record in last]
    return all(len(record["members"]) == len(peers) for record in last) and max(rounds) - min(rounds) <= 3


def the_others_go_on(swarm: Swarm, without: SwarmPeer) -> None:
    """The other peers commit three more rounds, with one state."""
    others = [peer for peer in peers_of(swarm) if peer is not without]
    begin = max(last_record(peer)["round"] for peer in others)
    until(lambda: all(last_record(peer)["round"] >= begin + 3 for peer in others), "the others commit")
    assert diverged(others) == []


def remains_of(peer: SwarmPeer) -> dict[str, Any]:
    """The processes and the sockets of a living peer."""
    daemon = psutil.Process(peer.process.pid)
    sockets = Path(peer.ready["runtime_dir"])
    assert list(sockets.glob("*.sock"))
    return {"processes": [daemon, *daemon.children(recursive=True)], "sockets": sockets}


def left_of(remains: dict[str, Any]) -> list[str]:
    """What of them is still there; a dead process that its parent has not collected is gone."""
    return [str(process) for process in remains["processes"] if lives(process)] + [
        str(entry) for entry in remains["sockets"].glob("*")
    ]


def nothing_is_left(remains: dict[str, Any]) -> None:
    """All of it goes within the bound."""
    end = time.monotonic() + GONE_S
    while left := left_of(remains):
        if time.monotonic() >= end:
            pytest.fail(f"still there after {GONE_S:.0f} s: {left}")
        time.sleep(0.05)


def child(peer: SwarmPeer, name: str) -> int:
    """Process id of the daemon's child whose command line has `name`."""
    for process in psutil.Process(peer.process.pid).children(recursive=True):
        if any(name in part for part in process.cmdline()[:3]):
            return int(process.pid)
    raise AssertionError(f"{peer.name} has no child {name}")
