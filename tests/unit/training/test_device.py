"""Devices: which one a setting names, what its memory is capped at, and when memory is full; CUDA's part is played."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from p2pllm.errors import SettingsError
from p2pllm.training import device


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, torch.device]]:
    """Two cards of 8 GB; the shares of memory that this process was held to."""
    held: list[tuple[float, torch.device]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=8_000_000_000))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, card: held.append((share, card)))
    return held


def test_the_memory_of_a_card_is_capped_where_somebody_wants_that(cuda: list[tuple[float, torch.device]]) -> None:
    card = device.choose_device("cuda:1,cuda:0")
    device.limit_memory(card, 2.0)
    device.limit_memory(card, 0.0)
    device.limit_memory(card, 80.0)
    device.limit_memory(torch.device("cpu"), 2.0)
    # of 2 GB 1.4 are torch's own, the rest is set aside for the driver
    assert cuda == [(pytest.approx(1.4 / 8), torch.device("cuda:1")), (1.0, torch.device("cuda:1"))]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_real_card_keeps_to_its_cap() -> None:
    program = """
import torch
from p2pllm.training.device import is_out_of_memory, limit_memory
card = torch.device("cuda:0")
limit_memory(card, 2.0)
fits = torch.empty(1_300_000_000, dtype=torch.uint8, device=card)
try:
    torch.empty(300_000_000, dtype=torch.uint8, device=card)
except RuntimeError as error:
    print(is_out_of_memory(error))
"""
    # a process of its own: the limit is for all that this one does later
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("True\n", 0), done.stderr


def test_a_card_that_is_not_there_is_refused(cuda: list[tuple[float, torch.device]]) -> None:
    assert device.choose_device("auto") == torch.device("cuda")
    with pytest.raises(SettingsError, match="has 2 CUDA devices"):
        device.choose_device("cuda:2")


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"), True),
        (MemoryError(), True),
        (RuntimeError("MPS backend out of memory"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), True),
        (RuntimeError("shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_says_that_memory_is_full(error: BaseException, full: bool) -> None:
    assert device.is_out_of_memory(error) is full
