"""Inner optimizers: AdamW, or Muon for the matrices of hidden layers; their moments in a file.

What does not live here: gradients (`inner`), when a step is taken (`local`), outer optimizers and the learning rate of
a round (`state`).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from blake3 import blake3
from torch import nn

from p2pllm.errors import StateError
from p2pllm.sections import OptimizerSection
from p2pllm.state.chunks import BytesLike
from p2pllm.state.files import DiskFolder, Reader, explained
from p2pllm.state.outer import SMALLEST
from p2pllm.training.model import layout_of, trained_parameters

_FORMAT = "p2pllm inner optimizer 1"

logger = logging.getLogger(__name__)


def hidden_matrices(model: nn.Module) -> list[nn.Parameter]:
    """The matrices that map one hidden layer to the next, each once: what is trained, called `weight`, has two axes,
    and belongs neither to an embedding nor to the output head.

    The head is what the model names as its output embeddings; where it shares its weight with an embedding, that one
    weight is neither's hidden matrix. What has two axes but another name (biases of positions, a state space's A) is
    not applied as a matrix.
    """
    head = getattr(model, "get_output_embeddings", lambda: None)()
    outer = [module for module in model.modules() if isinstance(module, nn.Embedding) or module is head]
    seen = {parameter for module in outer for parameter in module.parameters()}
    found = []
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.Parameter) and weight.requires_grad and weight.ndim == 2 and weight not in seen:
            seen.add(weight)
            found.append(weight)
    return found


def build_optimizers(model: nn.Module, settings: OptimizerSection) -> list[torch.optim.Optimizer]:
    """torch's optimizers for all trained parameters of a model; each parameter is in one of them.

    adamw: AdamW for all. muon (arXiv 2505.23725): Muon for `hidden_matrices`, AdamW for embeddings, head, vectors and
    the rest, as torch's documentation of Muon and its authors advise; also momentum 0.95 with Nesterov and 5
    Newton-Schulz steps, which are torch's defaults, are theirs. Muon's steps are scaled to the size of AdamW's
    (arXiv 2502.16982), so that one learning rate and one weight decay serve both. Only parameters with 2 or more axes
    decay.
    """
    optimizers: list[torch.optim.Optimizer] = []
    left = [parameter for _, parameter in trained_parameters(model)]
    if settings.type == "muon" and (matrices := hidden_matrices(model)):
        decay = settings.weight_decay
        optimizers.append(torch.optim.Muon(matrices, weight_decay=decay, adjust_lr_fn="match_rms_adamw"))
        taken = set(matrices)
        left = [parameter for parameter in left if parameter not in taken]
    groups = [
        {"params": [parameter for parameter in left if parameter.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [parameter for parameter in left if parameter.ndim < 2], "weight_decay": 0.0},
    ]
    betas = (settings.beta1, settings.beta2)
    optimizers.append(torch.optim.AdamW(groups, betas=betas, eps=max(settings.epsilon, SMALLEST), foreach=True))
    return optimizers


class InnerOptimizer:
    """The optimizers of one model with their moments, which are the peer's own and never leave the machine."""

    def __init__(self, model: nn.Module, settings: OptimizerSection) -> None:
        """Take all memory that steps will need, so that a micro-batch that fits afterwards keeps fitting."""
        self._settings = settings
        self._layout = layout_of(model)
        self._names, self._parameters = zip(*trained_parameters(model), strict=True)
        self._optimizers = build_optimizers(model, settings)
        # torch makes moments in the first step: take one that moves nothing, then forget it
        self.step([torch.zeros_like(parameter) for parameter in self._parameters], 0.0)
        self.reset()

    def step(self, gradients: Iterable[torch.Tensor], rate: float) -> None:
        """One step with the gradient of each trained parameter, in the layout's order; clipping changes them.

        rate: learning rate of this step; that of the settings, the peak of a whole run, is not used here.
        """
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient
        if self._settings.clip_norm:
            nn.utils.clip_grad_norm_(self._parameters, self._settings.clip_norm)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()

    def reset(self) -> None:
        """Fresh moments."""
        for _, tensor in self._tensors():
            tensor.zero_()

    def save(self, path: Path, run_id: str) -> None:
        """Write the moments in the safetensors format, in the place of what is there; durable when this returns.

        Raises StateError if the disk does not take them; what was there before is then as it was.
        """
        parts = [_bytes(tensor.cpu().numpy()) for _, tensor in self._tensors()]
        hasher = blake3()
        for part in parts:
            hasher.update(part)
        content: list[BytesLike] = [self._head(run_id), *parts, hasher.digest()]
        needed = sum(len(part) for part in content)
        with explained(f"The moments of the inner optimizer cannot be saved in {path.parent}", needed):
            DiskFolder(path.parent, read_only=False).put(path.name, content)

    def load(self, path: Path, run_id: str) -> bool:
        """Take the moments that `save` wrote; whether that was done.

        If there is no file the moments stay. If it is damaged, or of another run, model or optimizer, they are fresh,
        with a warning in this module's logger: they are worth some steps of warm-up and no failed start.
        """
        try:
            with DiskFolder(path.parent, read_only=True).open(path.name) as file:
                if file is None:
                    return False
                self._read(file, self._head(run_id))
        except (OSError, StateError) as error:
            self.reset()
            logger.warning("The inner optimizer starts with fresh moments, since %s cannot be used: %s", path, error)
            return False
        return True

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of all that the optimizers remember, parameter by parameter."""
        for name, parameter in zip(self._names, self._parameters, strict=True):
            for optimizer in self._optimizers:
                for key, tensor in sorted(optimizer.state.get(parameter, {}).items()):
                    yield f"{name}.{key}", tensor

    def _head(self, run_id: str) -> bytes:
        """The first bytes of a file. All of it follows from run, model and optimizer, so one comparison checks it.

        At the end of the file stands the digest of the moments, itself a tensor: the format knows nothing else.
        """
        optimizer, layout = self._settings.type, self._layout.digest()
        metadata = {"format": _FORMAT, "run_id": run_id, "layout": layout, "optimizer": optimizer}
        values: dict[str, Any] = {"__metadata__": metadata}
        end = 0
        for name, tensor in self._tensors():
            start, end = end, end + tensor.nbytes
            values[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
        values["digest"] = {"dtype": "U8", "shape": [32], "data_offsets": [end, end + 32]}
        head = json.dumps(values).encode()
        head += b" " * (-len(head) % 8)  # the format wants the tensors aligned to 8 bytes
        return len(head).to_bytes(8, "little") + head

    def _read(self, file: Reader, head: bytes) -> None:
        """Fill the moments from a file. Raises StateError if it is not what `save` wrote; they are then anything."""
        if file.read(0, len(head)) != head:
            raise StateError("it is not of this run, model and optimizer, or it is damaged.")
        at, hasher = len(head), blake3()
        for _, tensor in self._tensors():
            values = np.empty(tuple(tensor.shape), np.float32)
            file.read_into(at, _bytes(values))
            hasher.update(_bytes(values))
            if not np.isfinite(values).all():
                raise StateError("it holds a number that is not finite.")
            tensor.copy_(torch.from_numpy(values))
            at += values.nbytes
        if file.size != at + 32 or file.read(at, 32) != hasher.digest():
            raise StateError("its content does not have the digest that was saved with it.")


def _bytes(values: np.ndarray) -> memoryview:
    """The memory of a contiguous array, also of one without axes."""
    return values.reshape(-1).view(np.uint8).data
