"""Snapshots: the whole shared state in one safetensors file, written atomically and verified when read.

A file holds the tensors params, m and v, and as metadata the run id, the state's header, its layout and
its digest; any tool that reads safetensors can open it, and none can run code from it. What does not live
here: the log of rounds (`rounds`), exports for people (`training.export`).
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from p2pllm.errors import StateError
from p2pllm.state.layout import Layout
from p2pllm.state.shared import SharedState

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_TENSORS = ("params", "m", "v")

logger = logging.getLogger(__name__)


def save(folder: Path, state: SharedState, run_id: str, keep: int = 2) -> Path:
    """Write a snapshot and delete all but the `keep` last ones of the run; returns the file.

    The file appears under its name only when all of it is on the disk. Raises StateError if the disk is
    full or does not let us write; what was there before is then as it was.
    """
    temporary: Path | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder, run_id)
        present = _files(folder, run_id)
        # Numbered by save, not by round: who yields a lighter branch goes back to an earlier round.
        number = present[-1][0] + 1 if present else 0
        target = folder / f"{_prefix(run_id)}{number:08d}-round-{state.round}.safetensors"
        temporary = target.with_name(f".{target.name}.tmp")
        _write(temporary, state, run_id)
        temporary.replace(target)
        _sync_folder(folder)
        for _, old in present[: max(0, len(present) + 1 - keep)]:
            old.unlink(missing_ok=True)
    except OSError as error:
        _remove_quietly(temporary)
        raise StateError(_why_not_written(folder, state, error)) from None
    except BaseException:
        _remove_quietly(temporary)
        raise
    return target


def newest(
    folder: Path, run_id: str, layout: Layout | None = None, params_out: np.ndarray | None = None
) -> SharedState | None:
    """The last saved state of the run that is undamaged; None if there is none.

    Damaged files, and files of another `layout` if that is given, are skipped with a warning in this module's
    logger. The parameters go to `params_out` if it is given, which is not touched unless a state is returned.
    Raises StateError if the folder or a file may not be read.
    """
    try:
        present = _files(folder, run_id)
    except OSError as error:
        raise StateError(f"The saved states in {folder} cannot be read: {_reason(error)}.") from None
    for _, file in reversed(present):
        try:
            state = _read(file, run_id, layout)
        except StateError as error:
            logger.warning("Skipped the saved state %s: %s", file, error)
            continue
        except PermissionError:
            raise StateError(f"There is no permission to read the saved state {file}; allow it.") from None
        if params_out is None:
            return state
        powers = (state.beta1_power, state.beta2_power)
        moved = SharedState(state.layout, params_out, state.m, state.v, round=state.round, beta_powers=powers)
        np.copyto(params_out, state.params)
        return moved
    return None


def _prefix(run_id: str) -> str:
    return f"state-{run_id[:16]}-"


def _files(folder: Path, run_id: str) -> list[tuple[int, Path]]:
    """(number, file) of the run's snapshots in the order of saving; a missing folder has none."""
    pattern = re.compile(re.escape(_prefix(run_id)) + r"(\d{8})-round-\d+\.safetensors")
    try:
        names = [file.name for file in folder.iterdir()]
    except FileNotFoundError:
        return []
    return sorted((int(found[1]), folder / name) for name in names if (found := pattern.fullmatch(name)))


def _remove_leftovers(folder: Path, run_id: str) -> None:
    """Delete what a killed process left half written; one daemon at a time owns the folder of a run."""
    for file in folder.glob(f".{_prefix(run_id)}*.tmp"):
        file.unlink(missing_ok=True)


def _write(file: Path, state: SharedState, run_id: str) -> None:
    """Write the safetensors format ourselves: the library hides errno and copies the whole state first."""
    payload = state.payload()
    header: dict[str, Any] = {
        "__metadata__": {
            "format": "p2pllm state 1",
            "run_id": run_id,
            "header": json.dumps(state.header(), sort_keys=True),
            "layout": state.layout.to_json(),
            "digest": state.digest(),
        }
    }
    at = 0
    for name, buffer in zip(_TENSORS, payload, strict=True):
        header[name] = {
            "dtype": "F32",
            "shape": [state.layout.size],
            "data_offsets": [at, at + buffer.nbytes],
        }
        at += buffer.nbytes
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)  # the format wants the tensors aligned to 8 bytes
    with file.open("wb") as stream:
        stream.write(len(head).to_bytes(8, "little") + head)
        for buffer in payload:
            stream.write(buffer)
        stream.flush()
        os.fsync(stream.fileno())


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _read(file: Path, run_id: str, layout: Layout | None) -> SharedState:
    """Read and verify one snapshot. Raises StateError with what is wrong."""
    try:
        with safe_open(file, framework="numpy") as tensors:
            metadata = tensors.metadata() or {}
            if set(tensors.keys()) != set(_TENSORS):
                raise StateError("it does not hold the tensors of a state.")
            arrays = [tensors.get_tensor(name) for name in _TENSORS]
    except PermissionError:
        raise
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise StateError(f"it is damaged ({error}).") from None
    if metadata.get("run_id") != run_id:
        raise StateError("it belongs to another run.")
    saved_layout = Layout.from_json(metadata.get("layout", ""))
    if layout is not None and layout.entries != saved_layout.entries:
        raise StateError("it has another layout than this run's model.")
    try:
        header = json.loads(metadata.get("header", ""))
    except ValueError:
        raise StateError("its header is damaged.") from None
    if any(array.dtype != np.float32 or array.ndim != 1 for array in arrays):
        raise StateError("its tensors are not float32 vectors.")
    state = SharedState.from_payload(saved_layout, header, arrays)
    if state.digest() != metadata.get("digest"):
        raise StateError("its content does not have the digest that was saved with it.")
    return state


def _remove_quietly(file: Path | None) -> None:
    if file is not None:
        with contextlib.suppress(OSError):
            file.unlink(missing_ok=True)


def _why_not_written(folder: Path, state: SharedState, error: OSError) -> str:
    what = f"The state of round {state.round} cannot be saved in {folder}"
    if error.errno in _FULL:
        size = 3 * state.params.nbytes / 1e6
        return f"{what}: the disk or a quota is full; free {size:.0f} MB (the states saved earlier are intact)."
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{what}: writing there is not permitted; allow it or choose another folder as `home`."
    return f"{what}: {_reason(error)}."


def _reason(error: OSError) -> str:
    return error.strerror or str(error)
