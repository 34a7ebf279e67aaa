"""Pictures: grids of images, PNG and GIF files, text in them, curves."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import imageio.v3 as imageio
import numpy as np
import torch
from torch import Tensor
from torchvision.utils import make_grid

from logger.files import replace_file, warn_on_error
from logger.metrics_log import read_log
from utils import printable

FONT = cv2.FontFace("uni")  # has letters of many scripts; OpenCV 4 and its other fonts draw ??? for 猫
FONT_SIZE = 13  # pixels
CAPTION_HEIGHT = 18  # pixels below each frame of a GIF
NAME_WIDTH = 160  # pixels that the name of a class may take next to its row
CURVES = {  # file: unit, names in the log
    "test_accuracy.png": ("accuracy", ["accuracy/train", "accuracy/valid", "accuracy/test"]),
    "loss.png": ("nats", ["loss/total", "loss/classification", "loss/generative"]),
}


def to_uint8(x: Tensor) -> Tensor:
    """Images in [-1, 1], clamped, to uint8 of the same shape; NaN becomes 0."""
    return x.add(1).mul(127.5).nan_to_num(0, 255, 0).clamp(0, 255).round().to(torch.uint8)


def image_grid(images: Tensor, columns: int = 8, tile: int = 64) -> np.ndarray:
    """uint8 images (N, C, H, W), C = 1 or 3, as one RGB picture (H', W', 3).

    Small images are enlarged by a whole factor, without smoothing, until a side has about ``tile`` pixels.
    """
    factor = max(1, round(tile / images.shape[-1]))
    large = images.cpu().repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    return make_grid(large, nrow=columns, pad_value=128).permute(1, 2, 0).contiguous().numpy()


def text_width(text: str) -> int:
    """Pixels that a printable text needs in FONT."""
    return cv2.getTextSize((0, 0), text, (0, 0), FONT, FONT_SIZE)[2]


def write_text(picture: np.ndarray, x: int, y: int, text: str, width: int) -> None:
    """Black text into a picture (H, W, 3), from column ``x`` on, its middle at row ``y``, cut at ``width`` pixels.

    Names of files can hold what no font can draw: that is escaped.
    """
    text = printable(text, "utf-8")
    while len(text) > 1 and text_width(text) > width:
        text = text[:-2] + "…"
    cv2.putText(picture, text, (x, y + FONT_SIZE // 3), (0, 0, 0), FONT, FONT_SIZE)


def captioned(grid: np.ndarray, rows: Sequence[str] = (), columns: Sequence[str] = ()) -> np.ndarray:
    """An RGB picture (H, W, 3) uint8 with a name to the left of each of its equal rows and above each column.

    A name that is wider than NAME_WIDTH pixels, or than its column, is shortened.
    """
    (height, width), top = grid.shape[:2], 16 if columns else 0
    left = min(NAME_WIDTH, max(text_width(printable(name, "utf-8")) for name in rows)) + 8 if rows else 0
    picture = np.pad(grid, ((top, 0), (left, 0), (0, 0)), constant_values=255)
    for i, name in enumerate(rows):
        write_text(picture, 4, top + round((i + 0.5) * height / len(rows)), name, NAME_WIDTH)
    for i, name in enumerate(columns):
        write_text(picture, left + 4 + round(i * width / len(columns)), top // 2, name, width // len(columns) - 4)
    return picture


def save_png(path: Path, picture: Any) -> bytes:
    """Write an RGB picture, an array (H, W, 3) uint8, or a figure of Matplotlib; returns the file's bytes."""
    if isinstance(picture, np.ndarray):
        encoded = imageio.imwrite("<bytes>", picture, extension=".png")
    else:
        picture.savefig(file := io.BytesIO(), format="png", dpi=120)
        encoded = file.getvalue()
    replace_file(path, encoded)
    return encoded


def save_gif(path: Path, pictures: Sequence[np.ndarray], captions: Sequence[str]) -> bytes:
    """Write RGB pictures (H, W, 3) uint8, all of one size, as a looping GIF, each with its caption below.

    The first and the last frame stay for a second; of equal ones in a row Pillow makes one that stays as long. A
    picture that is narrower than its caption gets a white margin. Returns the file's bytes.
    """
    width = pictures[0].shape[1]
    margin = max(0, *(text_width(caption) + 8 - width for caption in captions))
    frames = []
    for picture, caption in zip(pictures, captions, strict=True):
        frame = np.pad(picture, ((0, CAPTION_HEIGHT), (0, margin), (0, 0)), constant_values=255)
        write_text(frame, 4, len(frame) - CAPTION_HEIGHT // 2, caption, width + margin)
        frames.append(frame)
    durations = [1000, *[100] * (len(frames) - 2), 1000][: len(frames)]  # milliseconds
    options = {"save_all": True, "duration": durations, "loop": 0}  # all: even if there is one
    encoded = imageio.imwrite("<bytes>", np.stack(frames), extension=".gif", **options)
    replace_file(path, encoded)
    return encoded


def plot_curves(path: Path) -> None:
    """test_accuracy.png and loss.png from a run's metrics.jsonl; where they cannot be drawn, a warning on stderr."""
    with warn_on_error(f"the curves in {path} could not be drawn"):
        from matplotlib.figure import Figure  # slow to import

        lines = read_log(path / "metrics.jsonl")
        for name, (unit, keys) in CURVES.items():
            figure = Figure(figsize=(7, 4), layout="constrained")
            axes = figure.subplots()
            axes.set(xlabel="training step", ylabel=unit)
            axes.grid(alpha=0.3)
            for key in keys:
                if points := [(line["step"], line[key]) for line in lines if line.get(key) is not None]:
                    axes.plot(*zip(*points, strict=True), ".-" if len(points) < 50 else "-", label=key)
                    axes.legend()
            save_png(path / name, figure)
