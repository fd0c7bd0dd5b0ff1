"""Every kind of error has a page, and each page says what to do."""

from __future__ import annotations

import errno
import inspect
import os
import re
import socket
from importlib import resources
from pathlib import Path

import pytest
from click.testing import CliRunner

from p2pllm import errors
from p2pllm.errors import P2PLLMError
from p2pllm.network.host import check_listen
from p2pllm.state.files import explained
from p2pllm_cli.explain import page_of, pages
from p2pllm_cli.main import cli
from p2pllm_peers.folders import RunFolder

KINDS = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, P2PLLMError)]
WITHOUT_ERROR = {"full", "complete", "clock", "paused", "service"}
"""Pages about what befalls a peer without an error."""


def test_every_error_leads_to_a_page_and_every_page_is_led_to_but_those_about_no_error() -> None:
    assert {page_of(kind("x")) for kind in KINDS} | WITHOUT_ERROR == set(pages())


def test_the_nearest_page_is_shown() -> None:
    assert page_of(type("OfTomorrow", (errors.NetworkError,), {})("x")) == "network"


@pytest.mark.parametrize(
    ("number", "code"),
    [(errno.ENOSPC, "disk"), (errno.EROFS, "disk"), (errno.EIO, "damaged")],
    ids=["full", "ro", "bad"],
)
def test_a_disk_that_is_full_and_one_that_is_damaged_have_pages_of_their_own(number: int, code: str) -> None:
    with pytest.raises(errors.StateError) as caught, explained("The snapshot cannot be written", needed=1):
        raise OSError(number, "x")
    assert page_of(caught.value) == code


def test_what_is_taken_already_has_a_page(tmp_path: Path) -> None:
    peer = RunFolder(tmp_path, "ab" * 32).peer("founder")
    handle = peer.lock()
    with pytest.raises(errors.DaemonError) as caught:
        peer.lock()
    os.close(handle)
    assert page_of(caught.value) == "running"
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(errors.NetworkError) as taken:
        check_listen("127.0.0.1", other.getsockname()[1])
    assert page_of(taken.value) == "port"


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
