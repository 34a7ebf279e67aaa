"""What --mode sample writes."""

from dataclasses import asdict

import torch

import utils
from config import Config
from generation.chains import ChainResult
from logger.files import save_arrays
from logger.images import save_each, to_uint8
from logger.run_dir import RunDir
from models import log_density


def write_result(
    run: RunDir, name: str, result: ChainResult, further: dict, settings: dict, cfg: Config, device: torch.device
) -> None:
    """Write config.json, ``name``.npz and, with ``--save_images``, each image as a PNG; say where they are.

    The archive holds ``x`` and ``labels`` of the result, its log-densities, float32 (N,), unnormalised, in nats:
    ``log_p_x`` of x alone and ``log_p_x_y`` with its label; ``images``, x as uint8 (N, H, W, C); the tensors of
    ``further``, by name; and ``settings`` as JSON text. Equal results give equal bytes.
    """
    images = to_uint8(result.x)
    arrays = {"x": result.x, "labels": result.labels, **further, "images": images.permute(0, 2, 3, 1)}
    arrays["log_p_x"] = log_density(result.logits)
    arrays["log_p_x_y"] = log_density(result.logits, result.labels)
    run.write_config(asdict(cfg), utils.environment(device))
    save_arrays(run.path / f"{name}.npz", arrays, settings)
    if cfg.save_images:
        save_each(run.path / "samples", name, images)
    print(f"Done. Look at {utils.printable(run.path)}")
