"""What --mode sample writes."""

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

import utils
from config import Config
from logger.files import save_arrays
from logger.images import save_each, to_uint8
from logger.run_dir import RunDir
from models import log_density


def write_result(
    run: RunDir, name: str, arrays: dict[str, Tensor], settings: dict[str, Any], cfg: Config, device: torch.device
) -> None:
    """Write config.json, ``name``.npz and, with ``--save_images``, each image as a PNG; say where they are.

    ``arrays`` must hold ``x``, the images, float32 (N, C, H, W) in [-1, 1], ``labels``, their classes, int64 (N,), and
    ``logits``, float32 (N, K). Instead of the logits the archive holds the log-densities that follow from them, float32
    (N,), unnormalised, in nats: ``log_p_x`` of x alone and ``log_p_x_y`` with its label; besides ``images``, uint8
    (N, H, W, C), and ``settings`` as JSON text. Equal results give equal bytes.
    """
    logits, images = arrays["logits"], to_uint8(arrays["x"])
    stored = {key: value for key, value in arrays.items() if key != "logits"}
    stored["images"] = images.permute(0, 2, 3, 1)
    stored["log_p_x"], stored["log_p_x_y"] = log_density(logits), log_density(logits, arrays["labels"])
    run.write_config(asdict(cfg), utils.environment(device))
    save_arrays(run.path / f"{name}.npz", stored, settings)
    if cfg.save_images:
        save_each(run.path / "samples", name, images)
    print(f"Done. Look at {utils.printable(run.path)}")
