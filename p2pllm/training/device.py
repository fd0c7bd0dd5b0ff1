"""Devices: which one to compute on, in which type, and whether an exception means that its memory is full.

What does not live here: what is computed (`inner`, `evaluate`, `generate`).
"""

from __future__ import annotations

import contextlib
import resource
import sys
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from p2pllm.errors import SettingsError
from p2pllm.settings import GPU_DRIVER_GB


def choose_device(setting: str) -> torch.device:
    """The device that the setting names, the first if it names several; "auto" is the best that this machine has, the
    first of CUDA, MPS and CPU.

    Raises SettingsError if it names one that is not here.
    """
    setting = setting.partition(",")[0]
    if setting == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        return torch.device(name)
    try:
        device = torch.device(setting)
    except RuntimeError:
        raise SettingsError(f'The device "{setting}" is none of auto, cpu, mps, cuda and cuda:N.') from None
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise SettingsError(
                f'The device "{setting}" is not on this machine, which has {count} CUDA devices that torch '
                "can use; set device to auto, or check the driver and torch's build."
            )
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise SettingsError('The device "mps" is not on this machine; set device to auto.')
    return device


def limit_memory(device: torch.device, gigabytes: float) -> None:
    """Take no more of a CUDA device's memory than that, 0: than there is; more is answered as if it were full.

    gigabytes: of 1e9 bytes, the driver's GPU_DRIVER_GB included, which torch's own limit leaves out.
    """
    if gigabytes and device.type == "cuda":
        whole = torch.cuda.get_device_properties(device).total_memory
        share = max(0.0, gigabytes - GPU_DRIVER_GB) * 1e9 / whole
        torch.cuda.set_per_process_memory_fraction(min(1.0, share), device)


def autocast(device: torch.device) -> AbstractContextManager[object]:
    """bfloat16 for matrix products where a CUDA device computes in it; float32 anywhere else."""
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.autocast("cuda", dtype=torch.bfloat16)
    return contextlib.nullcontext()


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that the memory of the host or of a device is full."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and (
        "out of memory" in text or "can't allocate memory" in text or "not enough memory" in text
    )


def release_memory(device: torch.device) -> None:
    """Give cached memory back, so that a smaller attempt does not fail on fragments of a larger one."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def memory_of(device: torch.device) -> dict[str, int]:
    """Bytes: the most that this process has had in memory so far; on CUDA also the device's, free and in all."""
    found = {"host_peak": _host_peak()}
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        peak = torch.cuda.max_memory_reserved(device)
        found |= {"device_peak": peak, "device_free": free, "device_total": total}
    return found


def _host_peak() -> int:
    status = Path("/proc/self/status")  # Linux; the figure below also holds what the process was before its exec
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given; needed before a clock is read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
