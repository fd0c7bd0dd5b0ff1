"""explain: what an error means, why it happens, and what to do; a page each."""

from __future__ import annotations

import difflib
from importlib import resources

import click

from p2pllm import errors
from p2pllm.errors import P2PLLMError, UsageError

_PAGE_OF: dict[type[P2PLLMError], str] = {
    errors.UsageError: "usage",
    errors.ManifestError: "manifest",
    errors.SettingsError: "settings",
    errors.InviteError: "invite",
    errors.DataError: "data",
    errors.P2PLLMError: "defect",
    errors.NetworkError: "network",
    errors.UnreachableError: "unreachable",
    errors.PortError: "port",
    errors.StateError: "damaged",
    errors.DiskError: "disk",
    errors.NoRoomError: "disk",
    errors.ArithmeticsError: "arithmetic",
    errors.WorkerError: "worker",
    errors.OutOfMemoryError: "memory",
    errors.VersionError: "version",
    errors.DaemonError: "daemon",
    errors.OccupiedError: "running",
}


def page_of(error: P2PLLMError) -> str:
    """The code of the page about an error, or of the nearest kind that has one."""
    return next(_PAGE_OF[kind] for kind in type(error).__mro__ if kind in _PAGE_OF)


def pages() -> dict[str, str]:
    """All pages, by code."""
    text = resources.files("p2pllm_cli").joinpath("explanations.md").read_text(encoding="utf-8")
    sections = [section.partition("\n") for section in text.split("## ")[1:]]
    return {code.strip(): page.strip() for code, _, page in sections}


@click.command(short_help="What an error means and what to do.")
@click.argument("code", required=False)
def explain(code: str | None) -> None:
    """What an error means, why it happens, and what to do. Without a CODE: all codes."""
    found = pages()
    if code is None:
        for name, page in found.items():
            click.echo(f"{name:12} {page.partition(chr(10))[0]}")
        return
    if code not in found:
        close = difflib.get_close_matches(code, found, n=1)
        hint = f"did you mean {close[0]}?" if close else "`p2pllm explain` lists them."
        raise UsageError(f"There is no page '{code}'; {hint}")
    click.echo(found[code])
