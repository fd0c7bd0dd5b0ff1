"""What p2pd is started with: who limits its line relays for nobody."""

from __future__ import annotations

from pathlib import Path

import pytest

from p2pllm.network.options import NodeSettings, P2pdOptions
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
    options = P2pdOptions.of(settings, Path("key"), Path("run"), ())
    assert options.relay_service == relays
    assert f"-relayService={int(relays)}" in _arguments(options, Path("run/sock"))
