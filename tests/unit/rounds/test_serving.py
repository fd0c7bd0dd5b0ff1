"""Serving: what a peer gives to those who catch up, and that it gives nothing for nonsense."""

from __future__ import annotations

from typing import Any

import pytest
from histories import commit, make_nodes, saved, train

from p2pllm.testing import virtual


@virtual
async def test_nobody_serves_the_first_state_once_a_record_exists() -> None:
    (node,) = await make_nodes(1)
    initial = node.disk.initial_state
    requests: list[dict[str, Any]] = [
        {"what": "snapshots"},
        {"what": "plan", "state": initial},
        {"what": "chunk", "state": initial, "index": 0},
    ]
    found, plan, chunk = [await node.keeper.serve(request) for request in requests]
    assert found is not None and [item[0] for item in found.header["snapshots"]] == [0]
    assert plan is not None and chunk is not None
    await commit(node)
    assert node.keeper._saving is not None
    for when in ("before the first one is saved", "after"):
        found, plan, chunk = [await node.keeper.serve(request) for request in requests]
        assert found is not None, when
        assert 0 not in [item[0] for item in found.header["snapshots"]], when
        assert plan is None and chunk is None, when
        await node.keeper._saving


@pytest.mark.parametrize(
    "request_",
    [
        {},
        {"what": 1},
        {"what": "state of affairs"},
        {"what": "log"},
        {"what": "log", "heads": 7},
        {"what": "record"},
        {"what": "record", "round": "1", "digest": bytes(32)},
        {"what": "record", "round": 1, "digest": [1]},
        {"what": "record", "round": 0, "digest": bytes(32)},
        {"what": "record", "round": 10**30, "digest": bytes(32)},
        {"what": "plan"},
        {"what": "plan", "state": [1]},
        {"what": "chunk", "state": {}, "index": 0},
        {"what": "chunk", "index": 0},
        {"what": "aggregate"},
        {"what": "aggregate", "digest": {}},
        {"what": "aggregate", "digest": b"short"},
        {"what": "proposal", "digest": [1]},
    ],
)
@virtual
async def test_strange_requests_get_nothing(request_: dict[str, Any]) -> None:
    (node,) = await make_nodes(1)
    await train(node, rounds=1)
    await saved(node)
    assert await node.keeper.serve(request_) is None


@pytest.mark.parametrize("index", [-1, 3, 10**30, True, None, "0"])
@virtual
async def test_a_chunk_that_is_not_there_is_not_given(index: Any) -> None:
    (node,) = await make_nodes(1)
    await train(node, rounds=1)
    await saved(node)
    state = node.disk.on_branch()[0].state
    assert await node.keeper.serve({"what": "chunk", "state": state, "index": index}) is None


@pytest.mark.parametrize("heads", [[], [[]], [[1, 2, 3]], [["x", b""]], [[0, b"x"]], [[10**30, bytes(32)]], [None]])
@virtual
async def test_who_shares_no_head_gets_the_log_from_its_beginning(heads: list[Any]) -> None:
    (node,) = await make_nodes(1)
    await train(node, rounds=2)
    blob = await node.keeper.serve({"what": "log", "heads": heads})
    assert blob is not None
    assert blob.header["base"][0] == 0
    assert blob.size == sum(4 + len(packed) for packed in node.disk.log.packed_after(node.disk.head_at(0), 10**6))
