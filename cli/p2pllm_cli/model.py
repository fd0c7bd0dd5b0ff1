"""generate, export: what a model user does with the newest state of a run on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from p2pllm.errors import StateError
from p2pllm_cli.options import find_peer, run_options

if TYPE_CHECKING:
    from p2pllm_peers.folders import PeerFolder


@click.command(short_help="Write text with the newest state.")
@run_options
@click.option("--prompt", default="", help="Text to go on from.")
@click.option(
    "--tokens",
    "max_tokens",
    type=click.IntRange(min=1),
    default=200,
    show_default=True,
    help="Tokens to write at most.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.8,
    show_default=True,
    help="0 always takes the likeliest token.",
)
@click.option(
    "--top-k", type=click.IntRange(min=0), default=50, show_default=True, help="Choose among so many tokens; 0 = all."
)
@click.option("--seed", type=int, help="For the same text again.")
def generate(
    home: Path | None,
    run_prefix: str | None,
    name: str | None,
    prompt: str,
    max_tokens: int,
    temperature: float,
    top_k: int,
    seed: int | None,
) -> None:
    """Write text with the newest state of this machine's run."""
    model, tokenizer = _load(find_peer(home, run_prefix, name))
    from p2pllm.training.generate import generate as write

    click.echo(prompt, nl=False)
    for piece in write(
        model, tokenizer, prompt, max_new_tokens=max_tokens, temperature=temperature, top_k=top_k, seed=seed
    ):
        click.echo(piece, nl=False)
    click.echo()


@click.command(short_help="Write the newest state for transformers.")
@click.argument("folder", type=click.Path(path_type=Path))
@run_options
def export(folder: Path, home: Path | None, run_prefix: str | None, name: str | None) -> None:
    """Write the newest state as a FOLDER that transformers' from_pretrained loads."""
    model, tokenizer = _load(find_peer(home, run_prefix, name))
    from p2pllm.training.export import export as write

    write(folder, model, tokenizer)
    click.echo(f"Wrote {folder}: AutoModelForCausalLM.from_pretrained({str(folder)!r}) loads it.")


def _load(peer: PeerFolder) -> tuple[Any, Any]:
    """(model, tokenizer) of the newest state: it is made of the peer's files, whether its daemon runs or not."""
    from p2pllm.rounds.disk import Disk
    from p2pllm.state import moments_of, outer_optimizer
    from p2pllm.training import model as models
    from p2pllm.training.tokenizer import load_tokenizer

    loaded = peer.run.load()
    if loaded is None:
        raise StateError(f"The manifest of run {peer.run.run_id[:16]} is missing; join again with an invite.")
    manifest, _, tokenizer_json = loaded
    tokenizer = load_tokenizer(tokenizer_json)
    model = models.build(manifest, tokenizer)
    layout = models.layout_of(model).with_moments(moments_of(manifest))
    disk = Disk(peer.path, manifest, layout, read_only=True)
    state = disk.recover(outer_optimizer(manifest, layout), None)
    if state is None or not state.round:
        raise StateError(
            f"'{peer.name}' has saved no state of run {manifest.run_id[:16]} yet; try again after its first round."
        )
    models.write_params(model, state.params)
    return model.eval(), tokenizer
