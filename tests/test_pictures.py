"""Pictures read back by Pillow: pixels, films frame by frame, text, curves."""

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

from logger.images import CAPTION_HEIGHT, NAME_WIDTH, captioned, image_grid, plot_curves, save_gif
from utils import printable

RNG = np.random.default_rng(0)
STRANGE = ["$a$b", "_hidden", "\udcff\udc80", "two\nlines", "ε-猫", "a" * 300, ""]  # names that a file system allows


def frames(path):
    """RGB (T, H, W, 3), and the milliseconds that each frame stays."""
    with Image.open(path) as film:
        assert film.info["loop"] == 0
        shown = [(np.asarray(frame.convert("RGB")), frame.info["duration"]) for frame in ImageSequence.Iterator(film)]
    return np.stack([pixels for pixels, _ in shown]), [duration for _, duration in shown]


def test_a_film_of_grey_images_keeps_every_pixel(tmp_path):
    images = torch.from_numpy(RNG.integers(256, size=(5, 16, 1, 8, 8), dtype=np.uint8))
    pictures = [image_grid(batch, 4) for batch in images]
    assert save_gif(tmp_path / "a.gif", pictures, [f"step {i}" for i in range(5)]) == (tmp_path / "a.gif").read_bytes()
    film, durations = frames(tmp_path / "a.gif")
    np.testing.assert_array_equal(film[:, :-CAPTION_HEIGHT], np.stack(pictures))
    assert durations == [1000, 100, 100, 100, 1000]
    strip = film[:, -CAPTION_HEIGHT:]
    assert strip.max() == 255 and strip.min() < 64 and (strip[0] != strip[1]).any()


@pytest.mark.parametrize("n", [1, 2, 12])
def test_every_frame_of_a_film_stays_though_the_pictures_are_equal_and_narrow(n, tmp_path):
    save_gif(tmp_path / "a.gif", [np.full((10, 10, 3), 90, np.uint8)] * n, [f"SGLD step {i}" for i in range(n)])
    film, durations = frames(tmp_path / "a.gif")
    assert len(film) == n and durations == [1000, *[100] * (n - 2), 1000][:n]
    assert (film[:, :10, :10] == 90).all() and (film[:, :10, 10:] == 255).all()


def test_names_are_written_beside_rows_and_above_columns():
    grid = np.full((66 * 7, 66 * 3, 3), 90, np.uint8)
    picture = captioned(grid, rows=STRANGE)
    np.testing.assert_array_equal(picture, captioned(grid, rows=[printable(name, "utf-8") for name in STRANGE]))
    left = picture.shape[1] - grid.shape[1]
    assert left == NAME_WIDTH + 8 and len(picture) == len(grid)
    np.testing.assert_array_equal(picture[:, left:], grid)
    beside = picture[:, :left].reshape(7, 66, left, 3)
    assert [row.min() < 64 for row in beside] == [True] * 6 + [False]  # the last name is empty
    assert beside[5, :, 4 + NAME_WIDTH :].min() == 255  # the long name is cut
    above = captioned(grid, columns=["a", "b" * 100, ""])[:16]
    assert above.shape == (16, 66 * 3, 3)
    assert [above[:, 66 * i : 66 * (i + 1)].min() < 64 for i in range(3)] == [True, True, False]
    assert printable("é\udcff\n", "utf-8") == "é\\udcff\\n" and printable("é", "ascii") == "\\xe9"


LINES = '{"step": 1, "loss/total": 2.0, "accuracy/test": 0.1}\n{"step": 2, "loss/total": null, "accuracy/test": 0.5}\n'


def test_curves_are_drawn_without_a_global_backend(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text(LINES)
    with matplotlib.rc_context({"savefig.format": "pdf"}):
        plot_curves(tmp_path)
    for name in ("test_accuracy.png", "loss.png"):
        assert np.asarray(Image.open(tmp_path / name)).std() > 5
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".jsonl", ".png", ".png"]
    assert capsys.readouterr().err == ""


def test_curves_that_cannot_be_drawn_are_one_warning(tmp_path, capsys):
    plot_curves(tmp_path)  # without a log
    (tmp_path / "metrics.jsonl").write_text(LINES)
    with matplotlib.rc_context({"text.usetex": True}), pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(tmp_path))  # without LaTeX
        plot_curves(tmp_path)
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 2
    assert all(line.startswith(f"Warning: the curves in {tmp_path} could not be drawn: ") for line in warnings)
