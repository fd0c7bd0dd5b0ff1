"""Every kind of error has a page, and each page says what to do."""

from __future__ import annotations

import inspect
import re
from importlib import resources

import pytest
from click.testing import CliRunner

from p2pllm import errors
from p2pllm.errors import P2PLLMError
from p2pllm_cli.explain import page_of, pages
from p2pllm_cli.main import cli

KINDS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, P2PLLMError)]
WITHOUT_ERROR = {"full", "complete", "clock"}
"""Pages about what befalls a peer without an error."""


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_error_of_a_volunteer_leads_to_a_page(kind: type[P2PLLMError]) -> None:
    assert page_of(kind("x")) in pages()


def test_every_page_is_led_to_but_those_about_no_error() -> None:
    assert {page_of(kind("x")) for kind in KINDS} | WITHOUT_ERROR == set(pages())


@pytest.mark.parametrize(
    ("raised", "code"),
    [
        (errors.OutOfMemoryError, "memory"),
        (errors.WorkerError, "worker"),
        (errors.PortError, "port"),
        (errors.NoRoomError, "disk"),
        (errors.StateError, "damaged"),
        (errors.OccupiedError, "running"),
        (type("OfTomorrow", (errors.NetworkError,), {}), "network"),
    ],
)
def test_the_nearest_page_is_shown(raised: type[P2PLLMError], code: str) -> None:
    assert page_of(raised("x")) == code


def test_each_page_is_there_once() -> None:
    text = resources.files("p2pllm_cli").joinpath("explanations.md").read_text(encoding="utf-8")
    codes = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert sorted(codes) == sorted(pages())


@pytest.mark.parametrize(("code", "page"), pages().items())
def test_each_page_says_what_happened_and_what_to_do(code: str, page: str) -> None:
    assert "What to do:" in page and page.splitlines()[0].endswith(".")
    assert max(map(len, page.splitlines())) <= 120
    shown = CliRunner().invoke(cli, ["explain", code])
    assert shown.exit_code == 0 and shown.output.strip() == page


def test_all_pages_are_listed_and_a_wrong_code_gets_a_hint() -> None:
    listed = CliRunner().invoke(cli, ["explain"]).output
    assert all(code in listed for code in pages())
    with pytest.raises(P2PLLMError, match="did you mean memory"):
        CliRunner().invoke(cli, ["explain", "memry"], catch_exceptions=False, standalone_mode=False)
