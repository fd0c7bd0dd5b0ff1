"""Orders travel whole, and what a daemon reports becomes an error or a start."""

import sys
from pathlib import Path

import pytest

from p2pllm import errors
from p2pllm.errors import DaemonError, DataError
from p2pllm.identity import Identity
from p2pllm.invite import Invite
from p2pllm.manifest import RunDraft
from p2pllm.settings import PeerSettings
from p2pllm_peers import launcher
from p2pllm_peers.folders import RunFolder
from p2pllm_peers.launcher import DaemonProcess, Order

SETTINGS = PeerSettings(home=Path("/a b/ü"), threads=3, announce=("/ip4/192.0.2.1/tcp/1",), nat=False)


@pytest.fixture
def daemon(monkeypatch: pytest.MonkeyPatch):
    """Starts a stand-in of the daemon from its source."""
    started = []
    popen = launcher.subprocess.Popen

    def start(source: str, order: Order | None = None) -> DaemonProcess:
        def instead(command, **options):
            return popen([sys.executable, "-c", "import sys, json\nsys.stdin.readline()\n" + source], **options)

        monkeypatch.setattr(launcher.subprocess, "Popen", instead)
        started.append(DaemonProcess(order or Order(SETTINGS, run_id="ab" * 32)))
        return started[-1]

    yield start
    for process in started:
        process.kill()


@pytest.mark.parametrize(
    "order",
    [
        Order(SETTINGS, draft=RunDraft().model_dump(mode="json"), name="x", foreground=False),
        Order(SETTINGS, invite="p2pllm:abc"),
        Order(SETTINGS, run_id="ab" * 32),
    ],
    ids=["draft", "invite", "run"],
)
def test_an_order_survives_the_pipe(order: Order) -> None:
    line = order.to_json()
    assert "\n" not in line
    assert Order.from_json(line) == order
    if order.draft is not None:
        assert RunDraft(**Order.from_json(line).draft) == RunDraft()


def test_progress_and_ready(daemon) -> None:
    heard: list[str] = []
    process = daemon(
        "print('a library says hello')\n"
        "print(json.dumps({'event': 'progress', 'text': 'one'}))\n"
        "print(json.dumps({'event': 'ready', 'socket': '/s'}), flush=True)\n"
        "sys.stdin.read()\n"
    )
    assert process.wait_ready(heard.append)["socket"] == "/s"
    assert heard == ["one"] and process.poll() is None
    process.leave()
    assert process.wait(10) == 0


def test_an_error_is_raised_as_what_it_is(daemon) -> None:
    process = daemon("print(json.dumps({'event': 'error', 'kind': 'DataError', 'message': 'No text.'}))")
    with pytest.raises(DataError, match=r"^No text\.$"):
        process.wait_ready(lambda _: None)
    assert process.poll() == 0


def test_every_error_of_ours_can_travel() -> None:
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    assert len(kinds) > 10 and all(kind("x").exit_code in (1, 2) for kind in kinds)


def test_a_daemon_that_dies_without_a_word(daemon) -> None:
    with pytest.raises(DaemonError, match=r"ended with code 3 before it was ready: last words\."):
        daemon("print('first\\nlast words', file=sys.stderr); sys.exit(3)").wait_ready(lambda _: None)


@pytest.mark.parametrize(
    ("source", "error"),
    [
        (
            "print(json.dumps({'event': 'error', 'kind': 'UnreachableError', 'message': 'No.'}))",
            errors.UnreachableError,
        ),
        ("sys.exit(3)", DaemonError),
    ],
)
def test_a_failed_join_leaves_no_folder_of_the_run(daemon, tmp_path: Path, source: str, error: type[Exception]) -> None:
    invite = Invite("ab" * 32, Identity.generate().peer_id, ("/ip4/127.0.0.1/tcp/1",))
    order = Order(SETTINGS.model_copy(update={"home": tmp_path}), invite=invite.encode())
    run = RunFolder(tmp_path, invite.run_id)
    run.peer("volunteer").path.mkdir(parents=True)
    process = daemon(source, order)
    with pytest.raises(error):
        process.wait_ready(lambda _: None)
    assert not run.path.exists()


def test_a_start_that_is_broken_off_ends_in_order(daemon) -> None:
    process = daemon(
        "import signal\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))\n"
        "print(json.dumps({'event': 'ready'}), flush=True)\n"
        "signal.pause()\n"
    )
    process.wait_ready(lambda _: None)
    process.end()
    assert process.poll() == 7
