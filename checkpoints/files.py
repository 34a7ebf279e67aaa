"""Checkpoint files: written whole or not at all, checked when they are read, never code to run."""

import errno
import itertools
import json
import os
import sys
import zipfile
from argparse import Namespace
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from logger.files import disk_errors
from utils import UserError

CHECKPOINT_FORMAT = 4
CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES)  # a directory; the last on Windows
LEGACY = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"  # how files of torch before 1.6 begin
# Plain values that other programs keep beside their weights, and that torch does not take by itself.
PLAIN = [
    Namespace,
    np.dtype,
    np.ndarray,
    np._core.multiarray.scalar,
    (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"),
    *(type(np.dtype(name)) for name in ("float64", "float32", "int64", "int32", "bool")),
]
Converter = Callable[[Path, Any], dict[str, Any]]
READABLE = (2, 3, CHECKPOINT_FORMAT)  # formats that --load_ckpt reads; --resume needs the newest


class Damaged(UserError):
    """A checkpoint is missing or broken. Trying again does not help, but an earlier checkpoint may work."""


def save_checkpoint(directory: Path, name: str, state: dict[str, Any], keep: str | None = None) -> None:
    """Write ``directory/name`` so that a power cut leaves the old file or the new one, never half of one.

    The file it replaces is kept as ``keep``. The archive carries a CRC-32 of each of its records.
    """
    path, temporary = directory / name, directory / f"{name}.tmp"
    with disk_errors(directory):
        directory.mkdir(exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                torch.save({"format": CHECKPOINT_FORMAT, **state}, file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            temporary.unlink(missing_ok=True)
            cause = error if isinstance(error, OSError) else error.__context__  # the disk's own error, if any
            raise cause if isinstance(cause, OSError) else OSError(str(error).splitlines()[0]) from None
        if keep and path.exists():
            os.replace(path, directory / keep)
        os.replace(temporary, path)
        sync_directory(directory)


def sync_directory(directory: Path) -> None:
    """Have renamed files on disk. Some file systems, and Windows, cannot do that: then they sync as they like."""
    try:
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno not in CANNOT_SYNC:
            raise


def set_aside(path: Path) -> None:
    """Rename a checkpoint, if it is there, so that it stays but counts no more."""
    ends = itertools.chain([""], (f"-{n}" for n in itertools.count(2)))
    names = (path.with_name(f"{path.stem}_set_aside{end}.pt") for end in ends)
    free = next(name for name in names if not name.exists())
    with disk_errors(path), suppress(FileNotFoundError):
        path.replace(free)


def load_checkpoint(path: Path, convert: Converter | None = None) -> dict[str, Any]:
    """Read one checkpoint file to the CPU. It may hold tensors and plain values, never code to run.

    ``convert`` makes a checkpoint of what a file of another program holds; without, such a file is refused.

    Raises UserError for a file that is missing, torn, corrupted, not ours, or of another format version.
    """
    state = _read(path)
    if not isinstance(state, dict) or "format" not in state:
        if convert is None:
            raise UserError(f"{path} is not a checkpoint of this program")
        return convert(path, state)
    if state["format"] not in READABLE:
        raise UserError(
            f"{path} has checkpoint format {state['format']}, which this version does not know: update this program"
        )
    return state


def _read(path: Path) -> Any:
    try:
        if not path.is_file():
            raise Damaged(f"no checkpoint at {path}")
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        with open(path, "rb") as file:
            legacy = file.read(len(LEGACY)) == LEGACY
        if not legacy:
            with zipfile.ZipFile(path) as archive:
                broken = archive.testzip()  # checks every record's CRC-32
            if broken:
                raise Damaged(f"{path} is corrupted (record {broken}); use another checkpoint")
        with torch.serialization.safe_globals(PLAIN):
            return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except zipfile.BadZipFile:
        raise Damaged(f"{path} is empty, incomplete or not a checkpoint; use another checkpoint") from None
    except Exception as error:
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            raise
        code = "weights_only" in str(error).lower()
        reason = "it holds more than tensors and plain values" if code else "it is broken"
        raise Damaged(f"{path} was refused: {reason}; use another checkpoint") from None


def _read_safetensors(path: Path) -> dict[str, Any]:
    """A checkpoint of this program where the file names its options, else just its tensors."""
    try:
        with safe_open(path, "pt") as file:
            tensors, about = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except SafetensorError as error:
        raise Damaged(f"{path} is empty, incomplete or not a safetensors file: {error}") from None
    if not {"config", "data", "step"} <= about.keys():
        return tensors
    config, data, step = (json.loads(about[name]) for name in ("config", "data", "step"))
    state = {"step": step, "model": tensors}
    if json.loads(about.get("averaged", "false")):
        state["ema"] = tensors
    return {"format": CHECKPOINT_FORMAT, "config": config, "data": data, "state": state}


def find_checkpoint(path: str, convert: Converter | None = None) -> tuple[Path, dict[str, Any]]:
    """The checkpoint that a user names by its file or its run directory: of a run, the newest that is whole.

    A file may be another program's where ``convert`` reads it.
    """
    named = Path(path)
    try:
        is_run = named.is_dir()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if not is_run:
        return named, load_checkpoint(named, convert)
    candidates = [named / "ckpt" / name for name in ("last.pt", "previous.pt")]
    error = None
    for candidate in candidates:
        try:
            state = load_checkpoint(candidate)
        except Damaged as e:
            error = error or e
            continue
        except UserError as e:
            other = f"; or name {candidates[1]}" if candidate is candidates[0] and candidates[1].exists() else ""
            raise UserError(f"{e}{other}") from None
        if error and os.path.exists(candidates[0]):
            print(f"Warning: {error}; taking {candidate} instead.", file=sys.stderr)
        return candidate, state
    if not any(map(os.path.exists, candidates)):
        raise UserError(f"no checkpoint in {path} (looked for ckpt/last.pt and ckpt/previous.pt)")
    raise error
