"""A folder of images, decoded once on all cores and cached beside the files."""

import hashlib
import io
import os
import sys
import warnings
import zlib
from collections.abc import Iterator
from contextlib import closing, suppress
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from utils import UserError

CACHE_FORMAT = 1  # raise it whenever the same files would decode to other pixels


def read(root: Path, image_size: int | None) -> tuple[Tensor, Tensor, int | None, list[str]]:
    """Every image below ``root``, which holds train/<class>/* and test/<class>/*, or only <class>/*.

    Args:
        image_size: side in pixels to which images are resized; None keeps the size that all of them have.

    Returns:
        images uint8 (N, C, H, W), C = 1 if every image is grey, else 3 (RGB); labels int64 (N,); how many images,
        counted from the first, are for training, or None where there is no train/ and test/; class names.

    Raises:
        UserError: the folder or a file in it is missing, broken or unusable.
    """
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
    return images, torch.tensor(labels), n_train, class_names


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
        sorted(path.name for path in part.iterdir() if path.is_dir() and path.name[0] != ".") for part in parts
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
    if height % 4 or width % 4 or min(height, width) < 8:
        nearest = max(8, 4 * round(min(height, width) / 4))
        raise UserError(
            f"{root} gives images of {width}x{height} pixels, but the model needs multiples of 4, at least 8: "
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
