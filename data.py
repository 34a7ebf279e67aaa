"""Data sets as uint8 tensors on the training device, or on the host if they are too large, and their augmentation."""

import glob
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor
from torchvision import datasets
from torchvision.datasets.utils import check_integrity, extract_archive
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import pad_image

import image_folder
from distributed import World
from utils import UserError

SPLIT_SEED = 0  # not the run's seed: all runs train and report on the same images
ALONE, WHOLE = World(), slice(None)
Parts = dict[str, "Split"]  # train, valid, test
AUTO_AUGMENT = v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)
FIRST_LABELS = {datasets.MNIST: [5, 0, 4, 1, 9, 2, 1, 3, 1, 4], datasets.FashionMNIST: [9, 0, 0, 3, 0, 2, 7, 2, 5, 5]}


@dataclass(frozen=True)
class Split:
    """Images, uint8 (N, C, H, W), and their labels, int64 (N,), on one device. UserError if they are not as many."""

    images: Tensor
    labels: Tensor

    def __post_init__(self):
        if len(self.images) != len(self.labels):
            raise UserError(f"a data set has {len(self.images)} images and {len(self.labels)} labels")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor | slice) -> "Split":
        return Split(self.images[index], self.labels[index])

    def to(self, device: torch.device) -> "Split":
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class ImageData:
    """A data set. Raises UserError for images or labels on another scale than those of ``Split``."""

    train: Split
    valid: Split
    test: Split
    class_names: tuple[str, ...]
    flip: bool  # whether a horizontal flip keeps an image's label

    def __post_init__(self):
        n_classes = len(self.class_names)
        for images, labels in ((part.images, part.labels) for part in (self.train, self.valid, self.test)):
            right = images.dtype == torch.uint8 and images.ndim == 4 and labels.dtype == torch.int64
            right = right and images.shape[1] in (1, 3) and not any(side % 4 for side in images.shape[2:])
            first, last = (labels.min().item(), labels.max().item()) if len(labels) else (0, 0)
            if not right or first < 0 or last >= n_classes:
                found = f"images {images.dtype} {tuple(images.shape)} and labels {labels.dtype} {tuple(labels.shape)}"
                needed = "images uint8 (N, C, H, W), C 1 or 3, H and W multiples of 4, and labels int64 (N,)"
                raise UserError(f"a data set has {needed}, 0 to {n_classes - 1}, not {found}, {first} to {last}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        return tuple(self.train.images.shape[1:])

    @cached_property
    def description(self) -> dict[str, Any]:
        """What a checkpoint remembers of its data: two data sets with the same description hold the same images."""
        parts, digest = (self.train, self.valid, self.test), hashlib.blake2b(digest_size=16)
        for part in parts:
            digest.update(part.images.cpu().contiguous().numpy())
            digest.update(part.labels.cpu().numpy())
        sizes = {"shape": list(self.shape), "images": [len(part) for part in parts]}
        names, some = list(self.class_names), " ".join(image_digests(self.train.images[:100]))
        return sizes | {"class_names": names, "digest": digest.hexdigest(), "some_training_images": some}


def image_digests(images: Tensor) -> list[str]:
    return [hashlib.blake2b(image, digest_size=8).hexdigest() for image in images.cpu().contiguous().numpy()]


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


@dataclass(eq=False)
class Batches:
    """Endless batches of a split: each pass takes its images once, in a new order, but for a last incomplete batch.

    ``rng`` draws; batches are on its device, for a ``world`` in parts. ``augmentation``: "none", or as for ``augment``.
    """

    split: Split
    batch_size: int
    flip: bool
    sigma: float
    rng: Generator
    augmentation: str = "crop"
    world: World = ALONE

    def __post_init__(self):
        size = self.batch_size // self.world.size
        self.part = slice(self.world.rank * size, (self.world.rank + 1) * size)
        self._start_epoch(torch.empty(0, dtype=torch.int64, device=self.rng.device))

    def next(self) -> tuple[Tensor, Tensor]:
        """Images float32 (N, C, H, W) and labels int64 (N,); see ``augment``.

        Synchronises with the device only at the start of a pass over images on the host, and for AutoAugment.
        """
        if self.position + self.batch_size > len(self.order):
            self._start_epoch(torch.randperm(len(self.split), generator=self.rng, device=self.rng.device))
        batch = self.split[self.order[self.position : self.position + self.batch_size][self.part]]
        self.position += self.batch_size
        images, labels, device = batch.images, batch.labels, self.rng.device
        if images.device.type != device.type:  # pinned, so that copies do not synchronise
            images, labels = (part.pin_memory().to(device, non_blocking=True) for part in (images, labels))
        if self.augmentation == "none":
            return to_float(images).contiguous(memory_format=torch.channels_last), labels
        return augment(images, self.flip, self.sigma, self.rng, self.augmentation, self.batch_size, self.part), labels

    def _start_epoch(self, order: Tensor) -> None:
        self.order, self.position = order.to(self.split.images.device), 0

    def state_dict(self) -> dict[str, Any]:
        return {"order": self.order, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._start_epoch(state["order"])
        self.position = state["position"]


class DataSet(NamedTuple):
    """``read(data_dir, image_size)`` gives class names, and parts: train, test, perhaps valid, or all, to divide."""

    read: Callable[[Path, int | None], tuple[list[str], dict[str, Split]]]
    flip: bool  # whether a horizontal flip keeps an image's label


def load(
    name: str,
    data_dir: str | Path = "data",
    image_size: int | None = None,
    n_valid: int | None = None,
    device: str | torch.device = "cpu",
    data_device: str = "auto",
    trained_on: dict[str, Any] | None = None,
) -> ImageData:
    """Read the data set ``name``, one of ``DATASETS``, onto ``device``.

    Args:
        image_size: side in pixels to which ``folder`` resizes its images; the aspect ratio is not kept.
        n_valid: images held out of train for validation; by default a tenth, but 5,000 at most.
        data_device: where the training images are: "cpu", "gpu" (on ``device``), or "auto"; see ``stays_on_host``.
        trained_on: for a set to measure, the ``description`` of the images that the model was trained on. Of other
            images there is only the test part then, or, of a folder of <class>/*, all as test images.

    Raises UserError if files are missing, broken or unusable, or ``n_valid`` leaves a class without training images.
    """
    root = Path(data_dir).expanduser()
    class_names, parts = DATASETS[name].read(root, image_size)
    if not {"test", "all"} & parts.keys():
        raise UserError(f"the data set {name} has neither a part test nor all, only {', '.join(parts) or 'nothing'}")
    if (undivided := parts.pop("all", None)) is not None:
        parts = _divide(undivided, root, trained_on is None)
    if trained_on is not None:
        parts = _as_in_training(parts, undivided, class_names, trained_on, root)
    else:
        whole, parts = parts, _hold_out(parts, n_valid, root)
        if lost := set(whole["train"].labels.tolist()) - set(parts["train"].labels.tolist()):
            raise UserError(f"no training images of {class_names[min(lost)]} are left: lower --n_valid")
    train, valid, test = (parts.get(part, parts["test"][:0]) for part in ("train", "valid", "test"))
    if name == "folder":
        counts = f"{len(train)} training, {len(valid)} validation and {len(test)} test images"
        image_folder.note(f"{len(class_names)} classes: {image_folder.some(class_names)}; {counts}")
    if not stays_on_host(train.images.nbytes, torch.device(device), data_device):
        train = train.to(device)
    return ImageData(train, valid.to(device), test.to(device), tuple(class_names), DATASETS[name].flip)


def stays_on_host(n_bytes: int, device: torch.device, data_device: str) -> bool:
    """Whether training images stay on the host; with "auto", if they take more than a fifth of a GPU's memory."""
    large = device.type == "cuda" and n_bytes > 0.2 * torch.cuda.get_device_properties(device).total_memory
    return data_device == "cpu" or (data_device == "auto" and large)


def to_float(images: Tensor) -> Tensor:
    """uint8 images as float32 in [-1, 1], floats as they are; shape and memory format stay."""
    return images if images.is_floating_point() else images.float() / 127.5 - 1


def crop_and_flip(images: Tensor, top: Tensor, left: Tensor, flip: Tensor, pad: int, black: bool = False) -> Tensor:
    """Pad uint8 images (N, C, H, W) by ``pad`` < min(H, W), with their reflection or ``black``; crop back to (H, W).

    The offsets ``top`` and ``left`` are int64 (N,) in [0, 2 * pad]. Where ``flip``, bool (N,), is set, left and right
    are mirrored after the crop. Returns channels_last memory.
    """
    n, channels, height, width = images.shape
    padded = pad_image(images, [pad], padding_mode="constant" if black else "reflect")
    rows = top[:, None] + torch.arange(height, device=images.device)  # (N, H), of the padded image
    columns = left[:, None] + torch.arange(width, device=images.device)  # (N, W)
    columns = torch.where(flip[:, None], columns.flip(1), columns)
    source = rows[:, :, None] * (width + 2 * pad) + columns[:, None, :]
    source = source.view(n, 1, height * width).expand(-1, channels, -1)
    return padded.flatten(2).gather(2, source).view(images.shape).contiguous(memory_format=torch.channels_last)


def augment(
    images: Tensor, flip: bool, sigma: float, rng: Generator, how: str = "crop", n: int = 0, part: slice = WHOLE
) -> Tensor:
    """A random crop and flip of each image, as floats with Gaussian noise: float32 (N, C, H, W), channels_last.

    Args:
        images: uint8 (N, C, H, W); the ``part`` that is asked for of a batch of ``n`` images, by default all of it.
        flip: mirrors each with probability 1/2. sigma: the noise's deviation; values may leave [-1, 1] by it.
        rng: on the images' device, drawn from for the whole batch. AutoAugment draws from PyTorch's global generator.
        how: "crop" mirrors the edges; "black": black ones; "auto": black ones, then AutoAugment and Cutout.
    """
    n, (_, channels, height, width) = n or len(images), images.shape
    draw = {"generator": rng, "device": images.device}
    side = min(height, width)
    pad = min(4, side // 8) if side >= 16 else 0  # the usual 4 at 32x32; the 8x8 digits fill their frame
    top, left = torch.randint(2 * pad + 1, (2, n), **draw)
    mirrored = torch.rand(n, **draw) < (0.5 if flip else 0.0)
    images = crop_and_flip(images, top[part], left[part], mirrored[part], pad, how != "crop")
    if how == "auto":
        row, column = (torch.randint(size, (n,), **draw)[part] for size in (height, width))
        images = cutout(torch.stack([AUTO_AUGMENT(image) for image in images]), row, column)
    x = to_float(images).contiguous(memory_format=torch.channels_last)
    # Drawn contiguous and permuted: filling a tensor of channels_last strides is ten times slower on a CPU.
    return x.add_(torch.randn(n, height, width, channels, **draw)[part].permute(0, 3, 1, 2), alpha=sigma)


def cutout(images: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Black squares of half the side in images (N, C, H, W), centres (N,), cut at edges (DeVries & Taylor, 2017)."""
    n_rows, n_columns = images.shape[2:]
    half = min(n_rows, n_columns) // 4
    down = torch.arange(n_rows, device=images.device) - row[:, None]
    across = torch.arange(n_columns, device=images.device) - column[:, None]
    hole = ((-half <= down) & (down < half))[:, :, None] & ((-half <= across) & (across < half))[:, None, :]
    return images.masked_fill(hole[:, None], 0)


def _divide(images: Split, root: Path, needed: bool) -> Parts:
    """80 % of each class for training and 20 % for testing; if there are too few and no need, all for testing."""
    from sklearn.model_selection import train_test_split  # slow to import, and most data sets do without

    try:
        every = torch.arange(len(images))
        train, test = train_test_split(every, test_size=0.2, stratify=images.labels, random_state=SPLIT_SEED)
    except ValueError as error:
        if needed:
            raise UserError(f"{root} has too few images to hold out a fifth of each class: add some") from error
        return {"test": images}
    return {"train": images[train], "test": images[test]}


def _as_in_training(parts: Parts, undivided: Split | None, names: list[str], trained_on: dict, root: Path) -> Parts:
    """The parts that a model was trained on, or only the test images where they are of other images.

    Another program may have trained on all training images, so that none are left for validation.
    """
    n_valid = None if "valid" in parts else trained_on.get("images", [0, 0])[1]
    if "train" in parts and (n_valid or 0) < len(parts["train"]):
        own = _hold_out(parts, n_valid, root)
        known = ImageData(**own, class_names=tuple(names), flip=False).description
        if trained_on.items() <= known.items() or (trained_on.get("assumed") and undivided is None):
            return own
        if known["images"] == trained_on.get("images"):
            undivided = None  # in the same places may be the same images, decoded in another way
    others = parts["test"] if undivided is None else undivided
    some = trained_on.get("some_training_images", "").split()
    found = set(some) & set(image_digests(others.images) if some else ())
    if len(found) > len(some) / 10:
        raise UserError(f"{root} has training images to measure ({len(found)} of {len(some)}): undo its change")
    image_folder.note(f"{root} holds other images than those of the training: only test images are used")
    return {"test": others}


def _hold_out(parts: Parts, n_valid: int | None, root: Path) -> Parts:
    """The training images in a random order, and the first ``n_valid`` for validation if they have no such part."""
    if (train := parts.get("train")) is None:
        raise UserError(f"{root} has no train/: add it; {image_folder.EXPECTED}")
    if n_valid is None:
        n_valid = 0 if "valid" in parts else min(5000, len(train) // 10)
    elif "valid" in parts:
        raise UserError(f"there is a validation folder, so --n_valid {n_valid} cannot be used: leave it out")
    if not 0 <= n_valid < len(train):
        raise UserError(f"--n_valid {n_valid} must be at least 0 and below {len(train)}, the training images")
    order = torch.randperm(len(train), generator=Generator().manual_seed(SPLIT_SEED))
    return {"valid": train[order[:n_valid]], **parts, "train": train[order[n_valid:]]}


def read_digits(root: Path, image_size: int | None) -> tuple[list[str], dict[str, Split]]:
    """scikit-learn's 8x8 digits, which need no files."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images * 255 / 16).round().byte()[:, None]  # (N, 1, 8, 8), from 0..16
    return [str(digit) for digit in range(10)], {"all": Split(images, torch.from_numpy(digits.target))}


def read_folder(root: Path, image_size: int | None) -> tuple[list[str], dict[str, Split]]:
    """train/<class>/* and test/<class>/*, perhaps val/<class>/*, or only <class>/*; see ``image_folder.read``."""
    images, labels, slices, class_names = image_folder.read(root, image_size)
    return class_names, {part: Split(images[where], labels[where]) for part, where in slices.items()}


def read_torchvision(cls: type, root: Path, image_size: int | None) -> tuple[list[str], dict[str, Split]]:
    """One of torchvision's data sets, downloaded if it is not there. MNIST's idx files may also lie in ``root``."""
    files = _files(cls)
    if os.path.isfile(root):
        raise UserError(f"--data_dir {root} is a file: give the folder that holds the data set's files")
    if root.name in {Path(file).parts[0] for file in files}:  # a folder too deep
        root = root.parent
    for file, md5 in files.items():  # torchvision would write over damaged ones
        if os.access(root / file, os.R_OK) and not check_integrity(root / file, md5):
            raise UserError(f"{root / file} is damaged, unfinished or another file (wrong MD5 sum): delete it, or wait")
    inside = image_folder.some(sorted(glob.glob("*", root_dir=root))) or "no files"
    choices = [{"split": part} if cls is datasets.SVHN else {"train": part == "train"} for part in ("train", "test")]
    try:
        with tempfile.TemporaryDirectory() as scratch:
            place = _unpack_idx(cls, root, Path(scratch))
            train, test = [cls(place, **choice, download=True) for choice in choices]
            parts = {"train": _as_split(train), "test": _as_split(test)}
    except Exception as error:  # a missing or broken file raises whatever its reader trips over
        downloads = " and ".join(Path(file).name for file in files if file.endswith((".gz", ".mat")))
        advice = f"put {downloads} there, or give --dataset folder, or another --data_dir"
        where = f"{cls.__name__} from --data_dir {root}, which holds {inside}"
        raise UserError(f"cannot read {where}: {advice} ({' '.join(str(error).split())})") from error
    if cls in FIRST_LABELS and parts["train"].labels[:10].tolist() != FIRST_LABELS[cls]:
        raise UserError(f"{root} holds another set than {cls.__name__}, whose files have the same names")
    return [str(digit) for digit in range(10)] if cls is datasets.SVHN else train.classes, parts


def _unpack_idx(cls: type, root: Path, scratch: Path) -> Path:
    """Lay MNIST's idx files that lie in ``root`` itself out in ``scratch``, as torchvision wants; returns its root."""
    bare = list(root.glob("*-idx?-ubyte*")) if issubclass(cls, datasets.MNIST) else []
    (raw := scratch / cls.__name__ / "raw").mkdir(parents=True)
    for path in bare:
        extract_archive(path, raw) if path.suffix == ".gz" else shutil.copy(path, raw)
    return scratch if len({path.name.removesuffix(".gz") for path in bare}) == 4 else root


def _files(cls: type) -> dict[str, str]:
    """What torchvision downloads to ``--data_dir``, and CIFAR's batches that it unpacks there, with their MD5 sums."""
    if issubclass(cls, datasets.CIFAR10):  # and CIFAR-100, which is made from it
        batches = {f"{cls.base_folder}/{name}": md5 for name, md5 in cls.train_list + cls.test_list}
        return {cls.filename: cls.tgz_md5} | batches
    if cls is datasets.SVHN:
        return {name: md5 for _, name, md5 in (cls.split_list["train"], cls.split_list["test"])}
    return {f"{cls.__name__}/raw/{name}": md5 for name, md5 in cls.resources}


def _as_split(dataset: datasets.VisionDataset) -> Split:
    images = torch.as_tensor(dataset.data)
    if images.ndim == 3:  # MNIST: (N, H, W)
        images = images[:, None]
    elif images.shape[-1] == 3:  # CIFAR: (N, H, W, C)
        images = images.permute(0, 3, 1, 2)
    labels = torch.as_tensor(dataset.labels if isinstance(dataset, datasets.SVHN) else dataset.targets)
    return Split(images.contiguous(), labels)


DATASETS = {  # a data set of your own: one function like read_digits, and one line here
    "cifar10": DataSet(partial(read_torchvision, datasets.CIFAR10), flip=True),
    "cifar100": DataSet(partial(read_torchvision, datasets.CIFAR100), flip=True),
    "svhn": DataSet(partial(read_torchvision, datasets.SVHN), flip=False),
    "mnist": DataSet(partial(read_torchvision, datasets.MNIST), flip=False),
    "fashion_mnist": DataSet(partial(read_torchvision, datasets.FashionMNIST), flip=True),
    "digits": DataSet(read_digits, flip=False),
    "folder": DataSet(read_folder, flip=True),
}
