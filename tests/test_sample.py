"""--mode sample by the command line: files read back, chains against a plain loop, pixels that stay."""

import json
import math
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from sklearn.datasets import load_digits
from small_runs import DIGITS, new_run, reference_chain, refused, seeded, state
from test_image_folder import tiff

import generation.sample
import main
from evaluation import quality
from generation import load_run, restore
from generation.restore import unknown_pixels
from generation.sample import by_class
from logger.images import to_uint8
from models import build_model
from sgld import uniform_images
from utils import UserError

TRAIN = [*DIGITS, *"--batch_size 16 --buffer_size 64 --max_steps 4 --warmup_steps 0 --lr 1e-3 --n_valid 50".split()]
train = partial(new_run, TRAIN)


@pytest.fixture(scope="module")
def jem(tmp_path_factory):
    return train(tmp_path_factory.mktemp("jem"))


def sample(checkpoint: Path, logdir: Path, *options: str, status: int = 0) -> tuple[Path, dict[str, np.ndarray]]:
    """Run --mode sample; returns its run directory and the content of its archive."""
    given = ["--mode", "sample", "--load_ckpt", str(checkpoint), "--gpu", "cpu", "--precision", "fp32"]
    run = new_run(given, logdir, *options, status=status)
    (archive,) = run.glob("*.npz")
    with np.load(archive) as content:
        return run, dict(content)


def network(weights: dict[str, torch.Tensor]):
    model = build_model((1, 8, 8), 10, depth=10, width=1).eval().requires_grad_(False)
    model.load_state_dict(weights)
    return model


def pixels(path: Path) -> np.ndarray:
    """A picture, RGB (H, W, 3) uint8."""
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def film_of(path: Path) -> np.ndarray:
    """A GIF's frames, RGB (T, H, W, 3) uint8."""
    with Image.open(path) as film:
        return np.stack([frame.convert("RGB") for frame in ImageSequence.Iterator(film)])


def tiles(picture: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """The 8x8 images (rows, columns, 8, 8) of a grid at the bottom right of a picture (H, W, 3)."""
    side, gap = 64, 2
    grid = picture[-(rows * (side + gap) + gap) :, -(columns * (side + gap) + gap) :, 0]
    pixels = [gap + i * (side + gap) + side // 16 + 8 * np.arange(8) for i in range(max(rows, columns))]
    return np.stack([[grid[np.ix_(pixels[r], pixels[c])] for c in range(columns)] for r in range(rows)])


def test_chains_from_noise_agree_with_a_plain_loop(jem, tmp_path):
    """Of 12 chains, 8 at a time: the second batch is whole, too, and is then cut."""
    options = "--n_samples 12 --n_sample_steps 5 --sgld_std 0.02 --batch_size 8 --seed 7".split()
    options += "--sgld_lr 0.5 --sgld_normalize --sgld_clamp --sgld_grad_clamp 0.1".split()
    limits = {"normalize": True, "clamp": True, "grad_clamp": 0.1}
    run, content = sample(jem, tmp_path, *options)
    model, rng = network(state(jem)["model"]), seeded(7)
    seeds, ends = torch.randint(2**31, (3,), generator=rng).tolist(), []
    for seed in seeds[:2]:  # each batch has randomness of its own
        rng.manual_seed(seed)
        first = uniform_images(8, (1, 8, 8), rng)
        ends.append(reference_chain(model.log_density, first, 5, 0.5, 0.02, rng, **limits).x)
    x = torch.cat(ends)[:12]
    torch.testing.assert_close(torch.from_numpy(content["x"]), x)
    logits = model(x).numpy()
    np.testing.assert_allclose(content["log_p_x"], np.log(np.exp(logits).sum(1)), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(content["labels"], logits.argmax(1))
    np.testing.assert_allclose(content["log_p_x_y"], logits.max(1), rtol=1e-4, atol=1e-4)
    expected = np.rint(np.clip((content["x"] + 1) / 2, 0, 1) * 255).transpose(0, 2, 3, 1)
    assert content["images"].dtype == np.uint8 and np.abs(content["images"] - expected).max() <= 1
    settings = json.loads(str(content["settings"]))
    assert settings["checkpoint"] == str(jem / "ckpt" / "last.pt")
    assert (settings["steps"], settings["sgld_lr"], settings["sgld_std"]) == (5, 0.5, 0.02)
    assert (settings["start"], settings["target"], settings["weights"]) == ("uniform", "log p(x)", "last")


@pytest.mark.parametrize("statistics", ["batch", "running"])
def test_the_images_are_those_that_quality_measures(statistics, tmp_path, monkeypatch):
    how = f"--recipe sada-jem --batch_size 20 --p_x_batch_size 16 --norm_statistics {statistics}"
    run = train(tmp_path / "train", *how.split())
    measured, sample_sets = {}, quality.sample_sets
    monkeypatch.setattr(quality, "sample_sets", lambda *inputs: measured.update(sample_sets(*inputs)) or dict(measured))
    options = "--n_sample_steps 3 --seed 5".split()
    test = ["--mode", "test", "--eval", "quality", "--load_ckpt", str(run), "--gpu", "cpu", "--precision", "fp32"]
    assert main.main([*test, *options, "--n_samples", "90"]) == 0
    for name, asked in {"fresh": [], "fresh, class-conditional": ["--class_cond"]}.items():
        for n in (90, 30):  # the first ones are the same, however many there are
            _, content = sample(run, tmp_path / "samples", *options, *asked, "--n_samples", str(n))
            np.testing.assert_array_equal(content["images"], measured[name].images[:n].permute(0, 2, 3, 1))


def test_pictures_and_films_show_the_chains(jem, tmp_path, monkeypatch):
    options = ["--n_samples", "20", "--batch_size", "7", "--n_sample_steps", "130", "--save_images"]
    run, content = sample(jem, tmp_path, *options, "--note", "try")
    assert run.name.endswith("_sample_try")
    shown = tiles(pixels(run / "samples.png"), 2, 10)
    np.testing.assert_array_equal(shown.reshape(20, 8, 8), content["images"][..., 0])
    singles = [pixels(path) for path in sorted((run / "samples").glob("*.png"))]
    np.testing.assert_array_equal(np.stack(singles), content["images"].repeat(3, 3))
    film = film_of(run / "samples.gif")
    assert len(film) == 45  # every third step, the start and the end
    assert film[0].shape == film[-1].shape and (film[0] != film[-1]).any()
    monkeypatch.setattr(generation.sample, "save_png", Mock(side_effect=MemoryError))
    _, saved = sample(jem, tmp_path / "again", *options, status=2)  # a picture that fails loses no samples
    np.testing.assert_array_equal(saved["images"], content["images"])


def test_one_class_a_row_and_each_chain_climbs_its_own(jem, tmp_path):
    conditions = ["--n_samples", "40", "--class_cond", "--sgld_std", "0", "--sgld_lr", "5"]
    _, start = sample(jem, tmp_path, *conditions, "--n_sample_steps", "0")
    run, end = sample(jem, tmp_path, *conditions, "--n_sample_steps", "30")
    np.testing.assert_array_equal(np.bincount(end["labels"]), np.full(10, 4))
    assert json.loads(str(end["settings"]))["target"] == "log p(x|y)"
    before, after = (network(state(jem)["model"])(torch.from_numpy(c["x"])) for c in (start, end))
    own = torch.from_numpy(end["labels"])[:, None]
    gain = after - before
    assert (gain.gather(1, own) > 0).all()
    others = (gain.sum(1, keepdim=True) - gain.gather(1, own)) / 9
    assert (gain.gather(1, own) > others).all()
    shown = tiles(pixels(run / "samples.png"), 10, 4)
    for label in range(10):
        np.testing.assert_array_equal(shown[label], end["images"][end["labels"] == label][..., 0])


def test_some_classes_alone(jem, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(generation.sample, "captioned", names := Mock(wraps=generation.sample.captioned))
    options = "--class_cond --n_sample_steps 2 --classes".split()
    run, content = sample(jem, tmp_path, *options, "7, 3", "--n_samples", "6")
    expected = load_run(jem, gpu="cpu", precision="fp32").chains(6, ["7", 3], steps=2)
    np.testing.assert_array_equal(content["x"], expected.x)
    assert content["labels"].tolist() == [7, 3, 7, 3, 7, 3] and names.call_args.kwargs["rows"] == ["7", "3"]
    np.testing.assert_array_equal(tiles(pixels(run / "samples.png"), 2, 3)[1], content["images"][1::2, ..., 0])
    run, content = sample(jem, tmp_path, *options, "3", "--n_samples", "20")
    assert set(content["labels"]) == {3}
    assert (tiles(pixels(run / "samples.png"), 2, 10).reshape(20, 8, 8) == content["images"][..., 0]).all()
    given = "--mode sample --gpu cpu --class_cond --load_ckpt".split()
    assert "there is no class [1, '12']: classes are 0, 1" in refused(capsys, *given, jem, "--classes", "1,12")
    _, held = sample(jem, tmp_path, "--from_buffer", "--n_samples", "64", "--n_sample_steps", "0")
    k = np.bincount(held["labels"]).argmax()
    options = f"--from_buffer --class_cond --classes {k},{k} --n_samples 3 --n_sample_steps 0"
    _, content = sample(jem, tmp_path, *options.split())
    of_class = {image.tobytes() for image in held["images"][held["labels"] == k]}
    assert {image.tobytes() for image in content["images"]} <= of_class and set(content["labels"]) == {k}
    options = "--start class_gaussian --n_samples 4 --n_sample_steps 0".split()
    (_, alone), (_, content) = sample(jem, tmp_path, *options), sample(jem, tmp_path, *options, "--classes", "?")
    assert (alone["x"] == content["x"]).all() and "does not use --classes" in capsys.readouterr().err


def test_a_classs_chains_start_from_images_of_that_class(jem, tmp_path, capsys):
    predicted = torch.tensor([2, 0, 1, 2, 0, 1, 1])
    names = {0: "a", 1: "b", 2: "c"}
    assert by_class(predicted, 6, names).tolist() == [1, 2, 0, 4, 5, 3]  # a, b, c, a, b, c
    assert by_class(predicted, 4, {2: "c", 1: "b"}).tolist() == [0, 2, 3, 5]
    with pytest.raises(UserError, match="needs 3 images of the class a, but the model finds only 2 in"):
        by_class(predicted, 9, names)
    options = "--mode sample --gpu cpu --from_buffer --class_cond --n_samples 60 --n_sample_steps 0".split()
    err = refused(capsys, *options, "--load_ckpt", jem, "--logdir", tmp_path)
    assert "give a smaller --n_samples" in err  # after four steps of training the classes are far from even
    assert not list(tmp_path.iterdir())


def originals_of(content: dict[str, np.ndarray]) -> np.ndarray:
    """The images that were changed, float (N, 1, 8, 8) in [-1, 1]."""
    return content["originals"].transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1


def true_labels(originals: np.ndarray) -> list[int]:
    """Of images, uint8 (N, 8, 8, 1), that are digits; a KeyError if one is not."""
    images = load_digits()
    label = {(image * 255 / 16).round().tobytes(): y for image, y in zip(images.images, images.target, strict=True)}
    return [label[image.astype(float).tobytes()] for image in originals[..., 0]]


MASKS = {"left": np.arange(64).reshape(8, 8) % 8 < 4, "center": np.pad(np.ones((4, 4), bool), 2)}
MASKS |= {"picture": np.eye(8, dtype=bool)}


@pytest.mark.parametrize("mask", MASKS)
def test_inpainting_holds_what_is_known(jem, tmp_path, mask):
    unknown, name = MASKS[mask], mask
    if mask == "picture":
        name = str(tmp_path / "mask.png")
        Image.fromarray(np.where(unknown, np.uint16(65535), np.uint16(300))).save(name)  # 16 bit
    options = ["--inpaint", name, "--n_samples", "5", "--n_sample_steps", "9"]
    run, content = sample(jem, tmp_path / "out", *options)
    assert len(true_labels(content["originals"])) == 5
    np.testing.assert_array_equal(content["known"], ~unknown)
    truth = originals_of(content)
    for x in (content["start"], content["x"]):
        np.testing.assert_array_equal(x[..., ~unknown], truth[..., ~unknown])
    assert (content["start"] != content["x"])[..., unknown].all()
    stages = tiles(pixels(run / "inpaint.png"), 5, 4)
    np.testing.assert_array_equal(stages[:, 0], content["originals"][..., 0])
    np.testing.assert_array_equal(stages[:, -1], content["images"][..., 0])
    np.testing.assert_array_equal(stages[:, :, ~unknown], stages[:, :1, ~unknown].repeat(4, 1))
    assert len(film_of(run / "inpaint.gif")) == 10


def test_the_start_uses_what_is_given(jem, tmp_path, capsys, monkeypatch):
    guess = Mock(wraps=restore.predict)
    monkeypatch.setattr(restore, "predict", guess)
    options = "--inpaint left --n_samples 120 --n_sample_steps 0 --start".split()
    starts = ("uniform", "class_gaussian --class_cond", "class_gaussian")
    found = [sample(jem, tmp_path, *options, *start.split())[1] for start in starts]
    error, of_class, guessed = (np.abs(c["start"] - originals_of(c))[..., :4].mean() for c in found)
    assert of_class < 0.33 * error and 1.05 * of_class < guessed < 0.6 * error
    assert (guess.call_args.args[1].numpy() == found[2]["given"]).all()  # and not by the whole image
    run, content = sample(jem, tmp_path, *"--denoise 0.5 --sgld_step 0 --class_cond --start class_gaussian".split())
    start = to_uint8(torch.from_numpy(content["start"]))[:, 0]
    np.testing.assert_array_equal(tiles(pixels(run / "denoise.png"), 10, 4)[:, 2], start)
    errors = [np.clip(content[name], -1, 1) - originals_of(content) for name in ("given", "start", "x")]
    given, start, end = (np.sqrt(np.square(error).mean()) for error in errors)
    assert start < 0.6 * given
    assert f"{given:.3f} as given, {start:.3f} at the start, {end:.3f} at the end" in capsys.readouterr().out


def test_denoising_starts_from_noisy_test_images(jem, tmp_path):
    options = "--denoise 0.5 --n_samples 100 --n_sample_steps 9 --class_cond --sgld_step_max 3"
    run, content = sample(jem, tmp_path, *options.split())
    noise = content["given"] - originals_of(content)
    assert abs(noise.mean()) < 4 * 0.5 / 80 and abs(noise.std() - 0.5) < 4 * 0.5 / np.sqrt(2 * 6400)
    settings = json.loads(str(content["settings"]))
    assert (settings["steps"], settings["start"]) == (3, "the noisy images (--denoise 0.5)")
    np.testing.assert_array_equal(content["labels"], true_labels(content["originals"]))
    np.testing.assert_array_equal(content["start"], content["given"])
    stages = tiles(pixels(run / "denoise.png"), 100, 4)
    np.testing.assert_array_equal(stages[:, 0], content["originals"][..., 0])
    np.testing.assert_array_equal(stages[:, 1], to_uint8(torch.from_numpy(content["given"]))[:, 0])
    np.testing.assert_array_equal(stages[:, -1], content["images"][..., 0])


def test_no_step_leaves_the_start(jem, tmp_path):
    run, content = sample(jem, tmp_path, "--inpaint", "left", "--n_samples", "3", "--n_sample_steps", "0")
    np.testing.assert_array_equal(content["x"], content["start"])
    assert pixels(next(run.glob("*.png"))).std() > 5


def test_what_is_transparent_in_a_mask_is_known_and_white_is_what_its_format_says(tmp_path, monkeypatch):
    alpha = np.zeros((8, 8), np.uint8)
    alpha[:, :3] = 255
    white, alpha_band = Image.new("L", (8, 8), 255), Image.fromarray(alpha)
    Image.merge("RGBA", [white, white, white, alpha_band]).save(tmp_path / "rgba.png")
    Image.merge("LA", [white, alpha_band]).save(tmp_path / "grey.png")
    Image.merge("RGB", [alpha_band, alpha_band, Image.new("L", (8, 8), 100)]).save(tmp_path / "light yellow.png")
    alpha_band.save(tmp_path / "one level.png", transparency=0)
    (tmp_path / "white is zero.tif").write_bytes(tiff(np.where(alpha, np.uint16(0), np.uint16(65535)), 16, 0))
    for path in tmp_path.iterdir():
        np.testing.assert_array_equal(unknown_pixels(str(path), 8, 8), alpha > 0)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # above twice the limit Pillow raises
    with pytest.raises(UserError, match="picture: .*grey.png cannot be read: Image size .64 pixels. exceeds limit"):
        unknown_pixels(str(tmp_path / "grey.png"), 8, 8)


def changed_checkpoint(run: Path, path: Path, **options) -> Path:
    """A copy of a run's checkpoint that says it was trained with other options."""
    content = torch.load(run / "ckpt" / "last.pt", weights_only=True)
    content["config"] |= options
    torch.save(content, path)
    return path


def test_a_small_buffer_gives_all_its_images_that_are_finite(jem, tmp_path, capsys):
    content = torch.load(jem / "ckpt" / "last.pt", weights_only=True)
    buffer = content["state"]["buffer"]["images"]
    buffer[5:60, 0, 3, 3] = math.nan
    torch.save(content, tmp_path / "nan.pt")
    _, found = sample(tmp_path / "nan.pt", tmp_path, "--from_buffer", "--n_sample_steps", "0")
    finite = torch.cat([buffer[:5], buffer[60:]]).numpy()
    assert sorted(x.tobytes() for x in found["x"]) == sorted(x.tobytes() for x in finite)
    buffer.fill_(math.inf)
    torch.save(content, tmp_path / "nan.pt")
    options = "--mode sample --gpu cpu --from_buffer --load_ckpt".split()
    assert "has 0 good images, fewer than 1" in refused(capsys, *options, tmp_path / "nan.pt", "--logdir", tmp_path)


BAD = {  # the checkpoint and other options, and what is said of them
    "torn": (["torn.pt"], "torn.pt was refused: it is broken, incomplete"),
    "uneven classes": (["JEM", "--n_samples", "15", "--class_cond"], "multiple of the 10 classes"),
    "no buffer": (["BEST", "--from_buffer"], "best.pt has no replay buffer"),
    "small buffer": (["JEM", "--from_buffer", "--n_samples", "65"], "has 64 good images, fewer than 65"),
    "no mask": (["JEM", "--inpaint", "right"], "right cannot be read: No such file"),
    "mask is a folder": (["JEM", "--inpaint", "."], "cannot be read: Is a directory"),
    "mask is no picture": (["JEM", "--inpaint", "torn.pt"], "--inpaint takes left, center or a picture: "),
    "mask of another size": (["JEM", "--inpaint", "big.png"], "has 9x8 pixels"),
    "black mask": (["JEM", "--inpaint", "black.png"], "no white pixels"),
    "too many": (["JEM", "--denoise", "1", "--n_samples", "361"], "--n_samples 361 is more than the 360 test images"),
    "classes without labels": (["UNLABELLED", "--class_cond"], "was trained without labels: leave --class_cond"),
    "two starts": (["JEM", "--denoise", "1", "--from_buffer"], "give one of them"),
}


def test_a_batch_of_one_that_leaves_no_variance_is_refused(tmp_path, capfd):
    run = train(tmp_path / "train", "--norm", "batch", "--stages", "4")
    options = ["--mode", "sample", "--gpu", "cpu", "--load_ckpt", str(run), "--logdir", str(tmp_path / "out")]
    assert "one value of each channel" in refused(capfd, *options, "--batch_size", 1)
    assert not (tmp_path / "out").exists()
    sample(run, tmp_path, "--n_samples", "1", "--batch_size", "2", "--n_sample_steps", "1")  # it has another beside it


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_status_2(case, jem, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    Path("torn.pt").write_bytes(b"PK")
    Image.new("L", (9, 8), 255).save("big.png")
    Image.new("L", (8, 8)).save("black.png")
    unlabelled = changed_checkpoint(jem, tmp_path / "unlabelled.pt", p_y_x_weight=0.0)
    (place, *options), message = BAD[case]
    place = {"JEM": jem, "BEST": jem / "ckpt" / "best.pt", "UNLABELLED": unlabelled}.get(place, place)
    command = ["--mode", "sample", "--gpu", "cpu", "--logdir", "out", "--load_ckpt", place, *options]
    assert message in refused(capfd, *command) and not Path("out").exists()
