"""runs, clean: what this machine takes part in, and freeing disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from p2pllm.errors import UsageError
from p2pllm_cli.options import find_runs, settings_of


@click.command(short_help="List what this machine takes part in.")
@click.option("--home", type=click.Path(path_type=Path), help="Folder of keys, runs and states of this machine.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a peer and line.")
def runs(home: Path | None, as_json: bool) -> None:
    """Every run that this machine knows, the one used last first: its peers here, their rounds, disk that they take."""
    from p2pllm_cli.log_view import Column, show
    from p2pllm_cli.view import size
    from p2pllm_peers.housekeeping import last_round, run_name, size_of

    rows: list[dict[str, Any]] = [
        {
            "run_id": run.run_id,
            "run_name": run_name(run),
            "peer": peer.name,
            "state": "stopped" if (running := peer.running()) is None else "running" if running else "starting",
            "round": last_round(peer),
            "bytes": size_of(peer.path),
        }
        for run in find_runs(home, None)
        for peer in run.peers()
    ]
    columns = [
        Column("run", lambda row: row["run_id"][:16], lambda row: row["run_id"], left=True),
        Column("name", lambda row: row["run_name"] or "?", left=True),
        Column("peer", lambda row: row["peer"], left=True),
        Column("state", lambda row: row["state"], left=True),
        Column("round", lambda row: "-" if row["round"] is None else str(row["round"])),
        Column("disk", lambda row: size(row["bytes"]), lambda row: str(row["bytes"])),
    ]
    total = sum(row["bytes"] for row in rows)
    show(rows, columns, {"bytes": total}, [f"{size(total)} in all; `p2pllm clean` frees disk."], as_json=as_json)


@click.command(short_help="Free disk; says first what goes.")
@click.option("--run", "run_prefix", help="Delete this run as a whole: run id or its beginning.")
@click.option("--home", type=click.Path(path_type=Path), help="Folder of keys, runs and states of this machine.")
@click.option("--yes", is_flag=True, help="Do not ask.")
def clean(run_prefix: str | None, home: Path | None, yes: bool) -> None:
    """Free disk: what comes back by itself when it is needed, or with --run all of one run.

    It lists what it would delete, and asks. Nothing of a peer that runs is touched, and no key.
    """
    from p2pllm_cli.view import size
    from p2pllm_peers.housekeeping import needless, remove, remove_run, whole_run

    settings = settings_of({"home": home})
    if run_prefix is not None:
        found = find_runs(home, run_prefix)
        if len(found) > 1:
            raise UsageError(f"{len(found)} runs begin with '{run_prefix}'; give more of the id, see `p2pllm runs`.")
        held = [whole_run(found[0])]
    else:
        held = needless(settings.home, settings.cache)
    if not held:
        click.echo("There is nothing to free; `p2pllm clean --run ID` deletes a run as a whole, see `p2pllm runs`.")
        return
    for each in held:
        click.echo(f"{size(each.size)}  {each.path}  {each.what}")
    if not yes and not click.confirm(f"Delete {size(sum(each.size for each in held))}?"):
        click.echo("Nothing was deleted.")
        return
    if run_prefix is not None:
        remove_run(found[0])
    else:
        for each in held:
            remove(each)
    click.echo(f"Freed {size(sum(each.size for each in held))}.")
