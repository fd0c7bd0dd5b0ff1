"""What is shown of a run of the lab: speeds of the lines from their counters, and in a pipe one record a line."""

import io
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from p2pllm_cli import lab_view
from p2pllm_peers.lab.evidence import PeerSample, Sample
from p2pllm_peers.lab.scenario import load_scenario

STATUS = {
    "recorded_round": 4,
    "swarm_tokens_per_s": 5012.3,
    "loss": 3.2,
    "validation_loss": None,
    "losses": [4.0, 3.6, 3.2],
}


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> io.StringIO:
    """All that was shown, on a terminal or in a pipe."""
    file = io.StringIO()
    console = Console(file=file, width=80, force_terminal=request.param, color_system=None, markup=False)
    monkeypatch.setattr(lab_view, "console", console)
    return file


def live_through() -> None:
    """A step, a fault, and two looks one second apart, at peers of which the last is down."""
    scenario = load_scenario("churn")
    names = scenario.names()
    peers = {
        name: SimpleNamespace(is_up=name != names[-1], is_running=False, frozen=False, last=STATUS) for name in names
    }
    swarm: Any = SimpleNamespace(peers=peers)
    with lab_view.LabView(scenario) as view:
        view.say("measuring the lines")
        view.event(3.84, "kill peer-2")
        for t, up, down in ((1.0, 500, 1_000), (2.0, 1_500_500, 13_345)):
            row = PeerSample(
                wire_up=up, wire_down=down, phase="collecting", round=4, digest="ab" * 32, tokens_per_s=1700
            )
            gone = PeerSample(wire_up=up, wire_down=down)
            view.show(t, swarm, Sample(t=t, peers={name: gone if name == names[-1] else row for name in names}))


@pytest.mark.parametrize("told", [True], indirect=True, ids=["terminal"])
def test_a_table_of_peers_and_lines(told: io.StringIO) -> None:
    live_through()
    lines = [line.strip("│ ") for line in told.getvalue().splitlines()[-11:]]
    assert lines[1] == "2 of 900 s  round 4  loss 3.2000  5,012 tokens/s"
    assert lines[4].split() == ["peer-0", "0.5", "50/100", "10ms", "collecting", "4", "1,700", "1.5M", "12k", "ababab"]
    assert lines[6].split() == ["peer-2", "0.5", "50/100", "5ms", "down", "0", "0", "1.5M", "12k"]
    assert lines[7] == "measuring the lines" and lines[8] == "3.8 s  kill peer-2"


@pytest.mark.parametrize("told", [False], indirect=True, ids=["pipe"])
def test_a_line_for_each_step_event_and_round(told: io.StringIO) -> None:
    live_through()
    assert told.getvalue().splitlines() == [
        "measuring the lines",
        "event 3.8 s  kill peer-2",
        "round 4 at 1.0 s  loss 3.2000  5,012 tokens/s",  # once, though it was looked at twice
    ]


def test_bytes_in_four_characters() -> None:
    assert [lab_view.compact(count) for count in (0, 999, 1_000, 999_499, 999_600, 1.5e6)] == [
        "0", "999", "1k", "999k", "1.0M", "1.5M"
    ]  # fmt: skip
