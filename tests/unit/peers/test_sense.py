"""Settings: each bad value, and each pair that makes no sense, is one sentence, exit code 2, and changes nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from p2pllm.errors import SettingsError
from p2pllm.settings import PeerSettings, load_settings
from p2pllm_peers import sense
from p2pllm_peers.folders import PeerFolder, RunFolder
from p2pllm_peers.sense import Here, check

REFUSED = [
    ("home=", "absolute"), ("home=relative", "absolute"), ("home=/dev/null", "not a folder"),
    ("cache=/dev/null", "not a folder"), ("cache=here", "absolute"),
    ("device=tpu", "cuda:N"), ("device=cuda:0,cuda:0", "twice"), ("threads=-1", "threads"), ("threads=2000", "1024"),
    ("nice=20", "19"), ("nice=-1", "nice"), ("nice=3.5", "integer"), ("io_idle=maybe", "boolean"),
    ("micro_batch=-1", "micro_batch"), ("listen_host=x", "IP address"), ("listen_port=70000", "65535"),
    ("announce=x", "multiaddress"), ("announce=/ip4/192.0.2.1/tcp/4001", "listen_port"), ("nat=2", "boolean"),
    ("upload_mbit=-1", "upload_mbit"), ("download_mbit=x", "number"), ("monthly_gb=-1", "monthly_gb"),
    ("data_path=/nowhere/at/all", "does not exist"), ("disk_gb=0", "greater than 0"), ("cpu_percent=0", "cpu_percent"),
    ("cpu_percent=nan", "cpu_percent"), ("duty_percent=0", "duty_percent"), ("gpu_memory_gb=-1", "gpu_memory_gb"),
    ("hours=7-7", "begins when it ends"), ("hours=22:-7", "22:30-07:00"), ("hours=７-8", "22:30-07:00"),
    ("hours=24-7", "22:30-07:00"), ("only_on_mains=perhaps", "boolean"), ("only_when_idle=", "boolean"),
    ("max_celsius=200", "150"), ("max_celsius=20", "pause for good"), ("startup_timeout_s=0", "startup_timeout_s"),
    ("direct_port=70000", "65535"), ("listen_port=4001 direct_port=4001", "both 4001"),
    ("nonsense=1", "not a known field"), ("nice=3 nice=4", "twice"), ("device=cpu gpu_memory_gb=4", "gpu_memory_gb=0"),
    ("Nice=5", "write it as nice."), ("CPU_PERCENT=40", "write it as cpu_percent."),
    ("only-on-mains=yes only_on_mains=no", "twice"), ("data_path=/" + 300 * "a", "does not exist"),
]  # fmt: skip


def test_the_table_has_every_setting() -> None:
    assert {change.partition("=")[0] for change, _ in REFUSED} >= set(PeerSettings.model_fields)


@pytest.fixture(scope="module")
def machine(make_peer_env):
    """Takes part in nothing, and has a settings file."""
    env = make_peer_env()
    for name in ("P2PLLM_LISTEN_HOST", "P2PLLM_NAT", "P2PLLM_THREADS", "P2PLLM_HOME", "P2PLLM_CACHE"):
        env.variables.pop(name, None)
    (env.folder / "config").mkdir(exist_ok=True)
    (env.folder / "config" / "settings.toml").write_text("# mine\nnice = 7\n")
    return env


@pytest.mark.parametrize(("changes", "words"), REFUSED, ids=[change for change, _ in REFUSED])
def test_the_command_refuses(machine, changes: str, words: str) -> None:
    machine.refuses(2, [words], "set", *changes.split(" "))
    assert (machine.folder / "config" / "settings.toml").read_text() == "# mine\nnice = 7\n"


@pytest.mark.parametrize(
    ("settings", "changed", "here", "words"),
    [
        ({"gpu_memory_gb": 4, "device": "cpu"}, "gpu_memory_gb", Here(), "device = cpu"),
        ({"gpu_memory_gb": 4, "device": "mps"}, "device", Here(), "device = mps"),
        ({"gpu_memory_gb": 4, "device": "cpu"}, "nice", Here(), ""),  # it was so before
        ({"gpu_memory_gb": 4, "device": "auto"}, "gpu_memory_gb", Here(), ""),
        ({"gpu_memory_gb": 0.7, "device": "auto"}, "gpu_memory_gb", Here(), "leaves nothing for a model"),
        ({"gpu_memory_gb": 4, "device": "auto"}, "gpu_memory_gb", Here(has_cuda=False), "finds none on this machine"),
        ({"gpu_memory_gb": 4, "device": "cuda:0"}, "gpu_memory_gb", Here(has_cuda=False), ""),  # it is hidden, perhaps
        ({"only_when_idle": True}, "only_when_idle", Here(tells_idleness=False), "no effect here"),
        ({"only_when_idle": True}, "only_when_idle", Here(), ""),
        ({"only_when_idle": False}, "only_when_idle", Here(tells_idleness=False), ""),
        ({"gpu_memory_gb": 4, "device": "cpu,cuda:0"}, "device", Here(), ""),
        ({"announce": "/ip4/192.0.2.1/tcp/1", "listen_port": 0}, "listen_port", Here(), "listen_port"),
        ({"announce": "/ip4/192.0.2.1/tcp/1", "listen_port": 1}, "announce", Here(), ""),
        ({"direct_port": 4001, "listen_port": 4002}, "direct_port", Here(), ""),
        ({"direct_port": 0, "listen_port": 0}, "direct_port", Here(), ""),
        ({"max_celsius": 80}, "max_celsius", Here(has_sensors=False), "no sensor"),
        ({"max_celsius": 80}, "max_celsius", Here(), ""),
        ({"max_celsius": 0}, "max_celsius", Here(has_sensors=False), ""),
        ({"monthly_gb": 1}, "monthly_gb", Here(round_bytes=1.2e9), "1.2 GB"),
        ({"monthly_gb": 2}, "monthly_gb", Here(round_bytes=1.2e9), ""),
        ({"monthly_gb": 0}, "monthly_gb", Here(round_bytes=1.2e9), ""),
        ({"disk_gb": 0.5}, "disk_gb", Here(kept_bytes=600_000_000), "0.6 GB"),
        ({"disk_gb": 0.7}, "disk_gb", Here(kept_bytes=600_000_000), ""),
        # what looks odd and is meant
        ({"hours": "22-7", "only_when_idle": True, "duty_percent": 1, "cpu_percent": 1}, "hours", Here(), ""),
    ],
)
def test_what_does_not_go_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, object], changed: str, here: Here, words: str
) -> None:
    quiet(tmp_path, monkeypatch)
    loaded = load_settings(**settings)
    if not words:
        return check(loaded, {changed}, here)
    with pytest.raises(SettingsError, match="nothing was changed") as caught:
        check(loaded, {changed}, here)
    assert words in str(caught.value)
    return None


def quiet(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("P2PLLM_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("P2PLLM_CONFIG", str(folder))


def test_the_environment_is_stronger_than_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quiet(tmp_path, monkeypatch)
    monkeypatch.setenv("P2PLLM_NICE", "5")
    with pytest.raises(SettingsError, match="P2PLLM_NICE"):
        check(load_settings(nice=7), {"nice"}, Here())
    check(load_settings(nice=5), {"nice"}, Here())
    check(load_settings(cpu_percent=50), {"cpu_percent"}, Here())


def test_running_peers_say_what_a_round_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peer = PeerFolder(RunFolder(tmp_path, "ab" * 32), "volunteer")
    (peer.path / "aggregates").mkdir(parents=True)
    (peer.path / "aggregates" / "one").write_bytes(bytes(700))
    lines = [{"bytes_sent": 1, "bytes_received": 1}, {"bytes_sent": 10**9, "bytes_received": 10**9}]
    (peer.path / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (peer.run.path / "manifest.json").write_text("{}")
    running: list[object] = [{"socket": "here"}]
    monkeypatch.setattr(PeerFolder, "running", lambda self: running[0])
    monkeypatch.setattr(sense, "all_runs", lambda home: [type("Run", (), {"peers": lambda self: [peer]})()])
    found = Here.now(tmp_path, PeerSettings())
    assert found.round_bytes > 2e9 and found.kept_bytes == 700
    running[0] = None
    assert (Here.now(tmp_path, PeerSettings()).round_bytes, Here.now(tmp_path, PeerSettings()).kept_bytes) == (0, 0)
