"""doctor: what this machine would contribute to a run."""

from __future__ import annotations

import json
import math
import operator
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from p2pllm.errors import UsageError
from p2pllm_cli.options import settings_of

if TYPE_CHECKING:
    from p2pllm_peers.doctor.words import Check


@click.command(short_help="What this machine would contribute to a run.")
@click.argument("invite", required=False)
@click.option("--run-file", type=click.Path(path_type=Path), help="A run file to judge for, as of `p2pllm start`.")
@click.option("--seconds", type=click.FloatRange(0.5, 600), default=4.0, show_default=True, help="How long to compute.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object.")
@click.option("--device", help="auto, cpu, mps, cuda or cuda:N.")
@click.option("--threads", type=int, help="CPU threads to compute with.")
@click.option("--micro-batch", type=int, help="Samples computed at once; 0 finds out by itself.")
@click.option("--listen", "listen_host", help="IP address to listen on.")
@click.option("--port", "listen_port", type=int, help="TCP port whose way in is tested; 0 takes any free one.")
@click.option("--nat/--no-nat", default=None, help="Open a port on the router, use relays if needed.")
@click.option("--upload", "upload_mbit", type=float, help="Mbit/s for updates and states; 0 measures the line.")
@click.option("--data", "data_path", help='Where this machine keeps the text of a "text:" source.')
@click.option("--disk", "disk_gb", type=float, help="GB on disk for rounds to replay.")
@click.option("--home", type=click.Path(path_type=Path), help="Folder of keys, runs and states of this machine.")
def doctor(invite: str | None, run_file: Path | None, seconds: float, as_json: bool, **flags: Any) -> int:
    """Measure what this machine would contribute: to the run of an INVITE, else to that of a run file.

    It computes for a few seconds, asks the run's peers how this machine looks from outside, takes part in nothing and
    leaves nothing behind. Exit code: 0 it can take part, 1 it cannot.
    """
    import asyncio
    import logging

    from p2pllm.invite import Invite
    from p2pllm.manifest import load_draft

    if invite is not None and run_file is not None:
        raise UsageError("Give an invite or --run-file, not both.")
    if math.isnan(seconds):  # which is neither less nor more than the bounds
        raise UsageError("--seconds is no number.")
    settings = settings_of(flags)
    known = None if invite is None else Invite.decode(invite)
    draft = None if run_file is None else load_draft(run_file)

    from p2pllm_cli.view import StartView
    from p2pllm_peers.doctor.examine import examine
    from p2pllm_peers.doctor.judge import judge
    from p2pllm_peers.doctor.words import as_json as json_of
    from p2pllm_peers.doctor.words import checks, heading

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)  # a closed terminal is a Ctrl+C
    logging.getLogger().addHandler(logging.NullHandler())  # what the library logs is for daemons
    with StartView() as view:
        progress = (lambda text: None) if as_json else view.progress
        found = asyncio.run(examine(settings, draft, known, seconds, progress))
    verdict = judge(found)
    if as_json:
        click.echo(json.dumps(json_of(found, verdict)))
    else:
        _show(heading(found), checks(found), [verdict.reason, f"What would help most: {verdict.advice}"])
    return 0 if verdict.can_take_part else 1


def _show(title: str, rows: list[Check], below: list[str]) -> None:
    """A table in a terminal, a line a check where the output is not one."""
    from p2pllm_cli.log_view import Column, say, table
    from p2pllm_cli.view import console

    if not console.is_terminal:
        for text in (title, *(f"{row.name}: {row.mark}: {row.text}" for row in rows), *below):
            say(text)
        return
    columns = [Column(name, operator.itemgetter(name), left=True) for name in ("check", "mark", "found")]
    shown = table([{"check": row.name, "mark": row.mark, "found": row.text} for row in rows], columns)
    shown.columns[-1].no_wrap = False
    say(title)
    console.print(shown)
    for text in below:
        say(text)
