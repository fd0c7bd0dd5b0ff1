"""Changing settings by a command: checked first, comments kept, nothing half done."""

from __future__ import annotations

from pathlib import Path

import pytest

from p2pllm.errors import SettingsError
from p2pllm.settings import PeerSettings, load_settings
from p2pllm.settings_file import LIVE, change_settings, with_changes


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("P2PLLM_CONFIG", str(tmp_path))
    return tmp_path / "settings.toml"


def test_a_file_is_made_and_changed_and_its_comments_stay(file: Path):
    assert change_settings({"cpu_percent": "50"}) == {"cpu_percent": 50.0}
    file.write_text("# mine\n" + file.read_text() + "nice = 3  # gentle\n")
    assert change_settings({"hours": "22-7", "only_on_mains": "yes", "nice": "4"}) == {
        "hours": "22-7",
        "only_on_mains": True,
        "nice": 4,
    }
    text = file.read_text()
    assert text.startswith("# mine\n") and "# gentle" in text
    settings = load_settings()
    assert (settings.cpu_percent, settings.hours, settings.only_on_mains, settings.nice) == (50, "22-7", True, 4)
    change_settings({"announce": "/ip4/192.0.2.1/tcp/1,/ip4/192.0.2.2/tcp/2", "home": str(file.parent)})
    assert len(load_settings().announce) == 2 and load_settings().home == file.parent
    assert [entry.name for entry in file.parent.iterdir()] == ["settings.toml"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"cpu_percent": "0"}, "cpu_percent"),
        ({"cpu_percent": "101"}, "cpu_percent"),
        ({"cpu_percent": "half"}, "cpu_percent"),
        ({"upload_mbit": "-1"}, "upload_mbit"),
        ({"cpu_percents": "50"}, "did you mean cpu_percent"),
        ({"Nice": "5"}, "write it as nice"),
        ({"data_path": "/text/\udcff"}, "no Unicode text"),
        ({"hours": "25-7"}, "22:30-07:00"),
        ({"only_on_mains": "perhaps"}, "only_on_mains"),
        ({"nice": "3", "max_celsius": "1000"}, "max_celsius"),
    ],
)
def test_what_is_not_valid_changes_nothing(file: Path, changes: dict[str, str], says: str):
    file.write_text("nice = 7\n")
    with pytest.raises(SettingsError) as caught:
        change_settings(changes)
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert file.read_text() == "nice = 7\n"


def test_a_damaged_file_is_not_overwritten(file: Path):
    file.write_text("nice = = 7\n")
    with pytest.raises(SettingsError, match="mend it"):
        change_settings({"nice": "3"})
    assert file.read_text() == "nice = = 7\n"


def test_a_running_peer_takes_what_it_can(file: Path):
    settings = load_settings(threads=3, cpu_percent=80)
    changed = with_changes(settings, {"cpu_percent": 40, "threads": 9, "hours": "1-2", "nice": 4})
    assert (changed.cpu_percent, changed.threads, changed.hours, changed.nice) == (40, 3, "1-2", 4)
    assert with_changes(settings, {}) == settings
    with pytest.raises(SettingsError, match="cpu_percent"):
        with_changes(settings, {"cpu_percent": 0})
    assert set(PeerSettings.model_fields) >= LIVE
