"""What people give wrong and a command sees at once: one sentence, the right exit code, and nothing left behind."""

from collections.abc import Callable

import pytest

from p2pllm.identity import Identity
from p2pllm.invite import Invite


@pytest.fixture(scope="module")
def empty(make_peer_env):
    """A machine that takes part in nothing, with a run file; the tests of this module leave it so."""
    env = make_peer_env()
    env.write_run()
    return env


def an_invite() -> str:
    return Invite("ab" * 32, Identity.generate().peer_id, ("/ip4/127.0.0.1/tcp/4001",)).encode()


def mistype(invite: str) -> str:
    return invite[:40] + ("a" if invite[40] != "a" else "b") + invite[41:]


@pytest.mark.parametrize(
    ("words", "arguments"),
    [
        (["not an invite"], [""]),
        (["not both"], ["p2pllm:aa", "--run-file", "run.toml"]),
        (["missing.toml"], ["--run-file", "missing.toml"]),
        (["--seconds"], ["--seconds", "nan"]),
    ],
    ids=["an empty variable", "both", "no file", "no number"],
)
def test_what_the_doctor_cannot_use(empty, words: list[str], arguments: list[str]) -> None:
    empty.refuses(2, words, "doctor", *arguments)
    empty.keeps_nothing()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (mistype, ["mistyped", "copy"]),
        (lambda invite: invite[: len(invite) // 2], ["cut off", "copy"]),
        (lambda invite: invite[:-2], ["cut off", "copy"]),
        (lambda invite: "https://example.org/run", ["not an invite", "p2pllm:"]),
        (lambda invite: "p2pllm:", ["cut off"]),
    ],
    ids=["mistyped", "cut-in-half", "last-letters-missing", "something-else", "prefix-alone"],
)
def test_spoiled_invite(empty, spoil: Callable[[str], str], words: list[str]) -> None:
    empty.refuses(2, words, "join", spoil(an_invite()))
    empty.keeps_nothing()


def test_invite_and_run_together(empty) -> None:
    empty.refuses(2, ["--run", "not both"], "join", an_invite(), "--run", "ab")


def test_peer_name_that_is_a_path(empty) -> None:
    for name in ("../x", "josé", "-_", "a" * 33):
        empty.refuses(2, [name, "letters"], "join", an_invite(), "--name", name)
    empty.keeps_nothing()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("samples = 8", "samplez = 8"), ["round.samplez", "did you mean samples"]),
        (("[round]", "[rouund]"), ["rouund", "did you mean round"]),
        (("samples = 8", 'samples = "many"'), ["round.samples", "many"]),
        (("samples = 8", "samples = 0"), ["round.samples", "greater than or equal to 1"]),
        (("context_length = 32", "context_length = nan"), ["data.context_length"]),
        (('"tiny"', '"a b"'), ["name", "letters, digits"]),
        (('"text:TEXT"', '"TEXT"'), ["data", "text:PATH"]),
        (("samples = 8", "samples ="), ["TOML", "line"]),
    ],
    ids=["key", "section", "type", "range", "not-a-number", "name", "source", "toml"],
)
def test_wrong_run_file(peer_env, change: tuple[str, str], words: list[str]) -> None:
    path = peer_env.write_run(change)
    peer_env.refuses(2, [str(path), *words], "start", path)
    peer_env.refuses(2, [str(path), *words], "swarm", path, "--out", peer_env.folder / "out")
    assert not (peer_env.folder / "out").exists()
    peer_env.keeps_nothing()


def test_run_file_that_is_no_text(peer_env) -> None:
    path = peer_env.folder / "run.toml"
    path.write_bytes(b"\xff\xfe\x00")
    peer_env.refuses(2, [str(path), "UTF-8"], "start", path)
    peer_env.refuses(2, [str(peer_env.folder), "directory"], "start", peer_env.folder)
    peer_env.refuses(2, ["nowhere.toml", "p2pllm new nowhere.toml"], "start", "nowhere.toml")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("P2PLLM_THREADS", "abc", ["threads", "valid integer", "abc"]),
        ("P2PLLM_MICRO_BATCH", "-3", ["micro_batch", "greater than or equal to 0"]),
        ("P2PLLM_DEVICE", "tpu", ["device", "cuda:N"]),
        ("P2PLLM_LISTEN_HOST", "here", ["listen_host", "IP address"]),
        ("P2PLLM_ANNOUNCE", "here", ["announce", "/ip4/"]),
        ("P2PLLM_NAT", "maybe", ["nat", "boolean"]),
        ("P2PLLM_THREDS", "1", ["P2PLLM_THREDS", "P2PLLM_THREADS"]),
    ],
)
def test_wrong_environment_variable(empty, name: str, value: str, words: list[str]) -> None:
    empty.refuses(2, words, "status", **{name: value})
    empty.refuses(2, words, "start", "run.toml", **{name: value})
    empty.keeps_nothing()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"thread = 1", ["thread", "not a known field", "did you mean threads"]),
        (b"threads = = 1", ["TOML", "line 1"]),
        (b"\xff\xfe", ["TOML"]),
    ],
    ids=["unknown", "toml", "binary"],
)
def test_wrong_settings_file(peer_env, content: bytes, words: list[str]) -> None:
    file = peer_env.folder / "config" / "settings.toml"
    file.parent.mkdir()
    file.write_bytes(content)
    peer_env.refuses(2, [str(file), *words], "status")
    peer_env.refuses(2, [str(file), *words], "join", an_invite())
    peer_env.keeps_nothing()


@pytest.mark.parametrize("command", [["status"], ["leave"], ["generate"], ["export", "folder"], ["logs"], ["join"]])
def test_no_run_yet(empty, command: list[str]) -> None:
    empty.refuses(2, ["no run yet", "p2pllm join", str(empty.home)], *command)
    assert not (empty.folder / "folder").exists()
    empty.keeps_nothing()


def test_new_over_a_file(peer_env) -> None:
    path = peer_env.folder / "run.toml"
    path.write_text("precious")
    peer_env.refuses(2, [str(path), "exists already"], "new", path)
    assert path.read_text() == "precious"
    peer_env.refuses(2, ["cannot be written"], "new", peer_env.folder / "nowhere" / "run.toml")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--peers", "0"], ["--peers is 0"]),
        (["--peers", "65"], ["--peers is 65", "64"]),
        (["--rounds", "0"], ["--rounds is 0"]),
        (["--out", "."], ["not empty", "--out"]),
    ],
)
def test_wrong_swarm(empty, flags: list[str], words: list[str]) -> None:
    empty.refuses(2, words, "swarm", "run.toml", *flags)
    assert not (empty.folder / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["frobnicate"], "No such command 'frobnicate'"),
        (["status", "--frobnicate"], "No such option '--frobnicate'"),
        (["start"], "Missing argument 'PATH'"),
        (["swarm", "run.toml", "--out", "run.toml"], "'run.toml' is a file"),
        (["join", "x", "--port", "many"], "'many' is not a valid integer"),
        (["logs", "-n", "-1"], "-1 is not in the range"),
        (["generate", "--tokens", "0"], "0 is not in the range"),
    ],
)
def test_wrong_usage(empty, arguments: list[str], words: str) -> None:
    result = empty.p2pllm(*arguments)
    assert result.returncode == 2
    assert words in result.stderr and "Usage: p2pllm" in result.stderr and result.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["set", "cpu_percent"], ["NAME=VALUE"]),
        (["set", "cpu_percent=0"], ["cpu_percent"]),
        (["set", "hours=22-30"], ["hours", "22:30-07:00"]),
        (["set", "cpu_percents=50"], ["did you mean cpu_percent"]),
        (["set", "cpu_percent=50", "nonsense=1"], ["nonsense"]),
        (["pause", "--for", "soon"], ["soon", "30m"]),
        (["pause", "--for", "-3h"], ["30m"]),
        (["pause"], ["takes part in no run"]),
        (["resume"], ["takes part in no run"]),
        (["runs"], ["takes part in no run"]),
        (["clean", "--run", "ab"], ["No run", "ab"]),
    ],
)
def test_wrong_limits_and_pauses(empty, arguments: list[str], words: list[str]) -> None:
    empty.refuses(2, words, *arguments)
    empty.keeps_nothing()
