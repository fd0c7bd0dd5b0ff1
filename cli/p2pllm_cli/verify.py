"""verify: recheck what lies in a folder, without a network and without a daemon."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import click

from p2pllm.errors import ManifestError, StateError, UsageError
from p2pllm_cli.log import json_option, keep_quiet

if TYPE_CHECKING:
    from p2pllm.manifest import RunManifest


@click.command(short_help="Recheck a peer's files offline.")
@click.argument("folder", type=click.Path(exists=True, file_okay=False, path_type=Path))
@json_option
def verify(folder: Path, as_json: bool) -> None:
    """Recheck everything in FOLDER: that of a peer, of a run with its peers, or a copy of either.

    Signatures, links, totals, votes, claims, checkpoints, and every digest; then all states are computed anew.
    Exits with 1 and says what is wrong if anything is.
    """
    from p2pllm.rounds.audit import audit
    from p2pllm_cli.log_view import follow, show_report

    keep_quiet()
    folder = folder.resolve()
    for path in _peers_in(folder):
        manifest, unsigned = _manifest_of(path)
        report = follow(audit(path, manifest), shown=not as_json)
        if unsigned:
            report.unchecked.insert(0, unsigned)
        show_report(path, manifest.run_id, report, as_json=as_json)


def _peers_in(folder: Path) -> list[Path]:
    """The folders with the logs that `folder` holds."""
    found = [path.parent for path in [folder / "log", *sorted(folder.glob("*/log"))] if path.is_file()]
    if not found:
        raise UsageError(
            f"{folder} holds no log of rounds; give the folder of a peer, such as runs/<run id>/founder, or of a run."
        )
    return found


def _manifest_of(folder: Path) -> tuple[RunManifest, str]:
    """The manifest in or above a peer's folder, and what could not be checked of it."""
    from p2pllm.manifest import RunManifest
    from p2pllm_peers.folders import check_signature

    path = next(
        (place / "manifest.json" for place in (folder, folder.parent) if (place / "manifest.json").exists()), None
    )
    if path is None:
        raise UsageError(f"There is no manifest.json in {folder} nor above it; copy the run's there.")
    seal = path.with_suffix(".sig")
    try:
        manifest = RunManifest.from_bytes(path.read_bytes())
        if seal.exists():
            check_signature(manifest, seal.read_bytes())
    except ManifestError as error:
        raise StateError(f"{path} is not right: {error}") from None
    named = path.parent.name
    if re.fullmatch("[0-9a-f]{16}", named) and not manifest.run_id.startswith(named):
        raise StateError(f"{path} is the manifest of run {manifest.run_id[:16]}, not of {named}; restore that one.")
    return manifest, "" if seal.exists() else f"the founder's signature of the manifest: there is no {seal}"
