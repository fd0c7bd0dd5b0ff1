"""The session that README shows, with the real command: start, join, status, generate, export, leave, go on."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import psutil
import pytest
from polling import until
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = [pytest.mark.swarm, pytest.mark.timeout(300)]


def statuses(env) -> dict[str, dict]:
    result = env.p2pllm_here("status", "--json")
    assert result.returncode == 0, result.stderr
    return {status["name"]: status for status in map(json.loads, result.stdout.splitlines())}


def test_two_terminals_of_one_machine(peer_env) -> None:
    env = peer_env
    started = env.p2pllm("start", env.write_run(), "--detach")
    assert started.returncode == 0, started.stderr
    invite = next(word for word in started.stdout.split() if word.startswith("p2pllm:"))

    # the other terminal: nothing but this string
    joined = env.p2pllm("join", invite, "--detach")
    assert joined.returncode == 0, joined.stderr

    def both_together() -> dict[str, dict] | None:
        found = statuses(env)
        both = [found.get("founder"), found.get("volunteer")]
        if any(status is None or not status.get("peers") or status["loss"] is None for status in both):
            return None
        return found

    found = until(both_together, "two peers train together")
    volunteer = found["volunteer"]
    assert volunteer["run_id"] == found["founder"]["run_id"]
    assert volunteer["peer_id"] in {peer["peer"] for peer in found["founder"]["peers"]}
    assert volunteer["loss"] is not None and volunteer["bytes_sent"] > 0 and volunteer["bytes_received"] > 0

    (facts,) = env.home.glob("runs/*/volunteer/daemon.json")
    children = psutil.Process(json.loads(facts.read_text())["pid"]).children()
    assert sorted(child.nice() for child in children) == [0, 10], "p2pd as usual, the worker behind everything else"

    written = env.p2pllm_here(
        "generate", "--prompt", "1 little", "--tokens", "20", "--seed", "1", "--name", "volunteer"
    )
    assert written.returncode == 0, written.stderr
    assert written.stdout.startswith("1 little") and len(written.stdout) > len("1 little\n")

    exported = env.p2pllm_here("export", env.folder / "model")
    assert exported.returncode == 0, exported.stderr
    model = AutoModelForCausalLM.from_pretrained(env.folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(env.folder / "model")
    ids = tokenizer("1 little", return_tensors="pt").input_ids
    assert model(ids).logits.shape[:2] == ids.shape

    assert env.p2pllm("leave", "--name", "volunteer").returncode == 0
    before = statuses(env)["volunteer"]
    assert before["phase"] == "stopped"

    # a second start goes on from there, without an invite
    again = env.p2pllm("join", "--name", "volunteer", "--detach")
    assert again.returncode == 0, again.stderr
    back = until(lambda: (statuses(env).get("volunteer") or {}).get("peers"), "the volunteer is back")
    assert back[0]["peer"] == found["founder"]["peer_id"]
    assert statuses(env)["volunteer"]["peer_id"] == volunteer["peer_id"]
    assert statuses(env)["volunteer"]["round"] >= volunteer["round"]

    assert env.p2pllm("leave", "--name", "volunteer").returncode == 0
    assert env.p2pllm("leave").returncode == 0
    assert env.left_behind() == []


def test_founder_goes_on_with_its_run(peer_env) -> None:
    env = peer_env
    run = env.write_run()
    reached = 0
    for _ in range(2):
        started = env.p2pllm("start", run, "--detach")
        assert started.returncode == 0, started.stderr
        until(lambda least=reached: statuses(env)["founder"].get("round", 0) > least, "a round is committed")
        reached = statuses(env)["founder"]["round"]
        assert env.p2pllm("leave").returncode == 0
    assert len(list((env.home / "runs").iterdir())) == 1, "the same file founded two runs"
    records = next(env.home.glob("runs/*/founder/rounds.jsonl")).read_text().splitlines()
    rounds = [json.loads(line)["round"] for line in records]
    assert rounds == sorted(set(rounds)), "rounds were trained twice"
    assert rounds[-1] > rounds[0]


def test_foreground_prints_plain_lines_and_leaves_on_interrupt(peer_env) -> None:
    env = peer_env
    command = [sys.executable, "-m", "p2pllm_cli.main", "start", str(env.write_run())]
    with subprocess.Popen(
        command, env=env.variables, cwd=env.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("round "):
                break
        else:
            pytest.fail(f"no round was shown: {process.stderr.read() if process.stderr else ''}")
        assert "\x1b" not in line
        process.send_signal(signal.SIGINT)
        begin = time.monotonic()
        rest, errors = process.communicate(timeout=30)
        assert time.monotonic() - begin < 10, "leaving took longer than promised"
    assert process.returncode == 0, errors
    assert rest.splitlines()[-1].startswith("Left run ")
    assert env.left_behind() == []


STRATEGIES = {
    "diloco": [
        ("[round]", '[round]\nstrategy = "diloco"\ncodec = "int8"\noverlap = true\nfragments = 2'),
        ("[data]", '[optimizer]\ntype = "muon"\n\n[data]'),
    ],
    "sparse_loco": [("[round]", '[round]\nstrategy = "sparse_loco"\noverlap = true')],
}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_swarm_without_terminals_trains_to_its_last_round(peer_env, strategy: str) -> None:
    out = peer_env.folder / "out"
    run_file = peer_env.write_run(*STRATEGIES[strategy])
    peer_env.variables["P2PLLM_DEVICE"] = "cpu,cpu"  # two workers a peer
    run = peer_env.p2pllm("swarm", run_file, "--peers", 2, "--rounds", 5, "--out", out, timeout=120)
    assert run.returncode == 0, run.stdout + run.stderr
    report = json.loads((out / "report.json").read_text())
    assert report["swarm"]["completed"] and report["swarm"]["rounds"] == 5 and report["left_over"] == []
    assert report["diverged"] == [] and report["rounds"][-1]["loss"] < report["rounds"][0]["loss"]
    assert peer_env.left_behind() == []
