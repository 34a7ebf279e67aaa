"""Data sets as uint8 tensors that live on the training device, and batch augmentation there.

``load`` reads a data set by name and returns its train, validation and test parts. Splits are drawn with a
seed of their own, so that runs with different seeds train and report on the same images.
"""

import gzip
import hashlib
import io
import os
import shutil
import sys
import tempfile
import warnings
import zlib
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Generator, Tensor
from torchvision import datasets
from tqdm import tqdm

from errors import UserError

DATASETS = ("cifar10", "cifar100", "svhn", "mnist", "fashion_mnist", "digits", "folder")
FLIP_KEEPS_LABEL = ("cifar10", "cifar100", "fashion_mnist", "folder")
SPLIT_SEED = 0
CACHE_FORMAT = 1  # raise it whenever the same files would decode to other pixels

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


def load(
    name: str,
    data_dir: str | Path = "data",
    image_size: int | None = None,
    n_valid: int | None = None,
    device: str | torch.device = "cpu",
) -> ImageData:
    """Read the data set ``name``, one of ``DATASETS``, onto ``device``.

    Args:
        data_dir: where the files are; torchvision's data sets are downloaded to it if they are missing. For
            ``mnist`` and ``fashion_mnist`` it may hold the bare idx files, gzipped or not. For ``folder`` it
            holds train/<class>/* and test/<class>/*, or only <class>/*, of which 20 % become the test part.
        image_size: side in pixels to which ``folder`` resizes its images; the aspect ratio is not kept.
        n_valid: images held out of train for validation; by default a tenth, but 5,000 at most.

    Raises:
        UserError: files are missing, broken or unusable, or ``n_valid`` leaves nothing to train on.
    """
    root = Path(data_dir).expanduser()
    if name == "digits":
        train, test, class_names = _read_digits()
    elif name == "folder":
        train, test, class_names = _read_folder(root, image_size)
    elif name in TORCHVISION:
        train, test, class_names = _read_torchvision(name, root)
    else:
        raise UserError(f"unknown data set {name}: choose one of {', '.join(DATASETS)}")
    n_valid = min(5000, len(train) // 10) if n_valid is None else n_valid
    if not 0 <= n_valid < len(train):
        raise UserError(f"--n_valid {n_valid} must be at least 0 and below {len(train)}, the training images")
    order = torch.randperm(len(train), generator=Generator().manual_seed(SPLIT_SEED))
    parts = (train[order[n_valid:]], train[order[:n_valid]], test)
    on_device = (Split(part.images.to(device), part.labels.to(device)) for part in parts)
    return ImageData(*on_device, tuple(class_names), flip=name in FLIP_KEEPS_LABEL)


def to_float(images: Tensor) -> Tensor:
    """uint8 images as float32 in [-1, 1]; shape and memory format stay."""
    return images.float() / 127.5 - 1


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


def augment(images: Tensor, flip: bool, sigma: float, generator: Generator) -> Tensor:
    """A random crop and flip of each image, as floats with Gaussian noise.

    Args:
        images: uint8 (N, C, H, W).
        flip: whether to mirror each image with probability 1/2.
        sigma: standard deviation of the noise, on the scale of [-1, 1]; values may leave that range by it.
        generator: source of all randomness, on the images' device.

    Returns:
        float32 (N, C, H, W), channels_last in memory.
    """
    n, channels, height, width = images.shape
    draw = {"generator": generator, "device": images.device}
    side = min(height, width)
    pad = min(4, side // 8) if side >= 16 else 0  # the usual 4 at 32x32; the 8x8 digits fill their frame
    top, left = torch.randint(2 * pad + 1, (2, n), **draw)
    mirrored = torch.rand(n, **draw) < (0.5 if flip else 0.0)
    x = to_float(crop_and_flip(images, top, left, mirrored, pad))
    # Drawn contiguous and permuted: filling a tensor of channels_last strides is ten times slower on a CPU.
    noise = torch.randn(n, height, width, channels, **draw).permute(0, 3, 1, 2)
    return x.add_(noise, alpha=sigma)


def _reflect(index: Tensor, size: int) -> Tensor:
    """Indices beyond either end of [0, size - 1], mirrored back at that end."""
    return size - 1 - (size - 1 - index.abs()).abs()


def _stratified_split(split: Split, name: str) -> tuple[Split, Split]:
    """80 % of each class for training and 20 % for testing."""
    from sklearn.model_selection import train_test_split  # slow to import, and most data sets do without

    everything = torch.arange(len(split))
    try:
        train, test = train_test_split(
            everything, test_size=0.2, stratify=split.labels, random_state=SPLIT_SEED
        )
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
    except Exception as error:  # a missing or broken file raises whatever its reader trips over
        cause = " ".join(str(error).split())
        raise UserError(
            f"cannot read {name} from {root} ({cause}): put {' and '.join(files_to_fetch)} there, "
            "or choose --dataset digits, which needs no files"
        ) from error


def _unpack_idx(files: dict[str, Path], raw_folder: Path) -> None:
    """Lay bare idx files out as torchvision's MNIST classes expect them."""
    raw_folder.mkdir(parents=True)
    for name in IDX_FILES:
        open_file = gzip.open if files[name].suffix == ".gz" else open
        with open_file(files[name], "rb") as source, open(raw_folder / name, "wb") as target:
            shutil.copyfileobj(source, target)


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


def _read_folder(root: Path, image_size: int | None) -> tuple[Split, Split, list[str]]:
    try:
        class_names, files, labels, n_train = _list_folder(root)
        fingerprint = _fingerprint(files, root)
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from error
    if image_size is not None:
        _check_sides(image_size, image_size, root)
    cache = root / f".jem_cache_{image_size or 'native'}.pt"
    images = _load_cache(cache, fingerprint)
    if images is None:
        images = _decode_all(files, image_size)
        _check_sides(*images.shape[2:], root)
        _save_cache(cache, fingerprint, images)
    everything = Split(images, torch.tensor(labels))
    if n_train is None:
        return *_stratified_split(everything, str(root)), class_names
    return everything[:n_train], everything[n_train:], class_names


def _list_folder(root: Path) -> tuple[list[str], list[str], list[int], int | None]:
    """What an image folder holds, without a look into the files.

    Returns:
        class names; files; their labels; how many of the files, counted from the first, are for training, or
        None where there is no train/ and test/.
    """
    if not root.is_dir():
        state = "is a file" if root.exists() else "does not exist"
        raise UserError(f"--data_dir {root} {state}: name a folder with train/<class>/ and test/<class>/")
    parts = [part for part in (root / "train", root / "test") if part.is_dir()]
    if len(parts) == 1:
        absent = "test" if parts[0].name == "train" else "train"
        raise UserError(f"{root} has {parts[0].name}/ but no {absent}/: add it")
    parts = parts or [root]
    class_names, *others = (
        sorted(path.name for path in part.iterdir() if path.is_dir() and path.name[0] != ".")
        for part in parts
    )
    if others and others[0] != class_names:
        odd = ", ".join(sorted(set(class_names) ^ set(others[0])))
        raise UserError(f"only one of train/ and test/ in {root} has {odd}: give both the same class folders")
    if len(class_names) < 2:
        found = f"only one class folder, {class_names[0]}" if class_names else "no class folders"
        raise UserError(f"{parts[0]} holds {found}: put the images of each class into a folder of its own")
    files, labels, ends = [], [], []
    for part in parts:
        for label, name in enumerate(class_names):
            found = _files_below(part / name)
            if not found:
                raise UserError(f"{part / name} holds no images: add some, or remove this class")
            files += found
            labels += [label] * len(found)
        ends.append(len(files))
    return class_names, files, labels, ends[0] if len(parts) == 2 else None


def _files_below(folder: Path) -> list[str]:
    """Every file in a folder and its subfolders, but for hidden ones and those that Windows leaves behind."""
    found = []
    for parent, subfolders, names in os.walk(folder):
        subfolders[:] = [name for name in subfolders if name[0] != "."]
        found += [os.path.join(parent, name) for name in names if name[0] != "."]
    return sorted(file for file in found if not file.lower().endswith(("thumbs.db", "desktop.ini")))


def _check_sides(height: int, width: int, root: Path) -> None:
    if height % 4 or width % 4:
        nearest = max(4, 4 * round(min(height, width) / 4))
        raise UserError(
            f"{root} gives images of {width}x{height} pixels, but the model needs multiples of 4: "
            f"try --image_size {nearest}"
        )


def _decode_all(files: list[str], image_size: int | None) -> Tensor:
    """Decode files on all cores to uint8 (N, C, H, W): C is 1 if every image is grey, else 3 (RGB)."""
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # what is broken is said once, below
    pixels, broken, grey = None, [], True
    results = closing(_decode_in_parallel(files, image_size))
    bar = tqdm(total=len(files), desc="decoding images", unit="file", leave=False, delay=1)
    with warnings.catch_warnings(action="ignore"), results as decoded, bar:
        for i, image in enumerate(decoded):
            bar.update()
            if isinstance(image, UserError):
                broken.append(image)
                continue
            if pixels is None:
                first, (height, width, _) = files[i], image.shape
                pixels = np.empty((len(files), 3, height, width), np.uint8)
            if image.shape != (height, width, 3):
                raise UserError(
                    f"{first} has {width}x{height} pixels but {files[i]} {image.shape[1]}x{image.shape[0]}: "
                    "give --image_size to bring all images to one size"
                )
            pixels[i] = image.transpose(2, 0, 1)
            grey = grey and (image == image[..., :1]).all()
    if broken:
        others = f" ({len(broken) - 1} more unusable files)" if len(broken) > 1 else ""
        raise UserError(f"{broken[0]}{others}")
    return torch.from_numpy(pixels[:, :1].copy() if grey else pixels)


def _decode_in_parallel(files: list[str], image_size: int | None) -> Iterator[np.ndarray | UserError]:
    pool = ThreadPool()
    try:
        # In chunks: a small image is decoded in less time than a thread pool needs to hand out one task.
        yield from pool.imap(partial(_decode_file, image_size=image_size), files, chunksize=16)
    finally:
        pool.terminate()
        pool.join()  # a thread that still decodes while Python exits would abort the process


def _decode_file(file: str, image_size: int | None) -> np.ndarray | UserError:
    """The image in a file, uint8 RGB (H, W, 3), or what is wrong with it."""
    try:
        image = _decode(file)
    except UserError as error:
        return error
    except Exception:  # image codecs raise almost anything on a broken file
        return UserError(f"{file} is not a readable image: replace or remove it")
    if image_size is None:
        return image
    height, width, _ = image.shape
    shrunk = (min(width, image_size), min(height, image_size))
    image = cv2.resize(image, shrunk, interpolation=cv2.INTER_AREA)
    return cv2.resize(image, (image_size, image_size), interpolation=cv2.INTER_CUBIC)


def _decode(file: str) -> np.ndarray:
    """Decode by content, not by file name, to uint8 RGB (H, W, 3): upright by EXIF, alpha dropped."""
    content = Path(file).read_bytes()
    if not content.startswith(b"\xff\xd8\xff"):  # a JPEG needs none of these checks
        with suppress(UnidentifiedImageError), Image.open(io.BytesIO(content)) as picture:
            if getattr(picture, "n_frames", 1) > 1:
                raise UserError(f"{file} has several frames or pages: export one frame of it")
            if picture.format in ("GIF", "TIFF") and picture.has_transparency_data:
                # OpenCV would multiply the alpha into the colours. Pillow turns a TIFF upright as it loads.
                return np.asarray(picture.convert("RGB"))
            picture.verify()  # finds broken PNGs before OpenCV's libpng complains of them on stderr
    image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def _fingerprint(files: list[str], root: Path) -> str:
    """A hash of every file's path below root, size and time of change."""
    digest = hashlib.sha256(f"format {CACHE_FORMAT}".encode())
    for file in files:
        status = os.stat(file)
        digest.update(ascii((file.removeprefix(str(root)), status.st_size, status.st_mtime_ns)).encode())
    return digest.hexdigest()


def _load_cache(cache: Path, fingerprint: str) -> Tensor | None:
    """Images decoded earlier from the same files, or None where there are none or the cache is damaged."""
    try:
        stored = torch.load(cache, weights_only=True)
        intact = stored["crc32"] == zlib.crc32(stored["images"].numpy())
        return stored["images"] if intact and stored["fingerprint"] == fingerprint else None
    except Exception:  # torch.load raises almost anything on a damaged file
        return None


def _save_cache(cache: Path, fingerprint: str, images: Tensor) -> None:
    unfinished = cache.with_name(f"{cache.name}.{os.getpid()}")
    stored = {"fingerprint": fingerprint, "crc32": zlib.crc32(images.numpy()), "images": images}
    try:
        with open(unfinished, "wb") as file:
            torch.save(stored, file)
        os.replace(unfinished, cache)
    except (OSError, RuntimeError):  # torch.save reports a full disk as RuntimeError
        print(f"cannot write {cache}: the next start will decode the images again", file=sys.stderr)
        with suppress(OSError):
            unfinished.unlink()
