"""One image file to pixels: read rightly, or refused with its reason.

The same decisions hold for every format: transparency is laid on white, pictures are turned upright by their EXIF
orientation, grey levels are scaled by the format's own white level, and what has no defined white is refused.
"""

import io
import os
import re
import stat
import threading
import zlib
from collections.abc import Callable
from contextlib import contextmanager, nullcontext, suppress

import numpy as np
from PIL import Image

from image_folder import jpeg
from utils import UserError

FORMATS = ("PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "AVIF", "JPEG2000", "DIB", "ICO", "PCX", "SGI", "QOI", "TGA")
IMAGE_ENDINGS = set(
    ".png .apng .jpg .jpeg .jpe .jfif .webp .tif .tiff .bmp .dib .gif .pgm .ppm .pbm .pnm .pfm .pam .avif .jp2 .j2k "
    ".jpf .jpx .jxl .heic .heif .ico .pcx .sgi .rgb .qoi .tga .svg .psd .exr .hdr".split()
)
RAW_ENDINGS = set(".cr2 .cr3 .crw .nef .nrw .arw .srf .sr2 .dng .raf .orf .rw2 .pef .raw .3fr .iiq .x3f".split())
OTHER_ENDINGS = set(
    ".txt .csv .tsv .json .jsonl .xml .yaml .yml .toml .md .rst .html .htm .log .db .sqlite .ini .cfg .zip .gz .tgz "
    ".tar .bz2 .xz .7z .rar .pdf .doc .docx .xls .xlsx .py .ipynb .sh .mat .npy .npz .pkl .pt .pth .h5 .hdf5 .mp4 .avi "
    ".mov .mkv .webm .mp3 .wav .lnk .url .bak .tmp .part".split()
)
COPIES = {".bak", ".tmp", ".part"}  # of any file
UNSUPPORTED = {  # how files begin whose format is known and not read here
    "HEIC": re.compile(rb"....ftyp(hei|hev|mif1|msf1)", re.DOTALL),
    "JPEG XL": re.compile(rb"\xff\x0a|\x00\x00\x00\x0cJXL "),
    "SVG": re.compile(rb"\s*(<\?xml[^>]*>)?\s*(<!--.*?-->\s*)?(<!DOCTYPE svg[^>]*>\s*)?<svg\b", re.DOTALL),
    "float PFM": re.compile(rb"P[Ff]\s"),
    "PAM": re.compile(rb"P7\s"),
    "OpenEXR": re.compile(rb"v/1\x01"),
    "Radiance HDR": re.compile(rb"#\?(RADIANCE|RGBE)"),
    "Photoshop": re.compile(rb"8BPS"),
    "camera raw": re.compile(rb"(II\*\x00|MM\x00\*)....CR|FUJIFILMCCD-RAW|IIR[OS]|IIU\x00", re.DOTALL),
}
UNSUPPORTED_ERRORS = re.compile(r"unsupported|unknown|cannot handle|not supported", re.IGNORECASE)  # what Pillow says
WHITE_OF = {"L;2": 3, "L;4": 15}  # grey PNGs of 2 and 4 bits
UPRIGHT = {  # EXIF orientation: what turns the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
ORIENTATION = 0x0112  # EXIF and TIFF tags
PHOTOMETRIC, BITS_PER_SAMPLE, SAMPLE_FORMAT, DNG_VERSION = 262, 258, 339, 50706
TO_8_OR_16 = "convert it to 8 or 16 bit, unsigned"
BEGINNING = 4096  # bytes, which tell what a file is
SRGB = (b"sRGB", "sRGB".encode("utf-16-be"))  # what a colour profile that changes nothing calls itself


class NoImage(Exception):
    """A file that is no image and does not claim to be one."""


class Refused(Exception):
    """Why a file cannot be used, to be read after its name."""


def decode(file: str, image_size: int | None, notes: list | None = None) -> np.ndarray | UserError | NoImage:
    """The image in a file as uint8 RGB (H, W, 3); or, returned and not raised, what is wrong with the file.

    Args:
        image_size: side in pixels to which it is resized; None keeps its size.
        notes: takes what is to be announced: ("transparent", 1), ("turned", 1), ("squeezed", 1), ("profile", 1),
            ("CMYK", 1), and ("16 bit", highest value) for a picture whose white is 65535.
    """
    found = []
    try:
        ending = os.path.splitext(file)[1].lower()
        picture = _decode_content(_read(file, ending), ending, found)
        if image_size is not None:
            if picture.width != picture.height:
                found.append(("squeezed", 1))
            picture = _resize(picture, image_size)
        pixels = np.asarray(picture if picture.mode == "RGB" else picture.convert("RGB"))
    except NoImage as error:
        return error
    except Refused as error:
        return UserError(f"{file} {error}")
    except OSError as error:
        return UserError(f"cannot read {file}: {error.strerror or error}")
    except MemoryError:
        raise
    except Exception:  # image codecs raise almost anything on a broken file
        return UserError(f"{file} is damaged: replace or remove it")
    if notes is not None:
        notes += found  # in one step, as other threads append to it too
    return pixels


def _read(file: str, ending: str) -> bytes:
    """The content; of a file that is no image, however large it is, no more than the beginning is read."""
    kind = os.stat(file).st_mode
    if not stat.S_ISREG(kind):  # opening a pipe would wait for its other end
        names = {stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket", stat.S_IFDIR: "a folder"}
        raise Refused(f"is {names.get(stat.S_IFMT(kind), 'a device')}, not a file: remove it")
    with open(file, "rb") as source:
        beginning = source.read(BEGINNING)
        text = ending not in COPIES and _is_text(beginning)
        if ending in OTHER_ENDINGS and (text or not _is_known(beginning, ending)):
            raise NoImage
        return beginning + source.read()


def _is_known(beginning: bytes, ending: str) -> bool:
    unsupported = any(pattern.match(beginning) for pattern in UNSUPPORTED.values())
    return unsupported or beginning.startswith(jpeg.SIGNATURE) or _factory(beginning, ending) is not None


def _factory(content: bytes, ending: str) -> Callable | None:
    """Pillow's reader of the format in which the content begins."""
    Image.init()
    beginning = content[:16].ljust(16, b"\0")
    for name in FORMATS:
        factory, accept = Image.OPEN.get(name, (None, None))
        if factory and (accept(beginning) is True if accept else ending == ".tga"):
            return factory
    return None


def _decode_content(content: bytes, ending: str, found: list) -> Image.Image:
    """The picture, decoded: upright, on white, mode L or RGB (or one that converts to RGB without a loss)."""
    picture = None
    try:
        picture = _open(content, ending)
        if picture.width * picture.height > (Image.MAX_IMAGE_PIXELS or float("inf")):
            raise Refused(
                f"has {picture.width}x{picture.height} pixels, more than the limit of {Image.MAX_IMAGE_PIXELS:,} "
                "pixels: make it smaller"
            )
        if getattr(picture, "n_frames", 1) > 1:
            raise Refused("has several frames or pages: export one frame of it")
        orientation = _tiff_checks(picture) if picture.format == "TIFF" else None  # which Pillow turns as it loads
        rawmode = picture.tile[0][3] if picture.tile else None
        _load(picture, content)
    except (NoImage, Refused, MemoryError):
        raise
    except Exception as error:
        name = picture.format if picture else "image"
        if UNSUPPORTED_ERRORS.search(str(error)):
            raise Refused(f"is a kind of {name} that is not supported ({error}): convert it to PNG or JPEG") from None
        raise Refused("is damaged: replace or remove it") from None
    if orientation is None:
        orientation = _orientation(picture)
        if orientation in UPRIGHT:
            picture = picture.transpose(UPRIGHT[orientation])
    if orientation in UPRIGHT:
        found.append(("turned", 1))
    profile = picture.info.get("icc_profile") or b""
    if picture.mode == "CMYK":
        found.append(("CMYK", 1))
    elif profile and picture.mode in ("RGB", "RGBA", "P", "PA") and not any(name in profile for name in SRGB):
        found.append(("profile", 1))
    return _to_8_bits(picture, rawmode, found)


def _open(content: bytes, ending: str) -> Image.Image:
    """Recognise the format by the content, whatever the file's name; nothing is decoded yet."""
    if content.startswith(jpeg.SIGNATURE):
        return jpeg.open_jpeg(content)
    if ending in RAW_ENDINGS:
        raise Refused("is of an unsupported format (camera raw): convert it to PNG or JPEG")
    for name, beginning in UNSUPPORTED.items():
        if beginning.match(content):
            advice = "convert it to 8 or 16 bit" if "float" in name else "convert it to PNG or JPEG"
            raise Refused(f"is of an unsupported format ({name}): {advice}")
    if factory := _factory(content, ending):
        return factory(io.BytesIO(content), "")
    if ending in IMAGE_ENDINGS:
        raise Refused("is empty: replace or remove it" if not content else "is no image: replace or remove it")
    if _is_text(content):
        raise NoImage
    raise Refused("is of an unknown format: convert it to PNG or JPEG, or remove it")


def _is_text(content: bytes) -> bool:
    with suppress(UnicodeDecodeError):
        return "\0" not in content[:1024].decode(errors="strict" if len(content) <= 1024 else "ignore")
    return False


def _tiff_checks(picture: Image.Image) -> int:
    """Refuse the TIFFs that Pillow reads as something else; returns the orientation."""
    tags = picture.tag_v2
    if DNG_VERSION in tags:
        raise Refused("is of an unsupported format (camera raw): convert it to PNG or JPEG")
    formats = set(np.atleast_1d(tags.get(SAMPLE_FORMAT, 1)).tolist())
    if not formats <= {1, 4}:  # 1: unsigned, 4: not said
        kind = "signed" if formats & {2, 5} else "float"
        raise Refused(
            f"is a TIFF of {kind} numbers (mode {picture.mode}): which number is white is not known: {TO_8_OR_16}"
        )
    return tags.get(ORIENTATION, 1)


def _load(picture: Image.Image, content: bytes) -> None:
    if picture.format == "JPEG":
        try:
            jpeg.load(picture, content)
        except jpeg.Damaged:
            raise Refused("is damaged (a part of its data is missing or wrong): replace or remove it") from None
        return
    if picture.format == "PNG":
        _check_png(content)
    with _silent_stderr() if picture.format == "TIFF" else nullcontext():
        picture.load()


def _check_png(content: bytes) -> None:
    """Compare every chunk with its checksum, which Pillow does not do for the pixels."""
    position, view = 8, memoryview(content)
    while position < len(content):
        end = position + 8 + int.from_bytes(view[position : position + 4])
        if zlib.crc32(view[position + 4 : end]) != int.from_bytes(view[end : end + 4]):
            raise Refused("is damaged (a checksum is wrong): replace or remove it")
        if view[position + 4 : position + 8] == b"IEND":
            return
        position = end + 4
    raise Refused("is damaged (its end is missing): replace or remove it")


_stderr_lock, _stderr_users, _stderr_kept = threading.Lock(), 0, -1


@contextmanager
def _silent_stderr():
    """Keep libtiff from printing to the terminal about files that are refused anyway; for several threads at once."""
    global _stderr_users, _stderr_kept
    with _stderr_lock:
        if _stderr_users == 0:
            with suppress(OSError):  # there may be no standard error
                _stderr_kept = os.dup(2)
                with open(os.devnull, "wb") as nothing:
                    os.dup2(nothing.fileno(), 2)
        _stderr_users += 1
    try:
        yield
    finally:
        with _stderr_lock:
            _stderr_users -= 1
            if _stderr_users == 0 and _stderr_kept >= 0:
                os.dup2(_stderr_kept, 2)
                os.close(_stderr_kept)
                _stderr_kept = -1


def _orientation(picture: Image.Image) -> int:
    if picture.format == "JPEG" and not picture.info.keys() & {"exif", "xmp"}:  # most files; saves time
        return 1
    try:
        return picture.getexif().get(ORIENTATION, 1)
    except Exception:  # damaged EXIF data say nothing about the picture
        return 1


def _to_8_bits(picture: Image.Image, rawmode: object, found: list) -> Image.Image:
    mode = picture.mode
    if mode in ("L", "RGB") and "transparency" not in picture.info:
        return picture
    if mode.startswith("I;16") or (mode == "I" and picture.format == "PPM"):
        return _from_16_bits(picture, found)
    if mode in ("I", "F", "LAB", "HSV"):
        kind = {"I": "32-bit or signed", "F": "float"}.get(mode, mode)
        raise Refused(f"is a {picture.format} of {kind} numbers (mode {mode}), which is not supported: {TO_8_OR_16}")
    if not picture.has_transparency_data:
        return picture.convert("RGB")
    if mode == "L" and rawmode in WHITE_OF:  # Pillow scales the pixels to 255, but not the transparent level
        picture.info["transparency"] *= 255 // WHITE_OF[rawmode]
    if "transparency" in picture.info and rawmode == "RGB;16B":  # Pillow compares 8 bits with 16
        raise Refused("is a PNG of 16-bit colours with one transparent colour: convert it to 8 bit")
    premultiplied = {"RGBa": "RGBA", "La": "LA"}.get(mode, mode)
    picture = picture.convert(premultiplied).convert("RGBA")
    if picture.getextrema()[3][0] == 255:
        return picture.convert("RGB")
    found.append(("transparent", 1))
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def _from_16_bits(picture: Image.Image, found: list) -> Image.Image:
    values, white = np.asarray(picture).astype(np.uint32), 65535  # Pillow itself scales a PGM to 65535
    if picture.format == "TIFF":
        bits = picture.tag_v2.get(BITS_PER_SAMPLE, 16)
        white = 2 ** int(np.atleast_1d(bits)[0]) - 1
        if picture.tag_v2.get(PHOTOMETRIC) == 0:  # white is zero, which Pillow respects only up to 8 bits
            values = white - values
    if white == 65535 and picture.format != "PPM":
        found.append(("16 bit", int(values.max())))
    pixels = ((values * 255 + white // 2) // white).astype(np.uint8)
    if "transparency" in picture.info:
        unseen = values == picture.info["transparency"]
        if unseen.any():
            found.append(("transparent", 1))
            pixels[unseen] = 255
    return Image.fromarray(pixels)


def _resize(picture: Image.Image, size: int) -> Image.Image:
    """To ``size`` on both sides: area averages along a side that shrinks, bicubic along one that grows."""
    width, height = picture.size
    if picture.mode not in ("L", "RGB"):
        picture = picture.convert("RGB")
    if max(width, height) > size:
        pixels = np.asarray(picture)
        if height > size:
            pixels = _area_average(pixels, size)
        if width > size:
            pixels = _area_average(pixels.swapaxes(0, 1), size).swapaxes(0, 1)
        picture = Image.fromarray(np.ascontiguousarray(np.rint(pixels), np.uint8))
    return picture.resize((size, size), Image.Resampling.BICUBIC) if picture.size != (size, size) else picture


def _area_average(pixels: np.ndarray, size: int) -> np.ndarray:
    """Shrink the first axis to ``size``: the mean over each cell, border pixels by the share that lies in it.

    Pillow's box filter takes border pixels whole or not at all, which shows where a side shrinks by little.
    """
    edges = np.arange(size + 1) * len(pixels) / size
    first = np.minimum(edges.astype(int), len(pixels) - 1)
    share = (edges - first).reshape(-1, *[1] * (pixels.ndim - 1))[:-1]  # of the first pixel, in the cell before
    dtype = np.uint32 if pixels.dtype == np.uint8 else pixels.dtype
    sums = np.add.reduceat(pixels, first[:-1], axis=0, dtype=dtype).astype(np.float32)
    shared = share.astype(np.float32) * pixels[first[:-1]]
    sums -= shared
    sums[:-1] += shared[1:]
    return sums * (size / len(pixels))
