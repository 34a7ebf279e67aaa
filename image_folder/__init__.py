"""A folder of images, decoded once on all cores and cached beside the files.

What was done to images (laid on white, turned, ignored) is counted and printed, one line for each kind; what cannot
be read rightly is refused.
"""

import hashlib
import os
import stat
import sys
import tempfile
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from image_folder import layout as layouts
from image_folder.file import NoImage, decode
from image_folder.layout import UNUSABLE_LIST, Layout
from utils import UserError, printable

END = 4096  # bytes
CACHE_FORMAT = 3  # raise it whenever the same files would decode to other pixels
SHOWN = 10  # unusable files that are printed; all of them are in a file
LOW_12_BITS = 4095


def read(root: Path, image_size: int | None) -> tuple[Tensor, Tensor, dict[str, slice], list[str]]:
    """Every image below ``root``, which holds train/<class>/* and test/<class>/*, or only <class>/*.

    Args:
        image_size: side in pixels to which images are resized; None keeps the size that all of them have.

    Returns:
        images uint8 (N, C, H, W), C = 1 if every image is grey, else 3 (RGB); labels int64 (N,); where the parts
        "train", "valid" and "test" lie, as far as they exist ({} for a folder of classes alone); class names.

    Raises:
        UserError: the folder or a file in it is missing, broken or unusable.
    """
    layout = _listed(layouts.find_classes, root)
    images, kept = _read_files(root, layout, image_size, "")
    parts = {}
    for part, files in layout.parts.items():
        parts[part] = slice(*np.searchsorted(kept, [files.start, files.stop]).tolist())
    labels = torch.tensor(layout.labels)[torch.from_numpy(kept)]
    for part, where in (parts or {"": slice(None)}).items():
        counts = torch.bincount(labels[where], minlength=len(layout.class_names))
        for label in (counts == 0).nonzero().flatten().tolist():
            place = layout.folders.get(part, root)
            raise UserError(f"class {layout.class_names[label]} has no images in {place}: add some")
    return images, labels, parts, layout.class_names


def read_unlabelled(root: Path, image_size: int | None, option: str = "") -> Tensor:
    """Every image below ``root``, however its folders are laid out: uint8 (N, C, H, W).

    ``option`` names ``root`` in errors. Other args, and errors, are those of ``read``.
    """
    return _read_files(root, _listed(partial(layouts.find_all, option=option), root), image_size, "all_")[0]


def read_test_part(root: Path, image_size: int | None) -> Tensor:
    """Every image of the test part below ``root``, or of all of it if it has no parts: uint8 (N, C, H, W).

    Labels are not needed: the images may lie in class folders or not. Args and errors are those of ``read``.
    """
    return read_unlabelled(_listed(layouts.find_test_part, root), image_size)


def _listed(find: Callable[[Path], Any], root: Path) -> Any:
    try:
        return find(root)
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from error


def _read_files(root: Path, layout: Layout, image_size: int | None, use: str) -> tuple[Tensor, np.ndarray]:
    """The images of a layout, and the indices of those files that are images, int64 (N,), ascending."""
    if image_size is not None:
        _check_sides(image_size, image_size, root)
    fingerprint = _fingerprint(layout.files, root)
    cache = root / f".jem_cache_{use}{image_size or 'native'}.pt"
    stored = None if layout.problems else _load_cache(cache, fingerprint)
    if stored is None:
        images, kept, notes = _decode_all(layout, root, image_size)
        _check_sides(*images.shape[2:], root)
        _save_cache(cache, fingerprint, images, kept, notes)
    else:
        images, kept, notes = stored
    for line in layout.notes + notes:
        print("data:", printable(line), flush=True)
    return images, np.array(kept)


def _check_sides(height: int, width: int, root: Path) -> None:
    if height % 4 or width % 4 or min(height, width) < 8:
        nearest = max(8, 4 * round(min(height, width) / 4))
        raise UserError(
            f"{root} gives images of {width}x{height} pixels, but the model needs multiples of 4, at least 8: "
            f"try --image_size {nearest}"
        )


def _decode_all(layout: Layout, root: Path, image_size: int | None) -> tuple[Tensor, list[int], list[str]]:
    """Decode files on all cores.

    Returns:
        images uint8 (N, C, H, W), C = 1 if every image is grey, else 3 (RGB); which of the files they are; lines
        for the user.
    """
    files, events = layout.files, []
    pixels, kept, grey, other_size = None, [], True, None
    broken, ignored = [UserError(problem) for problem in layout.problems], []
    results = closing(_decode_in_parallel(files, image_size, events))
    bar = tqdm(total=len(files), desc="decoding images", unit="file", leave=False, delay=1)
    with warnings.catch_warnings(action="ignore"), results as decoded, bar:
        for i, image in enumerate(decoded):
            bar.update()
            if isinstance(image, UserError):
                broken.append(image)
                continue
            if isinstance(image, NoImage):
                ignored.append(files[i])
                continue
            if pixels is None:
                first, (height, width, _) = files[i], image.shape
                pixels = _room_for(len(files), height, width, image_size)
            if image.shape != (height, width, 3):
                other_size = other_size or (files[i], image.shape)
                continue
            pixels[len(kept)] = image.transpose(2, 0, 1)
            kept.append(i)
            grey = grey and (image == image[..., :1]).all()
    if broken:
        raise _unusable(broken, len(files), root)
    if pixels is None:
        raise UserError(f"{root} holds no images: name a folder of images")
    if other_size:
        raise UserError(
            f"{first} has {width}x{height} pixels but {other_size[0]} {other_size[1][1]}x{other_size[1][0]}: "
            "give --image_size to bring all images to one size"
        )
    pixels = pixels[: len(kept), :1].copy() if grey else pixels[: len(kept)]
    return torch.from_numpy(pixels), kept, _notes(events, ignored, pixels, image_size)


def _room_for(n: int, height: int, width: int, image_size: int | None) -> np.ndarray:
    try:
        return np.empty((n, 3, height, width), np.uint8)
    except MemoryError:
        advice = "use fewer images or a smaller size" if image_size else "give --image_size"
        raise UserError(f"{n} images of {width}x{height} pixels do not fit into memory: {advice}") from None


def _decode_in_parallel(files: list[str], image_size: int | None, events: list) -> Iterator:
    pool = ThreadPool()
    try:
        # In chunks: a small image is decoded in less time than a thread pool needs to hand out one task.
        yield from pool.imap(partial(_decode_file, image_size=image_size, notes=events), files, chunksize=16)
    finally:
        pool.terminate()
        pool.join()  # a thread that still decodes while Python exits would abort the process


def _decode_file(file: str, image_size: int | None, notes: list | None = None) -> np.ndarray | UserError | NoImage:
    """The image in a file, uint8 RGB (H, W, 3), or what is wrong with it; see ``image_folder.file.decode``."""
    return decode(file, image_size, notes)


def _unusable(broken: list[UserError], n_files: int, root: Path) -> UserError:
    """Print the first unusable files and write all of them to a file; returns the error to raise."""
    if len(broken) == 1:
        return broken[0]
    lines = [printable(error) for error in broken]
    for line in lines[:SHOWN]:
        print(line, file=sys.stderr, flush=True)
    place = ""
    for folder in (root, Path(tempfile.gettempdir())):
        with suppress(OSError):
            listed = folder / UNUSABLE_LIST
            listed.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            place = f"; all are listed in {listed}"
            break
    return UserError(f"{len(broken)} of {n_files} files in {root} are unusable, the first: {broken[0]}{place}")


def _notes(events: list, ignored: list[str], pixels: np.ndarray, image_size: int | None) -> list[str]:
    """One line for each kind of thing that was done to the images or looks wrong with them."""
    n = len(pixels)
    counts = Counter(kind for kind, _ in events)
    deep = [highest for event, highest in events if event == "16 bit"]
    spread = pixels.reshape(n, pixels.shape[1], -1)
    highest, lowest = spread.max(2), spread.min(2)
    flat = int((highest == lowest).all(1).sum())
    top, bottom = int(highest.max()), int(lowest.min())
    example = Path(ignored[0]).name if ignored else ""
    size = f"{image_size}x{image_size}"
    lines = (
        (counts["transparent"], f"{counts['transparent']} of {n} images have transparency: composited on white"),
        (counts["turned"], f"{counts['turned']} of {n} images turned upright by their EXIF orientation"),
        (
            counts["squeezed"],
            f"{counts['squeezed']} of {n} images are not square: squeezed to {size}, the aspect ratio is not kept",
        ),
        (
            counts["profile"],
            f"{counts['profile']} of {n} images have a colour profile that is not called sRGB and is not applied: "
            "their colours are read as sRGB",
        ),
        (counts["CMYK"], f"{counts['CMYK']} of {n} images are CMYK: converted to RGB without a colour profile"),
        (len(ignored) == 1, f"1 file that is not an image was ignored ({example})"),
        (len(ignored) > 1, f"{len(ignored)} files that are not images were ignored (e.g. {example})"),
        (
            deep and max(deep) <= LOW_12_BITS,
            f"warning: the {len(deep)} images of 16 bits use values up to {max(deep, default=0)} of 65535 only (12 "
            "bits in 16?), so they come out dark: scale them to 16 bits",
        ),
        (
            flat >= 2 and flat > n / 10,
            f"warning: {flat} of {n} images are one flat colour each: is that what they should be?",
        ),
        (
            top < 64 or top - bottom < 32,
            f"warning: all pixels lie between {bottom} and {top} of 0 to 255: are the images scaled wrongly?",
        ),
    )
    return [line for holds, line in lines if holds]


def _fingerprint(files: list[str], root: Path) -> str:
    """A hash of every file's path below root, size and time of change; where these are equal, of its end, too.

    So files of one size and time that have changed places are noticed, and a copy of a folder keeps its cache.
    """
    digest = hashlib.sha256(f"format {CACHE_FORMAT}".encode())
    states = [_size_and_time(file) for file in files]
    how_many = Counter(states)
    for file, state in zip(files, states, strict=True):
        end = _end_of(file, state[0]) if state and how_many[state] > 1 else 0
        digest.update(ascii((file.removeprefix(str(root)), *state, end)).encode())
    return digest.hexdigest()


def _size_and_time(file: str) -> tuple[int, ...]:
    try:
        status = os.stat(file)
    except OSError:  # reported when the file is decoded
        return ()
    return (status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else ()


def _end_of(file: str, size: int) -> int:
    """A checksum of the last bytes, which differ even where files have the same beginning."""
    try:
        with open(file, "rb") as source:
            source.seek(max(0, size - END))
            return zlib.crc32(source.read(END))
    except OSError:
        return 0


def _checksum(images: Tensor, kept: list[int], notes: list[str]) -> int:
    return zlib.crc32(images.numpy(), zlib.crc32(ascii((kept, notes)).encode()))


def _load_cache(cache: Path, fingerprint: str) -> tuple[Tensor, list[int], list[str]] | None:
    """What was decoded earlier from the same files, or None where there is nothing or the cache is damaged."""
    try:
        stored = torch.load(cache, weights_only=True)
        content = stored["images"], stored["kept"].tolist(), stored["notes"]
        intact = stored["crc32"] == _checksum(*content)
        return content if intact and stored["fingerprint"] == fingerprint else None
    except Exception:  # torch.load raises almost anything on a damaged file
        return None


def _save_cache(cache: Path, fingerprint: str, images: Tensor, kept: list[int], notes: list[str]) -> None:
    unfinished = cache.with_name(f"{cache.name}.{os.getpid()}")
    stored = {
        "fingerprint": fingerprint,
        "crc32": _checksum(images, kept, notes),
        "images": images,
        "kept": torch.tensor(kept),
        "notes": notes,
    }
    try:
        with open(unfinished, "wb") as file:
            torch.save(stored, file)
        os.replace(unfinished, cache)
    except (OSError, RuntimeError):  # torch.save reports a full disk as RuntimeError
        message = f"cannot write {cache}: the next start will decode the images again"
        print(printable(message), file=sys.stderr)
    finally:  # after Ctrl-C, too
        with suppress(OSError):
            unfinished.unlink()
