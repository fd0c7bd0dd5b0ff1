"""Columns of rounds: what is kept of a long run."""

from __future__ import annotations

import itertools

from dashboard_samples import record

from p2pllm_peers.dashboard.history import THINNED, WHOLE, History, Row, columns


def filled(rounds: int, every: int = 7) -> History:
    history = History()
    for round_ in range(1, rounds + 1):
        history.add(Row.of(record(round_, validation_loss=2.5 if round_ % every == 0 else None)))
    return history


def test_a_short_run_is_whole() -> None:
    rows = filled(WHOLE + THINNED).rows()
    assert [row.round for row in rows] == list(range(1, WHOLE + THINNED + 1))


def test_older_rounds_are_thinned_evenly_and_the_newest_are_whole() -> None:
    for rounds in (WHOLE + THINNED + 1, 5000, 20_000):
        history = filled(rounds)
        shown = [row.round for row in history.rows()]
        assert THINNED / 2 <= len(shown) - WHOLE <= THINNED
        assert shown[-WHOLE:] == list(range(rounds - WHOLE + 1, rounds + 1))
        gaps = [after - before for before, after in itertools.pairwise(shown)]
        assert min(gaps) >= 1 and max(gaps) < 2 * history.stride


def test_validated_rounds_stay() -> None:
    history = filled(5000, every=10)
    validated = [row for row in history.rows() if row.validation_loss is not None]
    assert history.stride < 10 and len(validated) == 500


def test_another_branch_takes_the_place_of_the_rounds_it_replaces() -> None:
    history = filled(WHOLE + 50)
    history.add(Row.of(record(100)))
    assert [row.round for row in history.rows()] == list(range(1, 101))
    assert history.rows(after=98)[0].round == 99


def test_numbers_are_rounded_and_no_rows_are_empty_columns() -> None:
    history = History()
    assert set(map(tuple, columns([])["parts"].values())) == {()} and columns([])["round"] == []
    history.add(Row.of(record(2)))
    found = columns(history.rows())
    assert (found["loss"], found["time"], found["parts"]["exchange"]) == ([2.6235], [1795395660.2], [0.251])
