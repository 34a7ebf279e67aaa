import io
import os
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_data import random_images, refuses, rows, write_pngs

import data
import image_folder
from utils import UserError

TILE = np.stack(np.meshgrid(np.arange(12) * 20, np.arange(8) * 30), -1)  # (8, 12, 2), no symmetry
RGB = np.concatenate([TILE, TILE.sum(-1, keepdims=True) // 2], -1).astype(np.uint8)  # (8, 12, 3)
GREY = RGB[..., 0] // 2 + RGB[..., 1] // 2
ALPHA = RGB[..., :1]
PARTS = ("train/a", "train/b", "test/a", "test/b")


@pytest.fixture
def decoded(monkeypatch):
    """The files that were decoded since the start of the test."""
    files, decode = [], image_folder.decode_file
    monkeypatch.setattr(image_folder, "decode_file", lambda file, **size: files.append(file) or decode(file, **size))
    return files


def encode(pixels, kind="PNG", **options):
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png(pixels, depth, kind, *chunks):
    """A PNG with raw rows of bytes, for what Pillow does not write."""
    height, row = pixels.shape
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[kind]
    header = struct.pack(">IIBBBBB", row * 8 // depth // channels, height, depth, kind, 0, 0, 0)
    rows = b"".join(b"\0" + line.tobytes() for line in pixels)
    parts = (b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")
    packed = (struct.pack(f">I4s{len(x)}sI", len(x), name, x, zlib.crc32(name + x)) for name, x in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def tiff(pixels, bits=8, photometric=1, sample_format=1, compression=1, width=None):
    """An uncompressed TIFF of grey or RGB numbers, whatever they are."""
    height, row, *channels = pixels.shape
    content, samples = pixels.tobytes(), channels[0] if channels else 1
    tags = {256: width or row, 257: height, 258: bits, 259: compression, 262: photometric, 273: 150, 277: samples}
    tags |= {278: height, 279: len(content), 339: sample_format}
    if samples == 3:
        tags |= {258: (bits,) * 3, 339: (sample_format,) * 3}
    after, directory = b"", b""
    for tag, value in sorted(tags.items()):
        if isinstance(value, tuple):
            directory += struct.pack("<HHII", tag, 3, 3, 150 + len(content) + len(after))
            after += struct.pack("<3H", *value)
        else:
            directory += struct.pack("<HHII", tag, 4, 1, value)
    return (b"II*\0" + struct.pack("<IH", 8, len(tags)) + directory).ljust(150, b"\0") + content + after


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


def on_white(pixels, alpha):
    """What is seen of pixels (H, W, C) with alpha (H, W, 1) before a white wall."""
    return np.rint((pixels * alpha.astype(float) + 255 * (255.0 - alpha)) / 255).astype(np.uint8)


PALETTE = Image.fromarray(RGB).quantize(16)
PALETTE_WHITE = np.where(np.array(PALETTE)[..., None] == 3, np.uint8(255), np.array(PALETTE.convert("RGB")))
RGBA = np.concatenate([RGB, ALPHA], -1)
WIDE = RGB.astype(np.uint16) * 257  # the same levels in 16 bits
WIDE_ROWS = WIDE.astype(">u2").reshape(8, -1).view(np.uint8)
SEEN = on_white(RGB, ALPHA)
KEYED = np.where((RGB == RGB[2, 3]).all(-1, keepdims=True), np.uint8(255), RGB)
CHESS = ((np.indices((8, 12)).sum(0) % 2) * 255).astype(np.uint8)
KINDS = {  # file content, and the pixels that a person would see in it on white paper
    "png": (encode(RGB), RGB),
    "png alpha": (encode(RGBA), SEEN),
    "png palette transparent": (encode(PALETTE, transparency=3), PALETTE_WHITE),
    "png 16 bit": (png(WIDE_ROWS, 16, 2), RGB),
    "png grey alpha": (encode(np.stack([GREY, ALPHA[..., 0]], -1)), on_white(GREY[..., None], ALPHA)[..., 0]),
    "png 1 bit": (encode(Image.fromarray(CHESS).convert("1")), CHESS),
    "tiff 16 bit": (tiff(WIDE, 16, 2), RGB),
    "tiff cmyk": (encode(Image.fromarray(RGB).convert("CMYK"), "TIFF"), RGB),
    "webp alpha": (encode(RGBA, "WEBP", lossless=True, exact=True), SEEN),
    "gif transparent": (encode(PALETTE, "GIF", transparency=3), PALETTE_WHITE),
    "png 1 bit transparent": (png(np.uint8([[0b10100101]] * 8), 1, 0, (b"tRNS", b"\0\0")), CHESS[:, :8] | 255),
    "png rgb transparent": (png(RGB.reshape(8, -1), 8, 2, (b"tRNS", struct.pack(">3H", *RGB[2, 3]))), KEYED),
    "tiff white is zero, 16 bit": (tiff(65535 - GREY.astype(np.uint16) * 257, 16, 0), GREY),
    "tiff 12 bit": (tiff(np.uint8([[0x00, 0x0F, 0xFF] * 4] * 8), 12, width=8), np.uint8([[0, 255] * 4] * 8)),
    "pgm of 4096 levels": (b"P5 12 8 4095\n" + (GREY.astype(int) * 4095 // 255).astype(">u2").tobytes(), GREY),
}


@pytest.mark.parametrize("kind", KINDS)
def test_folder_reads_each_kind_of_lossless_file(kind, tmp_path):
    content, pixels = KINDS[kind]
    loaded = load_folder(write_files(tmp_path, four(content)))
    expected = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    for part in (loaded.train, loaded.test):
        assert part.images.shape == (2, *expected.shape)
        assert abs(part.images.numpy().astype(int) - expected).max() <= ("alpha" in kind)  # blending rounds
    assert loaded.shape == expected.shape


def test_folder_with_both_parts(tmp_path):
    train, test = ("train/b/1", "train/a/9", "train/b/0"), ("test/a/x", "test/b/y")
    images = {name: random_images(8, 8, 3) for name in (*train, *test)}
    loaded = load_folder(write_files(tmp_path, {f"{name}.jpg": encode(image) for name, image in images.items()}))
    assert loaded.class_names == ("a", "b") and loaded.flip
    for part, names in ((loaded.train, train), (loaded.test, test)):
        expected = [("ab".index(name.split("/")[1]), images[name].transpose(2, 0, 1).tobytes()) for name in names]
        assert rows(part) == sorted(expected)


def test_folder_of_classes_alone_is_split_by_class(tmp_path):
    images = {f"{c}/{i}.png": random_images(8, 8) for c, n in (("a", 50), ("b", 20), ("c", 10)) for i in range(n)}
    loaded = load_folder(write_files(tmp_path, {name: encode(pixels) for name, pixels in images.items()}))
    assert loaded.test.labels.bincount().tolist() == [10, 4, 2]
    assert loaded.train.labels.bincount().tolist() == [40, 16, 8]
    expected = [("abc".index(name[0]), pixels.tobytes()) for name, pixels in images.items()]
    assert rows(loaded.train, loaded.test) == sorted(expected)
    assert torch.equal(load_folder(tmp_path).test.images, loaded.test.images)


def test_what_systems_put_there_is_left_out_with_a_line(tmp_path, capsys):
    png = encode(RGB)
    litter = {f"train/{c}/@eaDir/image.png/SYNOPHOTO_THUMB_{size}.jpg": png for c in ("cat", "dog") for size in "SM"}
    litter |= dict.fromkeys(("$RECYCLE.BIN/S-1-5/x.png", "System Volume Information/x", "__MACOSX/y/._x.png"), png)
    litter |= dict.fromkeys(("lost+found/x", "train/cat/Thumbs.db", "test/dog/desktop.ini", "readme.txt"), b"litter")
    runs = ("train/20261130-010203_sample_a", "runs/20261130-010203_test")
    litter |= {f"{run}/{file}": png for run in runs for file in ("lock", "a.png")}
    litter |= dict.fromkeys((".DS_Store", "train/cat/.ipynb_checkpoints/x.png", "train/.thumbnails/a.png"), png)
    loaded = load_folder(write_files(tmp_path, four(png) | {"test/cat/20261130-010203_test.png": png} | litter))
    assert loaded.train.labels.bincount().tolist() == [1, 1] and loaded.test.labels.bincount().tolist() == [2, 1]
    assert capsys.readouterr().out.splitlines()[0] == (
        "data: left out, made by systems or runs: 1 $RECYCLE.BIN, 2 @eaDir, 1 System Volume Information, 1 Thumbs.db, "
        "1 __MACOSX, 1 desktop.ini, 1 lost+found, 2 run"
    )


def test_different_sizes_need_image_size_which_brings_all_images_to_one_size(tmp_path):
    flat, large, square = np.full((9, 5, 3), 77, np.uint8), random_images(32, 48, 3), random_images(8, 8, 3)
    files = four(encode(flat)) | {"test/dog/large.png": encode(large), "test/dog/thin.png": encode(large[:, :4])}
    write_files(tmp_path / "square", four(encode(square)))
    write_files(tmp_path / "two", four(encode(square)) | {"test/cat/other.png": encode(square[:4])})
    message = refuses("--image_size", "folder", tmp_path / "two")
    assert f"{tmp_path / 'two/train/cat/image.png'} and {tmp_path / 'two/test/cat/other.png'} differ in size" in message
    loaded = load_folder(write_files(tmp_path / "set", files), image_size=8)
    assert loaded.shape == (3, 8, 8) and (loaded.train.images == 77).all()
    assert np.array_equal(load_folder(tmp_path / "square", image_size=8).train.images[0], square.transpose(2, 0, 1))
    for image, source in ((loaded.test.images[2], large), (loaded.test.images[3], large[:, :4])):
        source = torch.from_numpy(source).permute(2, 0, 1)[None].float()
        expected = torch.nn.functional.interpolate(source, (8, 8), mode="bilinear", antialias=True)[0]
        assert abs(image - expected).max() <= 1.5


def check_cache(root, decoded, n_decoded, reference, **options):
    """The next load decodes so many files and gives the same pixels."""
    decoded.clear()
    loaded = load_folder(root, **options)
    assert len(decoded) == n_decoded and torch.equal(loaded.train.images, reference.train.images)
    assert torch.equal(loaded.test.images, reference.test.images)
    assert torch.equal(loaded.train.labels, reference.train.labels)


def test_cache_saves_decoding_and_is_noticed_when_it_is_stale(tmp_path, decoded):
    reference = load_folder(write_pngs(tmp_path, *PARTS, n=3))
    assert len(decoded) == 12
    check_cache(tmp_path, decoded, 0, reference)
    assert [path.name for path in tmp_path.glob(".*")] == [".jem_cache_native.pt"]
    small = load_folder(tmp_path, image_size=8)
    assert len(decoded) == 12 and small.shape == (3, 8, 8)
    check_cache(tmp_path, decoded, 0, small, image_size=8)
    check_cache(tmp_path, decoded, 0, reference)
    root = tmp_path.rename(tmp_path.with_name("moved"))
    check_cache(root, decoded, 0, reference)
    file = root / "train/a/0.png"
    os.utime(file, ns=(0, 1))
    check_cache(root, decoded, 12, reference)
    check_cache(root, decoded, 0, reference)
    file.write_bytes(encode(random_images(8, 8, 3)))
    changed = load_folder(root)
    assert len(decoded) == 12 and not torch.equal(changed.train.images, reference.train.images)
    decoded.clear()
    file.rename(root / "train/a/9.png")
    assert rows(load_folder(root).train) == rows(changed.train) and len(decoded) == 12
    (root / "train/b/0.png").unlink()
    assert len(load_folder(root).train) == 5


def test_damaged_cache_is_rebuilt(tmp_path, decoded):
    reference = load_folder(write_pngs(tmp_path / "images", *PARTS, n=20))
    cache, other = tmp_path / "images" / ".jem_cache_native.pt", io.BytesIO()
    content = cache.read_bytes()
    torch.save([1, 2, 3], other)
    with zipfile.ZipFile(cache) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    i = largest.header_offset + len(content[largest.header_offset :]) // 2  # in the middle of the pixels
    flipped = content[:i] + bytes([content[i] ^ 1]) + content[i + 1 :]  # which the zip format of torch.save lets pass
    for damaged in (content[:-100], flipped, other.getvalue()):
        cache.write_bytes(damaged)
        check_cache(tmp_path / "images", decoded, 80, reference)
        check_cache(tmp_path / "images", decoded, 0, reference)


def test_folder_that_takes_no_cache(tmp_path, decoded, capfd, monkeypatch):
    write_files(write_pngs(tmp_path, *PARTS, n=3), {".jem_cache_native.pt/in/the/way": b""})
    reference = load_folder(tmp_path)
    stderr = capfd.readouterr().err
    assert f"cannot write {tmp_path / '.jem_cache_native.pt'}" in stderr and stderr.count("\n") == 1
    check_cache(tmp_path, decoded, 12, reference)
    assert [path.name for path in tmp_path.glob(".*")] == [".jem_cache_native.pt"]

    def full(content, path):  # what a full disk leaves is removed
        path.touch()
        raise OSError("no space")

    monkeypatch.setattr(image_folder.torch, "save", full)
    load_folder(write_files(tmp_path / "other", four(encode(RGB))))
    assert not list((tmp_path / "other").glob(".*")) and "the next start will decode" in capfd.readouterr().err


NOISE = random_images(64, 64, 3)
NOISY_JPEG = encode(NOISE, "JPEG")
VERSION_0 = NOISY_JPEG.replace(b"JFIF\0\1\1", b"JFIF\0\0\0")
DEFLATED = encode(NOISE, "TIFF", compression="tiff_deflate")
UNUSABLE = {  # content, and what is said about it
    "zero bytes": (b"", "is no picture, damaged or"),
    "heic": (b"\0\0\0\x18ftypheic" + bytes(100), "of an unsupported format (HEIC?)"),
    "cut jpeg": (NOISY_JPEG[:-900], "cannot be read: "),
    "jpeg with zeros up to its end": (VERSION_0[:-900] + bytes(900), "is damaged (its end is missing)"),
    "progressive jpeg with zeros": (encode(NOISE, "JPEG", progressive=True)[:-900] + bytes(900), "cannot be read: "),
    "damaged png": (encode(RGB)[:60] + b"12345" + encode(RGB)[65:], "cannot be read: "),
    "zeroed tiff": (DEFLATED[:2000].ljust(12000, b"\0") + DEFLATED[12000:], "cannot be read: "),
    "pfm": (b"Pf\n2 1\n-1.0\n" + bytes(8), "numbers (mode F)"),
    "signed tiff": (tiff(GREY.astype(np.int16), 16, 1, 2), "numbers (mode I)"),
    "half float tiff": (tiff(GREY.astype(np.float16), 16, 1, 3), "of an unsupported format"),
    "png of 16 bits, one transparent": (png(WIDE_ROWS, 16, 2, (b"tRNS", bytes(6))), "has one transparent colour but"),
    "png of 4 bits, one transparent": (png(GREY[:, :6], 4, 0, (b"tRNS", b"\0\5")), "has one transparent colour but"),
    "several frames": (encode(RGB, "GIF", save_all=True, append_images=[Image.fromarray(NOISE)]), "export one frame"),
}


def test_unusable_files_are_listed_with_their_reasons(tmp_path, capfd):
    files = {tmp_path / "train/dog" / f"{i:02}.png": UNUSABLE[kind] for i, kind in enumerate(UNUSABLE)}
    write_files(tmp_path, four(encode(RGB)) | {file: content for file, (content, _) in files.items()})
    refuses(f"{len(files)} of {len(files) + 4} files in {tmp_path} are unusable", "folder", tmp_path)
    listed = capfd.readouterr().err.splitlines()[-len(files) :]
    for line, (file, (_, reason)) in zip(listed, files.items(), strict=True):
        assert line.startswith(f"{file} ") and reason in line
    for file in list(files)[1:]:
        file.unlink()
    assert "is no picture, damaged or" in refuses(f"{tmp_path / 'train/dog/00.png'} ", "folder", tmp_path)


@pytest.mark.parametrize("shape, advice", [((8, 10), 8), ((31, 33), 32), ((6, 12), 8), ((4, 4), 8), ((1, 1), 8)])
def test_sides_must_be_multiples_of_four(shape, advice, tmp_path):
    write_files(tmp_path, four(encode(random_images(*shape))))
    assert f"{shape[1]}x{shape[0]}" in refuses(f"try --image_size {advice}", "folder", tmp_path)
    assert load_folder(tmp_path, image_size=advice).shape == (1, advice, advice)


def test_data_dir_that_is_not_there(tmp_path):
    refuses(f"cannot read --data_dir {tmp_path / 'nowhere'}: No such file", "folder", tmp_path / "nowhere")
    with pytest.raises(UserError, match=f"^cannot read {tmp_path / 'nowhere'}: No such file"):
        image_folder.read_unlabelled(tmp_path / "nowhere", None)
    (tmp_path / "file").write_text("not a folder")
    refuses(f"cannot read --data_dir {tmp_path / 'file'}: Not a directory", "folder", tmp_path / "file")


def decode(tmp_path, content, name="x.png"):
    return image_folder.decode_file(str(write_files(tmp_path, {name: content}) / name), None)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_format_is_turned_upright(kind, orientation, tmp_path):
    """The pixel at the top left of the picture as it should be seen is the one that the EXIF standard says."""
    stored = np.kron(np.uint8([[0, 255], [90, 180], [30, 220]]), np.ones((16, 16), np.uint8))
    seen = [stored, stored[:, ::-1], stored[::-1, ::-1], stored[::-1]]
    seen += [stored.T, stored[::-1].T, stored[::-1, ::-1].T, stored[:, ::-1].T]
    seen = seen[orientation - 1]
    content = encode(np.stack([stored] * 3, -1), kind, exif=upright(orientation), quality=95)
    found = decode(tmp_path, content, "x.bin")
    assert found.pixels.shape == (*seen.shape, 3)
    assert abs(found.pixels[8::16, 8::16, 0].astype(int) - seen[8::16, 8::16]).max() < 10
    assert found.done == (("were turned upright by their EXIF orientation",) if orientation > 1 else ())


BEST = {"quality": 100, "subsampling": 0}
LOSSY = {
    "avif": (encode(RGBA, "AVIF", quality=100, subsampling="4:4:4"), SEEN),
    "webp": (encode(np.kron(RGB, np.ones((8, 8, 1), np.uint8)), "WEBP", quality=100), None),
    "jpeg 2000": (encode(RGB, "JPEG2000"), RGB),
    "jpeg 2000 grey 16 bit": (encode(GREY.astype(np.uint16) * 257, "JPEG2000"), np.stack([GREY] * 3, -1)),
    "jpeg cmyk": (encode(Image.fromarray(RGB).convert("CMYK"), "JPEG", **BEST), RGB),
    "jpeg with a picture in its header": (encode(RGB, "JPEG", **BEST, exif=b"Exif\0\0" + NOISY_JPEG), RGB),
    "jpeg with one byte too many": (encode(RGB, "JPEG", **BEST)[:-2] + b"1\xff\xd9", RGB),
    "jpeg with something after its end": (encode(RGB, "JPEG", **BEST) + b"more", RGB),
}


@pytest.mark.parametrize("kind", LOSSY)
def test_formats_that_lose_a_little(kind, tmp_path):
    content, expected = LOSSY[kind]
    pixels = decode(tmp_path, content).pixels
    if expected is None:
        pixels, expected = pixels[4::8, 4::8], RGB
    assert pixels.shape == (8, 12, 3) and abs(pixels.astype(int) - expected).max() <= 12


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 2}])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_damage_inside_a_jpeg_is_announced_where_its_decoder_notices(mode, options, tmp_path):
    whole = encode(Image.fromarray(NOISE).convert(mode), "JPEG", **options)
    damaged = [decode(tmp_path, whole[:-i] + b"other" + whole[5 - i :]) for i in range(100, 1000, 50)]
    assert sum(bool(found.done) for found in damaged) >= 3 and decode(tmp_path, whole).done == ()
    assert decode(tmp_path, VERSION_0[:-900] + bytes(898) + b"\xff\xd9").done  # which is a warning, too


def test_pixel_limit_and_unsupported_formats_are_reasons_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 47)
    assert "cannot be read: Image size (96 pixels) exceeds limit of 94" in decode(tmp_path, encode(RGB)).problem
    assert "of an unsupported format (heic): convert it" in decode(tmp_path, b"", "x.HEIC").problem
    assert "of an unsupported format" in decode(tmp_path, encode(RGB, "TGA"), "x.tga").problem
    monkeypatch.undo()
    monkeypatch.setattr(os, "sysconf", lambda name: 1)
    refuses("need 0.0 GB of memory of 0.0: use fewer", "folder", write_pngs(tmp_path / "set", "a", "b"))


def announced(capsys, root, **options):
    load_folder(root, **options)
    return [line.removeprefix("data: ") for line in capsys.readouterr().out.splitlines()]


def test_announcements_are_made_again_from_the_cache(tmp_path, capsys, decoded):
    jpegs = [encode(NOISE[i : i + 8, :12], "JPEG") for i in range(5)]
    files = four(encode(RGBA)) | {f"train/{c}/{i}.jpg": jpegs[i] for c in ("cat", "dog") for i in range(5)}
    files |= {"train/dog/turned.webp": encode(NOISE[:12, :8], "WEBP", exif=upright(8))}
    files |= {"train/cat/cat_boxes.txt": b"0 0 9 9", "test/dog/.hidden": b"", "train/dog/notes.db": b"\1\0\xff"}
    files |= {"train/dog/table.csv": b"BMI\n1\n", "test/cat/c.log": b"P1", "train/loose.png": b"", "extra/x.png": b""}
    files["train/cat/0.jpg"] = files["train/cat/0.jpg"][:-82] + b"any other bytes" * 4 + files["train/cat/0.jpg"][-22:]
    lines = announced(capsys, write_files(tmp_path, files))
    assert lines == [
        f"left out: extra, because {tmp_path} has the folders train, test",
        f"left out: images that belong to no class: 1 directly in {tmp_path / 'train'}",
        "1 of 15 images are JPEGs that do not decode cleanly: look at them, pixels may be guesses (train/cat/0.jpg)",
        "4 of 15 images have transparency: composited on white "
        "(train/cat/image.png, train/dog/image.png, test/cat/image.png and 1 more)",
        "1 of 15 images were turned upright by their EXIF orientation (train/dog/turned.webp)",
        "left out: files that are no images: 4 (e.g. cat_boxes.txt)",
        "2 classes: cat, dog; 13 training, 0 validation and 2 test images",
    ]
    decoded.clear()
    assert announced(capsys, tmp_path) == lines and not decoded
    assert "15 of 15 images are not square: squeezed to 8x8" in "".join(announced(capsys, tmp_path, image_size=8))


def test_dark_and_12_bit_sets_and_images_of_one_colour_are_announced(tmp_path, capsys):
    sets = {"dark": encode(GREY // 5), "deep": tiff(GREY.astype(np.uint16) * 16, 16)}  # 12 bits in 16
    for name, content in (sets | {"flat": encode(0 * GREY + 255), "pale": encode(GREY // 4 + 100)}).items():
        lines = announced(capsys, write_files(tmp_path / name, four(content)))
        assert any(line.startswith("warning: all pixels are from ") for line in lines)
        assert any(line.startswith("4 of 4 images are of one brightness") for line in lines) == (name == "flat")
    assert len(announced(capsys, write_files(tmp_path / "fine", four(encode(GREY))))) == 1


@pytest.mark.parametrize("names", ["Train Validation Test", "training_set dev testing", "TRN-DATA val_set Testset"])
def test_parts_are_recognised_by_their_usual_names(names, tmp_path, capsys):
    for name, n in zip(names.split(), (2, 5, 3), strict=True):
        write_pngs(tmp_path / name, "a", "b", n=n)
    loaded = data.load("folder", tmp_path)
    assert [len(part) for part in (loaded.train, loaded.valid, loaded.test)] == [4, 10, 6]
    assert capsys.readouterr().out == "data: 2 classes: a, b; 4 training, 10 validation and 6 test images\n"
    refuses("--n_valid 3", "folder", tmp_path, n_valid=3)


@pytest.mark.parametrize(
    "folders, message",
    [
        (".", "has 0 class folders"),
        ("cat dog", "too few images"),
        ("train/cat train/dog", "has train/ but no test/: add it"),
        ("test/cat test/dog", "has no train/: add it"),
        ("fold1/a fold1/b fold2/a fold2/b", "fold1, fold2 in"),
        ("Train/a Train/b Probe/a Probe/b", "Probe, Train in"),
        ("train/a train/b test", "test has 0 class folders, but labels need two or more"),
        ("train/a train/b test/a test/b test/bird", "has bird: give both the same classes"),
        (" ".join(f"train/{c} " for c in "abcdefgh") + "test/a test/b", "has c, d, e, f, g and 1 more: give"),
    ],
)
def test_layouts_that_are_not_understood_are_refused(folders, message, tmp_path):
    assert str(tmp_path) in refuses(message, "folder", write_pngs(tmp_path, *folders.split(), n=1))


def test_validation_folder_without_test_a_class_called_train_and_an_empty_class(tmp_path, capsys):
    loaded = load_folder(write_pngs(tmp_path / "one", "train/a", "train/b", "val/a", "val/b", n=3))
    assert (len(loaded.train), len(loaded.valid), len(loaded.test)) == (6, 0, 6)
    assert "has no test/: val/ serves as the test part" in capsys.readouterr().out
    assert load_folder(write_pngs(tmp_path / "two", "car", "bus", "train", n=5)).class_names == ("bus", "car", "train")
    files = four(encode(RGB)) | {"train/emu/x.txt": b"", "test/emu/x.txt": b""}
    refuses("a class folder in", "folder", write_files(tmp_path / "set", files))


def test_unlabelled_folders_are_read_whole(tmp_path, capsys, decoded):
    write_pngs(tmp_path, "train/a", "test/b", "x/y/z", ".", n=2)
    images = image_folder.read_unlabelled(write_files(tmp_path, {"list.txt": b"text"}), None)
    assert images.shape == (8, 3, 8, 8)
    assert capsys.readouterr().out == "data: left out: files that are no images: 1 (e.g. list.txt)\n"
    decoded.clear()
    assert torch.equal(image_folder.read_unlabelled(tmp_path, None), images) and not decoded
    write_files(tmp_path / "styles", {f"{name}/Thumbs.db": b"" for name in ("photo", "sketch")})
    styles = write_pngs(tmp_path / "styles", *(f"{style}/{animal}" for style in ("photo", "sketch") for animal in "ab"))
    assert len(image_folder.read_test_part(styles, None)) == 4 * len(list((styles / "photo" / "a").iterdir()))
    assert capsys.readouterr().out.count("Thumbs.db") == 1
    with pytest.raises(UserError, match="holds no images"):
        image_folder.read_unlabelled(write_files(tmp_path / "none", {"a.txt": b"text"}), None)


def test_linked_folders_are_followed_but_not_in_circles(tmp_path):
    root = write_pngs(tmp_path / "set", "cat", "dog")
    write_pngs(tmp_path, "elsewhere")
    (root / "cat/more").symlink_to(tmp_path / "elsewhere")
    (root / "cat/again").symlink_to(root / "cat")
    (root / "fox").symlink_to(tmp_path / "elsewhere")
    (root / "dog/up").symlink_to(root)
    loaded = load_folder(root)
    assert loaded.class_names == ("cat", "dog", "fox")
    assert torch.cat([loaded.train.labels, loaded.test.labels]).bincount().tolist() == [20, 10, 10]


def test_missing_permission_is_said_and_a_pipe_is_not_opened(tmp_path, monkeypatch):
    write_pngs(tmp_path, "a", "b")

    def closed(path, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(image_folder, "open", closed, raising=False)
        refuses("cannot be read: Permission denied", "folder", tmp_path)
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: closed(path) if Path(path).name == "b" else scandir(path))
    refuses(f"cannot read --data_dir {tmp_path / 'b'}: Permission denied", "folder", tmp_path)
    monkeypatch.undo()
    (tmp_path / "a/link.png").symlink_to(tmp_path / "nowhere.png")
    refuses(f"{tmp_path / 'a/link.png'} cannot be read: No such file", "folder", tmp_path)
    (tmp_path / "a/link.png").unlink()
    os.mkfifo(tmp_path / "a/pipe.png")
    refuses("pipe.png is a pipe, a socket or a device", "folder", tmp_path)


def test_names_that_are_no_utf8_are_printed_escaped(tmp_path, capsys):
    name = os.fsdecode(b"caf\xe9")
    write_pngs(tmp_path, name, "tea", n=5)
    assert announced(capsys, tmp_path) == [r"2 classes: caf\udce9, tea; 8 training, 0 validation and 2 test images"]
    write_files(tmp_path, {f"{name}/{i}.png": b"x" for i in "xy"})
    refuses("2 of 12 files", "folder", tmp_path)
    assert r"caf\udce9/x.png is no picture, damaged or" in capsys.readouterr().err
