"""PeerSettings: which source wins, and what is refused."""

import os
from pathlib import Path

import pytest

from p2pllm.errors import SettingsError
from p2pllm.settings import PeerSettings, load_settings, new_runtime_dir, settings_file


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No settings but those of the test."""
    for name in os.environ:
        if name.startswith("P2PLLM_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("P2PLLM_CONFIG", str(tmp_path))


def write(text: str) -> None:
    settings_file().write_text(text)


def test_flag_over_environment_over_file_over_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_settings().threads == 0
    write("threads = 1\ndisk_gb = 5")
    assert load_settings().threads == 1
    monkeypatch.setenv("P2PLLM_THREADS", "2")
    assert load_settings().threads == 2
    assert load_settings(threads=3).threads == 3
    assert load_settings(threads=None).threads == 2, "a flag that was not given says nothing"
    assert load_settings(threads=3).disk_gb == 5, "each field has its own strongest source"


def test_every_field_says_what_it_is_and_has_a_default() -> None:
    for name, field in PeerSettings.model_fields.items():
        assert field.description, name
        assert not field.is_required(), name


def test_settings_survive_the_way_to_the_daemon() -> None:
    settings = load_settings(announce=("/ip4/192.0.2.1/tcp/4001",), nat=False, home=Path("/x"))
    assert PeerSettings.model_validate_json(settings.model_dump_json()) == settings


@pytest.mark.parametrize("spelling", ["/ip4/192.0.2.1/tcp/1,/ip6/::1/tcp/1", " /ip4/192.0.2.1/tcp/1 , /ip6/::1/tcp/1,"])
def test_several_addresses_in_one_variable(spelling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("P2PLLM_ANNOUNCE", spelling)
    assert load_settings().announce == ("/ip4/192.0.2.1/tcp/1", "/ip6/::1/tcp/1")


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("device", "tpu", r"device does not fit \(it is 'tpu'\): auto, cpu"),
        ("device", "cuda:", "device"),
        ("threads", -1, "threads: must be greater than or equal to 0"),
        ("threads", "many", "threads: must be a valid integer"),
        ("micro_batch", 10**6, "micro_batch"),
        ("listen_port", 65536, "listen_port: must be less than or equal to 65535"),
        ("listen_host", "example.org", "listen_host: must be an IP address"),
        ("announce", ("example.org:4001",), "announce: .*no multiaddress"),
        ("announce", ("/ip4/192.0.2.1/tcp/1,rubbish",), "announce: .*no multiaddress"),
        ("disk_gb", 0, "disk_gb: must be greater than 0"),
        ("disk_gb", float("inf"), "disk_gb"),
        ("startup_timeout_s", float("nan"), "startup_timeout_s"),
        ("nonsense", 1, "nonsense is not a known field"),
    ],
)
def test_a_wrong_value_names_its_field_and_where_to_look(name: str, value: object, words: str) -> None:
    with pytest.raises(SettingsError, match=words) as caught:
        load_settings(**{name: value})
    assert str(settings_file()) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["threads = = 1", "threads = 1\nthreads = 2", "\0"])
def test_a_broken_file_is_named(text: str) -> None:
    write(text)
    with pytest.raises(SettingsError, match="not valid TOML"):
        load_settings()


def test_a_settings_file_that_is_a_folder_does_no_harm() -> None:
    settings_file().mkdir()
    assert load_settings() == PeerSettings()


def test_runtime_folders_are_short_and_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/7")
    first, second = new_runtime_dir(), new_runtime_dir()
    assert first != second and first.parent == Path("/run/user/7")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / ("deep" * 30)))
    assert len(os.fsencode(new_runtime_dir())) < 85
    assert not new_runtime_dir().exists()
