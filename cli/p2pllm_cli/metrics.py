"""metrics: what a peer measured, for the tools that people have: Prometheus, TensorBoard, W&B, or JSON lines."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from importlib import resources
from pathlib import Path

import click

from p2pllm_cli.options import find_peer, find_peers, home_folder, run_options

_LOOK_S = 1.0

follow_option = click.option("-f", "--follow", is_flag=True, help="Go on with what is added, until Ctrl+C.")


@click.group(short_help="Numbers for Prometheus, TensorBoard, W&B.")
def metrics() -> None:
    """What the peers of this machine measure, for the tools that people have.

    Each of these is a program of its own beside the daemon, which it does not slow down. It can be started and ended at
    any time, and finds all rounds since the peer began.
    """


@metrics.command(short_help="Answer Prometheus, for all peers of this machine.")
@click.option("--port", type=click.IntRange(0, 65535), default=9464, show_default=True, help="TCP port; 0: a free one.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on; 0.0.0.0: all.")
@click.option("--home", type=click.Path(path_type=Path), help="Folder of keys, runs and states of this machine.")
def serve(port: int, host: str, home: Path | None) -> None:
    """Serve /metrics in Prometheus' text format: all peers of all runs of this machine, with the labels run and peer.

    A peer that does not run has p2pllm_up 0. Whoever reaches the port can read the numbers; nothing can be changed.
    """
    from p2pllm_peers.exporter import MetricsServer

    with closing(MetricsServer(home_folder(home), host, port)) as server, _until_interrupted():
        click.echo(f"Serving {server.url}; Ctrl+C ends it.")
        server.wait()


@metrics.command(short_help="Write event files for TensorBoard.")
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path, file_okay=False))
@follow_option
@run_options
def tensorboard(folder: Path, follow: bool, home: Path | None, run_prefix: str | None, name: str | None) -> None:
    """Write the rounds of this machine's peers to DIR as TensorBoard's event files; a round is a step.

    Rounds that are in DIR already are not written again. Needs the extra: pip install -e '.[tensorboard]'.
    """
    from p2pllm.sinks import TensorBoardSink
    from p2pllm_peers.exporter import Export, label

    peers = find_peers(home, run_prefix, name)
    peers = [peer for peer in peers if peer.run == peers[0].run]
    with closing(Export({peer: TensorBoardSink(folder / label(peer)) for peer in peers})) as export:
        with _until_interrupted():
            export.run(_pause(follow))
        click.echo(f"Wrote {export.written} rounds; see them with: tensorboard --logdir {folder}")


@metrics.command(short_help="Log to Weights & Biases.")
@click.option("--project", default="p2pllm", show_default=True, help="Project in W&B.")
@follow_option
@run_options
def wandb(project: str, follow: bool, home: Path | None, run_prefix: str | None, name: str | None) -> None:
    """Log one peer's rounds as a run of Weights & Biases; a round is a step.

    Sent are the rounds and the run's manifest; of this machine only the versions of Python and of W&B, and the kind of
    system. W&B's own variables hold: WANDB_MODE=offline writes to the peer's folder, for `wandb sync`. Needs the extra:
    pip install -e '.[wandb]'.
    """
    from p2pllm_peers.exporter import Export, wandb_sink

    peer = find_peer(home, run_prefix, name)
    with closing(Export({peer: wandb_sink(peer, project)})) as export:
        with _until_interrupted():
            export.run(_pause(follow))
        click.echo(f"Logged {export.written} rounds.")


@metrics.command(short_help="Print records as JSON lines.")
@follow_option
@run_options
def jsonl(follow: bool, home: Path | None, run_prefix: str | None, name: str | None) -> None:
    """Print all that a peer measured, a round a line, as METRICS.md and `p2pllm metrics names` describe it.

    `p2pllm rounds --json` lists the run's log instead, with rounds in which this peer took no part.
    """
    from p2pllm_peers.exporter import stream

    with _until_interrupted():
        for _, record in stream([find_peer(home, run_prefix, name)], _pause(follow)):
            click.echo(record.to_json())


@metrics.command(short_help="List all numbers and what they mean.")
def names() -> None:
    """Two tables in Markdown: all metrics, and the fields of the JSON lines, each with its unit and meaning."""
    from p2pllm.metric_names import as_markdown
    from p2pllm.record_fields import fields_as_markdown

    for line in (*as_markdown(), "", *fields_as_markdown()):
        click.echo(line)


@metrics.command(short_help="Print a dashboard for Grafana.")
def grafana() -> None:
    """Print a dashboard, to be imported into a Grafana that has a Prometheus which scrapes `p2pllm metrics serve`."""
    click.echo(resources.files("p2pllm_cli").joinpath("grafana.json").read_text(encoding="utf-8"), nl=False)


def _pause(follow: bool) -> Callable[[], object] | None:
    return (lambda: time.sleep(_LOOK_S)) if follow else None  # a file has no event that works everywhere


@contextmanager
def _until_interrupted() -> Iterator[None]:
    """Ctrl+C, or SIGTERM of a service manager, is how these programs are meant to end: in order."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, before)
