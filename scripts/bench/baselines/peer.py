"""What every baseline shares: the model, the data, the optimizer's settings, evaluating, recording, and its end.

A program ends after the seconds that it was given, or at once when its standard input closes: then its parent is
gone, however it died. What does not live here: what it hears and says (`messages`), and how peers find each other and
exchange anything, which is what tells the systems apart.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import psutil
import torch
from torch import nn

from baselines.messages import Order, Row
from p2pllm.manifest import RunDraft
from p2pllm.sections import OptimizerSection
from p2pllm.state.adamw import learning_rate
from p2pllm.training.data import Corpus
from p2pllm.training.evaluate import validation_loss
from p2pllm.training.inner import sum_of_losses
from p2pllm.training.model import build, trained_parameters
from p2pllm.training.tokenizer import load_tokenizer

CPU = torch.device("cpu")

TORCH_SHM = "torch_shm_manager"
"""torch's helper that removes the shared memory of dead processes, and then ends by itself."""


class Peer:
    """One process of a baseline: everything but the exchange."""

    def __init__(self) -> None:
        """Wait for the order, then build what it names and compute once, as the first pass is a slow one."""
        torch.set_num_threads(1)
        self._events = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)  # a library that prints must not break the protocol
        # Sockets and whatever else libraries leave go with the machine's own folder.
        os.environ["TMPDIR"] = tempfile.tempdir = os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()
        self._lines: queue.Queue[dict[str, Any]] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()
        self.order = Order(**self._lines.get())
        self.draft = RunDraft.model_validate(self.order.draft)
        tokenizer = load_tokenizer(None)
        self.model = build(self.draft, tokenizer)
        self._corpus = Corpus.open(self.draft.data, tokenizer, Path(self.order.cache))
        self._held_out = self._corpus.validation_windows()
        self._drawn = 0
        for windows in self.micro_batches(self.order.micro_batch):
            torch.autograd.grad(sum_of_losses(self.model, windows), list(self.model.parameters()))

    # -- the others --------------------------------------------------------------------------------------------

    def meet(self, announce: Callable[[], str]) -> str:
        """How to reach the first peer: it says so itself, the others are told."""
        if self.order.rank:
            return str(self._lines.get()["contact"])
        contact = announce()
        self._emit("contact", contact=contact)
        return contact

    def wait_go(self) -> None:
        """Say that all is ready; returns when all others are, too."""
        self._emit("ready")
        seconds = self._lines.get()["go"]
        timer = threading.Timer(seconds, _end)
        timer.daemon = True
        timer.start()

    def _emit(self, event: str, **fields: Any) -> None:
        self._events.write(json.dumps({"event": event, **fields}) + "\n")
        self._events.flush()

    def _listen(self) -> NoReturn:
        """Take lines until there are no more. Not sys.stdin: a forked child would wait for its lock for ever."""
        left = b""
        while data := os.read(0, 1 << 16):
            *lines, left = (left + data).split(b"\n")
            for line in lines:
                self._lines.put(json.loads(line))
        _end()

    # -- training ----------------------------------------------------------------------------------------------

    def micro_batches(self, samples: int) -> Iterator[torch.Tensor]:
        """Fresh windows of this peer, int64 of shape (up to the micro-batch, context_length + 1); `samples` in all."""
        windows = self._corpus.draw("baseline", str(self.order.rank), 0, self._drawn, samples)
        self._drawn += 1
        for start in range(0, samples, self.order.micro_batch):
            yield torch.from_numpy(windows[start : start + self.order.micro_batch])

    def backward(self, model: nn.Module, windows: torch.Tensor, samples: int) -> float:
        """Add the gradient of a micro-batch's share in the mean over `samples`; returns its share in the loss."""
        loss = sum_of_losses(model, windows) / samples
        torch.autograd.backward(loss)
        return float(loss.detach())

    def commit(self, number: int, samples: int, loss: float) -> None:
        """Record the update to round `number`, with `samples` of this peer in it.

        Evaluates in the same rounds as p2pllm, whose peers all do so, too.
        """
        now, data = time.time(), self.draft.data
        due = number == 1 or number % data.validation_every == 0
        held_out = validation_loss(self.model, self._held_out, CPU, self.order.micro_batch) if due else None
        row = Row(now, number, samples * data.context_length, loss, held_out)
        with Path(self.order.rows).open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(row)) + "\n")


class ClippedAdamW(torch.optim.AdamW):
    """torch's AdamW that clips by norm itself, for optimizers that call `step` out of our sight."""

    def __init__(self, groups: Iterable[dict[str, Any]], section: OptimizerSection) -> None:
        super().__init__(
            groups,
            lr=section.learning_rate,
            betas=(section.beta1, section.beta2),
            eps=section.epsilon,
            weight_decay=section.weight_decay,
        )
        self._clip_norm = section.clip_norm

    def step(self, closure: Any = None) -> Any:
        """Clip the gradient over all groups, then the step of AdamW."""
        if self._clip_norm:
            everything = [parameter for group in self.param_groups for parameter in group["params"]]
            nn.utils.clip_grad_norm_(everything, self._clip_norm)
        return super().step(closure)


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """What is trained, as groups for an optimizer: matrices decay, vectors do not."""
    found = [parameter for _, parameter in trained_parameters(model)]
    return [
        {"params": [parameter for parameter in found if parameter.ndim >= 2]},
        {"params": [parameter for parameter in found if parameter.ndim < 2], "weight_decay": 0.0},
    ]


def schedule(optimizer: torch.optim.Optimizer, draft: RunDraft) -> torch.optim.lr_scheduler.LambdaLR:
    """The run's learning rate, one step a round."""
    section, rounds = draft.optimizer, draft.round.rounds
    return torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda done: learning_rate(section, rounds, done) / section.learning_rate
    )


def _end() -> NoReturn:
    """End with all that we started, whatever other threads are doing; a library's own farewell may hang."""
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if child.name() != TORCH_SHM:
                child.kill()
    os._exit(0)
