"""Checkpoint files: written whole or not at all, checked when they are read, never code to run."""

import json
import os
import pickle
import sys
import zipfile
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from data import to_float
from logger.files import disk_errors, first_free, whole_file
from utils import UserError, out_of_memory

CHECKPOINT_FORMAT = 5
READABLE = (2, 3, 4, CHECKPOINT_FORMAT)  # formats that --load_ckpt reads; --resume needs the newest
PARTS = {"config": set(), "data": {"shape", "class_names"}, "state": {"step", "model"}}  # and what each must hold
# Plain values that other programs keep beside their weights, and that torch does not take by itself.
SCALAR = np._core.multiarray.scalar
PLAIN = [Namespace, np.dtype, np.ndarray, SCALAR, (SCALAR, "numpy.core.multiarray.scalar")]
PLAIN += [type(np.dtype(name)) for name in ("float64", "float32", "int64", "int32", "bool")]


class Damaged(UserError):
    """A checkpoint is broken. Trying again does not help, but an earlier checkpoint may work."""


def save_checkpoint(directory: Path, name: str, state: dict[str, Any]) -> None:
    """Write ``directory/name`` so that a power cut leaves the old file or the new one, never half of one.

    Before that, the last.pt that is there becomes previous.pt. Each record of the archive carries its CRC-32.
    """
    keep = directory / "previous.pt" if name == "last.pt" else None
    with disk_errors(directory), whole_file(directory / name, keep) as file:
        try:
            torch.save({"format": CHECKPOINT_FORMAT, **state}, file)
        except RuntimeError as error:  # how torch reports the disk's own error
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def set_aside(path: Path) -> None:
    """Rename a checkpoint, if it is there, so that it stays but counts no more."""
    if path.exists():
        with disk_errors(path):
            path.replace(first_free(path.with_name(f"{path.name}_set_aside"), partial(Path.touch, exist_ok=False)))


def load_checkpoint(path: Path) -> Any:
    """Read one file of tensors and plain values, never code, to the CPU, of this program (``is_ours``) or another.

    Raises UserError for a file that is missing, torn, corrupted, or of a format that this version does not know.
    """
    if not os.path.isfile(path):  # reading from a pipe would wait
        raise UserError(f"no checkpoint at {path}, or none that may be read")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read(path)
    if not is_ours(content):
        return content
    if content["format"] not in READABLE:
        raise UserError(f"{path} has format {content['format']}, which this version does not know: update this program")
    for name, keys in PARTS.items():
        if not isinstance(content.get(name), dict) or not keys <= content[name].keys():
            raise Damaged(f"{path} lacks {name}, or a part of it, that every checkpoint has; use another checkpoint")
    return content


def is_ours(content: Any) -> bool:
    return isinstance(content, dict) and isinstance(content.get("format"), int)


def _read(path: Path) -> Any:
    is_archive = zipfile.is_zipfile(path)  # files of torch before 1.6 are none
    try:
        if is_archive:
            with zipfile.ZipFile(path) as archive:
                if broken := archive.testzip():  # torch.load does not check the CRC-32s
                    raise Damaged(f"{path} is corrupted (record {broken}); use another checkpoint")
        with torch.serialization.safe_globals(PLAIN):
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except Exception as error:
        if isinstance(error, UserError) or out_of_memory(error):
            raise
        reason = "it is broken, incomplete or not a checkpoint"
        if is_archive and isinstance(error, pickle.UnpicklingError):
            reason = "it holds more than tensors and plain values"
        raise Damaged(f"{path} was refused: {reason}; use another checkpoint") from None


def _read_safetensors(path: Path) -> dict[str, Any]:
    """A checkpoint of this program where the file names its options, else just its tensors.

    Beside the weights there may be images of the replay buffer, uint8, and Gaussians for ``StoredStarts``.
    """
    try:
        with safe_open(path, "pt") as file:
            tensors, about = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
        if not {"config", "data", "step"} <= about.keys():
            return tensors
        about = {name: json.loads(value) for name, value in about.items()}
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise Damaged(f"{path} is incomplete or not a safetensors file: {error}") from None
    starts = {}
    for kind in ("gaussian", "class_gaussian"):
        if f"start.{kind}.mean" in tensors:
            parts = (tensors.pop(f"start.{kind}.{part}").float() for part in ("mean", "factor", "basis", "noise"))
            mean, factor, basis, noise = parts  # (K, D), (K, R, R), (R, D), (K,)
            starts[kind] = list(zip(mean, factor @ basis, noise.tolist(), strict=True))
    buffer = tensors.pop("buffer.images", None)
    state = {"step": about["step"], "model": tensors} | ({"ema": tensors} if about.get("averaged") else {})
    if buffer is not None:
        state["buffer"] = {"images": to_float(buffer), "age": torch.zeros(len(buffer), dtype=torch.int64)}
    return about | {"format": CHECKPOINT_FORMAT, "state": state, "starts": starts}


def find_checkpoint(path: str) -> tuple[Path, Any]:
    """The checkpoint that a user names by its file or its run directory: of that the newest whole one, else best.pt."""
    if not os.path.isdir(path):
        return Path(path), load_checkpoint(Path(path))
    *newest_first, best = (Path(path, "ckpt", name) for name in ("last.pt", "previous.pt", "best.pt"))
    there = list(filter(os.path.exists, newest_first)) or list(filter(os.path.exists, [best]))
    for file in there:
        try:
            return file, load_checkpoint(file)
        except Damaged as error:
            if file == there[-1]:
                raise
            print(f"Warning: {error}; taking {there[-1]} instead.", file=sys.stderr)
    raise UserError(f"no checkpoint in {path}: name a training run (looked for ckpt/last.pt, previous.pt and best.pt)")
