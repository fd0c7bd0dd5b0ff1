"""Where three peers' recorded updates lead, round by round, bit for bit: through compression, exchange and outer step.

Another digest here is another swarm: peers of both versions would not agree on a state. What `sync` learns is compared
with one process in `test_fidelity`; these say of every strategy that a refactor changes none of its numbers.
"""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from p2pllm.averaging import DenseAllReduce, Exchange, Group, exchange_of, form_of, view_of
from p2pllm.averaging.form import Term
from p2pllm.state import Layout, moments_of, outer_optimizer, span_of
from p2pllm.state.chunks import digest_of
from p2pllm.testing import MemoryNetwork, make_manifest, make_state, virtual

LAYOUT = Layout.of([("embedding", (130, 70)), ("matrix", (64, 64)), ("gain", (70,))])
ROUNDS = 6
WEIGHTS = (12.0, 5.0, 40.0)

GOLDEN: list[tuple[dict[str, Any], list[str]]] = [
    (
        {"strategy": "sync"},
        [
            "935d2a10ef932904",
            "04324b240f13db9f",
            "1398728d688ae908",
            "97539bfec84d62fb",
            "56f39fd8de3d67de",
            "50057be671b596b7",
        ],
    ),
    (
        {"strategy": "diloco"},
        [
            "4ab34659bec5d735",
            "9425aad112376e50",
            "a765698c8f541515",
            "169568e641b36bbb",
            "b3f76156a9a878b8",
            "72ff0f60aa9bec92",
        ],
    ),
    (
        {"strategy": "diloco", "codec": "int8"},
        [
            "6820c3e60a01081e",
            "db30f47f0c22cf60",
            "34b773f5dde401b0",
            "ef424543cc6d5498",
            "579bd5364dc2b002",
            "345d14ec31fe7feb",
        ],
    ),
    (
        {"strategy": "diloco", "overlap": True, "fragments": 3},
        [
            "f958b406affb67ec",
            "e228a124cbb4f001",
            "b2742b28b2e8a6d0",
            "eb888af83b6148e6",
            "b91f31f35eecb59a",
            "2f9a505d53ed0d5a",
        ],
    ),
    (
        {"strategy": "sparse_loco"},
        [
            "e72d566d7e7f8f8d",
            "baa072e4b887a4b8",
            "ac18003215fbf9c9",
            "3865cbf1c299cb30",
            "acef507583228635",
            "60cc81f6ad2dc92f",
        ],
    ),
]


async def trajectory(**section: Any) -> list[str]:
    """The first 16 digits of the state's digest after each round."""
    manifest = make_manifest(LAYOUT, rounds=ROUNDS, **section)
    layout = LAYOUT.with_moments(moments_of(manifest))
    network, optimizer, state = MemoryNetwork(), outer_optimizer(manifest, layout), make_state(layout=layout)
    hosts, form = [network.host(number) for number in range(len(WEIGHTS))], form_of(manifest, layout)
    sparse = manifest.round.strategy == "sparse_loco"
    exchanges: list[Exchange] = [
        exchange_of(manifest, form_of(manifest, layout), host) if sparse else DenseAllReduce(host, part_bytes=256)
        for host in hosts
    ]
    for exchange in exchanges:
        await exchange.start()
    digests: list[str] = []
    for round_ in range(ROUNDS):
        span = span_of(layout.size, manifest.round.fragments, round_)
        updates = [
            np.random.default_rng([round_, number]).standard_normal(layout.size).astype(np.float32)[slice(*span)]
            for number in range(len(hosts))
        ]
        packed = [exchange.pack(update) for exchange, update in zip(exchanges, updates, strict=True)]
        signed = tuple(digest_of(view_of(payload)) for payload in packed)
        members = tuple(host.peer_id for host in hosts)
        group = Group(bytes([round_]) * 32, members, WEIGHTS, span[1] - span[0], manifest.round.codec, signed)
        running = [exchange.run(group, payload, 60.0) for exchange, payload in zip(exchanges, packed, strict=True)]
        aggregates = [result.aggregate for result in await asyncio.gather(*running)]
        assert len({digest_of(view_of(found)) for found in aggregates if found is not None}) == 1
        assert aggregates[0] is not None
        for exchange in exchanges:
            exchange.delivered()
        terms = [Term(int(weight), digest) for weight, digest in zip(WEIGHTS, signed, strict=True)]
        optimizer.step(state, form.vector(view_of(aggregates[0]), terms, round_))
        digests.append(state.digest()[:16])
    return digests


@pytest.mark.parametrize(
    ("section", "digests"), GOLDEN, ids=lambda value: str(value) if isinstance(value, dict) else ""
)
@virtual
async def test_the_states_of_six_rounds(section: dict[str, Any], digests: list[str]) -> None:
    assert await trajectory(**section) == digests
