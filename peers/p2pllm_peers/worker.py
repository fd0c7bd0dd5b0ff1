"""The worker: the process that computes. It owns the device, the model and the data, and no network.

The daemon starts it, writes commands to its standard input and reads events from its standard output, one JSON
object a line. The first line in is the job. Parameters come and updates go through one shared file of
2 * parameters float32 values: first the parameters, then the update.

    job      {"draft", "tokenizer", "settings", "shared_fd", "fresh", "micro_batch": 0 to measure it,
              "workers": of this peer on the processor, to share its cores}
    in       {"do": "begin", "round", "run_id", "peer", "moments"}, {"do": "finish", "go_on"},
             {"do": "hold", "held"}, {"do": "share", "share", "cores"}, {"do": "fit", "micro_batch"},
             {"do": "abandon" | "evaluate" | "memory" | "exit"}

What comes out, each with its name as "event":

    progress     text: a phrase, while it builds
    trying       micro_batch: samples that it is about to compute at once, to measure them
    ready        layout: JSON; device; micro_batch: samples; samples_per_s: as measured, 0 if it was not; data_digest
    fitted       micro_batch: samples, the answer to fit
    step         round; samples: gathered in it so far; tokens, seconds, computed: tokens, wall time, samples of it
    micro_batch  micro_batch: samples, fewer than before, as memory ran out
    update       elements: of the shared update; samples; loss: mean, nats a token; steps: samples of each
    abandoned
    validation   loss: mean, nats a token
    memory       host_peak, device_peak, device_free, device_total: bytes; those of a device on CUDA only
    error        kind: name of an error of ours; message: its sentence; the process ends

What is answered (finish, abandon, evaluate, memory) carries a "number", and so does its answer (update, abandoned,
validation, memory).

When its standard input closes the daemon is gone, however it died: the worker then removes the sockets that the
daemon could not remove, and ends at once.
"""

from __future__ import annotations

import base64
import contextlib
import gc
import importlib
import mmap
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from p2pllm.errors import P2PLLMError, WorkerError
from p2pllm.manifest import RunDraft
from p2pllm.settings import PeerSettings
from p2pllm_peers.crew import Crew
from p2pllm_peers.pipe import Command, Pipe
from p2pllm_peers.rest import Rest


class Worker:
    """The model, the data and the round under way."""

    def __init__(self, pipe: Pipe, job: Command, crew: Crew) -> None:
        """Build everything the job names. Raises what the training package raises for input that is not usable.

        crew: has looked at other programs since this process began.
        """
        # Here and not at the top: the daemon hears progress before these seconds, and tests import this module.
        import torch

        from p2pllm.training import data, device, model, sources, tokenizer, work

        self._pipe = pipe
        settings, draft = PeerSettings(**job["settings"]), RunDraft.model_validate(job["draft"])
        if settings.threads:
            torch.set_num_threads(settings.threads)
        self._device = device.choose_device(settings.device)
        chosen = settings.threads or self._device.type != "cpu"
        crew.workers = job["workers"]
        self._crew, self._most_threads = None if chosen else crew, torch.get_num_threads()
        self._take_cores()
        device.limit_memory(self._device, settings.gpu_memory_gb)
        tokens = tokenizer.load_tokenizer(base64.b64decode(job["tokenizer"]) if job["tokenizer"] else None)
        pipe.emit("progress", text="building the model")
        self._model = model.build(draft, tokens)
        gc.freeze()
        gc.enable()
        layout = model.layout_of(self._model)
        self._params, self._update = _map(job["shared_fd"], layout.size, job["fresh"])
        if job["fresh"]:
            model.read_params(self._model, self._params)
        self._model.to(self._device)
        pipe.emit("progress", text="reading the text")
        self._corpus = data.Corpus.open(draft.data, tokens, settings.cache, settings.data_path, pipe.tokenising)
        digest = draft.data.digest
        if draft.data.source != "stdlib" and not digest:
            found = sources.documents(draft.data.source, settings.data_path)
            digest = sources.text_digest(found, pipe.tokenising)
        self._work = work.inner_work(draft, self._model, self._corpus, self._device, job["micro_batch"] or 1)
        self._local = self._work if isinstance(self._work, work.Local) else None  # can go on while an update travels
        samples_per_s = 0.0  # not measured
        if not job["micro_batch"]:
            pipe.emit("progress", text="finding the micro-batch that suits this device")
            self._take_cores()
            samples_per_s = self._work.find_micro_batch(self._trying)
        self._drawn_for = ("", "")
        self._moments: Path | None = None
        self._round: int | None = None
        self._steps: list[int] = []
        self._loss = 0.0
        self._goes_on = False  # on from our own parameters, while an update travels
        self._held = False
        self._number: int | None = None  # of the command that is being answered
        self._rest = Rest()
        pipe.emit(
            "ready",
            layout=layout.to_json(),
            device=str(self._device),
            micro_batch=self._work.micro_batch,
            samples_per_s=samples_per_s,
            data_digest=digest,
        )

    def run(self) -> None:
        """Obey commands; between them compute, if a round is under way."""
        while True:
            idle = self._held or self._round is None
            command = self._pipe.next(None if idle else self._rest.left())
            self._number = command.get("number") if command else None
            match command and command["do"]:
                case None:
                    self._step()
                case "begin":
                    assert command is not None  # noqa: S101 - matched above
                    self._begin(command)
                case "finish":
                    assert command is not None  # noqa: S101 - matched above
                    self._finish(command["go_on"])
                case "hold":
                    assert command is not None  # noqa: S101 - matched above
                    self._held = command["held"]
                case "share":
                    assert command is not None  # noqa: S101 - matched above
                    self._rest.share, self._rest.cores = command["share"], command["cores"]
                case "fit":
                    assert command is not None  # noqa: S101 - matched above
                    self._fit(command["micro_batch"])
                case "abandon":
                    self._abandon()
                    self._answer("abandoned")
                case "evaluate":
                    self._evaluate()
                case "memory":
                    self._tell_memory()
                case "exit":
                    return self._keep()

    def _begin(self, command: Command) -> None:
        """Take the parameters from the shared memory and start on a round, or put them below what was done already."""
        if self._goes_on and self._local is not None:
            self._goes_on, self._round = False, command["round"]
            self._local.land(self._params, command["round"])
            return
        self._abandon()
        drawn_for = (command["run_id"], command["peer"])
        if drawn_for != self._drawn_for:
            self._work.draw_for(*drawn_for)
            self._drawn_for, self._moments = drawn_for, Path(command["moments"])
            self._work.load(self._moments)
        self._round = command["round"]
        self._work.begin(self._params, command["round"])

    def _step(self) -> None:
        """The smallest piece of a round's work."""
        assert self._round is not None  # noqa: S101 - nobody asks for it otherwise
        before, began = self._work.micro_batch, time.monotonic()
        result = self._work.step(self._round, len(self._steps))
        self._steps.append(result.samples)
        self._loss += result.loss * result.samples
        self._pipe.emit(
            "step",
            round=self._round,
            samples=self._work.samples,
            tokens=result.tokens,
            seconds=time.monotonic() - began,
            computed=result.samples,
        )
        if self._work.micro_batch != before:
            self._pipe.emit("micro_batch", micro_batch=self._work.micro_batch)
        self._rest.stepped(began)
        if self._crew is not None and self._crew.due():
            self._take_cores()

    def _trying(self, size: int) -> None:
        self._pipe.emit("trying", micro_batch=size)

    def _fit(self, size: int) -> None:
        """Compute so many samples at once, or if 0 as many as suit the device now."""
        if size:
            self._work.take_micro_batch(size)
        else:
            self._work.find_micro_batch(self._trying)
        self._pipe.emit("fitted", micro_batch=self._work.micro_batch)

    def _take_cores(self) -> None:
        """Compute with as many threads as others leave cores, where nobody has chosen."""
        if self._crew is not None:
            import torch

            torch.set_num_threads(self._crew.size(self._most_threads))

    def _finish(self, go_on: bool) -> None:
        """Hand over the update in the shared memory, and go on with the next round if we shall and can."""
        if self._round is not None and not self._steps and not self._rest.left():
            self._step()  # the swarm is done before our first one: it is nearly free and makes us a member
        elements, samples = self._work.finish(self._update)
        loss = self._loss / max(1, samples)
        self._answer("update", elements=elements, samples=samples, loss=loss, steps=self._steps)
        if not go_on or self._round is None or self._local is None:
            self._abandon()
            return
        self._round, self._steps, self._loss, self._goes_on = self._round + 1, [], 0.0, True
        self._local.go_on(self._round)

    def _abandon(self) -> None:
        self._work.reset()
        self._round, self._steps, self._loss, self._goes_on = None, [], 0.0, False

    def _evaluate(self) -> None:
        from p2pllm.training.evaluate import validation_loss

        windows = self._corpus.validation_windows()
        with self._work.holding(self._params):
            loss = validation_loss(self._model, windows, self._device, self._work.micro_batch)
        self._answer("validation", loss=loss)

    def _tell_memory(self) -> None:
        from p2pllm.training.device import memory_of

        self._answer("memory", **memory_of(self._device))

    def _answer(self, event: str, **fields: Any) -> None:
        self._pipe.emit(event, number=self._number, **fields)

    def _keep(self) -> None:
        """What is this peer's own, for its next session."""
        if self._moments is not None:
            with contextlib.suppress(P2PLLMError):  # worth some steps of warm-up, and no failed end
                self._work.save(self._moments)


def _map(handle: int, size: int, fresh: bool) -> tuple[np.ndarray, np.ndarray]:
    """The shared memory as (parameters, update), float32 vectors of `size` elements; we size it if it is fresh."""
    if fresh:
        os.ftruncate(handle, 8 * size)
    elif os.fstat(handle).st_size != 8 * size:
        raise WorkerError(f"The model has {size} parameters here, and the state of this run another number of them.")
    both = np.frombuffer(mmap.mmap(handle, 8 * size), dtype="<f4")
    return both[:size], both[size:]


def main() -> None:
    """Entry of the process: `python -m p2pllm_peers.worker RUNTIME_DIR`, started by the daemon only."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the daemon decides when we end
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    events = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # a library that prints must not break the protocol
    pipe = Pipe(sys.stdin, events, sys.argv[1])
    pipe.start()
    crew = Crew()
    gc.disable()  # while libraries load, of which all stays; a fifth of that time
    # load the libraries while the daemon finds out what to compute: torch, and what all models of transformers need
    for name in ("torch", "p2pllm.training.inner", "transformers.modeling_utils", "transformers.generation"):
        importlib.import_module(name)

    job = pipe.next(None)
    assert job is not None  # noqa: S101 - waited for
    try:
        Worker(pipe, job, crew).run()
    except P2PLLMError as error:
        pipe.emit("error", kind=type(error).__name__, message=str(error))
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
