"""Which exchange a run's strategy has, and in which form its aggregates are.

What does not live here: the outer step of a strategy (`state`) and the inner work (`training`).
"""

from __future__ import annotations

from pathlib import Path

from p2pllm.averaging.dense import DenseAllReduce
from p2pllm.averaging.exchange import Exchange
from p2pllm.averaging.form import DenseForm, Form, SparseForm
from p2pllm.averaging.sparse_exchange import SparseExchange
from p2pllm.manifest import RunDraft, RunManifest
from p2pllm.network.transport import Transport
from p2pllm.state import Layout


def form_of(draft: RunDraft, layout: Layout) -> Form:
    """The form of a run's aggregates."""
    if draft.round.strategy == "sparse_loco":
        return SparseForm(layout)
    return DenseForm(layout, draft.round.fragments)


def exchange_of(manifest: RunManifest, form: Form, transport: Transport, folder: Path | None = None) -> Exchange:
    """The exchange of a run, which makes aggregates of this form.

    folder: where it keeps what is this peer's own, from session to session.
    """
    if not isinstance(form, SparseForm):
        return DenseAllReduce(transport)
    file = None if folder is None else folder / "error.safetensors"
    return SparseExchange(transport, form, manifest.run_id, manifest.round.error_decay, file)
