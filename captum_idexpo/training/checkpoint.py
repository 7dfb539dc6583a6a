"""Checkpoints that survive: written whole or not at all, checked before they are believed, loaded without running code.

A checkpoint is one file: a line that says what it is, the SHA-256 digest of the rest, and the state as `torch.save`
writes it, which is loaded with ``weights_only=True``. It is written to a temporary name, flushed to the disk and
renamed; the one before it is kept.
"""

from __future__ import annotations

import hashlib
import io
import os
import random
import re
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from captum_idexpo._core.errors import warn
from captum_idexpo._core.rng import accelerators, set_streams, streams
from captum_idexpo.training.generators import Generator, kind_of, set_state, state_of

_MAGIC = b"captum-idexpo checkpoint 4\n"
_DIGEST_SIZE = 64
_NAME = re.compile(r"checkpoint-(\d{9})\.pt")
_KEPT = 2


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read or written; the message says which, why, and what to do."""


def save(state: dict[str, Any], folder: Path, step: int) -> Path:
    """Writes a checkpoint of the run after so many updates, and removes all but the one before it.

    Also those of more updates, from which a run that was resumed from an earlier one has turned away.

    Raises:
        CheckpointError: it could not be written (a full disk); earlier ones are untouched.
    """
    buffer = io.BytesIO()
    torch.save(_plain(state), buffer)
    payload = buffer.getvalue()
    _loaded(payload, "The state of this run")  # now, rather than when it is needed
    path = folder / f"checkpoint-{step:09d}.pt"
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    make(folder)
    try:
        with temporary.open("wb") as file:
            file.write(_MAGIC + hashlib.sha256(payload).hexdigest().encode() + b"\n" + payload)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise CheckpointError(
            f"The checkpoint {path} could not be written ({error}). Earlier ones are untouched: make room, then "
            "continue with trainer.resume()."
        ) from error
    _flush_folder(folder)
    up_to_here = sorted(old for old in checkpoints(folder) if old.name <= path.name)
    for old in set(checkpoints(folder)) - set(up_to_here[-_KEPT:]):
        old.unlink(missing_ok=True)
    for leftover in folder.glob("checkpoint-*.tmp"):
        leftover.unlink(missing_ok=True)
    return path


def make(folder: Path) -> None:
    """Makes a folder for checkpoints, if there is none.

    Raises:
        CheckpointError: there can be none, or nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written to ({error}): choose another checkpoint_dir.") from error


def load(path: Path) -> dict[str, Any]:
    """The state in a checkpoint file.

    Raises:
        CheckpointError: it is missing, foreign, cut short or changed.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"The checkpoint {path} cannot be read: {error}.") from error
    if not content.startswith(_MAGIC):
        if content.startswith(_MAGIC[: _MAGIC.rindex(b" ")]):
            raise CheckpointError(f"{path} is a checkpoint in another format: resume with the version that wrote it.")
        raise CheckpointError(f"{path} is no checkpoint of ExplanationRegularizedTrainer.")
    start = len(_MAGIC) + _DIGEST_SIZE + 1
    digest, payload = content[len(_MAGIC) : start - 1], content[start:]
    if hashlib.sha256(payload).hexdigest().encode() != digest:
        raise CheckpointError(f"{path} was cut short or changed: its content does not match its digest.")
    return _loaded(payload, str(path))


def load_latest(path: Path) -> tuple[dict[str, Any], Path]:
    """The state of a checkpoint file, or of the latest good one in a folder, and where it was found.

    Raises:
        CheckpointError: there is none, or none that is good; names what is wrong with each.
    """
    if path.is_file():
        return load(path), path
    faults = []
    for candidate in sorted(checkpoints(path), reverse=True):
        try:
            return load(candidate), candidate
        except CheckpointError as error:
            faults.append(str(error))
    if faults:
        raise CheckpointError(f"No checkpoint in {path} is good. " + " ".join(faults))
    raise CheckpointError(f"There is no checkpoint in {path}: start with fit(), without resume().")


def random_state(generators: Iterable[Generator], device: torch.device) -> dict[str, Any]:
    """The random streams of a process: Python's, NumPy's, torch's on the CPU and its devices, the generators given."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    version, internal, gauss_next = random.getstate()
    return {
        "python": [version, list(internal), gauss_next],
        "numpy": [name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), position, has_gauss, gauss],
        "torch": [device.type, streams(accelerators(device))],
        "generators": [[kind_of(generator), state_of(generator)] for generator in generators],
    }


def set_random_state(state: dict[str, Any], generators: Iterable[Generator], device: torch.device) -> None:
    """Puts all random streams back; with a warning all but those of another kind of device than this run's."""
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    kind, states = state["torch"]
    devices = accelerators(device)[: len(states) - 1] if device.type == kind else []
    set_streams(states[: 1 + len(devices)], devices)
    kinds = {(kind, device.type)}
    generators = list(generators)
    if len(generators) != len(state["generators"]):
        warn(
            f"The checkpoint's run drew from {len(state['generators'])} generators, this one knows {len(generators)}: "
            "some go on from another place, and the run does not end as it would have.",
        )
    for generator, (kind, own) in zip(generators, state["generators"], strict=False):
        kinds.add((kind, kind_of(generator)))
        if kind_of(generator) == kind:
            set_state(generator, own)
    for kind, here in kinds:
        if kind != here:
            warn(
                f"The checkpoint's run drew random numbers on {kind}, this one draws them on {here}: they go on from "
                "another place, and the run does not end as it would have.",
            )


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoint files in a folder."""
    return [path for path in folder.glob("checkpoint-*.pt") if _NAME.fullmatch(path.name)]


def _loaded(payload: bytes, what: str) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"{what} holds something that cannot be loaded without running code ({error}): a scheduler, an optimizer "
            "or a callback put more than numbers and tensors there."
        ) from error
    return state


def _plain(values: Any) -> Any:
    """NumPy's numbers as Python's, which load without running code."""
    if isinstance(values, np.generic):
        return values.item()
    if type(values) is dict:  # an OrderedDict is a module's, and holds more than its items
        return {_plain(key): _plain(value) for key, value in values.items()}
    return type(values)(map(_plain, values)) if type(values) in (list, tuple) else values


def _flush_folder(folder: Path) -> None:
    """Makes the renaming itself last, where the system lets a folder be flushed."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
