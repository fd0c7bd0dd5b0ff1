"""Scenario files: what is taken, what a short form changes, and what follows for each peer."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError
from scenario_files import GOOD, event, written

from p2pllm.manifest import RunDraft
from p2pllm_peers.lab.scenario import (
    Churn,
    Event,
    Link,
    Peers,
    Scenario,
    Verdict,
    describe,
    fits,
    load_scenario,
)


def test_a_good_file(tmp_path: Path) -> None:
    scenario = load_scenario(written(tmp_path, GOOD + event("kill", peer='"home-1"', for_s=10)))
    assert scenario.name == "mine" and scenario.about == "for tests" and scenario.seed == 0
    assert scenario.names() == ["home-0", "home-1", "late"]
    assert scenario.run.round.samples == 8 and scenario.run.model == RunDraft().model
    assert scenario.events == (Event(at_s=30, do="kill", peer="home-1", for_s=10),)
    with pytest.raises(ValidationError):
        scenario.seed = 3  # type: ignore[misc]


def test_an_empty_file_is_one_peer_on_loopback(tmp_path: Path) -> None:
    scenario = load_scenario(written(tmp_path, "", "least.toml"))
    assert scenario == Scenario(name="least")
    (spec,) = scenario.peer_specs()
    assert (spec.name, spec.link, spec.cores, spec.start_s, spec.disk_mb) == ("peer", None, 0, 0, 0)


def test_a_file_may_name_itself(tmp_path: Path) -> None:
    path = written(tmp_path, 'name = "other"', "A File With Spaces.toml")
    assert load_scenario(path).name == "other"


def test_specs_draw_delays_from_the_seed_and_the_name(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD)
    specs = load_scenario(path).peer_specs()
    assert [(spec.name, spec.link_name, spec.cores, spec.start_s, spec.disk_mb) for spec in specs] == [
        ("home-0", "home", 0.5, 0, 0),
        ("home-1", "home", 0.5, 0, 0),
        ("late", "home", 0.0, 20, 64),
    ]
    delays = [spec.link.delay_ms for spec in specs if spec.link]
    assert len(set(delays)) == 3 and all(20 <= delay <= 60 for delay in delays if isinstance(delay, float))
    assert delays == [35.702, 53.042, 20.44], "the same on every machine"
    more = load_scenario(written(tmp_path, GOOD.replace("count = 2", "count = 3"))).peer_specs()
    assert {spec.name: spec.link for spec in specs}.items() <= {spec.name: spec.link for spec in more}.items()
    assert [spec.link for spec in load_scenario(path, seed=1).peer_specs()] != [spec.link for spec in specs]


def test_it_comes_back_from_json(tmp_path: Path) -> None:
    changes = "{up_mbit = 1}"
    text = GOOD + event("slow_link", peer='"home-0"', link=changes) + event("partition", groups='[["home-0"]]')
    scenario = load_scenario(written(tmp_path, text))
    again = Scenario.model_validate_json(scenario.model_dump_json())
    assert again == scenario and again.peer_specs() == scenario.peer_specs()


def test_the_short_form_replaces_tables_by_field_and_arrays_whole(tmp_path: Path) -> None:
    text = GOOD + event("kill", peer='"home-1"') + "[verdict]\nmin_rounds = 50\nmax_validation_loss = 3.0\n"
    text += """
    [short]
    duration_s = 40
    events = []
    [short.run.round]
    rounds = 20
    [short.links.home]
    loss = 0.1
    [short.verdict]
    min_rounds = 5
    """
    path = written(tmp_path, text)
    whole, short = load_scenario(path), load_scenario(path, short=True, seed=9)
    assert (whole.duration_s, whole.seed, len(whole.events), whole.links["home"].loss) == (100, 0, 1, 0)
    assert (short.duration_s, short.seed, len(short.events), short.links["home"].loss) == (40, 9, 0, 0.1)
    assert short.links["home"].up_mbit == 20 and short.alone_s == 5
    assert (short.run.round.rounds, short.run.round.samples) == (20, 8)
    assert (short.verdict.min_rounds, short.verdict.max_validation_loss) == (5, 3.0)


def test_the_seed_that_is_asked_for_is_stronger_than_any_in_the_file(tmp_path: Path) -> None:
    path = written(tmp_path, "seed = 1\n[short]\nseed = 2\n")
    assert [load_scenario(path, short=short).seed for short in (False, True)] == [1, 2]
    assert [load_scenario(path, short=short, seed=3).seed for short in (False, True)] == [3, 3]


def test_a_run_file_is_found_beside_the_scenario(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "book.txt").write_text("call me anything")
    (tmp_path / "runs" / "run.toml").write_text('seed = 5\n[data]\nsource = "text:book.txt"\n[round]\nsamples = 9\n')
    scenario = load_scenario(written(tmp_path, '[run]\nfile = "runs/run.toml"\n[run.round]\nrounds = 3\n'))
    assert scenario.run.data.source == f"text:{tmp_path}/runs/book.txt"
    assert (scenario.run.seed, scenario.run.round.samples, scenario.run.round.rounds) == (5, 9, 3)


def test_text_is_relative_to_the_scenario(tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_text("call me anything")
    scenario = load_scenario(written(tmp_path, '[run.data]\nsource = "text:book.txt"\n'))
    assert scenario.run.data.source == f"text:{tmp_path}/book.txt"


def test_budgets_leave_room_for_the_lab(tmp_path: Path) -> None:
    scenario = load_scenario(written(tmp_path, GOOD.replace("cores = 0.5", "cores = 0.85")))
    assert fits(scenario, 2, 3 * 450) == ""
    assert "1.7 cores in all, but this machine has 1 and the lab itself needs 0.3; give them at most 0.7" in fits(
        scenario, 1, 9999
    )
    assert "3 peers of mine need about 1,350 MB" in fits(scenario, 2, 1349)
    assert fits(Scenario(name="free", peers=(Peers(count=9),)), 1, 9999) == "", "no limit asks for no cores"


@pytest.mark.parametrize("section", [Scenario, Link, Peers, Event, Churn, Verdict], ids=lambda kind: kind.__name__)
def test_every_field_says_what_it_is(section: type[BaseModel]) -> None:
    described = {place for place, _, _ in describe()}
    sections = {"run", "links", "peers", "events", "churn", "verdict"} if section is Scenario else set()
    for name, field in section.model_fields.items():
        assert name in sections or field.description, name
        assert name in sections or any(place.split()[-1] == name for place in described), name
