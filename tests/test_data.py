import gzip
import hashlib
import io
import os
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from sklearn.datasets import load_digits
from torchvision import datasets
from torchvision.transforms import functional as F

import data
import image_folder
from utils import UserError

RNG = np.random.default_rng(0)
TILE = np.stack(np.meshgrid(np.arange(12) * 20, np.arange(8) * 30), -1)  # (8, 12, 2), no symmetry
RGB = np.concatenate([TILE, TILE.sum(-1, keepdims=True) // 2], -1).astype(np.uint8)  # (8, 12, 3)
GREY = RGB[..., 0] // 2 + RGB[..., 1] // 2
ALPHA = RGB[..., :1]


@pytest.fixture
def decoded(monkeypatch):
    """The files that were decoded since the start of the test."""
    files, decode_file = [], image_folder._decode_file

    def counted(file, image_size):
        files.append(file)
        return decode_file(file, image_size)

    monkeypatch.setattr(image_folder, "_decode_file", counted)
    return files


def random_images(*shape):
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def refuses(message, *args, **kwargs):
    with pytest.raises(UserError) as caught:
        data.load(*args, **kwargs)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- crops, flips, noise


def offsets(n, pad, seed=0):
    generator = torch.Generator().manual_seed(seed)
    top, left = torch.randint(2 * pad + 1, (2, n), generator=generator)
    return top, left, torch.rand(n, generator=generator) < 0.5


@pytest.mark.parametrize("shape, pad", [((3, 32, 32), 4), ((1, 28, 28), 3), ((1, 8, 8), 1), ((3, 12, 20), 2)])
def test_crop_and_flip_is_what_torchvision_gives(shape, pad):
    images = torch.from_numpy(random_images(40, *shape))
    top, left, flip = offsets(40, pad)
    result = data.crop_and_flip(images, top, left, flip, pad)
    assert result.dtype == torch.uint8
    assert result.is_contiguous(memory_format=torch.channels_last)
    for image, i, j, mirrored, got in zip(images, top, left, flip, result, strict=True):
        expected = F.crop(F.pad(image, pad, padding_mode="reflect"), int(i), int(j), *shape[1:])
        assert torch.equal(got, F.hflip(expected) if mirrored else expected)


def test_crop_and_flip_takes_any_memory_format():
    images = torch.from_numpy(random_images(9, 3, 16, 16))
    arguments = (*offsets(9, 2), 2)
    strided = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(data.crop_and_flip(strided, *arguments), data.crop_and_flip(images, *arguments))


def augment(images, flip=True, sigma=0.0, seed=0):
    return data.augment(images, flip, sigma, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("side, pad", [(4, 0), (8, 0), (12, 0), (16, 2), (28, 3), (32, 4), (64, 4)])
def test_augment_draws_every_offset_of_the_pad_rule_and_flips_half(side, pad, flip):
    n, middle = 1000, side // 2
    grid = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    coordinates = torch.stack(grid).byte().expand(n, -1, -1, -1)  # each pixel tells where it came from
    x = augment(coordinates, flip)
    row, column = ((x[:, :, middle, middle] + 1) * 127.5).round().long().T
    mirrored = x[:, 1, middle, middle - 1] > x[:, 1, middle, middle]
    column = torch.where(mirrored, side - 1 - column, column)
    assert set((row - middle).tolist()) == set(range(-pad, pad + 1))
    if flip:
        assert abs(mirrored.float().mean() - 0.5) < 5 * 0.5 / n**0.5
    else:
        assert not mirrored.any()
        assert set((column - middle).tolist()) == set(range(-pad, pad + 1))


def test_augment_without_noise_stays_in_range_and_reaches_both_ends():
    x = augment(torch.from_numpy(random_images(16, 3, 32, 32)))
    assert x.dtype == torch.float32 and x.is_contiguous(memory_format=torch.channels_last)
    assert x.min() == -1 and x.max() == 1


def test_augment_noise_is_gaussian_and_comes_from_the_generator():
    images = torch.from_numpy(random_images(128, 3, 32, 32))
    noise = augment(images, sigma=0.3) - augment(images, sigma=0.0)
    n = noise.numel()
    assert abs(noise.mean()) < 5 * 0.3 / n**0.5
    assert abs(noise.std() - 0.3) < 5 * 0.3 / (2 * n) ** 0.5
    assert abs((noise.abs() < 0.3).float().mean() - 0.6827) < 5 * 0.47 / n**0.5  # within one standard deviation
    assert augment(images, sigma=0.3).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(augment(images, sigma=0.3), augment(images, sigma=0.3))
    assert not torch.equal(augment(images, sigma=0.3), augment(images, sigma=0.3, seed=1))


def test_augment_leaves_the_data_alone():
    images = torch.from_numpy(random_images(4, 1, 8, 8))
    before = images.clone()
    augment(images, sigma=1.0)
    assert torch.equal(images, before)


def test_to_float_covers_the_range():
    x = data.to_float(torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16))
    assert x[0, 0, 0, 0] == -1 and x[0, 0, -1, -1] == 1
    torch.testing.assert_close(x.flatten(), torch.linspace(-1, 1, 256))


# --- digits and splits


def rows(*splits):
    """Every (label, image) of the splits, as a sorted list."""
    return sorted(
        (int(y), x.numpy().tobytes()) for split in splits for x, y in zip(split.images, split.labels, strict=True)
    )


def test_digits_are_scikit_learns():
    digits = data.load("digits")
    reference = load_digits()
    images = np.rint(reference.images / 16 * 255).astype(np.uint8)
    assert rows(digits.train, digits.valid, digits.test) == sorted(
        (int(y), x.tobytes()) for x, y in zip(images, reference.target, strict=True)
    )
    assert digits.shape == (1, 8, 8) and digits.train.images.dtype == torch.uint8
    assert digits.train.labels.dtype == torch.int64
    assert digits.class_names == tuple("0123456789") and not digits.flip
    assert (len(digits.train), len(digits.valid), len(digits.test)) == (1294, 143, 360)


def test_digits_split_is_stratified_and_independent_of_the_users_seed():
    torch.manual_seed(1)
    first = data.load("digits")
    torch.manual_seed(2)
    np.random.seed(2)
    second = data.load("digits")
    for part in ("train", "valid", "test"):
        assert torch.equal(getattr(first, part).images, getattr(second, part).images)
        assert torch.equal(getattr(first, part).labels, getattr(second, part).labels)
    share = np.bincount(first.test.labels) / np.bincount(load_digits().target)
    assert (abs(share - 0.2) < 0.01).all()


def test_n_valid_moves_images_out_of_train_only():
    full = data.load("digits", n_valid=0)
    assert len(full.valid) == 0 and full.valid.images.shape == (0, 1, 8, 8)
    held = data.load("digits", n_valid=300)
    assert len(held.valid) == 300
    assert rows(held.train, held.valid) == rows(full.train)
    assert torch.equal(held.test.images, full.test.images)
    assert len(data.load("digits", n_valid=1436).train) == 1
    refuses("--n_valid 1437", "digits", n_valid=1437)
    refuses("--n_valid -1", "digits", n_valid=-1)


def test_unknown_name():
    assert "digits" in refuses("unknown data set imagenet", "imagenet")


# --- torchvision's data sets, from small files in their real formats


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def write_cifar(root, monkeypatch, cls, label_key, meta_key, class_names):
    """Small batches in torchvision's layout, whose checksums become the expected ones."""
    folder = root / cls.base_folder
    folder.mkdir(parents=True)
    images = {}
    for part in ("train_list", "test_list"):
        sums = []
        for name, _ in getattr(cls, part):
            images[name] = random_images(4, 3, 32, 32), RNG.integers(0, len(class_names), 4).tolist()
            batch = {"data": images[name][0].reshape(4, -1), label_key: images[name][1], "batch_label": name}
            (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
            sums.append([name, md5(folder / name)])
        monkeypatch.setattr(cls, part, sums)
    meta = folder / cls.meta["filename"]
    meta.write_bytes(pickle.dumps({meta_key: class_names}, protocol=2))
    monkeypatch.setattr(cls, "meta", cls.meta | {"md5": md5(meta)})
    test = images.pop(cls.test_list[0][0])
    return np.concatenate([x for x, _ in images.values()]), sum((y for _, y in images.values()), []), *test


def write_cifar10(root, monkeypatch):
    names = [f"class {i}" for i in range(10)]
    return *write_cifar(root, monkeypatch, datasets.CIFAR10, "labels", "label_names", names), names


def write_cifar100(root, monkeypatch):
    names = [f"class {i}" for i in range(100)]
    return *write_cifar(root, monkeypatch, datasets.CIFAR100, "fine_labels", "fine_label_names", names), names


def write_svhn(root, monkeypatch):
    parts = []
    for part, n in (("train", 20), ("test", 6)):
        images, labels = random_images(n, 3, 32, 32), np.arange(n) % 10
        file = root / f"{part}_32x32.mat"
        savemat(file, {"X": images.transpose(2, 3, 1, 0), "y": np.where(labels == 0, 10, labels)[:, None]})
        monkeypatch.setitem(datasets.SVHN.split_list, part, ["http://nowhere", file.name, md5(file)])
        parts += [images, labels]
    return *parts, [str(i) for i in range(10)]


def idx_bytes(array):
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_idx(folder, names, packed=False):
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for part, n in (("train", 20), ("t10k", 6)):
        images, labels = random_images(n, 28, 28), (np.arange(n) % 10).astype(np.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            file, content = folder / f"{part}-{kind}-ubyte", idx_bytes(array)
            file.with_name(file.name + ".gz" * packed).write_bytes(gzip.compress(content) if packed else content)
        parts += [images[:, None], labels]
    return *parts, names


def write_mnist(root, monkeypatch):
    return write_idx(root / "MNIST" / "raw", datasets.MNIST.classes)


def write_fashion_mnist(root, monkeypatch):
    return write_idx(root / "FashionMNIST" / "raw", datasets.FashionMNIST.classes)


def check_parts(loaded, train_images, train_labels, test_images, test_labels, class_names):
    assert np.array_equal(loaded.test.images, test_images) and loaded.test.images.dtype == torch.uint8
    assert loaded.test.labels.tolist() == list(test_labels) and loaded.test.labels.dtype == torch.int64
    expected = sorted((int(y), x.tobytes()) for x, y in zip(train_images, train_labels, strict=True))
    assert rows(loaded.train, loaded.valid) == expected
    assert loaded.class_names == tuple(class_names)
    assert loaded.shape == test_images.shape[1:]
    assert len(loaded.valid) == len(train_images) // 10
    assert loaded.train.images.is_contiguous()


WRITERS = {
    "cifar10": write_cifar10,
    "cifar100": write_cifar100,
    "svhn": write_svhn,
    "mnist": write_mnist,
    "fashion_mnist": write_fashion_mnist,
}


@pytest.mark.parametrize("name", WRITERS)
def test_files_in_place_are_read_without_the_network(name, tmp_path, monkeypatch, network):
    expected = WRITERS[name](tmp_path, monkeypatch)
    loaded = data.load(name, tmp_path)
    check_parts(loaded, *expected)
    assert loaded.flip == (name in ("cifar10", "cifar100", "fashion_mnist"))
    assert not network


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name, cls", [("mnist", datasets.MNIST), ("fashion_mnist", datasets.FashionMNIST)])
def test_bare_idx_files_are_read_where_they_are(name, cls, packed, tmp_path, network):
    expected = write_idx(tmp_path, cls.classes, packed)
    before = sorted(tmp_path.rglob("*"))
    check_parts(data.load(name, str(tmp_path)), *expected)
    assert sorted(tmp_path.rglob("*")) == before
    assert not network


def test_an_archive_in_place_is_unpacked_without_the_network(tmp_path, monkeypatch, network):
    expected = write_cifar10(tmp_path / "source", monkeypatch)
    archive = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "source" / "cifar-10-batches-py", "cifar-10-batches-py")
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", md5(archive))
    check_parts(data.load("cifar10", tmp_path), *expected)
    assert not network


@pytest.mark.parametrize(
    "name, files",
    [
        ("cifar10", "cifar-10-python.tar.gz"),
        ("cifar100", "cifar-100-python.tar.gz"),
        ("svhn", "train_32x32.mat and test_32x32.mat"),
        ("mnist", "train-labels-idx1-ubyte.gz and t10k-images-idx3-ubyte.gz and t10k-labels-idx1-ubyte.gz"),
        ("fashion_mnist", "t10k-images-idx3-ubyte.gz and t10k-labels-idx1-ubyte.gz"),
    ],
)
def test_no_files_and_no_network(name, files, tmp_path, network):
    message = refuses(f"cannot read {name} from {tmp_path / 'here'}", name, tmp_path / "here")
    assert "put " in message and f"{files} there" in message and "--dataset digits" in message
    assert "no network" in message
    assert network


def test_missing_part_and_no_network(tmp_path, monkeypatch):
    write_svhn(tmp_path, monkeypatch)
    (tmp_path / "test_32x32.mat").unlink()
    refuses("test_32x32.mat there", "svhn", tmp_path)


def test_damaged_cifar_is_noticed(tmp_path, monkeypatch):
    write_cifar10(tmp_path, monkeypatch)
    batch = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    batch.write_bytes(batch.read_bytes()[:-5])
    refuses("put cifar-10-python.tar.gz there", "cifar10", tmp_path)


@pytest.mark.parametrize("bare", [True, False])
@pytest.mark.parametrize("damage", ["cut", "empty", "nonsense", "other length"])
def test_damaged_idx_is_noticed(bare, damage, tmp_path, network):
    folder = tmp_path if bare else tmp_path / "MNIST" / "raw"
    write_idx(folder, [])
    file = folder / "train-labels-idx1-ubyte"
    content = file.read_bytes()
    other = idx_bytes(np.zeros(7, np.uint8))
    file.write_bytes({"cut": content[:-5], "empty": b"", "nonsense": b"x" * 40, "other length": other}[damage])
    refuses(f"cannot read mnist from {tmp_path}", "mnist", tmp_path)
    assert not network


def test_damaged_gzip_is_noticed(tmp_path):
    write_idx(tmp_path, [], packed=True)
    file = tmp_path / "t10k-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:-200])
    refuses("cannot read fashion_mnist", "fashion_mnist", tmp_path)


def test_data_dir_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    for name in data.DATASETS:
        if name != "digits":
            refuses(str(tmp_path / "file"), name, tmp_path / "file")


# --- folders of images


def encode(pixels, kind="PNG", **options):
    """The bytes of an image file, by Pillow."""
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def encode16(pixels, kind):
    """The bytes of a 16-bit image file, by OpenCV."""
    pixels = pixels if pixels.ndim == 2 else cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
    return cv2.imencode(kind, pixels.astype(np.uint16) * 257)[1].tobytes()


def write_files(root, files):
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return root


def four(content, name="image.png"):
    """The smallest folder with both parts: one and the same file everywhere."""
    return {f"{part}/{label}/{name}": content for part in ("train", "test") for label in ("cat", "dog")}


def load_folder(root, **options):
    return data.load("folder", root, n_valid=0, **options)


def upright(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


PALETTE = Image.fromarray(RGB).quantize(16)
PALETTE_RGB = np.array(PALETTE.convert("RGB"))
CHESS = ((np.indices((8, 12)).sum(0) % 2) * 255).astype(np.uint8)
KINDS = {  # file content, and the pixels that a person would see in it but for the alpha
    "png": (encode(RGB), RGB),
    "png alpha": (encode(np.concatenate([RGB, ALPHA], -1)), RGB),
    "png palette": (encode(PALETTE), PALETTE_RGB),
    "png palette transparent": (encode(PALETTE, transparency=3), PALETTE_RGB),
    "png 16 bit": (encode16(RGB, ".png"), RGB),
    "png turned": (encode(RGB, exif=upright(6)), np.rot90(RGB, -1)),
    "png grey": (encode(GREY), GREY),
    "png grey alpha": (encode(np.stack([GREY, ALPHA[..., 0]], -1)), GREY),
    "png grey 16 bit": (encode16(GREY, ".png"), GREY),
    "png grey as rgb": (encode(np.stack([GREY] * 3, -1)), GREY),
    "png 1 bit": (encode(Image.fromarray(CHESS).convert("1")), CHESS),
    "tiff": (encode(RGB, "TIFF"), RGB),
    "tiff alpha": (encode(np.concatenate([RGB, ALPHA], -1), "TIFF"), RGB),
    "tiff 16 bit": (encode16(RGB, ".tiff"), RGB),
    "tiff grey 16 bit": (encode16(GREY, ".tiff"), GREY),
    "tiff cmyk": (encode(Image.fromarray(RGB).convert("CMYK"), "TIFF"), RGB),
    "tiff turned": (encode(RGB, "TIFF", exif=upright(6)), np.rot90(RGB, -1)),
    "tiff alpha turned": (
        encode(np.concatenate([RGB, ALPHA], -1), "TIFF", exif=upright(6)),
        np.rot90(RGB, -1),
    ),
    "webp": (encode(RGB, "WEBP", lossless=True), RGB),
    "webp alpha": (encode(np.concatenate([RGB, ALPHA], -1), "WEBP", lossless=True, exact=True), RGB),
    "webp turned": (encode(RGB, "WEBP", lossless=True, exif=upright(8)), np.rot90(RGB)),
    "gif": (encode(PALETTE, "GIF"), PALETTE_RGB),
    "gif transparent": (encode(PALETTE, "GIF", transparency=3), PALETTE_RGB),
    "gif grey": (encode(GREY, "GIF"), GREY),
    "bmp": (encode(RGB, "BMP"), RGB),
    "ppm": (encode(RGB, "PPM"), RGB),
}


@pytest.mark.parametrize("kind", KINDS)
def test_folder_reads_each_kind_of_lossless_file(kind, tmp_path):
    content, pixels = KINDS[kind]
    loaded = load_folder(write_files(tmp_path, four(content)))
    expected = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    assert np.array_equal(loaded.train.images, np.stack([expected] * 2))
    assert np.array_equal(loaded.test.images, np.stack([expected] * 2))
    assert loaded.shape == expected.shape


@pytest.mark.parametrize(
    "pixels, options, expected",
    [
        (RGB, {}, RGB),
        (RGB, {"progressive": True}, RGB),
        (GREY, {}, GREY),
        (RGB, {"exif": upright(6)}, np.rot90(RGB, -1)),
        (GREY, {"exif": upright(3)}, np.rot90(GREY, 2)),
        (Image.fromarray(RGB).convert("CMYK"), {}, RGB),
    ],
)
def test_folder_reads_each_kind_of_jpeg(pixels, options, expected, tmp_path):
    content = encode(pixels, "JPEG", quality=100, subsampling=0, **options)
    image = load_folder(write_files(tmp_path, four(content))).train.images[0].permute(1, 2, 0).numpy()
    assert image.shape == (expected[..., None] if expected.ndim == 2 else expected).shape
    assert abs(image.astype(int) - expected.reshape(image.shape)).max() <= 3  # what JPEG itself loses


def test_folder_with_both_parts(tmp_path):
    """Labels follow the class names in order; names of files and of their extensions mean nothing."""
    images = {name: random_images(8, 8, 3) for name in ("train/b/1", "train/a/9", "train/b/0", "test/a/x", "test/b/y")}
    files = {f"{name}.jpg": encode(pixels) for name, pixels in images.items()}
    loaded = load_folder(write_files(tmp_path, files))
    assert loaded.class_names == ("a", "b") and loaded.flip
    expected = [
        (images[name].transpose(2, 0, 1).tobytes(), label) for name, label in (("test/a/x", 0), ("test/b/y", 1))
    ]
    assert [
        (x.numpy().tobytes(), int(y)) for x, y in zip(loaded.test.images, loaded.test.labels, strict=True)
    ] == expected
    assert rows(loaded.train) == sorted(
        (label, images[name].transpose(2, 0, 1).tobytes())
        for name, label in (("train/a/9", 0), ("train/b/0", 1), ("train/b/1", 1))
    )


def test_folder_of_classes_alone_is_split_by_class(tmp_path):
    images = {f"{c}/{i}.png": random_images(8, 8) for c, n in (("a", 50), ("b", 20), ("c", 10)) for i in range(n)}
    write_files(tmp_path, {name: encode(pixels) for name, pixels in images.items()})
    loaded = load_folder(tmp_path)
    assert loaded.test.labels.bincount().tolist() == [10, 4, 2]
    assert loaded.train.labels.bincount().tolist() == [40, 16, 8]
    assert rows(loaded.train, loaded.test) == sorted(
        ("abc".index(name[0]), pixels.tobytes()) for name, pixels in images.items()
    )
    assert torch.equal(load_folder(tmp_path).test.images, loaded.test.images)


def test_one_coloured_image_makes_the_set_coloured(tmp_path):
    files = four(encode(GREY)) | {"test/dog/colour.png": encode(RGB)}
    loaded = load_folder(write_files(tmp_path, files))
    assert loaded.shape == (3, 8, 12)
    assert np.array_equal(loaded.train.images[0], np.stack([GREY] * 3))


def test_hidden_and_system_files_are_ignored(tmp_path):
    litter = (
        ".DS_Store",
        "train/.DS_Store",
        "train/cat/.DS_Store",
        "train/cat/Thumbs.db",
        "test/dog/desktop.ini",
    )
    litter += ("train/cat/.ipynb_checkpoints/x.png", "train/.git/config", "readme.txt", "train/labels.csv")
    loaded = load_folder(write_files(tmp_path, four(encode(RGB)) | dict.fromkeys(litter, b"litter")))
    assert len(loaded.train) == len(loaded.test) == 2


def test_images_in_subfolders_of_a_class_count(tmp_path):
    files = four(encode(RGB)) | {"train/cat/more/1.png": encode(RGB), "train/cat/more/2.png": encode(RGB)}
    assert load_folder(write_files(tmp_path, files)).train.labels.bincount().tolist() == [3, 1]


def test_image_size_brings_all_images_to_one_size(tmp_path):
    flat, large = np.full((9, 5, 3), 77, np.uint8), random_images(32, 48, 3)
    files = four(encode(flat)) | {
        "test/dog/large.png": encode(large),
        "test/dog/thin.png": encode(large[:, :4]),
    }
    loaded = load_folder(write_files(tmp_path, files), image_size=8)
    assert loaded.shape == (3, 8, 8)
    assert (loaded.train.images == 77).all()
    blocks = large.reshape(8, 4, 8, 6, 3).mean((1, 3)).transpose(2, 0, 1)  # area averages
    assert abs(loaded.test.images[2].numpy() - blocks).max() <= 0.51
    halves = large[:, :4].reshape(8, 4, 4, 3).mean(1).transpose(2, 0, 1)  # one side shrinks, the other grows
    grown = cv2.resize(halves.transpose(1, 2, 0), (8, 8), interpolation=cv2.INTER_CUBIC).transpose(2, 0, 1)
    assert abs(loaded.test.images[3].numpy() - grown.clip(0, 255)).max() <= 1.5


def test_images_of_the_right_size_are_not_resampled(tmp_path):
    pixels = random_images(8, 8, 3)
    write_files(tmp_path, four(encode(pixels)))
    assert np.array_equal(load_folder(tmp_path, image_size=8).train.images[0], pixels.transpose(2, 0, 1))


# --- the cache


def make_folder(root, n=3):
    return write_files(
        root,
        {f"{p}/{c}/{i}.png": encode(random_images(8, 8, 3)) for p in ("train", "test") for c in "ab" for i in range(n)},
    )


def check_cache(root, decoded, n_decoded, reference, **options):
    """The next load decodes so many files and gives the same pixels."""
    decoded.clear()
    loaded = load_folder(root, **options)
    assert len(decoded) == n_decoded
    assert torch.equal(loaded.train.images, reference.train.images)
    assert torch.equal(loaded.test.images, reference.test.images)
    assert torch.equal(loaded.train.labels, reference.train.labels)


def test_cache_saves_decoding(tmp_path, decoded):
    reference = load_folder(make_folder(tmp_path))
    assert len(decoded) == 12
    check_cache(tmp_path, decoded, 0, reference)
    assert [path.name for path in tmp_path.glob(".*")] == [".jem_cache_native.pt"]
    small = load_folder(tmp_path, image_size=8)
    assert len(decoded) == 12 and small.shape == (3, 8, 8)
    check_cache(tmp_path, decoded, 0, small, image_size=8)
    check_cache(tmp_path, decoded, 0, reference)


def test_cache_moves_with_its_folder(tmp_path, decoded):
    reference = load_folder(make_folder(tmp_path / "before"))
    (tmp_path / "before").rename(tmp_path / "after")
    check_cache(tmp_path / "after", decoded, 0, reference)


def test_stale_cache_is_noticed(tmp_path, decoded):
    make_folder(tmp_path)
    load_folder(tmp_path)
    file = tmp_path / "train/a/0.png"
    os.utime(file, ns=(0, 1))
    reference = load_folder(tmp_path)
    check_cache(tmp_path, decoded, 0, reference)

    file.write_bytes(encode(random_images(8, 8, 3)))
    changed = load_folder(tmp_path)
    assert len(decoded) == 12
    assert not torch.equal(changed.train.images, reference.train.images)

    decoded.clear()
    file.rename(tmp_path / "train/a/9.png")
    assert rows(load_folder(tmp_path).train) == rows(changed.train)
    assert len(decoded) == 12

    (tmp_path / "train/b/0.png").unlink()
    assert len(load_folder(tmp_path).train) == 5


def test_cache_notices_a_file_that_changed_its_class(tmp_path):
    """All files have one size and one time of change, as bitmaps from an archive may have."""
    names = ("train/a/1.bmp", "train/a/2.bmp", "train/b/3.bmp", "test/a/4.bmp", "test/b/5.bmp")
    pixels = {name: random_images(8, 8) for name in names}
    write_files(tmp_path, {name: encode(pixels[name], "BMP") for name in names})
    for name in names:
        os.utime(tmp_path / name, ns=(0, 0))
    load_folder(tmp_path)
    (tmp_path / "train/a/1.bmp").rename(tmp_path / "train/b/4.bmp")
    labels = (1, 0, 1)
    expected = sorted((y, pixels[name].tobytes()) for y, name in zip(labels, names[:3], strict=True))
    assert rows(load_folder(tmp_path).train) == expected


def flip_a_bit(content):
    """Damage in the middle of the pixels, which the zip format of torch.save lets pass."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    i = largest.header_offset + len(content[largest.header_offset :]) // 2
    return content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :]


class Malicious:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.mark.parametrize("damage", ["cut", "empty", "nonsense", "bit", "other content", "malicious"])
def test_damaged_cache_is_rebuilt(damage, tmp_path, decoded):
    reference = load_folder(make_folder(tmp_path / "images", n=20))
    cache = tmp_path / "images" / ".jem_cache_native.pt"
    content = cache.read_bytes()
    if damage == "other content":
        torch.save([1, 2, 3], cache)
    elif damage == "malicious":
        torch.save({"fingerprint": Malicious(tmp_path / "harm")}, cache)
    else:
        cache.write_bytes(
            {"cut": content[:-100], "empty": b"", "nonsense": b"x" * 1000, "bit": flip_a_bit(content)}[damage]
        )
    check_cache(tmp_path / "images", decoded, 80, reference)
    check_cache(tmp_path / "images", decoded, 0, reference)
    assert not (tmp_path / "harm").exists()


def test_folder_that_takes_no_cache(tmp_path, decoded, capfd):
    write_files(make_folder(tmp_path), {".jem_cache_native.pt/in/the/way": b""})
    reference = load_folder(tmp_path)
    stderr = capfd.readouterr().err
    assert f"cannot write {tmp_path / '.jem_cache_native.pt'}" in stderr and stderr.count("\n") == 1
    check_cache(tmp_path, decoded, 12, reference)
    assert [path.name for path in tmp_path.glob(".*")] == [".jem_cache_native.pt"]


# --- folders that cannot be used


FRAMES = [Image.fromarray(RGB), Image.fromarray(RGB[::-1].copy())]
BROKEN = {
    "zero bytes": b"",
    "text": b"this is no image\n" * 20,
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "cut jpeg": encode(random_images(64, 64, 3), "JPEG")[:-900],
    "cut png": encode(random_images(64, 64, 3))[:-900],
    "cut webp": encode(random_images(64, 64, 3), "WEBP")[:-900],
    "cut tiff": encode(random_images(64, 64, 3), "TIFF")[:-900],
    "cut bmp": encode(random_images(64, 64, 3), "BMP")[:-900],
    "cut gif": encode(Image.fromarray(random_images(64, 64, 3)).quantize(16), "GIF")[:-900],
    "damaged png": encode(RGB)[:60] + b"12345" + encode(RGB)[65:],
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_file_is_named(kind, tmp_path, capfd):
    write_files(tmp_path, four(encode(RGB)) | {"train/dog/broken.png": BROKEN[kind]})
    message = refuses(f"{tmp_path / 'train/dog/broken.png'} is not a readable image", "folder", tmp_path)
    assert "more" not in message
    assert capfd.readouterr().err == ""  # the decoders' own complaints would hide the one line


def test_many_broken_files_are_counted(tmp_path):
    files = four(encode(RGB)) | {f"train/dog/{i}.jpg": b"x" for i in range(5)}
    message = refuses("train/dog/0.jpg is not a readable image", "folder", write_files(tmp_path, files))
    assert message.endswith("(4 more unusable files)")


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_animated_file_is_named(kind, tmp_path):
    content = encode(FRAMES[0], kind, save_all=True, append_images=FRAMES[1:])
    write_files(tmp_path, four(encode(RGB)) | {"train/dog/film.png": content})
    assert "export one frame" in refuses(str(tmp_path / "train/dog/film.png"), "folder", tmp_path)


def test_different_sizes_need_image_size(tmp_path):
    files = four(encode(RGB)) | {"test/cat/other.png": encode(RGB[:4])}
    message = refuses("--image_size", "folder", write_files(tmp_path, files))
    assert f"{tmp_path / 'train/cat/image.png'} has 12x8 pixels" in message
    assert f"{tmp_path / 'test/cat/other.png'} 12x4" in message
    assert load_folder(tmp_path, image_size=8).shape == (3, 8, 8)


@pytest.mark.parametrize("shape, advice", [((8, 10), 8), ((31, 33), 32), ((6, 12), 8), ((4, 4), 8), ((1, 1), 8)])
def test_sides_must_be_multiples_of_four(shape, advice, tmp_path):
    write_files(tmp_path, four(encode(random_images(*shape))))
    message = refuses(f"try --image_size {advice}", "folder", tmp_path)
    assert f"{shape[1]}x{shape[0]}" in message
    assert load_folder(tmp_path, image_size=advice).shape == (1, advice, advice)


def test_image_size_must_be_a_multiple_of_four(tmp_path, decoded):
    write_files(tmp_path, four(encode(RGB)))
    refuses("try --image_size 28", "folder", tmp_path, image_size=29)
    assert not decoded


@pytest.mark.parametrize(
    "files, message",
    [
        ({}, "holds no class folders"),
        ({"1.png": encode(RGB)}, "holds no class folders"),
        ({"cat/1.png": encode(RGB), "cat/2.png": encode(RGB)}, "holds only one class folder, cat"),
        ({"train/cat/1.png": encode(RGB), "test/cat/1.png": encode(RGB)}, "only one class folder, cat"),
        ({"train/cat/1.png": encode(RGB), "train/dog/1.png": encode(RGB)}, "has train/ but no test/"),
        ({"test/cat/1.png": encode(RGB), "test/dog/1.png": encode(RGB)}, "has test/ but no train/"),
        (four(encode(RGB)) | {"test/bird/1.png": encode(RGB)}, "has bird: give both the same class folders"),
        (four(encode(RGB)) | {"train/Cat/1.png": encode(RGB)}, "has Cat"),
        (four(encode(RGB)) | {"train/emu/.x": b"", "test/emu/.x": b""}, "emu holds no images"),
        ({"cat/1.png": encode(RGB), "dog/1.png": encode(RGB)}, "too few images"),
    ],
)
def test_folder_without_what_is_needed(files, message, tmp_path):
    assert str(tmp_path) in refuses(message, "folder", write_files(tmp_path, files))


def test_data_dir_that_is_not_there(tmp_path):
    refuses(f"--data_dir {tmp_path / 'nowhere'} does not exist", "folder", tmp_path / "nowhere")
    (tmp_path / "file").write_text("not a folder")
    refuses(f"--data_dir {tmp_path / 'file'} is a file", "folder", tmp_path / "file")


def test_dangling_link_is_named(tmp_path):
    write_files(tmp_path, four(encode(RGB)))
    (tmp_path / "train/cat/link.png").symlink_to(tmp_path / "nowhere.png")
    refuses(f"cannot read {tmp_path / 'train/cat/link.png'}", "folder", tmp_path)


def test_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write_files(tmp_path / "pictures", four(encode(RGB)))
    assert len(load_folder("~/pictures").test) == 2
