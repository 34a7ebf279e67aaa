"""Pictures: grids of images, PNG and GIF files, text in them, curves."""

import functools
import io
import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.utils import make_grid
from tqdm import tqdm

from logger.files import disk_errors, replace_file
from logger.metrics_log import read_log
from utils import printable

CAPTION_HEIGHT = 18  # pixels below each frame of a film
NAME_WIDTH = 160  # pixels that the name of a class may take next to its row


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


@functools.cache
def font(size: int = 11) -> ImageFont.FreeTypeFont:
    """DejaVu Sans: it comes with matplotlib and has letters of many scripts. ``size`` is its height in pixels."""
    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"), size)


def text_width(text: str) -> int:
    """Pixels that a text needs in ``font()``."""
    return round(font().getlength(printable(text, "utf-8")))


def write_text(picture: Image.Image, x: int, y: int, text: str, width: int) -> None:
    """Black text from the pixel column ``x`` on, its middle at the row ``y``; at more than ``width`` pixels it is cut.

    Names of files can hold what no font can draw: that is escaped.
    """
    text = printable(text, "utf-8")
    if text_width(text) > width:
        while text and text_width(text + "…") > width:
            text = text[:-1]
        text += "…"
    ImageDraw.Draw(picture).text((x, y), text, fill="black", font=font(), anchor="lm")


def captioned(grid: np.ndarray, rows: Sequence[str] = (), columns: Sequence[str] = ()) -> np.ndarray:
    """An RGB picture (H, W, 3) uint8 with a name to the left of each of its equal rows and above each column.

    A name that is wider than NAME_WIDTH pixels, or than its column, is shortened.
    """
    height, width = grid.shape[:2]
    left = min(NAME_WIDTH, max((text_width(name) for name in rows), default=-8)) + 8
    top = 16 if columns else 0
    picture = Image.new("RGB", (left + width, top + height), "white")
    picture.paste(Image.fromarray(grid), (left, top))
    for i, name in enumerate(rows):
        write_text(picture, 4, top + round((i + 0.5) * height / len(rows)), name, NAME_WIDTH)
    for i, name in enumerate(columns):
        write_text(picture, left + 4 + round(i * width / len(columns)), top // 2, name, width // len(columns) - 4)
    return np.asarray(picture)


def save_each(folder: Path, name: str, images: Tensor) -> None:
    """Write uint8 images (N, C, H, W), each as a PNG of its own, in their own size: ``name``_00000.png and so on."""
    for i, image in enumerate(tqdm(images, desc="PNGs", unit="image", leave=False)):
        save_png(folder / f"{name}_{i:05d}.png", image_grid(image[None], tile=1))


def save_png(path: Path, picture: np.ndarray) -> bytes:
    """Write an RGB picture (H, W, 3) uint8; returns the file's bytes."""
    encoded = io.BytesIO()
    Image.fromarray(picture).save(encoded, "PNG")
    with disk_errors(path):
        replace_file(path, encoded.getvalue())
    return encoded.getvalue()


def save_gif(path: Path, pictures: Sequence[np.ndarray], captions: Sequence[str]) -> bytes:
    """Write RGB pictures (H, W, 3) uint8, all of one size, as a looping film, each with its caption below.

    The first and the last frame stay for a second. The captions must differ: Pillow makes one frame of equal ones.
    So a picture that is narrower than its caption gets a white margin. Returns the file's bytes.
    """
    height, width = pictures[0].shape[:2]
    full = max(width, *(text_width(caption) + 8 for caption in captions))
    film = []
    for picture, caption in zip(pictures, captions, strict=True):
        frame = Image.new("RGB", (full, height + CAPTION_HEIGHT), "white")
        frame.paste(Image.fromarray(picture))
        write_text(frame, 4, height + CAPTION_HEIGHT // 2, caption, full)
        film.append(frame)
    durations = [1000, *[100] * (len(film) - 2), 1000][: len(film)]  # milliseconds
    encoded = io.BytesIO()
    film[0].save(encoded, "GIF", save_all=True, append_images=film[1:], duration=durations, loop=0)
    with disk_errors(path):
        replace_file(path, encoded.getvalue())
    return encoded.getvalue()


def plot_curves(path: Path) -> None:
    """test_accuracy.png and loss.png from metrics.jsonl; where they cannot be drawn, a warning on stderr.

    They are a by-product: training goes on without them.
    """
    try:
        lines = read_log(path / "metrics.jsonl")
        curves = {
            "test_accuracy.png": ("accuracy", ["accuracy/train", "accuracy/valid", "accuracy/test"]),
            "loss.png": ("nats", ["loss/total", "loss/classification", "loss/generative"]),
        }
        for name, (unit, keys) in curves.items():
            encoded = io.BytesIO()
            curves_figure(lines, unit, keys).savefig(encoded, dpi=120)
            replace_file(path / name, encoded.getvalue())
    except (OSError, ValueError) as error:  # a full disk; a log that is missing or damaged
        print(printable(f"Warning: the curves in {path} could not be drawn: {error}"), file=sys.stderr)


def curves_figure(lines: list[dict], unit: str, keys: list[str]) -> Figure:
    """A curve for each key that the log's ``lines`` hold, over the training step."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for key in keys:
        points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=key, marker="." if len(points) < 50 else None)
    axes.set(xlabel="training step", ylabel=unit)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    return figure
