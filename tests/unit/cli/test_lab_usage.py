"""What `p2pllm lab` refuses: one sentence that says what is wrong, where, and what to do, and exit code 2."""

from pathlib import Path

import pytest

from p2pllm_peers.lab.scenario import shipped

SCENARIO = """
duration_s = 10
[[peers]]
count = 2
"""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("duration = 10", ["scenario.toml", "duration", "duration_s"]),
        (SCENARIO + "cores = 0.9\nlink = 'slow'\n[links.slow]\nup_mbit = 0\ndown_mbit = 1", ["up_mbit"]),
        (SCENARIO + "[[events]]\nat_s = 1\ndo = 'kill'\npeer = 'peer-7'", ["peer-7", "no peer"]),
        (SCENARIO + "cores = 40", ["cores", "machine has"]),
        (SCENARIO + "[[events]]\nat_s = 1\ndo = 'cut'\npeer = 'peer-0'", ["cut", "link"]),
        ("[[peers", ["scenario.toml", "TOML"]),
    ],
    ids=["unknown-key", "impossible-link", "unknown-peer", "too-large", "no-link-to-cut", "no-toml"],
)
def test_scenario_that_cannot_be(peer_env, text: str, words: list[str]) -> None:
    path = peer_env.folder / "scenario.toml"
    path.write_text(text)
    peer_env.refuses(2, words, "lab", "run", path)
    assert not (peer_env.folder / "out").exists()


def test_unknown_scenario(peer_env) -> None:
    peer_env.refuses(2, ["home-line", "home-lines"], "lab", "run", "home-line")


def test_folder_with_something_in_it(peer_env) -> None:
    path, out = peer_env.folder / "scenario.toml", peer_env.folder / "out"
    path.write_text(SCENARIO)
    out.mkdir()
    (out / "mine").touch()
    peer_env.refuses(2, ["out", "not empty", "--out"], "lab", "run", path, "--out", out)
    assert (out / "mine").exists()


@pytest.mark.parametrize("command", [["report"], ["compare", "."]], ids=["report", "compare"])
def test_folder_that_no_lab_wrote(peer_env, tmp_path: Path, command: list[str]) -> None:
    peer_env.refuses(2, ["lab.json", "p2pllm lab run"], "lab", *command, tmp_path)


def test_scenarios_are_listed_one_a_line(peer_env) -> None:
    result = peer_env.p2pllm("lab", "scenarios")
    assert result.returncode == 0
    names = [line.split()[0] for line in result.stdout.splitlines()]
    assert names == [name for name, _ in shipped()]
