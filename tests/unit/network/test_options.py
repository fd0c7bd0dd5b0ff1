"""What p2pd is started with: who limits its line relays for nobody."""

from __future__ import annotations

from pathlib import Path

import pytest

from p2pllm.network.options import NodeSettings, P2pdOptions, Reach
from p2pllm.network.p2pd import _arguments


@pytest.mark.parametrize(
    ("settings", "relays"),
    [
        (NodeSettings(nat=True), True),
        (NodeSettings(nat=True, download_mbit=5.0), True),
        (NodeSettings(nat=True, upload_mbit=5.0), False),
        (NodeSettings(nat=True, monthly_gb=5.0), False),
        (NodeSettings(), False),
    ],
)
def test_what_is_relayed_cannot_be_limited(settings: NodeSettings, relays: bool) -> None:
    options = P2pdOptions.of(settings, Path("key"), Path("run"), Reach.PUBLIC)
    assert options.relay_service == relays
    assert f"-relayService={int(relays)}" in _arguments(options, Path("run/sock"))


@pytest.mark.parametrize("reach", Reach)
def test_p2pd_is_told_who_can_dial_us_and_who_relays(reach: Reach) -> None:
    options = P2pdOptions(Path("key"), Path("run"), reach=reach, relay="/ip4/1.1.1.1/tcp/1/p2p/x")
    given = _arguments(options, Path("run/sock"))
    private = reach is Reach.PRIVATE
    assert f"-forceReachabilityPublic={int(reach is Reach.PUBLIC)}" in given
    assert f"-forceReachabilityPrivate={int(private)}" in given and f"-autoRelay={int(private)}" in given
    assert ("-trustedRelays=/ip4/1.1.1.1/tcp/1/p2p/x" in given) == private
    assert P2pdOptions.of(NodeSettings(), Path("key"), Path("run"), reach).reach is Reach.UNKNOWN, "nat is off"
