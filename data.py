"""Data sets as uint8 tensors on the training device, or on the host if they are too large, and their augmentation.

``load`` reads a data set by name and returns its train, validation and test parts. Splits are drawn with a
seed of their own, so that runs with different seeds train and report on the same images.
"""

import gzip
import hashlib
import shutil
import tempfile
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor
from torchvision import datasets
from torchvision.datasets.utils import check_integrity

import image_folder
from distributed import World
from image_folder.layout import describe
from utils import UserError

DATASETS = ("cifar10", "cifar100", "svhn", "mnist", "fashion_mnist", "digits", "folder")
FLIP_KEEPS_LABEL = ("cifar10", "cifar100", "fashion_mnist", "folder")
SPLIT_SEED = 0
LARGE = 0.2  # of a GPU's memory: training images that take more stay on the host
ALONE, WHOLE = World(), slice(None)

SVHN_PARTS = ("train", "test")
IDX_FILES = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
TORCHVISION = {  # name: torchvision's class, and the files to fetch by hand where there is no network
    "cifar10": (datasets.CIFAR10, ["cifar-10-python.tar.gz"]),
    "cifar100": (datasets.CIFAR100, ["cifar-100-python.tar.gz"]),
    "svhn": (datasets.SVHN, ["train_32x32.mat", "test_32x32.mat"]),
    "mnist": (datasets.MNIST, [f"{file}.gz" for file in IDX_FILES]),
    "fashion_mnist": (datasets.FashionMNIST, [f"{file}.gz" for file in IDX_FILES]),
}


@dataclass(frozen=True)
class Split:
    """Images, uint8 (N, C, H, W), and their labels, int64 (N,), on one device."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor | slice) -> "Split":
        return Split(self.images[index], self.labels[index])

    def to(self, device: torch.device) -> "Split":
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class ImageData:
    """A data set; ``flip`` says whether a horizontal flip keeps an image's label."""

    train: Split
    valid: Split
    test: Split
    class_names: tuple[str, ...]
    flip: bool

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        return tuple(self.train.images.shape[1:])

    @property
    def device(self) -> torch.device:
        """Where everything is but, perhaps, the training images."""
        return self.test.images.device

    @cached_property
    def description(self) -> dict[str, Any]:
        """What a checkpoint remembers of its data: two data sets with the same description hold the same images."""
        parts = (self.train, self.valid, self.test)
        digest = hashlib.blake2b(digest_size=16)
        for part in parts:
            digest.update(part.images.cpu().contiguous().numpy())
            digest.update(part.labels.cpu().numpy())
        return {
            "shape": list(self.shape),
            "class_names": list(self.class_names),
            "images": [len(part) for part in parts],
            "digest": digest.hexdigest(),
        }


def some_of_each_class(split: Split, n: int | None, n_classes: int) -> Split:
    """``n`` images of each class, the same random ones every time; all with None. UserError if a class has fewer."""
    if n is None:
        return split
    order = torch.randperm(len(split), generator=Generator().manual_seed(SPLIT_SEED)).to(split.labels.device)
    chosen = [order[split.labels[order] == k][:n] for k in range(n_classes)]
    least = min(map(len, chosen))
    if least < n:
        raise UserError(f"--labels_per_class {n} is too many: the smallest class has {least} training images")
    return split[torch.cat(chosen).sort().values]


def evenly_spaced(split: Split, n: int, kind: str) -> Split:
    """``n`` images, evenly spaced in a split, in its order. Raises UserError, which says ``kind``, if it has fewer."""
    if n > len(split):
        raise UserError(f"--n_samples {n} is more than the {len(split)} {kind}")
    return split[torch.arange(n, device=split.labels.device) * len(split) // n]


class Batches:
    """Endless batches of a split: each pass takes all its images once, in a new order.

    The last images of a pass that fill no batch are left out. Images are augmented unless ``augmented`` is False. All
    randomness comes from ``rng``, on whose device the batches are. Where several processes draw with equal ``rng``,
    each takes its part of the same batches with the same augmentation. Images that lie on the host are sent to a GPU
    one batch ahead, while it computes.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        flip: bool,
        sigma: float,
        rng: Generator,
        augmented: bool = True,
        world: World = ALONE,
    ):
        self.split, self.batch_size, self.flip, self.sigma, self.rng = split, batch_size, flip, sigma, rng
        self.augmented, self.part = augmented, world.slice_of(batch_size)
        self.from_host = split.images.device.type != rng.device.type
        self.copying = torch.cuda.Stream(rng.device) if self.from_host and rng.device.type == "cuda" else None
        self.load_state_dict({"order": torch.empty(0, dtype=torch.int64, device=rng.device), "position": 0})

    def next(self) -> tuple[Tensor, Tensor]:
        """Images float32 (N, C, H, W) and labels int64 (N,); see ``augment``.

        Never waits for the device, but at the start of a pass over images on the host.
        """
        if self.position + self.batch_size > len(self.order):
            order = torch.randperm(len(self.split), generator=self.rng, device=self.rng.device)
            self.load_state_dict({"order": order, "position": 0})
        batch = self.ready(self.ahead or self.batch_at(self.position))
        self.position += self.batch_size
        more = self.from_host and self.position + self.batch_size <= len(self.order)
        self.ahead = self.batch_at(self.position) if more else None
        if self.augmented:
            return augment(batch.images, self.flip, self.sigma, self.rng, self.batch_size, self.part), batch.labels
        return to_float(batch.images).contiguous(memory_format=torch.channels_last), batch.labels

    def batch_at(self, position: int) -> Split:
        """This process's part of the batch there in the order; from the host, it is perhaps still on its way."""
        batch = self.split[self.index[position : position + self.batch_size][self.part]]
        if not self.copying:
            return batch
        with torch.cuda.stream(self.copying):
            pinned = batch.images.pin_memory(), batch.labels.pin_memory()
            return Split(*(t.to(self.rng.device, non_blocking=True) for t in pinned))

    def ready(self, batch: Split) -> Split:
        """The batch. The GPU waits until it has arrived; the host does not."""
        if self.copying:
            computing = torch.cuda.current_stream(self.rng.device)
            computing.wait_stream(self.copying)
            for t in (batch.images, batch.labels):
                t.record_stream(computing)  # its memory serves other copies only when the computing is past
        return batch

    def state_dict(self) -> dict[str, Any]:
        return {"order": self.order, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.order, self.position = state["order"], state["position"]
        self.index = self.order.to(self.split.images.device)  # the same order, where the images are
        self.ahead: Split | None = None


def load(
    name: str,
    data_dir: str | Path = "data",
    image_size: int | None = None,
    n_valid: int | None = None,
    device: str | torch.device = "cpu",
    data_device: str = "auto",
) -> ImageData:
    """Read the data set ``name``, one of ``DATASETS``, onto ``device``.

    Args:
        data_dir: where the files are; torchvision's data sets are downloaded to it if they are missing. For
            ``mnist`` and ``fashion_mnist`` it may hold the bare idx files, gzipped or not. For ``folder`` it
            holds train/<class>/* and test/<class>/*, or only <class>/*, of which 20 % become the test part; with
            val/<class>/* next to them, that is the validation part, and ``n_valid`` may not be given.
        image_size: side in pixels to which ``folder`` resizes its images; the aspect ratio is not kept.
        n_valid: images held out of train for validation; by default a tenth, but 5,000 at most.
        data_device: "cpu" leaves the training images on the host, "gpu" puts them on ``device`` with the others, "auto"
            leaves them if they take more than a fifth of its memory.

    Raises:
        UserError: files are missing, broken or unusable, or ``n_valid`` leaves nothing to train on.
    """
    try:
        root = Path(data_dir).expanduser()
    except RuntimeError as error:  # no such user
        raise UserError(f"--data_dir {data_dir}: {error}") from None
    valid = None  # a part of its own, where the data set has one
    if name == "digits":
        train, test, class_names = _read_digits()
    elif name == "folder":
        train, valid, test, class_names = _read_folder(root, image_size)
    elif name in TORCHVISION:
        train, test, class_names = _read_torchvision(name, root)
    else:
        raise UserError(f"unknown data set {name}: choose one of {', '.join(DATASETS)}")
    if valid is not None and n_valid is not None:
        raise UserError(f"{root} has a validation folder, so --n_valid {n_valid} cannot be used: leave it out")
    if n_valid is None:
        n_valid = min(5000, len(train) // 10) if valid is None else 0
    if not 0 <= n_valid < len(train):
        raise UserError(f"--n_valid {n_valid} must be at least 0 and below {len(train)}, the training images")
    order = torch.randperm(len(train), generator=Generator().manual_seed(SPLIT_SEED))
    parts = (train[order[n_valid:]], train[order[:n_valid]] if valid is None else valid, test)
    if name == "folder":
        counts = zip(("train", "valid", "test"), (part.labels for part in parts), strict=True)
        per_class = {part: labels.bincount(minlength=len(class_names)).tolist() for part, labels in counts}
        print("data:", describe(class_names, per_class), flush=True)
    device = torch.device(device)
    train, *others = parts
    if not stays_on_host(train.images.nbytes, device, data_device):
        train = train.to(device)
    others = (part.to(device) for part in others)
    return ImageData(train, *others, tuple(class_names), flip=name in FLIP_KEEPS_LABEL)


def stays_on_host(n_bytes: int, device: torch.device, data_device: str) -> bool:
    """Whether training images of that size stay on the host; see ``load``."""
    if data_device != "auto" or device.type != "cuda":
        return data_device == "cpu"
    return n_bytes > LARGE * torch.cuda.get_device_properties(device).total_memory


def to_float(images: Tensor) -> Tensor:
    """uint8 images as float32 in [-1, 1], floats as they are; shape and memory format stay."""
    return images if images.is_floating_point() else images.float() / 127.5 - 1


def crop_and_flip(images: Tensor, top: Tensor, left: Tensor, flip: Tensor, pad: int) -> Tensor:
    """Reflect-pad by ``pad``, crop each image back to (H, W) at its own offset, mirror it if ``flip`` is set.

    Args:
        images: uint8 (N, C, H, W), with pad < min(H, W).
        top, left: int64 (N,), offsets in [0, 2 * pad]; ``pad`` leaves the image in place.
        flip: bool (N,), whether to mirror left and right after the crop.

    Returns:
        uint8 (N, C, H, W), channels_last in memory.
    """
    n, channels, height, width = images.shape
    rows = _reflect(top[:, None] - pad + torch.arange(height, device=images.device), height)  # (N, H)
    columns = _reflect(left[:, None] - pad + torch.arange(width, device=images.device), width)  # (N, W)
    columns = torch.where(flip[:, None], columns.flip(1), columns)
    source = (rows[:, :, None] * width + columns[:, None, :]).view(n, 1, height * width)
    moved = images.flatten(2).gather(2, source.expand(-1, channels, -1))  # (N, C, H * W)
    return moved.view(images.shape).contiguous(memory_format=torch.channels_last)


def augment(
    images: Tensor,
    flip: bool,
    sigma: float,
    generator: Generator,
    n: int | None = None,
    part: slice = WHOLE,
) -> Tensor:
    """A random crop and flip of each image, as floats with Gaussian noise.

    Args:
        images: uint8 (N, C, H, W); the ``part`` that is asked for of a batch of ``n`` images, by default all of it.
        flip: whether to mirror each image with probability 1/2.
        sigma: standard deviation of the noise, on the scale of [-1, 1]; values may leave that range by it.
        generator: source of all randomness, on the images' device; it is drawn from for the whole batch.

    Returns:
        float32 (N, C, H, W), channels_last in memory.
    """
    n, (_, channels, height, width) = n or len(images), images.shape
    draw = {"generator": generator, "device": images.device}
    side = min(height, width)
    pad = min(4, side // 8) if side >= 16 else 0  # the usual 4 at 32x32; the 8x8 digits fill their frame
    top, left = torch.randint(2 * pad + 1, (2, n), **draw)
    mirrored = torch.rand(n, **draw) < (0.5 if flip else 0.0)
    x = to_float(crop_and_flip(images, top[part], left[part], mirrored[part], pad))
    # Drawn contiguous and permuted: filling a tensor of channels_last strides is ten times slower on a CPU.
    noise = torch.randn(n, height, width, channels, **draw)[part].permute(0, 3, 1, 2)
    return x.add_(noise, alpha=sigma)


def _reflect(index: Tensor, size: int) -> Tensor:
    """Indices beyond either end of [0, size - 1], mirrored back at that end."""
    return size - 1 - (size - 1 - index.abs()).abs()


def _stratified_split(split: Split, name: str) -> tuple[Split, Split]:
    """80 % of each class for training and 20 % for testing."""
    from sklearn.model_selection import train_test_split  # slow to import, and most data sets do without

    everything = torch.arange(len(split))
    try:
        train, test = train_test_split(everything, test_size=0.2, stratify=split.labels, random_state=SPLIT_SEED)
    except ValueError as error:
        raise UserError(f"{name} has too few images to hold out a fifth of each class: add some") from error
    return split[train], split[test]


def _read_digits() -> tuple[Split, Split, list[str]]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images * 255 / 16).round().byte()[:, None]  # (N, 1, 8, 8), from 0..16
    train, test = _stratified_split(Split(images, torch.from_numpy(digits.target)), "digits")
    return train, test, [str(digit) for digit in range(10)]


def _read_torchvision(name: str, root: Path) -> tuple[Split, Split, list[str]]:
    dataset_class, files_to_fetch = TORCHVISION[name]
    try:
        with tempfile.TemporaryDirectory() as scratch:
            bare = {path.name.removesuffix(".gz"): path for path in root.glob("*-idx?-ubyte*")}
            if name in ("mnist", "fashion_mnist") and bare.keys() >= set(IDX_FILES):
                _unpack_idx(bare, Path(scratch, dataset_class.__name__, "raw"))
                train, test = (_open_part(dataset_class, scratch, part) for part in ("train", "test"))
            else:
                train, test = (_open_part(dataset_class, root, part) for part in ("train", "test"))
        class_names = [str(digit) for digit in range(10)] if name == "svhn" else train.classes
        return _as_split(train), _as_split(test), class_names
    except UserError:
        raise
    except Exception as error:  # a missing or broken file raises whatever its reader trips over
        for path, md5 in _archives(dataset_class, root):
            if path.is_file() and not check_integrity(path, md5):
                raise UserError(
                    f"{path} is damaged: remove it and run this again with a network, or put an intact copy there"
                ) from error
        cause = " ".join(str(error).split())
        raise UserError(
            f"cannot read {name} from {root} ({cause}): put {' and '.join(files_to_fetch)} there, "
            "or choose --dataset digits, which needs no files"
        ) from error


def _archives(dataset_class: type, root: Path) -> list[tuple[Path, str]]:
    """Where torchvision's class keeps the files that it downloads, and the MD5 sum that each must have."""
    if issubclass(dataset_class, datasets.CIFAR10):  # and CIFAR-100, which is made from it
        return [(root / dataset_class.filename, dataset_class.tgz_md5)]
    if dataset_class is datasets.SVHN:
        return [(root / dataset_class.split_list[part][1], dataset_class.split_list[part][2]) for part in SVHN_PARTS]
    raw = root / dataset_class.__name__ / "raw"
    return [(raw / name, md5) for name, md5 in dataset_class.resources]


def _unpack_idx(files: dict[str, Path], raw_folder: Path) -> None:
    """Lay bare idx files out as torchvision's MNIST classes expect them."""
    raw_folder.mkdir(parents=True)
    for name in IDX_FILES:
        open_file = gzip.open if files[name].suffix == ".gz" else open
        with open_file(files[name], "rb") as source, open(raw_folder / name, "wb") as target:
            try:
                shutil.copyfileobj(source, target)
            except (EOFError, gzip.BadGzipFile, zlib.error):
                raise UserError(f"{files[name]} is damaged: remove it and put an intact copy there") from None


def _open_part(dataset_class: type, root: str | Path, part: str) -> datasets.VisionDataset:
    """torchvision's "train" or "test" data set; the network is asked only for what is not there."""
    choice = {"split": part} if dataset_class is datasets.SVHN else {"train": part == "train"}
    try:
        return dataset_class(root, **choice)
    except RuntimeError:
        return dataset_class(root, **choice, download=True)


def _as_split(dataset: datasets.VisionDataset) -> Split:
    images = torch.as_tensor(dataset.data)
    if images.ndim == 3:  # MNIST: (N, H, W)
        images = images[:, None]
    elif images.shape[-1] == 3:  # CIFAR: (N, H, W, C)
        images = images.permute(0, 3, 1, 2)
    labels = torch.as_tensor(dataset.labels if isinstance(dataset, datasets.SVHN) else dataset.targets)
    if len(images) != len(labels):
        raise ValueError(f"{len(images)} images but {len(labels)} labels")
    return Split(images.contiguous(), labels)


def _read_folder(root: Path, image_size: int | None) -> tuple[Split, Split | None, Split, list[str]]:
    images, labels, parts, class_names = image_folder.read(root, image_size)
    everything = Split(images, labels)
    if not parts:
        train, test = _stratified_split(everything, str(root))
        return train, None, test, class_names
    valid = everything[parts["valid"]] if "valid" in parts else None
    return everything[parts["train"]], valid, everything[parts["test"]], class_names
