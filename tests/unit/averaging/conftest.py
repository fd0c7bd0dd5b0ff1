"""Fixtures of the averaging tests; what they are made of is in cluster.py."""

from __future__ import annotations

import pytest
from cluster import Cluster, SocketNetwork

from p2pllm.testing import MemoryNetwork


@pytest.fixture(params=["sockets", "objects"])
def cluster(request: pytest.FixtureRequest) -> Cluster:
    return Cluster(SocketNetwork() if request.param == "sockets" else MemoryNetwork())
