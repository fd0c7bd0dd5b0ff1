"""`p2pllm doctor` for real: it computes, asks a run's peer how it looks from outside, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import json

import psutil
import pytest

from p2pllm.identity import Identity
from p2pllm.invite import Invite

pytestmark = [pytest.mark.swarm, pytest.mark.timeout(240)]


@pytest.fixture(scope="module")
def founder(make_peer_env):
    """A machine whose founder trains the tiny run, and the run's invite."""
    env = make_peer_env()
    started = env.p2pllm("start", env.write_run(), "--detach")
    assert started.returncode == 0, started.stderr
    env.invite = next(word for word in started.stdout.split() if word.startswith("p2pllm:"))
    yield env
    env.clean()


def check_untouched(env) -> None:
    """No process, no socket, and no file of any kind in this machine's folders."""
    assert env.left_behind() == []
    assert not env.home.exists() and not (env.folder / "cache").exists()


def test_a_machine_is_examined_for_a_run(founder, peer_env) -> None:
    result = peer_env.p2pllm("doctor", founder.invite, "--seconds", 1, "--json", timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(result.stdout.splitlines()) == 1 and result.stderr == ""
    said = json.loads(result.stdout)
    assert said["can_take_part"] and said["run"]["name"] == "tiny" and said["run"]["known"]
    assert said["run"]["run_id"] == Invite.decode(founder.invite).run_id
    compute, outside, traffic = said["compute"], said["outside"], said["traffic"]
    assert compute["tokens_per_s"] > 0 and compute["micro_batch"] >= 1 and compute["device"]
    assert said["memory"]["parameters_bytes"] == 4 * compute["parameters"] > 0
    assert said["memory"]["needed_bytes"] > compute["worker_peak_bytes"] > 0
    assert outside["how"] == "direct" and outside["scope"] == "this machine" and outside["seen_as"] == "127.0.0.1"
    assert abs(outside["clock_skew_s"]) <= outside["clock_error_s"] + 0.1, "one machine has one clock"
    assert outside["peers"] == 1 and outside["upload_mbit"] > 0 and outside["swarm_tokens_per_s"] >= 0
    assert traffic["members"] == 2 and traffic["up_mb_per_hour"] > 0
    assert traffic["round_up_bytes"] == 4 * compute["parameters"], "half of all, twice"
    assert said["disk"]["text_problem"] == "" and said["disk_needed_bytes"] > 0
    assert set(said["versions"]) == {"p2pllm", "python", "hivemind", "torch", "transformers", "p2pd"}
    check_untouched(peer_env)

    status = json.loads(founder.p2pllm_here("status", "--json").stdout)
    assert status["peers"] == [], "the doctor never became a member"


def test_plain_lines_and_a_machine_without_the_text(peer_env) -> None:
    run_file = peer_env.write_run(("[round]", '[round]\nstrategy = "sparse_loco"'))
    options = ("--seconds", 0.5, "--upload", 8, "--data", "/nowhere/text")
    result = peer_env.p2pllm("doctor", "--run-file", run_file, *options, timeout=120)
    assert result.returncode == 1, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    title = lines.index("This machine for the run file tiny (sparse_loco)")
    checks = dict(line.split(": ", 1) for line in lines[title + 1 : -2])
    assert checks["text"].startswith("no: ") and "/nowhere/text" in checks["text"]
    assert checks["speed"].startswith("ok: "), "it is measured all the same"
    assert "inner optimizer" in checks["memory"] and "8.0 Mbit/s" in checks["line up"]
    assert checks["clock"].startswith("-: ") and checks["reachable"].startswith("-: ")
    assert "/nowhere/text" in lines[-2] and lines[-1].startswith("What would help most: ") and "--data" in lines[-1]
    assert "\x1b" not in result.stdout and result.stderr == ""
    check_untouched(peer_env)


def test_nobody_answers(peer_env) -> None:
    peer = Identity.generate().peer_id
    gone = Invite("ab" * 32, peer, ("/ip4/127.0.0.1/tcp/1",)).encode()
    result = peer_env.p2pllm("doctor", gone, timeout=60)
    assert result.returncode == 1 and "fresh invite" in result.stderr
    assert result.stderr.startswith("p2pllm: ") and len(result.stderr.splitlines()) == 1
    check_untouched(peer_env)


def test_a_model_that_cannot_be_built(peer_env) -> None:
    run_file = peer_env.write_run(('"llama"', '"lama"'))
    result = peer_env.p2pllm("doctor", "--run-file", run_file, timeout=60)
    assert result.returncode == 2 and "llama" in result.stderr
    check_untouched(peer_env)


def test_what_the_system_kills_for_want_of_memory_is_seen(peer_env) -> None:
    """A bound on address space cannot do it: torch reports that. So the worker is killed, as the system would."""
    out = peer_env.folder / "out"
    with peer_env.start("doctor", "--run-file", peer_env.write_run(), output=out) as process:
        killed: set[int] = set()
        while process.poll() is None:
            for found in peer_env.processes() if "building the model" in out.read_text() else ():
                with contextlib.suppress(psutil.NoSuchProcess):  # it ended meanwhile
                    if "p2pllm_peers.worker" in " ".join(found.cmdline()) and found.pid not in killed:
                        found.kill()
                        killed.add(found.pid)
    said = out.read_text()
    assert process.returncode == 1 and len(killed) >= 3, said
    assert "trying a smaller micro-batch" in said and "3 times for want of memory (signal 9)" in said
    assert "Free memory" in said.splitlines()[-1]
    check_untouched(peer_env)
