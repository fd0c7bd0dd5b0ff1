"""Examine: the whole of it, in the order in which one would find out: the run, the machine, a few seconds of work.

Everything that it writes lies in one private folder, which is removed, by the worker if the doctor is killed.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from p2pllm.averaging import codec
from p2pllm.errors import ManifestError
from p2pllm.invite import Invite
from p2pllm.manifest import RunDraft
from p2pllm.network.host import prepare_runtime_dir
from p2pllm.network.lean import load_lean
from p2pllm.settings import PeerSettings, new_runtime_dir
from p2pllm.state import moments_of
from p2pllm.training.sources import documents
from p2pllm.training.tokenizer import load_tokenizer
from p2pllm_peers.doctor import machine, sizes
from p2pllm_peers.doctor.findings import DiskNeed, Findings, Outside, Run
from p2pllm_peers.doctor.measure import Bench, Measurement, encoded_size
from p2pllm_peers.doctor.memory import free_memory
from p2pllm_peers.pace import Pace

Progress = Callable[[str], None]


_NOT_ASKED = Outside(why_not="there was no invite")


@dataclass(frozen=True)
class _Target:
    """What the machine is judged for. run_id: "" for a run file. pace: of the run, if a peer told it."""

    draft: RunDraft
    tokenizer: bytes | None
    run_id: str = ""
    outside: Outside = _NOT_ASKED
    pace: Pace | None = None


async def examine(
    settings: PeerSettings, draft: RunDraft | None, invite: Invite | None, seconds: float, progress: Progress
) -> Findings:
    """Everything about this machine and a run: that of the invite, else of the draft, else the default one.

    seconds: of computing. Raises UsageError for what no machine can use, NoRoomError where nothing can be kept,
    NetworkError if nobody of the run answers.
    """
    machine.check_writable(settings.home)
    machine.check_writable(settings.cache)
    free, folder = free_memory(), new_runtime_dir()
    prepare_runtime_dir(folder)
    own = settings.model_copy(update={"cache": folder / "cache", "data_path": ""})
    bench = Bench(own, folder, progress)
    try:
        await bench.launch()
        target = await _target(draft, invite, settings, folder, progress)
        return await _examine(target, settings, bench, seconds, folder, free, progress)
    finally:
        await bench.close()
        shutil.rmtree(folder, ignore_errors=True)


async def _target(
    draft: RunDraft | None, invite: Invite | None, settings: PeerSettings, folder: Path, progress: Progress
) -> _Target:
    if invite is None:
        draft = draft or RunDraft()
        line = replace(_NOT_ASKED, upload_mbit=settings.upload_mbit or None, upload_limited=bool(settings.upload_mbit))
        return _Target(draft, await asyncio.to_thread(_tokenizer_of, draft), outside=line)
    load_lean()
    from p2pllm_peers.doctor.outside import ask_run  # loads hivemind's network, which the rest needs not

    met = await ask_run(invite, settings, folder, progress)
    return _Target(met.sealed[0], met.sealed[2], invite.run_id, met.outside, met.pace)


def _tokenizer_of(draft: RunDraft) -> bytes | None:
    source = draft.tokenizer.source
    if source == "bytes":
        return None
    try:
        return Path(source.removeprefix("file:")).read_bytes()
    except OSError as error:
        raise ManifestError(f"The tokenizer {source} cannot be read: {error.strerror}.") from None


async def _examine(
    target: _Target,
    settings: PeerSettings,
    bench: Bench,
    seconds: float,
    folder: Path,
    free: int,
    progress: Progress,
) -> Findings:
    progress("looking at this machine")
    versions = await asyncio.to_thread(machine.versions)
    arithmetic = await asyncio.to_thread(machine.arithmetic_problem)
    found, problem = await asyncio.to_thread(machine.find_text, target.draft, settings)
    sample, draft = folder / "sample.txt", target.draft
    shown = found or documents("stdlib")  # how fast a machine computes does not depend on what
    await asyncio.to_thread(machine.write_sample, shown, draft.data.context_length, sample)
    tokenizer = load_tokenizer(target.tokenizer)
    text_bytes = await asyncio.to_thread(machine.tokenised_bytes, found, sample, tokenizer)
    measured = await bench.run(_on_sample(draft, sample), target.tokenizer, seconds)
    whole = _put_together(target, settings, measured, free, versions, arithmetic, text_bytes, problem)
    here = await asyncio.to_thread(machine.files_here, settings.home, target.run_id)
    tokens = await asyncio.to_thread(machine.text_here, draft, settings, tokenizer)
    return replace(whole, disk=replace(whole.disk, home_here_bytes=here, text_here_bytes=tokens))


def _on_sample(draft: RunDraft, sample: Path) -> RunDraft:
    """The same run on a little of its text: reading all of it could take minutes, and would leave it in the cache."""
    fields = draft.model_dump(include=set(RunDraft.model_fields))
    fields["data"] |= {"source": f"text:{sample}", "digest": ""}
    return RunDraft.model_validate(fields)


def _put_together(
    target: _Target,
    settings: PeerSettings,
    measured: Measurement,
    free: int,
    versions: dict[str, str],
    arithmetic: str,
    text_bytes: int,
    problem: str,
) -> Findings:
    draft, compute, pace = target.draft, measured.compute, target.pace
    moments = len(moments_of(draft))
    update = _update_bytes(draft, measured)
    members = (max(2, min(pace.peers + 1, draft.round.max_peers))) if pace else sizes.ASSUMED_PEERS
    swarm = pace.tokens_per_s if pace else (sizes.ASSUMED_PEERS - 1) * compute.tokens_per_s
    mbit = target.outside.upload_mbit
    sending_s = sizes.moved_a_round(draft, update, members) * 8 / 1e6 / mbit if mbit else 0.0
    round_s = sizes.round_seconds(draft, compute.tokens_per_s, swarm, pace.round_s if pace else 0.0, sending_s)
    control = (pace.control_sent_per_s, pace.control_received_per_s) if pace else (0.0, 0.0)
    disk = sizes.disk_of(
        draft,
        compute.parameters,
        moments,
        update,
        members,
        int(settings.disk_gb * 1e9),
        text_bytes,
        pace.record_bytes if pace else 0.0,
    )
    return Findings(
        run=Run(
            draft.name,
            target.run_id,
            bool(target.run_id),
            draft.round.strategy,
            draft.round.samples,
            draft.data.context_length,
            draft.round.overlap,
        ),
        compute=compute,
        memory=sizes.memory_of(draft, compute, moments, free),
        traffic=sizes.traffic_of(draft, update, members, round_s, control, measured=pace is not None),
        disk=_with_free(disk, settings, problem),
        outside=target.outside,
        versions=versions,
        arithmetic_problem=arithmetic,
    )


def _update_bytes(draft: RunDraft, measured: Measurement) -> int:
    sparse = 0
    if draft.round.strategy == "sparse_loco" and measured.layout is not None:
        update = measured.update
        if update is None or update.size != measured.layout.size:
            update = np.random.default_rng(0).standard_normal(measured.layout.size, np.float32)  # as long as a real one
        sparse = encoded_size(measured.layout, update)
    return sizes.update_bytes(draft, measured.compute.parameters, codec(draft.round.codec).bytes_for, sparse)


def _with_free(disk: DiskNeed, settings: PeerSettings, problem: str) -> DiskNeed:
    (home_free, home), (cache_free, cache) = machine.free_disk(settings.home), machine.free_disk(settings.cache)
    return replace(
        disk, home_free_bytes=home_free, cache_free_bytes=cache_free, same_disk=home == cache, text_problem=problem
    )
