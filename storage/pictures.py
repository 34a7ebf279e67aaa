"""Pictures: grids of images, PNG and GIF files, curves."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import imageio.v3 as imageio
import numpy as np
import torch
from torch import Tensor
from torchvision.utils import make_grid

from storage.log import read_log
from storage.writer import disk_errors, replace_file


def to_uint8(x: Tensor) -> Tensor:
    """Images in [-1, 1], clamped, to uint8 of the same shape; values that are not finite become 0."""
    return x.add(1).mul(127.5).nan_to_num(0, 255, 0).clamp(0, 255).round().to(torch.uint8)


def image_grid(images: Tensor, columns: int = 8, tile: int = 64, padding: int = 2) -> np.ndarray:
    """uint8 images (N, C, H, W), C = 1 or 3, as one RGB picture (H', W', 3).

    Small images are enlarged by a whole factor, without smoothing, until a side has about ``tile`` pixels.
    """
    factor = max(1, round(tile / images.shape[-1]))
    large = images.cpu().repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    grid = make_grid(large, nrow=columns, padding=padding, pad_value=128)
    return grid.permute(1, 2, 0).contiguous().numpy()


def save_png(path: Path, picture: np.ndarray) -> bytes:
    """Write an RGB picture (H, W, 3) uint8; returns the file's bytes."""
    ok, encoded = cv2.imencode(".png", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    assert ok
    with disk_errors(path):
        replace_file(path, encoded.tobytes())
    return encoded.tobytes()


def save_gif(path: Path, pictures: Sequence[np.ndarray], captions: Sequence[str]) -> bytes:
    """Write RGB pictures (H, W, 3), all of one size, as a looping film, each with its caption below.

    The first and the last frame stay for a second. Returns the file's bytes.
    """
    film = []
    for picture, caption in zip(pictures, captions, strict=True):
        picture = cv2.copyMakeBorder(picture, 0, 18, 0, 0, cv2.BORDER_CONSTANT, value=(255, 255, 255))
        cv2.putText(
            picture, caption, (4, picture.shape[0] - 5), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 0), 1, cv2.LINE_AA
        )
        film.append(picture)
    durations = [1000, *[100] * (len(film) - 2), 1000][: len(film)]  # milliseconds
    encoded = imageio.imwrite("<bytes>", np.stack(film), extension=".gif", duration=durations, loop=0)
    with disk_errors(path):
        replace_file(path, encoded)
    return encoded


def plot_curves(path) -> None:
    """test_accuracy.png and loss.png from metrics.jsonl."""
    import matplotlib.pyplot as plt

    lines = read_log(path / "metrics.jsonl")
    curves = {
        "test_accuracy.png": ("accuracy", ["accuracy/train", "accuracy/valid", "accuracy/test"]),
        "loss.png": ("nats", ["loss/total", "loss/classification", "loss/generative"]),
    }
    for name, (unit, keys) in curves.items():
        figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
        for key in keys:
            points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), label=key, marker="." if len(points) < 50 else None)
        axes.set(xlabel="training step", ylabel=unit)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
        with disk_errors(path):
            figure.savefig(path / name, dpi=120)
        plt.close(figure)
