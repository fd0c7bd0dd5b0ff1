"""What one process of the all-reduce benchmark does: ours, hivemind's averager, or gloo.

A peer gets commands through a pipe and answers when done: prepare(size, codec); arm(number): the group is known and
only the exchange is left; go(at): seconds from `at`, on the machine's monotonic clock, until this peer holds the
mean; release(); end().
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

RUN_ID = "be" * 32


def wait_until(at: float) -> None:
    """Return at a moment of the machine's monotonic clock, to a few microseconds."""
    while (left := at - time.monotonic()) > 0:
        time.sleep(left if left < 0.002 else left - 0.001)


def value(index: int) -> float:
    """What a peer gives in every element."""
    return 1.0 + index


def check(mean: float, peers: int) -> None:
    """Stop a benchmark that averages wrongly; fp16 may be off by rounding."""
    expected = sum(map(value, range(peers))) / peers
    assert abs(mean - expected) < 1e-2 * expected, f"the mean is {mean}, not {expected}"


class Ours:
    """p2pllm's DenseAllReduce over its Node."""

    def __init__(self, index: int, peers: int, shared: Path) -> None:
        from p2pllm.averaging import DenseAllReduce
        from p2pllm.identity import Identity
        from p2pllm.network.node import Node, NodeSettings

        self.index, self.peers, self.shared = index, peers, shared
        self.runner = asyncio.Runner()
        self.folder = tempfile.TemporaryDirectory(prefix="bench-")
        identity = Identity.load_or_create(Path(self.folder.name) / "key")

        async def start() -> None:
            self.node = await Node.start(identity, RUN_ID, Path(self.folder.name) / "run", NodeSettings())
            self.engine = DenseAllReduce(self.node)
            await self.engine.start()

        self.runner.run(start())
        mine = shared / f"ours-{index}"
        mine.with_suffix(".new").write_text(f"{self.node.peer_id} {self.node.addresses()[0]}")
        mine.with_suffix(".new").rename(mine)
        self.members = []
        for other in range(peers):
            while not (shared / f"ours-{other}").exists():
                time.sleep(0.05)
            peer, address = (shared / f"ours-{other}").read_text().split()
            self.node.learn(peer, [address])
            self.members.append(peer)

    def prepare(self, size: int, codec: str) -> None:
        self.vector = np.full(size, value(self.index), np.float32)
        self.codec = codec

    def arm(self, number: int) -> None:
        from p2pllm.averaging import Group

        ones = (1.0,) * self.peers
        group_id = number.to_bytes(32, "big")
        self.group = Group(group_id, tuple(self.members), ones, self.vector.size, self.codec)

    def go(self, at: float) -> dict[str, float]:
        async def run() -> Any:
            wait_until(at)
            result = await self.engine.run(self.group, self.vector, 300)
            return result, time.monotonic() - at

        result, seconds = self.runner.run(run())
        assert result.aggregate is not None, result.reason
        check(float(result.aggregate[:: 1 + self.vector.size // 1000].mean()), self.peers)
        return {**result.seconds, "seconds": seconds}

    def release(self) -> None:
        del self.vector

    def end(self) -> None:
        self.runner.run(self.node.stop())
        self.runner.close()
        self.folder.cleanup()


class Hivemind:
    """hivemind's DecentralizedAverager with one flat tensor, its group found before the clock starts."""

    def __init__(self, index: int, peers: int, shared: Path) -> None:
        multiprocessing.set_start_method("fork", force=True)  # its classes cannot be pickled for spawn
        import hivemind

        self.index, self.peers = index, peers
        rendezvous = shared / "hivemind-0"
        while index and not rendezvous.exists():
            time.sleep(0.05)
        known = rendezvous.read_text().split() if index else []
        self.dht = hivemind.DHT(
            initial_peers=known,
            start=True,
            nat_port_map=False,
            auto_nat=False,
            host_maddrs=["/ip4/127.0.0.1/tcp/0"],
            startup_timeout=120,
        )
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if not index:
            rendezvous.with_suffix(".new").write_text(" ".join(map(str, self.dht.get_visible_maddrs())))
            rendezvous.with_suffix(".new").rename(rendezvous)

    def prepare(self, size: int, codec: str) -> None:
        import torch
        from hivemind.averaging import DecentralizedAverager
        from hivemind.compression import Float16Compression, NoCompression

        # Larger parts than the default 512 KiB: the best of those tried on this data plane.
        self.averager = DecentralizedAverager(
            [torch.full((size,), value(self.index))],
            self.dht,
            prefix=f"bench{size}{codec}",
            target_group_size=self.peers,
            min_group_size=self.peers,
            compression=NoCompression() if codec == "fp32" else Float16Compression(),
            part_size_bytes=2 << 20,
            allow_state_sharing=False,
            start=True,
        )
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def arm(self, number: int) -> None:
        from hivemind.averaging.control import AveragingStage
        from hivemind.utils import get_dht_time

        with self.averager.get_tensors() as tensors:
            tensors[0].fill_(value(self.index))
        self.step = self.averager.step(
            scheduled_time=get_dht_time() + 10, require_trigger=True, wait=False, timeout=120
        )
        while self.step.stage is not AveragingStage.AWAITING_TRIGGER:
            assert not self.step.done(), self.step.exception()
            time.sleep(0.01)

    def go(self, at: float) -> dict[str, float]:
        wait_until(at)
        self.step.allow_allreduce()
        gathered = self.step.result(300)
        seconds = time.monotonic() - at
        assert gathered is not None
        assert len(gathered) == self.peers
        with self.averager.get_tensors() as tensors:
            check(float(tensors[0][:: 1 + tensors[0].numel() // 1000].mean()), self.peers)
        return {"seconds": seconds}

    def release(self) -> None:
        self.averager.shutdown()
        del self.averager

    def end(self) -> None:
        self.dht.shutdown()


class Gloo:
    """torch.distributed's all_reduce; a sum, without encryption, and no member may fail."""

    def __init__(self, index: int, peers: int, shared: Path) -> None:
        import torch
        import torch.distributed as dist

        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        self.index, self.peers, self.torch, self.dist = index, peers, torch, dist
        dist.init_process_group("gloo", init_method=f"file://{shared}/gloo", rank=index, world_size=peers)

    def prepare(self, size: int, codec: str) -> None:
        self.vector = self.torch.empty(size)

    def arm(self, number: int) -> None:
        self.vector.fill_(value(self.index))

    def go(self, at: float) -> dict[str, float]:
        wait_until(at)
        self.dist.all_reduce(self.vector)
        seconds = time.monotonic() - at
        check(float(self.vector[:: 1 + self.vector.numel() // 1000].mean()) / self.peers, self.peers)
        return {"seconds": seconds}

    def release(self) -> None:
        del self.vector

    def end(self) -> None:
        self.dist.destroy_process_group()


SYSTEMS: dict[str, Callable[[int, int, Path], Any]] = {"ours": Ours, "hivemind": Hivemind, "gloo": Gloo}


def peer_main(system: str, index: int, peers: int, shared: str, pipe: Connection) -> None:
    """The process of one peer; ends when its pipe does, or its parent."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG, Linux only
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    # Whatever libraries put into the temporary folder goes when the parent removes the shared one.
    os.environ["TMPDIR"] = tempfile.tempdir = shared
    import torch

    torch.set_num_threads(1)
    peer = SYSTEMS[system](index, peers, Path(shared))
    pipe.send("up")
    with contextlib.suppress(EOFError):
        while True:
            command, *arguments = pipe.recv()
            answer = getattr(peer, command)(*arguments)
            pipe.send(answer)
            if command == "end":
                break
