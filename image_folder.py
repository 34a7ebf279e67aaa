"""Folders of images: decoded once, on all cores, and cached; what cannot be read rightly is refused."""

import hashlib
import os
import re
import sys
import warnings
import zlib
from collections import Counter, defaultdict
from contextlib import suppress
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import simplejpeg
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2 import functional
from tqdm import tqdm

from utils import UserError, printable

CACHE_FORMAT = 6  # raise it whenever the same files would decode to other pixels
SYSTEM_FILES = {  # what systems put into folders by themselves, in lower case; hidden files are left out, too
    *("@eadir", "#recycle", "@recycle", "$recycle.bin", "recycler", "system volume information", "lost+found"),
    *("found.000", "__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini"),
}
RUN_DIRECTORY = re.compile(r"\d{8}-\d{6}_")  # as logger/run_dir.py begins its name; a file lock lies in it
PART_NAMES = {  # as they read in lower case, without "_", "-", "set", "data" and the like
    "train": "train|training|trn",
    "valid": "val|valid|validation|validate|dev|eval|evaluation",
    "test": "test|testing|tst",
}
EXPECTED = "expected are train/<class>/ and test/<class>/ (val/<class>/ too, if you like), or only <class>/"
FORMATS = ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "AVIF", "JPEG2000", "DIB", "ICO", "PCX", "SGI", "QOI"]
# Of many camera raw files, Pillow would take the small preview for the picture.
UNSUPPORTED = set(".heic .heif .jxl .svg .psd .exr .hdr .cr2 .cr3 .nef .nrw .arw .srf .dng .raf .orf .rw2 .pef".split())
NO_IMAGES = ("PDF", "MPEG", "HDF5", "GRIB", "BUFR", "IPTC")  # to Pillow they are
IMAGE_ENDINGS = {end for end, name in Image.registered_extensions().items() if name not in NO_IMAGES} | UNSUPPORTED
ORIENTATION, BITS_PER_SAMPLE, PHOTOMETRIC = 274, 258, 262  # EXIF and TIFF tags
Names = tuple[str, ...]  # of the folders on the way to a file, and of the file


def read(root: Path, image_size: int | None) -> tuple[Tensor, Tensor, dict, list[str]]:
    """Every image below ``root``, which holds test/<class>/* and perhaps train and val beside it, or only <class>/*.

    They are resized to ``image_size`` pixels a side; None keeps the size that all of them have. Returns images uint8
    (N, C, H, W), C = 1 if every image is grey, else 3 (RGB); labels int64 (N,); for each of the parts "train", "valid"
    and "test" that exist, or else for "all", the slice of the images; class names. UserError for what is unusable.
    """
    paths = _list(root, "--data_dir ")
    folders = _find_parts(root, paths) or {"all": ""}
    inside = _folders(paths) | {"": paths}
    first, *_ = folders.values()  # train, if there is one
    class_names = list(_folders(inside[first]))
    files, labels, ends = [], [], [0]
    for folder in folders.values():
        classes = _folders(inside[folder])
        if len(classes) < 2:
            advice = "sort pictures into class folders, or give a folder of them (--mode score needs no labels)"
            raise UserError(f"{root / folder} has {len(classes)} class folders, but labels need two or more: {advice}")
        if odd := sorted(set(classes) ^ set(class_names)):
            raise UserError(f"only one of {first}/ and {folder}/ in {root} has {some(odd)}: give both the same classes")
        if loose := _images(inside[folder]):
            note(f"left out: images that belong to no class: {len(loose)} directly in {root / folder}")
        for label, (name, in_class) in enumerate(classes.items()):
            files += [os.path.join(root, folder, name, *path) for path in in_class]
            labels += [label] * len(in_class)
        ends.append(len(files))
    images, kept = _read_files(root, files, image_size)
    labels, ends = torch.tensor(labels)[kept], np.searchsorted(kept, ends).tolist()
    slices = {part: slice(ends[i], ends[i + 1]) for i, part in enumerate(folders)}
    for part, folder in folders.items():
        if len(labels[slices[part]].unique()) < len(class_names):
            raise UserError(f"a class folder in {root / folder} holds no images: add some, or remove it")
    return images, labels, slices, class_names


def read_unlabelled(root: Path, image_size: int | None, option: str = "") -> Tensor:
    """Every image below ``root``, however laid out: uint8 (N, C, H, W); ``option`` names ``root`` in errors."""
    return _read_files(root, [os.path.join(root, *path) for path in _list(root, option)], image_size)[0]


def read_pictures(place: Path, shape: tuple[int, int, int]) -> tuple[list[str], Tensor]:
    """A picture, or all below a folder: names, and uint8 (N, C, H, W) squeezed to ``shape`` (C, H, W); not cached."""
    channels, height, width = shape
    if height != width:
        raise UserError(f"--images needs a network for square images, and this one's are {width}x{height}")
    root, paths = (place.parent, [(place.name,)]) if os.path.isfile(place) else (place, _list(place, "--images "))
    decoded = _decode_all(place, [os.path.join(root, *path) for path in paths], height)
    note(*decoded["notes"])
    return [os.path.join(*paths[i]) for i in decoded["kept"]], grey_or_rgb(decoded["images"], channels)


def grey_or_rgb(images: Tensor, channels: int) -> Tensor:
    """Images (N, C, H, W) with 1 or 3 channels: colours as their luma, grey as RGB."""
    return images if images.shape[1] == channels else functional.rgb_to_grayscale(images, channels)


def read_test_part(root: Path, image_size: int | None) -> Tensor:
    """The images of the test part below ``root``, or all if it has no parts, as ``read_unlabelled`` reads them."""
    paths, test = _list(root, ""), None
    with suppress(UserError):  # images that lie in another way than labels need are images all the same
        test = _find_parts(root, paths).get("test")
    files = [os.path.join(root, *path) for path in paths if test in (None, path[0])]
    return _read_files(root / (test or ""), files, image_size)[0]


def note(*lines: str) -> None:
    for line in lines:
        print("data:", printable(line), flush=True)


def _list(root: Path, option: str) -> list[Names]:
    """Every file below ``root``, sorted. Links are followed, but not in circles."""

    def fail(error: OSError) -> None:
        own = " (by default that of --resume or, outside training, --load_ckpt)" if "data_dir" in option else ""
        raise UserError(f"cannot read {option}{error.filename}: {error.strerror}{own}") from error

    paths, left_out = [], Counter()
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=fail):
        here = Path(folder)
        foreign = {name for name in subfolders + names if name.lower() in SYSTEM_FILES}
        runs = {name for name in subfolders if RUN_DIRECTORY.match(name) and os.path.exists(here / name / "lock")}
        left_out.update([*foreign, *["run"] * len(runs)])
        above = set(map(os.path.realpath, [here, *here.parents]))
        circles = [name for name in subfolders if os.path.realpath(here / name) in above]
        kept = {name for name in subfolders + names if name[0] != "."} - foreign - runs
        subfolders[:] = kept.intersection(subfolders).difference(circles)
        paths += [(*here.relative_to(root).parts, name) for name in kept.intersection(names)]
    if left_out:
        note("left out, made by systems or runs: " + ", ".join(f"{n} {name}" for name, n in sorted(left_out.items())))
    return sorted(paths)


def _folders(paths: list[Names]) -> dict[str, list[Names]]:
    """For each folder, the files in it, seen from there."""
    inside = {}
    for first, *rest in paths:
        if rest:
            inside.setdefault(first, []).append(tuple(rest))
    return inside


def _images(paths: list[Names]) -> list[str]:
    """The files that lie in no folder and have the name of an image."""
    return [path[0] for path in paths if len(path) == 1 and os.path.splitext(path[0])[1].lower() in IMAGE_ENDINGS]


def _find_parts(root: Path, paths: list[Names]) -> dict[str, str]:
    """The name of each part's folder, such as "Training_Set": train, valid, test; {} if the top folders are classes."""
    inside, parts = _folders(paths), {}
    for part, names in PART_NAMES.items():
        pattern = f"({names})(set|data|images|imgs|split|folder)?"
        if found := [name for name in inside if re.fullmatch(pattern, re.sub(r"[\W_]", "", name.lower()))]:
            parts[part] = found[0]
    chosen = list(parts.values())
    others = [name for name in inside if name not in chosen and (_folders(inside[name]) or _images(inside[name]))]
    if not any(_folders(inside[name]) for name in chosen) and any(_images(inside[name]) for name in others):
        return {}  # a class may be called train
    if "valid" in parts and "train" in parts and "test" not in parts:
        note(f"{root} has no test/: {parts['valid']}/ serves as the test part")
        parts["test"] = parts.pop("valid")
    subfolders = Counter(tuple(_folders(files)) for files in inside.values())
    alike = [name for name, files in inside.items() if len(_folders(files)) > 1 < subfolders[tuple(_folders(files))]]
    if alike and (others or not parts) and not parts.keys() >= {"train", "test"}:
        raise UserError(f"{some(alike)} in {root} look like parts of a data set, not classes: rename them; {EXPECTED}")
    if parts and "test" not in parts:
        raise UserError(f"{root} has {'/ and '.join(chosen)}/ but no test/: add it; {EXPECTED}")
    if parts and others:
        note(f"left out: {some(others)}, because {root} has the folders {some(chosen)}")
    return parts


def some(names: list[str], n: int = 5) -> str:
    """The first ``n`` names, and how many more there are."""
    return ", ".join(names[:n]) + (f" and {len(names) - n} more" if len(names) > n else "")


class Decoded(NamedTuple):
    """What became of a file. With neither pixels nor a problem, it is no image and does not claim to be one."""

    pixels: np.ndarray | None = None  # uint8 RGB (H, W, 3)
    done: tuple[str, ...] = ()  # to the image, in words
    problem: str = ""


def decode_file(file: str, image_size: int | None, behind: str = "white") -> Decoded:
    """A picture, with transparency on the colour ``behind``."""
    try:
        return _decode_file(file, image_size, behind)
    except UserError as error:
        problem = str(error)
    except Image.UnidentifiedImageError:
        problem = "is no picture, damaged or of an unsupported format (HEIC?): replace or remove it"
    except Exception as error:  # image codecs raise almost anything on a broken file
        problem = f"cannot be read: {getattr(error, 'strerror', None) or str(error) or type(error).__name__}"
    return Decoded(problem=f"{file} {problem}")


def _decode_file(file: str, image_size: int | None, behind: str) -> Decoded:
    done, ending = (), os.path.splitext(file)[1].lower()
    if ending in UNSUPPORTED:
        raise UserError(f"is of an unsupported format ({ending[1:]}): convert it to PNG or JPEG")
    if os.path.exists(file) and not (os.path.isfile(file) or os.path.isdir(file)):  # opening a pipe would wait
        raise UserError("is a pipe, a socket or a device: remove it")
    with open(file, "rb") as source:
        try:
            image = Image.open(source, formats=FORMATS)
        except Exception:
            if ending in IMAGE_ENDINGS:
                raise
            return Decoded()
        if image.format != "MPO" and getattr(image, "n_frames", 1) > 1:  # an MPO's other pictures are previews
            raise UserError("has several frames or pages: export one frame of it")
        if "transparency" in image.info and image.tile[0][3] in ("L;2", "L;4", "I;16B", "RGB;16B"):
            raise UserError("has one transparent colour but not 8 bits, which Pillow mixes up: convert it to 8 bits")
        turned, pixel_data = image.getexif().get(ORIENTATION, 1) in range(2, 9), source.tell()
        image.load()
        if image.format in ("JPEG", "MPO"):
            source.seek(0)
            done += _jpeg_damage(source.read(), pixel_data, image.mode)
    if turned:
        done += ("were turned upright by their EXIF orientation",)
        if image.format != "TIFF":  # which Pillow has turned as it was loaded
            image = ImageOps.exif_transpose(image)
    image = to_8_bits(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getextrema()[3][0] < 255:
            done += (f"have transparency: composited on {behind}",)
        image = Image.alpha_composite(Image.new("RGBA", image.size, behind), image)
    image = image.convert("RGB")
    if image_size is not None:
        if image.width != image.height:
            done += (f"are not square: squeezed to {image_size}x{image_size}, the aspect ratio is not kept",)
        image = image.resize((image_size, image_size), Image.Resampling.BILINEAR)
    return Decoded(np.asarray(image), done)


def _jpeg_damage(encoded: bytes, pixel_data: int, mode: str) -> tuple[str, ...]:
    """Whether libjpeg has a warning, which Pillow keeps to itself; ``pixel_data``: where the header may end."""
    if b"\xff\xd9" not in encoded[pixel_data:]:  # libjpeg would take zeros for pixels
        raise UserError("is damaged (its end is missing): replace or remove it")
    encoded = re.sub(rb"JFIF\0..", b"JFIF\0\1\1", encoded, count=1, flags=re.DOTALL)  # a wrong version hides the rest
    try:
        simplejpeg.decode_jpeg(encoded, {"L": "GRAY", "CMYK": "CMYK"}.get(mode, "RGB"), strict=True)
    except ValueError:
        return ("are JPEGs that do not decode cleanly: look at them, pixels may be guesses",)
    return ()


def to_8_bits(image: Image.Image) -> Image.Image:
    """The image with 16 bits scaled to 8 by the format's own white level; others as they are."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        tags = image.tag_v2 if image.format == "TIFF" else {}
        white = 2 ** int(np.atleast_1d(tags.get(BITS_PER_SAMPLE, 16))[0]) - 1  # Pillow itself scales a PGM to 65535
        levels = (np.asarray(image).astype(np.uint32) * 255 + white // 2) // white
        if tags.get(PHOTOMETRIC) == 0:  # white is zero, which Pillow respects only up to 8 bits
            levels = 255 - levels
        return Image.fromarray(levels.astype(np.uint8))
    if image.mode in ("I", "F"):
        raise UserError(f"has signed, float or 32-bit numbers (mode {image.mode}): convert it to 8 or 16 bit, unsigned")
    return image


def _read_files(root: Path, files: list[str], image_size: int | None) -> tuple[Tensor, list[int]]:
    """The images, uint8 (N, C, H, W), decoded or from the cache; and which of the files they are, ascending."""
    digest = hashlib.sha256(f"format {CACHE_FORMAT}".encode())
    for file in files:
        with suppress(OSError):  # reported when the file is decoded
            status = os.stat(file)
            digest.update(ascii((file.removeprefix(str(root)), status.st_size, status.st_mtime_ns)).encode())
    cache, fingerprint = root / f".jem_cache_{image_size or 'native'}.pt", digest.hexdigest()
    try:
        content = torch.load(cache, weights_only=True)
        fresh = content["fingerprint"] == fingerprint and content["crc32"] == zlib.crc32(content["images"].numpy())
    except Exception:  # torch.load raises almost anything on a missing or unfinished file
        fresh = False
    if not fresh:
        content = _decode_all(root, files, image_size)
        content |= {"fingerprint": fingerprint, "crc32": zlib.crc32(content["images"].numpy())}
        try:
            torch.save(content, cache)
        except (OSError, RuntimeError):  # torch.save reports a full disk as RuntimeError
            with suppress(OSError):
                cache.unlink()  # a torn one would only take room
            print(printable(f"cannot write {cache}: the next start will decode the images again"), file=sys.stderr)
    note(*content["notes"])
    return content["images"], content["kept"]


def _decode_all(root: Path, files: list[str], image_size: int | None) -> dict[str, Any]:
    """Decode files on all cores: "images", uint8 (N, C, H, W), "kept", which of the files they are, "notes", lines."""
    pixels, kept, problems, ignored, done = None, [], [], [], defaultdict(list)
    pool = ThreadPool()
    try:
        # In chunks: a small image is decoded in less time than a thread pool needs to hand out one task.
        results = pool.imap(partial(decode_file, image_size=image_size), files, chunksize=16)
        results = tqdm(results, "decoding images", len(files), leave=False, delay=1, unit="file")
        with warnings.catch_warnings(action="ignore"):
            for i, result in enumerate(results):
                if result.problem:
                    problems.append(printable(result.problem))
                elif result.pixels is None:
                    ignored.append(os.path.basename(files[i]))
                else:
                    image = result.pixels.transpose(2, 0, 1)
                    if pixels is None:
                        pixels = _room_for(root, len(files), *image.shape[1:])
                    if pixels.shape[1:] != image.shape:
                        raise UserError(f"{files[kept[0]]} and {files[i]} differ in size: give --image_size")
                    pixels[len(kept)] = image
                    kept.append(i)
                    for text in result.done + (("are of one brightness",) if image.min() == image.max() else ()):
                        done[text].append(files[i].removeprefix(f"{root}{os.sep}"))
    finally:
        pool.terminate()
        pool.join()  # a thread that still decodes while Python exits would abort the process
    if problems[1:]:
        print(*problems[: 20 if sys.stderr.isatty() else None], sep="\n", file=sys.stderr, flush=True)  # in a file, all
        problems = [f"{len(problems)} of {len(files)} files in {root} are unusable, the first: {problems[0]}"]
    if problems:
        raise UserError(problems[0])
    if pixels is None:
        raise UserError(f"{root} is no image" if root.is_file() else f"{root} holds no images: name a folder of images")
    pixels = pixels[: len(kept)]
    if (pixels == pixels[:, :1]).all():
        pixels = pixels[:, :1].copy()  # grey
    notes = [f"{len(of)} of {len(kept)} images {text} ({some(of, 3)})" for text, of in sorted(done.items())]
    if ignored:
        notes.append(f"left out: files that are no images: {len(ignored)} (e.g. {ignored[0]})")
    darkest, brightest = int(pixels.min()), int(pixels.max())
    if brightest - darkest < 96:
        notes.append(f"warning: all pixels are from {darkest} to {brightest} of 255: are the images scaled wrongly?")
    return {"images": torch.from_numpy(pixels), "kept": kept, "notes": notes}


def _room_for(root: Path, n: int, height: int, width: int) -> np.ndarray:
    """uint8 (n, 3, height, width). Raises UserError if the images have no size for the network, or no room."""
    if height % 4 or width % 4 or min(height, width) < 8:
        advice = f"try --image_size {min(2048, max(8, 4 * round(min(height, width) / 4)))}"
        raise UserError(f"{root} has images of {width}x{height} pixels, not multiples of 4, at least 8: {advice}")
    needed = 2 * n * 3 * height * width / 1e9  # GB, while they are read
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    if needed > memory:
        advice = "use fewer, or a smaller --image_size"
        raise UserError(f"{n} images of {width}x{height} need {needed:.1f} GB of memory of {memory:.1f}: {advice}")
    return np.empty((n, 3, height, width), np.uint8)
