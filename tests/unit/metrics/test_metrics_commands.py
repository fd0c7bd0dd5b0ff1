"""`p2pllm metrics`: what its commands print and write, what they refuse, and that Ctrl+C is an end in order."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from metric_samples import RUN_ID, append, make_peer, record

from p2pllm.identity import Identity
from p2pllm.manifest import RunDraft
from p2pllm.metric_names import METRICS
from p2pllm.record_fields import FIELDS
from p2pllm_peers.folders import SIGNING_DOMAIN, RunFolder, key_file


def test_records_are_printed_as_they_are(peer_env: Any) -> None:
    peer = make_peer(peer_env.home)
    append(peer, record(1), record(2), end='{"rou')
    result = peer_env.p2pllm_here("metrics", "jsonl")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.splitlines() == [record(1).to_json(), record(2).to_json()]


def test_event_files_are_written_once(peer_env: Any) -> None:
    append(make_peer(peer_env.home), record(1), record(2))
    append(make_peer(peer_env.home, "volunteer"), record(1))
    for written in ("Wrote 3 rounds", "Wrote 0 rounds"):
        result = peer_env.p2pllm_here("metrics", "tensorboard", "out")
        assert (result.returncode, result.stderr) == (0, "")
        assert result.stdout.startswith(written) and "tensorboard --logdir out" in result.stdout
    files = sorted(str(path.relative_to(peer_env.folder)) for path in peer_env.folder.glob("out/*/*/*"))
    name = f"out/run-{RUN_ID[:8]}"
    assert [file.rpartition("/")[0] for file in files] == [f"{name}/founder", f"{name}/volunteer"]


def test_two_programs_never_write_the_same_event_files(peer_env: Any) -> None:
    append(make_peer(peer_env.home), record(1))
    output: Path = peer_env.folder / "output.txt"
    process = peer_env.start("metrics", "tensorboard", "out", "--follow", output=output)
    end = time.monotonic() + 30
    while not list(peer_env.folder.glob("out/*/*/events*")):
        assert process.poll() is None and time.monotonic() < end, output.read_text()
        time.sleep(0.02)  # another process writes; there is no event to wait for
    peer_env.refuses(2, ["another program writes already", "founder"], "metrics", "tensorboard", "out")
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 0
    later = peer_env.p2pllm_here("metrics", "tensorboard", "out").stdout
    # the interrupt may come between the file and its first round, which is then left to the second program
    assert sorted(said.split()[1] for said in (output.read_text(), later)) == ["0", "1"]


def test_wandb_is_told_rounds_and_manifest(peer_env: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    founder = Identity.load_or_create(key_file(peer_env.home, "founder"))
    manifest = RunDraft().seal(founder=founder.peer_id, initial_state="5a" * 32, tokenizer="bytes", data_digest="")
    run = RunFolder(peer_env.home, manifest.run_id)
    run.save(manifest, founder.sign(SIGNING_DOMAIN, manifest.canonical_bytes()), None)
    os.close(run.peer("founder").lock())
    append(run.peer("founder"), record(1), record(2))
    began, logged = dict[str, Any](), list[int]()

    def init(**arguments: Any) -> SimpleNamespace:
        began.update(arguments)
        log = lambda values, step, commit: logged.append(step)  # noqa: E731
        return SimpleNamespace(step=0, log=log, finish=lambda: logged.append(-1))

    fake = SimpleNamespace(init=init, Settings=lambda **settings: settings, Error=OSError)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    result = peer_env.p2pllm_here("metrics", "wandb", "--project", "mine")
    assert (result.returncode, result.stderr, result.stdout) == (0, "", "Logged 2 rounds.\n")
    assert logged == [1, 2, -1]
    assert began["config"] == manifest.model_dump(mode="json") and json.dumps(began["config"])
    assert (began["project"], began["id"]) == ("mine", f"{manifest.run_id[:16]}-{founder.peer_id[-16:]}")


def test_the_table_and_the_dashboard_are_printed(peer_env: Any) -> None:
    shown = peer_env.p2pllm_here("metrics", "names").stdout
    assert all(f"| `{metric.name}` |" in shown for metric in METRICS)
    assert all(f"| `{name}` |" in shown for name in FIELDS)
    assert json.loads(peer_env.p2pllm_here("metrics", "grafana").stdout)["title"] == "p2pllm"


def test_what_cannot_be_used_is_one_sentence(peer_env: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    peer_env.refuses(2, ["no run yet", "p2pllm join"], "metrics", "jsonl")
    peer_env.refuses(2, ["no run yet"], "metrics", "tensorboard", "out")
    (peer_env.folder / "file").write_text("")
    peer_env.refuses(2, ["is a file", "--home"], "metrics", "serve", "--home", "file")
    make_peer(peer_env.home)
    peer_env.refuses(2, ["no peer named 'x'"], "metrics", "jsonl", "--name", "x")
    monkeypatch.setitem(sys.modules, "tensorboardX.proto.event_pb2", None)
    peer_env.refuses(2, ["manifest"], "metrics", "wandb")  # it is damaged, and W&B would be told what is in it
    peer_env.refuses(2, ["pip install -e '.[tensorboard]'"], "metrics", "tensorboard", "out")
    assert not (peer_env.folder / "out").exists()


@pytest.mark.parametrize(("number", "name"), [(signal.SIGINT, "Ctrl+C"), (signal.SIGTERM, "a service manager")])
def test_serving_ends_in_order(peer_env: Any, number: signal.Signals, name: str) -> None:
    append(make_peer(peer_env.home), record(1))
    output: Path = peer_env.folder / "output.txt"
    process = peer_env.start("metrics", "serve", "--port", "0", output=output)
    end = time.monotonic() + 30
    while "Ctrl+C" not in output.read_text():
        assert process.poll() is None and time.monotonic() < end, output.read_text()
        time.sleep(0.02)  # another process prints; there is no event to wait for
    url = output.read_text().split()[1].rstrip(";")
    with urllib.request.urlopen(url, timeout=10) as reply:  # noqa: S310 - our own server
        assert b'p2pllm_up{peer="founder",run="' in reply.read()
    process.send_signal(number)
    assert process.wait(10) == 0
    assert len(output.read_text().splitlines()) == 1, output.read_text()
