"""The meter: what all peers of a machine moved this month, over restarts and into the next month."""

from __future__ import annotations

import datetime
import json
from pathlib import Path

import pytest

from p2pllm.network.pacing import ON_THE_LINE
from p2pllm_peers.meter import FILE, MONTHS, SAVE_BYTES, Meter

NOVEMBER, DECEMBER = datetime.datetime(2026, 11, 30, 23, 59), datetime.datetime(2026, 12, 1)


def peer(home: Path, run: str, name: str) -> Path:
    folder = home / "runs" / run / name
    folder.mkdir(parents=True)
    return folder


def test_it_counts_over_restarts_and_begins_anew_with_the_month(tmp_path: Path) -> None:
    moved, folder = [0], peer(tmp_path, "a", "volunteer")
    first = Meter(folder, lambda: moved[0])
    assert first.used(NOVEMBER) == 0
    moved[0] = 10_000_000
    assert first.used(NOVEMBER) == pytest.approx(10e6 * ON_THE_LINE)
    moved[0] += 100
    first.save()
    again = Meter(folder, lambda: 7)
    assert again.used(NOVEMBER) == pytest.approx(10_000_100 * ON_THE_LINE, abs=1)
    assert again.used(DECEMBER) == 0


def test_what_was_moved_before_a_month_began_is_not_of_it(tmp_path: Path) -> None:
    moved = [5_000_000]
    meter = Meter(peer(tmp_path, "a", "x"), lambda: moved[0])
    meter.used(NOVEMBER)
    moved[0] += 3_000_000
    assert meter.used(DECEMBER) == 0
    moved[0] += 1_000_000
    assert meter.used(DECEMBER) == pytest.approx(1e6 * ON_THE_LINE, abs=1)


def test_all_peers_of_the_machine_count_and_broken_files_do_not(tmp_path: Path) -> None:
    moved = [0, 0]
    one, other = peer(tmp_path, "a", "x"), peer(tmp_path, "b", "y")
    first, second = Meter(one, lambda: moved[0]), Meter(other, lambda: moved[1])
    first.used(NOVEMBER), second.used(NOVEMBER)
    moved[:] = [4_000_000, 2_000_000]
    second.used(NOVEMBER)
    assert first.used(NOVEMBER) == pytest.approx(6e6 * ON_THE_LINE, abs=2)
    (peer(tmp_path, "c", "z") / FILE).write_text("[")
    (peer(tmp_path, "d", "z") / FILE).write_text(json.dumps({"2026-10": 10**12}))
    (peer(tmp_path, "e", "z") / FILE).write_text('{"2026-11": null}')
    assert first.used(NOVEMBER) == pytest.approx(6e6 * ON_THE_LINE, abs=2)


def test_a_clock_that_was_wrong_costs_no_count(tmp_path: Path) -> None:
    moved, folder = [0], peer(tmp_path, "a", "x")
    meter = Meter(folder, lambda: moved[0])
    meter.used(NOVEMBER)
    for year in range(1970, 1990):
        moved[0] += 2 * SAVE_BYTES
        meter.used(NOVEMBER)
        wrong = Meter(folder, lambda: moved[0])
        wrong.used(datetime.datetime(year, 1, 1))
        wrong.save()
    assert Meter(folder, lambda: 0).used(NOVEMBER) == pytest.approx(moved[0] * ON_THE_LINE, abs=30)
    assert len(json.loads((folder / FILE).read_text())) <= MONTHS


def test_a_killed_daemon_forgets_little(tmp_path: Path) -> None:
    moved, folder = [0], peer(tmp_path, "a", "x")
    meter = Meter(folder, lambda: moved[0])
    meter.used(NOVEMBER)
    for _ in range(50):
        moved[0] += 300_000
        meter.used(NOVEMBER)
    assert Meter(folder, lambda: 0).used(NOVEMBER) > moved[0] * ON_THE_LINE - SAVE_BYTES
