"""Checkpoints: written whole or not at all, checked before they are loaded, loaded without running code.

A checkpoint is one file: a line that says what it is, the SHA-256 digest of the rest, and the state as `torch.save`
writes it, which is loaded with ``weights_only=True``. It is written to a temporary name, flushed to the disk and
renamed; the one before it is kept.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from captum_idexpo._core.rng import AnyGenerator

_MAGIC = b"captum-idexpo checkpoint 6\n"
_DIGEST_SIZE = 64
_NAME = re.compile(r"checkpoint-(\d{9})\.pt")
_KEPT = 2
_HOLDERS_OF_GENERATORS = ("sampler", "batch_sampler", "dataloader", "base_dataloader")
"""Attributes by which loaders, also those that accelerate prepares, lead to their samplers."""


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read or written; the message says which, why, and what to do."""


def save(state: dict[str, Any], folder: Path, step: int) -> Path:
    """Write the checkpoint of a run after so many updates, and delete all others but the one before it.

    Checkpoints of more updates belong to the part of a run that was given up when an older one was resumed. They are
    deleted, too.

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
    """Make a folder for checkpoints, if there is none.

    Raises:
        CheckpointError: it cannot be made, or nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be written to ({error}): choose another checkpoint_dir.") from error


def load(path: Path) -> dict[str, Any]:
    """Return the state in a checkpoint file.

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
    """Return the state of a checkpoint file, or of the latest good one in a folder, and where it was found.

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


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoint files in a folder."""
    return [path for path in folder.glob("checkpoint-*.pt") if _NAME.fullmatch(path.name)]


def checked_generators(generators: Iterable[object]) -> list[AnyGenerator]:
    """Return random generators as a list; TypeError for one of an unknown kind."""
    checked = []
    for generator in generators:
        if not isinstance(generator, AnyGenerator):
            raise TypeError(
                "generators must be torch.Generator, numpy.random.Generator, numpy.random.RandomState or "
                f"random.Random, given: {type(generator).__name__}."
            )
        checked.append(generator)
    return checked


def generators_of(*loaders: object) -> list[AnyGenerator]:
    """Return the random generators that loaders and their samplers hold, each once."""
    found: dict[int, AnyGenerator] = {}
    queue, seen = list(loaders), set()
    while queue:
        holder = queue.pop()
        if holder is None or id(holder) in seen:
            continue
        seen.add(id(holder))
        generator = getattr(holder, "generator", None)
        if isinstance(generator, AnyGenerator):
            found[id(generator)] = generator
        queue.extend(getattr(holder, name, None) for name in _HOLDERS_OF_GENERATORS)
    return list(found.values())


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
    """Return NumPy's numbers as Python's, which load without running code."""
    if isinstance(values, np.generic):
        return values.item()
    if type(values) is dict:  # an OrderedDict is a module's, and holds more than its items
        return {_plain(key): _plain(value) for key, value in values.items()}
    return type(values)(map(_plain, values)) if type(values) in (list, tuple) else values


def _flush_folder(folder: Path) -> None:
    """Write the new name to the disk, where the system allows it."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
