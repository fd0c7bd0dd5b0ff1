"""What the views show: numbers with units, at most 80 columns, nothing that a terminal must understand."""

import io

import pytest
from rich.console import Console

from p2pllm_cli import view
from p2pllm_cli.advice import advice

PEER = "12D3KooWNMszKZCCPkRwtMBfzXuSxBMMpmy5S1oHfVAqUGwXfyyE"
STATUS = {
    "run_name": "a" * 64,
    "run_id": "5a" * 32,
    "name": "founder",
    "peer_id": PEER,
    "invite": "p2pllm:" + "a" * 200,
    "phase": "collecting",
    "round": 123_456_789,
    "recorded_round": 123_456_789,
    "rounds": 1_000_000_000,
    "samples": 1_000_000,
    "record": "ab" * 32,
    "loss": 3.14159,
    "validation_loss": None,
    "losses": [5.0 - 0.01 * step for step in range(200)],
    "tokens_per_s": 1_234_567.8,
    "swarm_tokens_per_s": 79_012_345.6,
    "bytes_sent": 1_500,
    "bytes_received": 2_500_000,
    "device": "cuda:0",
    "micro_batch": 64,
    "peers": [
        {
            "peer": PEER,
            "phase": "collecting",
            "round": 123_456_789,
            "samples": 1_000_000,
            "tokens_per_s": 1_234_567.8,
            "record": "cd" * 32,
        }
    ],
}


def shown(what: object, *, terminal: bool = False, width: int = 80) -> str:
    file = io.StringIO()
    Console(file=file, width=width, force_terminal=terminal, color_system=None, markup=False).print(what)
    return file.getvalue()


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (999_949, "999.9 kB"),
        (999_960, "1.0 MB"),
        (2.5e6, "2.5 MB"),
        (3e9, "3.0 GB"),
        (4e12, "4.0 TB"),
        (5e15, "5000.0 TB"),
    ],
)
def test_size(count: float, text: str) -> None:
    assert view.size(count) == text


def test_curve() -> None:
    assert view.curve([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert view.curve([3, 3]) == "▁▁"
    assert view.curve([1.0]) == "▁"
    assert len(view.curve([float(value) for value in range(200)])) == 60
    assert view.curve([9.0, 1.0, 2.0], width=2) == "▁█", "only the last values count"


def test_status_line_is_one_plain_line() -> None:
    line = view.status_line({**STATUS, "validation_loss": 2.0})
    assert line == (
        "round 123456789/1000000000 loss 3.1416 validation 2.0000 peers 2 tokens/s 79012346 up 1.5 kB down 2.5 MB"
    )
    assert "loss - validation -" in view.status_line({**STATUS, "loss": None})


@pytest.mark.parametrize("bottom", ["Ctrl+C leaves", ""])
@pytest.mark.parametrize("width", [80, 200])
def test_the_panel_fits_in_80_columns_without_colour(bottom: str, width: int) -> None:
    text = shown(view.panel(STATUS, bottom=bottom), terminal=True, width=width)
    assert "\x1b" not in text
    assert max(len(line) for line in text.splitlines()) <= 80
    for fact in ("123456789 of 1000000000", "3.1416", "1.5 kB", "2.5 MB", "cuda:0", f"{PEER[-8:]} (this)"):
        assert fact in text
    assert bottom in text


def test_the_panel_of_a_peer_that_has_just_begun() -> None:
    fresh = {**STATUS, "loss": None, "losses": [], "peers": [], "tokens_per_s": 0.0, "swarm_tokens_per_s": 0.0}
    assert "validation" in shown(view.panel(fresh))


def test_markup_of_strangers_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    stranger = {**STATUS["peers"][0], "phase": "[bold]"}
    assert "[bold]" in shown(view.peer_table([stranger]))
    view.print_status({**STATUS, "peers": [stranger]})
    assert "[bold]" in capsys.readouterr().out


def test_piped_status_is_plain_and_never_wraps(capsys: pytest.CaptureFixture[str]) -> None:
    view.print_status(STATUS)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "run 5a5a5a5a5a5a5a5a as 'founder': collecting"
    assert lines[2].startswith(f"peer {PEER} collecting round 123456789")
    assert lines[-1] == f"invite {STATUS['invite']}"
    assert len(lines) == 4


@pytest.mark.parametrize("phase", ["stopped", "starting", "not answering"])
def test_status_of_a_daemon_that_cannot_be_asked(phase: str, capsys: pytest.CaptureFixture[str]) -> None:
    view.print_status({"run_id": "5a" * 32, "name": "x", "phase": phase})
    assert capsys.readouterr().out == f"run 5a5a5a5a5a5a5a5a as 'x': {phase}\n"


def test_start_view_says_each_step_once_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    with view.StartView() as starting:
        for text in ("building", "building", "reading [1]"):
            starting.progress(text)
    assert capsys.readouterr().out == "building\nreading [1]\n"


BUSY = {
    **STATUS,
    "round": 1234,
    "rounds": 5000,
    "wanted": 400,
    "gathered": 130,
    "phase": "exchange",
    "seconds": {"compute": 12.34, "exchange": 1.5, "vote": 0.02, "apply": 0.1, "roster": 0.2},
    "credit": {"complete": True, "samples": 250, "all": 1000},
    "limits": {"cpu_percent": 50.0, "upload_mbit": 5.0},
    "worker_restarts": 2,
    "trouble": "the disk is full",
    "paused": "",
    "peers": [{**STATUS["peers"][0], "round": 1234} for _ in range(63)],
}


NOTICE = (
    "The system ended the compute process for want of memory, so it goes on with a micro-batch of 4 instead of 8; "
    "see `p2pllm explain memory`."
)


AMISS = {**BUSY, "disk_free": 1e6, "reach": "relay", "seconds": {"exchange": 1234.5, "compute": 1234.0}}


@pytest.mark.parametrize("status", [STATUS, BUSY, AMISS, {**AMISS, "notice": NOTICE}])
def test_the_live_panel_fits_into_a_small_terminal(status: dict) -> None:
    lines = shown(view.panel(status, height=24), terminal=True, width=80).splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 80


def test_the_panel_says_what_a_volunteer_wants_to_know() -> None:
    text = shown(view.panel(BUSY, height=24), terminal=True, width=80)
    said = ["███░░░░░░░ 130 of 400", "[exchange 1.5 s]", "collecting 12.3 s", "  vote  ", "250 (25.0 %)"]
    for words in (*said, "cpu_percent=50.0", "takes no part: the disk is full", "died 2 times", " more"):
        assert words in text, text
    noticed = {**BUSY, "notice": NOTICE}
    panel = shown(view.panel(noticed, height=24), terminal=True, width=80)
    assert "a micro-batch of 4 instead of 8" in " ".join(panel.replace("│", " ").split())
    assert NOTICE in view.status_line(noticed) and "note:" not in view.status_line(BUSY)
    alone = shown(view.panel({**BUSY, "peers": [], "phase": "joining"}), terminal=True, width=80)
    assert "hand out the invite" in alone and "[joining]" in alone


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"disk_free": 123e6}, "123 MB left"),
        ({"worker_restarts": 1, "micro_batch": 2}, "computes 2 samples at once now"),
        ({"seconds": {"exchange": 12.0, "compute": 5.0}}, "the exchange took 12 s, computing 5 s: a line, here or"),
        (
            {"seconds": {"exchange": 12.0, "compute": 5.0}, "limits": {"upload_mbit": 5.0}},
            "because of upload_mbit=5.0?",
        ),
        ({"reach": "relay"}, "only through a relay"),
        ({"limits": {"cpu_percent": 25.0, "hours": "22-7"}}, "because of cpu_percent=25.0, hours=22-7"),
    ],
)
def test_the_panel_says_what_would_help(changes: dict, words: str) -> None:
    (sentence,) = (text for text, _ in advice({**STATUS, **changes}))
    assert words in sentence
    assert sentence[:40] in shown(view.panel({**STATUS, **changes}), terminal=True)


def test_there_is_no_advice_where_nothing_is_amiss() -> None:
    fine = {"disk_free": None, "reach": "direct", "seconds": {"exchange": 1.0, "compute": 5.0}, "limits": {"nice": 5}}
    assert list(advice({**STATUS, **fine})) == [] == list(advice(STATUS))
