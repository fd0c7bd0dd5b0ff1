"""Numbers in words, at the places where a unit or a digit changes."""

import pytest

from p2pllm_peers.lab.reporting.words import compact, duration, median, size, spans


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "–"), (0, "0 B"), (2.64, "2.64 B"), (518.3, "518 B"), (999.4, "999 B"), (999.6, "1 kB"),
        (1914, "1.91 kB"), (999_499, "999 kB"), (999_501, "1 MB"), (12_345_678, "12.3 MB"), (999_600_000, "1 GB"),
        (999.6e9, "1,000 GB"), (1.2345e12, "1,234 GB"),
    ],
)  # fmt: skip
def test_bytes(value: float | None, words: str) -> None:
    assert size(value) == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (3599.6, "1 h 0 min"), (7500, "2 h 5 min")],
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_digits_that_matter() -> None:
    assert [compact(value) for value in (0.1234, 99.94, 100.4, 12345.6)] == ["0.123", "99.9", "100", "12,346"]


def test_median_of_what_is_known() -> None:
    assert median([{"s": 3.0}, {"s": None}, {"s": 1.0}], "s") == 2.0 and median([{"s": None}], "s") is None


def test_rounds_in_a_row() -> None:
    assert spans([4]) == "round 4" and spans([4, 5, 6, 9]) == "rounds 4-6, 9"
