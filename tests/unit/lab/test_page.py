"""The page of a report: one file, nothing from outside, no name that becomes markup, and every window's charts."""

import builtins
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from fake_runs import evidence, long_run, peer, record, sample, strikes

from p2pllm.errors import UsageError
from p2pllm_peers.lab.reporting.page import headline, tables, write_page
from p2pllm_peers.lab.reporting.plots import MAX_BARS, MAX_NUMBERED, MAX_ROWS
from p2pllm_peers.lab.reporting.report import report

VOID = {"meta", "br", "use", "path", "rect", "line"}


class Reader(HTMLParser):
    """Checks that elements close in order; keeps ids, references, and text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: set[str] = set()
        self.text = ""
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("href", "src", "xlink:href", "srcset", "data", "action"):
                self.links.append(value or "")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.text += data


def page_of(found: dict, tmp_path: Path) -> str:
    path = tmp_path / "report.html"
    write_page(found, path)
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def long_report(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The report of the long run."""
    return report(long_run(tmp_path_factory.mktemp("long")))


@pytest.fixture(scope="module")
def page(long_report: dict, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Its page, with all charts."""
    return page_of(long_report, tmp_path_factory.mktemp("page"))


def test_nothing_comes_from_outside(page: str) -> None:
    read = Reader(page)
    assert all(link.startswith("#") for link in read.links), read.links
    assert {link[1:] for link in read.links} <= set(read.ids)
    assert not re.search(r"https?:|//[a-z]|@import|url\((?!#)", page)
    assert not read.tags & {"script", "link", "iframe", "img", "object", "image"}
    assert len(page) < 2_000_000


def test_ids_are_unique_and_each_clip_is_in_the_page(page: str) -> None:
    ids = Reader(page).ids
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"url\(#([^)]*)\)", page)) <= set(ids)


def test_colours_are_those_of_the_style_sheet(page: str) -> None:
    charts = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
    assert set(re.findall(r"var\(--([a-z0-9]+)\)", charts)) <= set(re.findall(r"--([a-z0-9]+):", page))
    assert not re.search(r"#[0-9a-f]{6}\b", charts), "a colour that does not follow light and dark"
    assert "prefers-color-scheme: dark" in page


def test_it_says_what_the_report_says(page: str) -> None:
    text = " ".join(Reader(page).text.split())
    for words in (
        "Failed 2 of 12 checks failed", "efficiency: 23", "Loss against tokens", "loss, nats a token",
        "time since the first peers were ready, s", "bytes, MB", "mean seconds of a round",
        "partition adsl-0, adsl-1 | fibre-0", "fork of adsl-0, adsl-1", "OUTSIDE", "tokens/s, mean of",
    ):  # fmt: skip
        assert words in text, words


def test_each_chart_is_there_for_wide_and_for_narrow_windows(page: str) -> None:
    assert page.count('<div class="wide"><svg viewBox="0 0 860 ') == page.count('<div class="narrow"><svg ') == 7
    sizes = [float(size) for size in re.findall(r"font(?:-size)?: (?:[a-z0-9]+ )*([0-9.]+)px", page)]
    assert sizes and min(sizes) >= 12


def test_names_are_escaped_and_the_same_report_gives_the_same_page(tmp_path: Path) -> None:
    """In the tables, and in the two charts that there are without rounds, which name the peers."""
    evil = "<script>alert('x')</script>&\"id="
    peers = [peer("a", link=evil, crashes=[evil]), peer(evil, records="b.jsonl", peer_id="id-b")]
    planned = strikes((5.0, "kill", evil), (6.0, evil, "a"))
    planned["struck"][1].error = evil
    busy = {"phase": "collecting", "wire_up": 7, "traffic": {"updates_sent": 5}}
    found = report(evidence(tmp_path, {"a": [], "b": []}, peers=peers, notes=[evil], left_over=[evil],
                            samples=[sample(1.0, **{"a": busy, evil: busy})], scenario={"about": evil}, **planned)
                   )  # fmt: skip
    page = page_of(found, tmp_path)
    read = Reader(page)
    assert "<script" not in page and "script" not in read.tags
    assert read.text.count(evil) > 12, "it is shown as it is"
    assert "".join(Reader(svg).text for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL)).count(evil) == 4
    assert all(link.startswith("#") for link in read.links)
    assert page_of(found, tmp_path) == page


def test_a_run_without_anything(tmp_path: Path) -> None:
    page = page_of(report(evidence(tmp_path, {"a": []}, ended_s=0.0)), tmp_path)
    assert "no round was committed" in Reader(page).text


@pytest.mark.parametrize(("rounds", "most"), [(1, "5 s, 51 at most"), (1200, "8 s, 128 at most")], ids=["one", "many"])
def test_the_speed_of_a_run_of_one_round_and_of_many(tmp_path: Path, rounds: int, most: str) -> None:
    """256 tokens in 5 s, the least span that counts; and in each of the four rounds of 2 s that count otherwise."""
    losses = [None if rounds == 1 else 3.0 + n % 11 / 10 for n in range(rounds)]
    rows = [record(n, 2.0 * n, loss=float("nan"), validation_loss=loss) for n, loss in enumerate(losses, 1)]
    made = evidence(tmp_path, {"a": rows}, ended_s=2.0 * rounds)
    page = page_of(report(made) | {"parts": [], "timeline": {}}, tmp_path)  # others draw their charts
    assert f"The swarm's tokens a second, mean of the last {most}" in Reader(page).text
    assert len(page) < 120_000


def test_a_run_of_many_faults_and_peers_stays_light(tmp_path: Path) -> None:
    names = [f"peer-{number}" for number in range(MAX_ROWS + 2)]
    rows = [record(n, 0.1 * n, names[:4]) for n in range(1, 3 * MAX_BARS)]
    planned = strikes(*((2.0 * n, "kill", names[n]) for n in range(1, MAX_NUMBERED + 2)))
    made = evidence(tmp_path, {name: rows if name in names[:2] else [] for name in names}, **planned)
    page = page_of(report(made) | {"rounds": []}, tmp_path)
    assert f"the first {MAX_ROWS} of {MAX_ROWS + 2} peers" in Reader(page).text
    assert f"{MAX_NUMBERED + 1} faults; dotted lines: faults; shaded" in Reader(page).text
    assert len(page) < 500_000


def test_every_row_fits_its_heading_and_units_are_told(long_report: dict) -> None:
    for table in tables(long_report):
        assert table.rows, table.title
        assert all(len(row) == len(table.head) for row in table.rows), table.title
    shown = {what: value for what, value, _ in headline(long_report)}
    assert shown["speed"].endswith(" tokens/s") and shown["time"] == "5 min 0 s"
    assert shown["bytes a round"].endswith(" MB") and shown["recovery"].endswith(" s")


def test_without_the_extra_it_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(name: str, *rest: object) -> object:
        if name == "jinja2":
            raise ModuleNotFoundError(name=name)
        return real(name, *rest)

    real = builtins.__import__
    found = report(evidence(tmp_path, {"a": [record(1, 2.0)]}))
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match=r"pip install -e '\.\[lab\]'\.$"):
        write_page(found, tmp_path / "report.html")


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be written: No such file or directory; name another folder"):
        write_page(report(evidence(tmp_path, {"a": []})), tmp_path / "none" / "report.html")
