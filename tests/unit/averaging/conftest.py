"""Fixtures of the averaging tests; what they are made of is in memory_network.py."""

from __future__ import annotations

import pytest
from memory_network import Cluster, Network


@pytest.fixture(params=["sockets", "objects"])
def cluster(request: pytest.FixtureRequest) -> Cluster:
    return Cluster(Network(sockets=request.param == "sockets"))
