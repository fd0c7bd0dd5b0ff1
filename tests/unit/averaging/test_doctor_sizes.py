"""The doctor's estimates against what really moves, and against what is really kept."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from blake3 import blake3
from cluster import Cluster, make_group, make_vectors, virtual

from p2pllm.averaging import codec
from p2pllm.averaging.gather import Gather
from p2pllm.averaging.group import Group
from p2pllm.averaging.sparse import SparseCodec
from p2pllm.manifest import RunDraft
from p2pllm.state import Layout
from p2pllm.testing import MemoryNetwork
from p2pllm.testing import virtual as in_virtual_time
from p2pllm_peers.doctor import sizes
from p2pllm_peers.doctor.findings import Compute
from p2pllm_peers.doctor.measure import encoded_size

SIZE = 100_000


def draft(strategy: str = "sync", **section: object) -> RunDraft:
    return RunDraft.model_validate({"round": {"strategy": strategy, **section}})


@pytest.mark.parametrize("codec_name", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("members", [2, 5])
@virtual
async def test_an_all_reduce_moves_as_much_as_is_said(members: int, codec_name: str) -> None:
    group = make_group(members, SIZE, codec_name)
    results = await Cluster(MemoryNetwork()).run(group, make_vectors(group))
    run = draft("diloco", codec=codec_name)
    update = sizes.update_bytes(run, SIZE, codec(codec_name).bytes_for, 0)
    said = sizes.moved_a_round(run, update, members)
    for result in results.values():
        assert said == pytest.approx(result.bytes_sent, rel=0.02)
        assert said == pytest.approx(result.bytes_received, rel=0.02)


@in_virtual_time
async def test_sparse_updates_move_as_much_as_is_said() -> None:
    layout = Layout.of([("matrix", (256, 400)), ("vector", (7,))])
    vectors = [np.random.default_rng(seed).standard_normal(layout.size).astype(np.float32) for seed in range(3)]
    payloads = [SparseCodec(layout).encode(vector) for vector in vectors]
    network = MemoryNetwork()
    hosts = [network.host(number) for number in range(3)]
    made = [Gather(host, 200_000) for host in hosts]
    for gather in made:
        await gather.start()
    digests = tuple(blake3(payload).digest() for payload in payloads)
    group = Group(bytes(32), tuple(host.peer_id for host in hosts), (1.0,) * 3, 1, digests=digests)
    results = await asyncio.gather(*(one.run(group, what, 60.0) for one, what in zip(made, payloads, strict=True)))
    said = sizes.moved_a_round(draft("sparse_loco"), encoded_size(layout, vectors[0]), 3)
    for result in results:
        assert len(result.updates) == 3 and said == pytest.approx(result.bytes_sent, rel=0.05)


def test_a_large_sparse_update_is_measured_by_its_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout.of([(f"matrix{number}", (64, 640)) for number in range(8)])
    update = np.random.default_rng(1).standard_normal(layout.size).astype(np.float32)
    whole = encoded_size(layout, update)
    monkeypatch.setattr("p2pllm_peers.doctor.measure.ENCODED", layout.size // 4)
    assert encoded_size(layout, update) == pytest.approx(whole, rel=0.02)


def test_fragments_and_a_lone_peer() -> None:
    fourth = draft("diloco", overlap=True, fragments=4)
    assert sizes.update_bytes(fourth, SIZE, codec("fp32").bytes_for, 0) == SIZE
    assert sizes.moved_a_round(fourth, SIZE, 1) == 0


def test_how_long_a_round_takes_with_one_more() -> None:
    run = draft(samples=100, deadline_s=60.0)  # of 128 tokens
    tokens = 100 * 128
    assert sizes.round_seconds(run, 1000.0, 1000.0, tokens / 1000 + 2) == pytest.approx(tokens / 2000 + 2)
    assert sizes.round_seconds(run, 1000.0, 3000.0, 0.0) == pytest.approx(tokens / 4000)
    assert sizes.round_seconds(run, 1.0, 1.0, 61.0) == pytest.approx(61.0), "the deadline ends it, as before"
    assert sizes.round_seconds(run, 0.0, 0.0, 0.0) == 60.0
    assert sizes.round_seconds(run, 1000.0, 3000.0, 0.0, 5.0) == pytest.approx(tokens / 4000 + 5)
    hidden = draft("diloco", samples=100, overlap=True)
    assert sizes.round_seconds(hidden, 1000.0, 3000.0, 0.0, 5.0) == 5.0
    assert sizes.round_seconds(hidden, 1000.0, 3000.0, 0.0, 1.0) == pytest.approx(tokens / 4000)


def test_megabytes_an_hour_are_rounds_and_control() -> None:
    traffic = sizes.traffic_of(draft(), 4_000_000, 2, 10.0, (100.0, 300.0), measured=True)
    assert traffic.round_up_bytes == 4_000_000
    assert traffic.up_mb_per_hour == pytest.approx(360 * 4 + 0.36)
    assert traffic.down_mb_per_hour == pytest.approx(360 * 4 + 1.08)


def test_memory_of_a_strategy() -> None:
    compute = Compute("cpu", 4, parameters=1000, worker_base_bytes=10**6, worker_peak_bytes=10**6 + 50_000)
    sync = sizes.memory_of(draft(), compute, 2, 10**9)
    assert (sync.parameters_bytes, sync.gradients_bytes, sync.inner_optimizer_bytes) == (4000, 8000, 0)
    assert sync.outer_optimizer_bytes == 3 * 3 * 4000 and sync.activations_bytes == 50_000 - 12_000
    local = sizes.memory_of(draft("diloco"), compute, 1, 10**9)
    assert local.inner_optimizer_bytes == 3 * 4000 and local.activations_bytes == 50_000 - 24_000
    assert sync.needed_bytes - local.needed_bytes == 3 * 4000, "a moment less in each of three states"
    on_gpu = sizes.memory_of(
        draft(), Compute("cuda:0", 4, parameters=1000, device_peak_bytes=20_000, device_free_bytes=1), 2, 9
    )
    assert on_gpu.activations_bytes == 8_000


def test_disk_stays_within_its_budget() -> None:
    run = draft(rounds=1000, snapshot_every=10)
    disk = sizes.disk_of(run, 1000, 2, 4000, 4, budget=10**9, text_bytes=5, record_bytes=0.0)
    assert disk.snapshots_bytes == 3 * 12_000 and disk.aggregates_bytes == 20 * 4000 and disk.optimizer_bytes == 0
    assert disk.log_bytes == 1000 * 4 * sizes.RECORD_BYTES_PER_MEMBER and disk.text_bytes == 5
    assert sizes.disk_of(run, 1000, 2, 4000, 4, 7000, 5, 100.0).aggregates_bytes == 7000
    assert sizes.disk_of(run, 1000, 2, 4000, 4, 7000, 5, 100.0).log_bytes == 100_000
    sparse = sizes.disk_of(draft("sparse_loco", rounds=3), 1000, 0, 50, 4, 10**9, 5, 0.0)
    assert sparse.aggregates_bytes == 3 * 4 * 50 and sparse.optimizer_bytes == 12_000
