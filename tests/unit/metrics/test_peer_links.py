"""Links: what an exchange moved with each member of its round, and how fast."""

from __future__ import annotations

from metric_samples import record

from p2pllm.network.streams import Moved, Traffic
from p2pllm_peers.links import Links


def test_rates_are_those_of_the_newest_round() -> None:
    links, moved = Links(), {"a": Moved(1_000, 500), "b": Moved(10, 0), "stranger": Moved(10**9, 0)}
    links.note(record(1, members={"a": 3, "b": 4, "me": 5}, seconds={"exchange": 2.0}), moved)
    moved["a"].sent += 1_000_000
    moved["a"].received += 500_000
    links.note(record(2, members={"a": 3, "b": 4, "me": 5}, seconds={"exchange": 2.0}), moved)
    assert links.rows() == [{"peer": "a", "bytes": 1_500_000, "mbit": 6.0}]
    links.note(record(3, members={"me": 1}, seconds={}), moved)
    assert links.rows()[0]["bytes"] == 1_500_000, "a round without an exchange says nothing of links"


def test_only_the_peers_met_last_are_counted() -> None:
    traffic = Traffic()
    first = traffic.with_("0")
    for number in range(1000):
        traffic.with_("0")
        traffic.with_(str(number))
    assert traffic.with_("0") is first and len(traffic.peers) <= 256
