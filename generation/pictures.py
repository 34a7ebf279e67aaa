"""The images that --mode sample changes: test images, or a user's own pictures."""

from pathlib import Path
from typing import Any

import distributed
import image_folder
from checkpoints.load import load_data
from config import Config
from data import Split
from models import JEM
from models.predict import predict


def given_images(model: JEM, cfg: Config, path: Path, content: dict[str, Any]) -> tuple[Split, str]:
    """The pictures of ``--images``, whose labels are the classes that ``model`` sees, or the test images; and a name.

    They are on the model's device. path, content: of the model's checkpoint.
    """
    device = model.class_output.weight.device
    if not cfg.images:
        return load_data(cfg, path, content, device).test.to(device), f"test images of {cfg.dataset}"
    read = distributed.rank0_first(lambda: image_folder.read_pictures(Path(cfg.images), content["data"]["shape"]))
    images = read[1].to(device)
    return Split(images, predict(model, images).argmax(1)), f"pictures of {cfg.images}"
