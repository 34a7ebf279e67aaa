"""What belongs to a checkpoint: its network, and the images that the network can classify."""

import sys
from pathlib import Path
from typing import Any

import torch

import data
from config import Config
from models import JEM, build_model
from utils import UserError


def load_model(cfg: Config, path: Path, content: dict[str, Any]) -> JEM:
    """The checkpoint's network on the CPU, with its averaged weights (``--ema``) where it has them."""
    state, described = content["state"], content["data"]
    model = build_model(
        described["shape"][0],
        len(described["class_names"]),
        cfg.depth,
        cfg.width,
        cfg.norm,
        cfg.dropout_rate,
        cfg.activation,
    )
    own = {name: content["config"][name] for name in ("depth", "width", "norm", "activation")}
    try:
        if any(getattr(cfg, name) != own[name] for name in ("norm", "activation")):
            raise RuntimeError("the weights may fit, and be another network")
        model.load_state_dict(state.get("ema", state["model"]))
    except RuntimeError:
        options = " ".join(f"--{name} {value}" for name, value in own.items())
        raise UserError(f"{path} holds another network, {options}: leave these options out") from None
    return model


def load_data(cfg: Config, path: Path, content: dict[str, Any], device: torch.device) -> data.ImageData:
    """The data set of ``cfg``, which the checkpoint's network must be able to classify."""
    images = data.load(cfg.dataset, cfg.data_dir, cfg.image_size, cfg.n_valid, device)
    shape, class_names = content["data"]["shape"], content["data"]["class_names"]
    if list(images.shape) != list(shape) or len(images.class_names) != len(class_names):
        raise UserError(
            f"{path} was trained on images of {'x'.join(map(str, shape))} in {len(class_names)} "
            f"classes, and those of {cfg.dataset} are others; mend --dataset or --image_size"
        )
    if list(images.class_names) != list(class_names):
        print(
            f"Warning: the classes of {cfg.dataset} are not those that {path} was trained on: what depends on labels "
            "means nothing.",
            file=sys.stderr,
        )
    return images
