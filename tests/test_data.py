import gzip
import hashlib
import pickle
import re
import struct
import tarfile
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from sklearn.datasets import load_digits
from small_runs import refused, start
from torchvision import datasets
from torchvision.transforms import functional as F

import data
import main
from checkpoints.load import load_data, open_trained
from config import Config
from config.cli import parse
from utils import UserError

RNG = np.random.default_rng(0)
FIRST_LABELS = dict(data.FIRST_LABELS)


@pytest.fixture(autouse=True)
def made_up_sets(monkeypatch):
    monkeypatch.setattr(data, "FIRST_LABELS", dict.fromkeys(data.FIRST_LABELS, list(range(10))))


def random_images(*shape):
    return RNG.integers(0, 256, shape, dtype=np.uint8)


def refuses(message, *args, **kwargs):
    with pytest.raises(UserError) as caught:
        data.load(*args, **kwargs)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("shape, pad", [((3, 32, 32), 4), ((1, 28, 28), 3), ((1, 8, 8), 1), ((3, 12, 20), 2)])
def test_crop_and_flip_is_what_torchvision_gives(shape, pad):
    images = torch.from_numpy(random_images(40, *shape))
    top, left = torch.randint(2 * pad + 1, (2, 40), generator=torch.Generator().manual_seed(0))
    flip = torch.arange(40) % 3 == 0
    for black, mode in ((False, "reflect"), (True, "constant")):
        result = data.crop_and_flip(images, top, left, flip, pad, black)
        assert result.dtype == torch.uint8 and result.is_contiguous(memory_format=torch.channels_last)
        for image, i, j, mirrored, got in zip(images, top, left, flip, result, strict=True):
            expected = F.crop(F.pad(image, pad, padding_mode=mode), int(i), int(j), *shape[1:])
            assert torch.equal(got, F.hflip(expected) if mirrored else expected)


def test_auto_augmentation_is_autoaugment_and_then_cutout(monkeypatch):
    """Every image gets a policy of its own, and a black square of half its side around a random pixel."""
    images, rng, seen = torch.full((200, 3, 32, 32), 200, dtype=torch.uint8), torch.Generator().manual_seed(0), []
    monkeypatch.setattr(data, "AUTO_AUGMENT", lambda image: (seen.append(image), image // 2)[1])
    black, auto = (data.augment(images, True, 0.0, rng.manual_seed(0), how) for how in ("black", "auto"))
    assert torch.equal(torch.stack(seen), ((black + 1) * 127.5).round().byte()) and len(seen) == 200
    assert auto.is_contiguous(memory_format=torch.channels_last)
    areas = set()
    for crop, image in zip(black, auto, strict=True):
        halved = data.to_float(((crop + 1) * 127.5).round().byte() // 2)
        assert any(torch.equal(with_hole(halved, i, j), image) for i in range(32) for j in range(32))
        areas.add((image == -1).all(0).sum().item())
    assert len(areas) > 20  # squares end at edges
    assert (data.cutout(torch.ones(1, 1, 12, 20), torch.tensor([6]), torch.tensor([10])) == 0).sum() == 6 * 6
    wide = data.augment(torch.full((200, 1, 8, 64), 200, dtype=torch.uint8), True, 0.0, rng, "auto")
    holes = (wide == -1).any(2)  # (200, 1, 64), by column: squares of 4 wherever they fit, and no black edges
    assert holes[..., :16].any() and holes[..., 48:].any() and holes.sum(-1).max() == 4
    monkeypatch.undo()
    torch.manual_seed(0)
    ramps = torch.arange(32 * 32 * 3).remainder(251).byte().view(1, 3, 32, 32).expand(60, -1, -1, -1)
    changed = torch.stack([data.AUTO_AUGMENT(image) for image in ramps])
    assert len({tuple(image.flatten().tolist()) for image in changed}) > 15


def with_hole(image, row, column):
    image = image.clone()
    image[:, max(0, row - 8) : row + 8, max(0, column - 8) : column + 8] = -1
    return image


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
        assert not mirrored.any() and set((column - middle).tolist()) == set(range(-pad, pad + 1))


def test_augment_stays_in_range_and_adds_gaussian_noise_of_the_generator():
    images = torch.from_numpy(random_images(128, 3, 32, 32))
    before, x, noisy = images.clone(), augment(images), augment(images, sigma=0.3)
    torch.testing.assert_close(data.to_float(torch.arange(256, dtype=torch.uint8)), torch.linspace(-1, 1, 256))
    assert x.dtype == torch.float32 and x.min() == -1 and x.max() == 1
    assert all(y.is_contiguous(memory_format=torch.channels_last) for y in (x, noisy))
    noise, n = noisy - x, x.numel()
    assert torch.equal(images, before) and abs(noise.mean()) < 5 * 0.3 / n**0.5
    assert abs(noise.std() - 0.3) < 5 * 0.3 / (2 * n) ** 0.5
    assert abs((noise.abs() < 0.3).float().mean() - 0.6827) < 5 * 0.47 / n**0.5  # within one standard deviation
    assert torch.equal(noisy, augment(images, sigma=0.3))
    assert not torch.equal(noisy, augment(images, sigma=0.3, seed=1))


def rows(*splits):
    """Every (label, image) of the splits, as a sorted list."""
    pairs = [pair for split in splits for pair in zip(split.images, split.labels, strict=True)]
    return sorted((int(y), np.asarray(x).tobytes()) for x, y in pairs)


def test_digits_are_scikit_learns_stratified_whatever_the_users_seed():
    digits, reference = data.load("digits"), load_digits()
    images = np.rint(reference.images / 16 * 255).astype(np.uint8)
    assert rows(digits.train, digits.valid, digits.test) == rows(data.Split(images, reference.target))
    assert digits.shape == (1, 8, 8) and digits.train.images.dtype == torch.uint8
    assert digits.train.labels.dtype == torch.int64 and digits.class_names == tuple("0123456789") and not digits.flip
    assert (len(digits.train), len(digits.valid), len(digits.test)) == (1294, 143, 360)
    share = np.bincount(digits.test.labels) / np.bincount(reference.target)
    assert (abs(share - 0.2) < 0.01).all()
    torch.manual_seed(2)
    np.random.seed(2)
    again = data.load("digits")
    assert again.description == digits.description
    for part, field in product(("train", "valid", "test"), ("images", "labels")):
        values = getattr(getattr(again, part), field)
        assert torch.equal(getattr(getattr(digits, part), field), values)
        changed = values.clone()
        changed.view(-1)[-1] ^= 1
        other = replace(again, **{part: replace(getattr(again, part), **{field: changed})})
        assert other.description != digits.description


def test_n_valid_moves_images_out_of_train_only():
    full = data.load("digits", n_valid=0)
    assert len(full.valid) == 0 and full.valid.images.shape == (0, 1, 8, 8)
    held = data.load("digits", n_valid=300)
    assert len(held.valid) == 300 and rows(held.train, held.valid) == rows(full.train)
    assert torch.equal(held.test.images, full.test.images) and len(data.load("digits", n_valid=1300).train) == 137
    refuses("are left: lower", "digits", n_valid=1436)
    refuses("--n_valid 1437", "digits", n_valid=1437)
    refuses("--n_valid -1", "digits", n_valid=-1)


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def write_cifar(cls, prefix, n_classes, root, monkeypatch):
    """Small batches in torchvision's layout, whose checksums become the expected ones."""
    folder = root / cls.base_folder
    folder.mkdir(parents=True)
    images, class_names = {}, [f"class {i}" for i in range(n_classes)]
    for part in ("train_list", "test_list"):
        sums = []
        for name, _ in getattr(cls, part):
            images[name] = random_images(4, 3, 32, 32), RNG.permutation(4).tolist()
            batch = {"data": images[name][0].reshape(4, -1), f"{prefix}labels": images[name][1], "batch_label": name}
            (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
            sums.append([name, md5(folder / name)])
        monkeypatch.setattr(cls, part, sums)
    meta = folder / cls.meta["filename"]
    meta.write_bytes(pickle.dumps({f"{prefix}label_names": class_names}, protocol=2))
    monkeypatch.setattr(cls, "meta", cls.meta | {"md5": md5(meta)})
    test = images.pop(cls.test_list[0][0])
    return np.concatenate([x for x, _ in images.values()]), sum((y for _, y in images.values()), []), *test, class_names


def write_svhn(root, monkeypatch):
    parts = []
    for part, n in (("train", 20), ("test", 6)):
        images, labels = random_images(n, 3, 32, 32), np.arange(n) % 10
        file = root / f"{part}_32x32.mat"
        savemat(file, {"X": images.transpose(2, 3, 1, 0), "y": np.where(labels == 0, 10, labels)[:, None]})
        monkeypatch.setitem(datasets.SVHN.split_list, part, ["http://nowhere", file.name, md5(file)])
        parts += [images, labels]
    return *parts, [str(i) for i in range(10)]


def write_idx(folder, names, packed=False):
    folder.mkdir(parents=True, exist_ok=True)
    parts = []
    for part, n in (("train", 20), ("t10k", 6)):
        images, labels = random_images(n, 28, 28), (np.arange(n) % 10).astype(np.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            file, head = folder / f"{part}-{kind}-ubyte", (0, 0, 8, array.ndim, *array.shape)
            content = struct.pack(f">BBBB{array.ndim}I", *head) + array.tobytes()
            file.with_name(file.name + ".gz" * packed).write_bytes(gzip.compress(content) if packed else content)
        parts += [images[:, None], labels]
    return *parts, names


def check_parts(loaded, train_images, train_labels, test_images, test_labels, class_names):
    assert np.array_equal(loaded.test.images, test_images) and loaded.test.images.dtype == torch.uint8
    assert loaded.test.labels.tolist() == list(test_labels) and loaded.test.labels.dtype == torch.int64
    assert rows(loaded.train, loaded.valid) == rows(data.Split(train_images, train_labels))
    assert loaded.class_names == tuple(class_names) and loaded.shape == test_images.shape[1:]
    assert len(loaded.valid) == len(train_images) // 10 and loaded.train.images.is_contiguous()


WRITERS = {
    "cifar10": partial(write_cifar, datasets.CIFAR10, "", 10),
    "cifar100": partial(write_cifar, datasets.CIFAR100, "fine_", 100),
    "svhn": write_svhn,
    "mnist": lambda root, _: write_idx(root / "MNIST" / "raw", datasets.MNIST.classes),
    "fashion_mnist": lambda root, _: write_idx(root / "FashionMNIST" / "raw", datasets.FashionMNIST.classes),
}
DAMAGED = ["cifar10 cifar-10-python.tar.gz", "mnist MNIST/raw/t10k-labels-idx1-ubyte.gz", "svhn test_32x32.mat"]


@pytest.mark.parametrize("name", WRITERS)
def test_files_in_place_are_read_without_the_network(name, tmp_path, monkeypatch, network):
    expected = WRITERS[name](tmp_path, monkeypatch)
    loaded = data.load(name, tmp_path)
    check_parts(loaded, *expected)
    assert loaded.flip == (name in ("cifar10", "cifar100", "fashion_mnist")) and not network


@pytest.mark.parametrize("packed", [True, False])
def test_bare_idx_files_are_read_where_they_are_and_told_apart_by_their_labels(packed, tmp_path, monkeypatch, network):
    *parts, _ = write_idx(tmp_path, [], packed)
    before = sorted(tmp_path.rglob("*"))
    for name, cls in (("mnist", datasets.MNIST), ("fashion_mnist", datasets.FashionMNIST)):
        check_parts(data.load(name, str(tmp_path)), *parts, cls.classes)
    assert sorted(tmp_path.rglob("*")) == before and not network
    monkeypatch.setitem(data.FIRST_LABELS, datasets.MNIST, FIRST_LABELS[datasets.MNIST])
    refuses(f"{tmp_path} holds another set than MNIST", "mnist", tmp_path)
    assert len(data.load("fashion_mnist", tmp_path).test) == 6
    file = Path("/usr/share/datasets/fashion-mnist/train-labels-idx1-ubyte.gz")  # of the Debian package
    if file.exists():
        assert list(gzip.open(file).read(18)[8:]) == FIRST_LABELS[datasets.FashionMNIST]


def test_an_archive_in_place_is_unpacked_without_the_network(tmp_path, monkeypatch, network):
    expected = WRITERS["cifar10"](tmp_path / "source", monkeypatch)
    archive = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "source" / "cifar-10-batches-py", "cifar-10-batches-py")
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", md5(archive))
    check_parts(data.load("cifar10", tmp_path), *expected)
    assert not network


def test_no_files_and_no_network(tmp_path, network):
    message = refuses(f"from --data_dir {tmp_path}, which holds no files: put ", "svhn", tmp_path)
    words = ": put train_32x32.mat and test_32x32.mat there, or give --dataset folder, or another --data_dir ("
    assert words in message and "no network>)" in message and network


@pytest.mark.parametrize("name_and_file", [*DAMAGED, "cifar10 cifar-10-batches-py/data_batch_3"])
@pytest.mark.parametrize("content", [b"", b"of another set"])
def test_a_damaged_file_is_named_and_kept(name_and_file, content, tmp_path, monkeypatch, network):
    name, file = name_and_file.split()
    WRITERS[name](tmp_path, monkeypatch)
    (tmp_path / file).write_bytes(content)
    refuses(f"{tmp_path / file} is damaged, unfinished or another file (wrong MD5 sum)", name, tmp_path)
    assert (tmp_path / file).read_bytes() == content and not network


def test_what_lies_there_instead_is_said(tmp_path, monkeypatch, network):
    WRITERS["cifar10"](tmp_path / "set", monkeypatch)
    batches = tmp_path / "set/cifar-10-batches-py"
    assert len(data.load("cifar10", batches).test) == 4  # a folder too deep
    WRITERS["mnist"](tmp_path / "mnist", monkeypatch)
    assert len(data.load("mnist", tmp_path / "mnist/MNIST").test) == 6
    assert not network and list((tmp_path / "mnist/MNIST").iterdir()) == [tmp_path / "mnist/MNIST/raw"]
    (tmp_path / "file").write_text("not a folder")
    for name in WRITERS:
        refuses(f"--data_dir {tmp_path / 'file'} is a file: give the folder", name, tmp_path / "file")
    (batches / "data_batch_2").unlink()
    refuses("which holds cifar-10-batches-py: put cifar-10-python.tar.gz there", "cifar10", tmp_path / "set")


@pytest.mark.parametrize("damage", ["cut", "empty", "nonsense"])
def test_damaged_idx_is_noticed(damage, tmp_path, network):
    write_idx(tmp_path, [])
    file = tmp_path / "train-labels-idx1-ubyte"
    file.write_bytes({"cut": file.read_bytes()[:-5], "empty": b"", "nonsense": b"x" * 40}[damage])
    refuses(f"cannot read MNIST from --data_dir {tmp_path}", "mnist", tmp_path)
    assert not network


def test_a_data_set_of_ones_own_is_one_entry_and_on_another_scale_refused(monkeypatch):
    def add(images, labels, *names):
        parts = dict.fromkeys(names or ("train", "test"), data.Split(images, labels))
        monkeypatch.setitem(data.DATASETS, "mine", data.DataSet(lambda *_: (["apple", "fig"], parts), False))

    images, labels = torch.randint(256, (40, 3, 8, 8), dtype=torch.uint8), torch.arange(40) % 2
    add(images, labels)
    loaded = data.load("mine")
    assert torch.equal(loaded.test.images, images) and loaded.class_names == ("apple", "fig")
    assert rows(loaded.train, loaded.valid) == rows(loaded.test) and len(loaded.valid) == 4
    for one, other, found in (
        (images / 255, labels, "images torch.float32"),
        (images, labels.int(), "labels torch.int32"),
        (images, labels + 1, "labels torch.int64 (36,), 1 to 2"),
        (images, labels - 1, "labels torch.int64 (36,), -1 to 0"),
        (images.permute(0, 2, 3, 1), labels, "(36, 8, 8, 3)"),
        (images[:, :, :6], labels, "(36, 3, 6, 8)"),
    ):
        add(one, other)
        needed = "images uint8 (N, C, H, W), C 1 or 3, H and W multiples of 4, and labels int64 (N,), 0 to 1, not "
        assert found in refuses(f"a data set has {needed}", "mine")
    add(images, labels, "train", "valid")
    assert "has neither a part test nor all, only train, valid" in refuses("the data set mine", "mine")
    for other in (labels[:30], labels.repeat(2)):
        with pytest.raises(UserError, match=f"a data set has 40 images and {len(other)} labels"):
            add(images, other)


def write_pngs(root, *folders, n=10, side=8, level=None):
    """Random pictures, or all of one grey level."""
    for folder in folders:
        (root / folder).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            pixels = random_images(side, side, 3) if level is None else np.full((side, side), level, np.uint8)
            Image.fromarray(pixels).save(root / folder / f"{i}.png")
    return root


def test_a_folder_that_is_only_measured_is_not_cut(tmp_path, capsys):
    trained_on = data.load("folder", write_pngs(tmp_path / "own", "a", "b"), n_valid=3).description
    same = data.load("folder", tmp_path / "own", n_valid=5, trained_on=trained_on)
    assert [len(part) for part in (same.train, same.valid, same.test)] == [13, 3, 4]  # --n_valid of the training
    older = {name: value for name, value in trained_on.items() if name != "some_training_images"}
    assert len(data.load("folder", tmp_path / "own", trained_on=older).train) == 13
    assert "other images than those" not in capsys.readouterr().out
    write_pngs(tmp_path / "own", "a", "b")  # in the same places, but other pixels: perhaps the same images, saved again
    assert len(data.load("folder", tmp_path / "own", trained_on=trained_on).test) == 4
    capsys.readouterr()
    write_pngs(tmp_path / "few", "a", "b", n=1)
    assert len(data.load("folder", tmp_path / "few", trained_on=trained_on).test) == 2
    write_pngs(tmp_path / "other", "a", "b", n=11)
    for description in (trained_on, {"shape": [3, 8, 8], "class_names": ["a", "b"], "assumed": True}):
        other = data.load("folder", tmp_path / "other", trained_on=description)
        assert [len(part) for part in (other.train, other.valid, other.test)] == [0, 0, 22]
        assert other.shape == (3, 8, 8)
        assert f"{tmp_path / 'other'} holds other images than those of the training" in capsys.readouterr().out
    assert len(data.load("folder", tmp_path / "other").train) == 16
    parts = data.load("folder", write_pngs(tmp_path / "parts", "train/a", "train/b", "test/a", "test/b"), n_valid=4)
    known, shape = parts.description, {"shape": [3, 8, 8], "class_names": ["a", "b"], "assumed": True}
    for description, sizes in ((known, [16, 4, 20]), (trained_on, [0, 0, 20]), (shape, [20, 0, 20])):
        found = data.load("folder", tmp_path / "parts", trained_on=description)
        assert [len(part) for part in (found.train, found.valid, found.test)] == sizes
    write_pngs(tmp_path / "alone", "test/a", "test/b")
    assert len(data.load("folder", tmp_path / "alone", trained_on={}).test) == 20


def test_another_test_set_is_measured_whole(tmp_path, capsys):
    write_pngs(tmp_path / "own", "a", "b", n=20)
    write_pngs(tmp_path / "other", "a", "b", n=9)
    write_pngs(tmp_path / "three", "a", "b", "c")
    write_pngs(tmp_path / "large", "a", "b", side=12)
    for file in write_pngs(tmp_path / "grey", "a", "b", n=5).rglob("*.png"):
        Image.open(file).convert("L").save(file)
    images = ["--dataset", "folder", "--data_dir", str(tmp_path / "own"), "--buffer_size", "100", "--n_valid", "0"]
    _, run = start(tmp_path, *images, "--batch_size", "20", "--max_steps", "1")
    test = ["--mode", "test", "--gpu", "cpu", "--load_ckpt", str(run), "--eval", "classification"]
    assert main.main([*test, "--eval", "classification,quality", "--data_dir", str(tmp_path / "other")]) == 0
    report = (run / "eval/report.md").read_text()
    assert re.search(r"accuracy \|.*\| 18 \|", report) and "log p(x), training minus test" not in report
    assert report.count("these data are only test images") == 2 and "; other images than those of the train" in report
    assert main.main(test) == 0
    write_pngs(tmp_path / "own", "a", n=21)
    assert "training images to measure (16 of 32)" in refused(capsys, *test)
    write_pngs(tmp_path / "own", "b", n=21)  # none of these images was there before
    assert "has changed since the training" in refused(capsys, *test)
    assert main.main([*test, "--data_dir", str(tmp_path / "grey")]) == 0
    grey = load_data(open_trained(parse([*test, "--data_dir", str(tmp_path / "grey")], Config)), torch.device("cpu"))
    assert grey.shape == (3, 8, 8) and len(grey.test) == 10
    assert torch.equal(grey.test.images[:, :1].expand(-1, 3, -1, -1), grey.test.images)
    capsys.readouterr()
    advice = {"three": "choose a set that has as many classes, of that size\n", "large": "give --image_size 8\n"}
    for folder, words in advice.items():
        assert words in refused(capsys, *test, "--data_dir", str(tmp_path / folder))
    assert main.main([*test, "--data_dir", str(tmp_path / "large"), "--image_size", "8"]) == 0
