"""Which files below a folder belong to which class and part; no file is opened.

A folder holds train/<class>/*, test/<class>/* and perhaps val/<class>/*, or only <class>/*. The parts may have other
usual names. What looks like parts but is not understood is refused, as its images would get wrong labels.
"""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from image_folder.file import IMAGE_ENDINGS, RAW_ENDINGS
from utils import UserError, printable

UNUSABLE_LIST = "unusable_images.txt"  # written by image_folder beside the images
PART_NAMES = {  # as they read in lower case, without "_", "-", "set", "data" and the like
    "train": ("train", "training", "trn"),
    "valid": ("val", "valid", "validation", "validate", "dev", "eval", "evaluation"),
    "test": ("test", "testing", "tst"),
}
EXPECTED = "expected are train/<class>/ and test/<class>/ (val/<class>/ too, if you like), or only <class>/"


@dataclass
class Layout:
    """What a folder holds.

    Attributes:
        class_names: in order of their names; empty for images without labels.
        files, labels: one for each file, those of one part after those of another.
        parts: "train", "valid" and "test" that exist, and the range of files in each; {} if there are none.
        folders: where each of them lies.
        notes: lines for the user.
        problems: why folders could not be listed.
    """

    class_names: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    parts: dict[str, range] = field(default_factory=dict)
    folders: dict[str, Path] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def find_all(root: Path, option: str = "") -> Layout:
    """Every file below ``root``, without labels."""
    _check_root(root, "name a folder of images", option)
    layout = Layout()
    layout.files = files_below(root, layout.problems)
    return layout


def find_test_part(root: Path) -> Path:
    """The folder that holds the images of the test part; ``root`` itself if it has no parts."""
    _check_root(root, "name a folder of images")
    return _find_parts(root, []).get("test", root)


def find_classes(root: Path) -> Layout:
    """The classes, parts and files of a labelled folder.

    Raises:
        UserError: the folder is missing, or its layout cannot be understood.
    """
    _check_root(root, "name a folder with train/<class>/ and test/<class>/", "--data_dir ")
    layout = Layout()
    parts = _find_parts(root, layout.notes)
    class_names = _subfolders(next(iter(parts.values()))) if parts else _subfolders(root)
    for part, folder in parts.items():
        _check_same_classes(root, parts["train"], folder, class_names, part)
    if len(class_names) < 2:
        found = f"only one class folder, {class_names[0]}" if class_names else "no class folders"
        place = parts.get("train", root)
        raise UserError(f"{place} holds {found}: put the images of each class into a folder of its own")
    for folder in (root, *parts.values()):
        if n := _holds_images(folder):
            layout.notes.append(f"left out: images that belong to no class: {n} directly in {folder}")
    for part, folder in (parts or {"": root}).items():
        start = len(layout.files)
        for label, name in enumerate(class_names):
            found = files_below(folder / name, layout.problems)
            if not found and not layout.problems:
                raise UserError(f"{folder / name} holds no images: add some, or remove this class")
            layout.files += found
            layout.labels += [label] * len(found)
        if part:
            layout.parts[part] = range(start, len(layout.files))
    layout.class_names, layout.folders = class_names, parts
    return layout


def files_below(folder: str | Path, problems: list[str], above: tuple = ()) -> list[str]:
    """Every file in a folder and its subfolders, sorted, except hidden ones and those that Windows leaves behind.

    Links are followed, but not back to a folder that they lie in.
    """
    found = []
    try:
        status = os.stat(folder)
        here = (*above, (status.st_dev, status.st_ino))
        with os.scandir(folder) as entries:
            entries = sorted((entry for entry in entries if not _is_litter(entry.name)), key=lambda entry: entry.name)
    except OSError as error:
        problems.append(f"cannot read {folder}: {error.strerror}")
        return found
    for entry in entries:
        if not entry.is_dir():
            found.append(entry.path)
        elif not entry.is_symlink() or _identity(entry) not in here:
            found += files_below(entry.path, problems, here)
    return found


def _identity(entry: os.DirEntry) -> tuple[int, int]:
    status = entry.stat()
    return status.st_dev, status.st_ino


def _is_litter(name: str) -> bool:
    return name[0] == "." or name.lower() in ("thumbs.db", "desktop.ini", "__macosx", UNUSABLE_LIST)


def _check_root(root: Path, advice: str, option: str = "") -> None:
    if not root.is_dir():
        state = "is a file" if root.exists() else "does not exist"
        raise UserError(f"{option}{root} {state}: {advice}")


def _subfolders(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not _is_litter(path.name) and path.is_dir())


def _part_of(name: str) -> str | None:
    """The part that a folder's name stands for, whatever its case and spelling: "Training_Set" is "train"."""
    plain = re.sub(r"[\W_]", "", name.lower())
    plain = re.sub(r"(set|data|images|imgs|split|folder)$", "", plain)
    return next((part for part, names in PART_NAMES.items() if plain in names), None)


def _find_parts(root: Path, notes: list[str]) -> dict[str, Path]:
    """The folder of each part, in the order train, valid, test; {} if the top folders are classes."""
    tops = {name: _subfolders(root / name) for name in _subfolders(root)}
    named = {}
    for name in tops:
        named.setdefault(_part_of(name), []).append(name)
    others = named.pop(None, [])
    if not named:
        _refuse_unknown_parts(root, tops)
        return {}
    if others and not any(tops[name] for names in named.values() for name in names):
        if any(_holds_images(root / name) for name in others):
            return {}  # a class may be called train
    for part, names in named.items():
        if len(names) > 1:
            raise UserError(f"{root} has several folders for the {part} part ({', '.join(names)}): keep one of them")
    parts = {part: root / named[part][0] for part in PART_NAMES if part in named}
    if "train" not in parts or len(parts) == 1:
        if others:
            _refuse_unknown_parts(root, tops)
        have = " and ".join(f"{folder.name}/" for folder in parts.values())
        absent = "train" if "train" not in parts else "test"
        raise UserError(f"{root} has {have} but no {absent}/: add it; {EXPECTED}")
    left_out = [f"{name}/" for name in others if _holds_images(root / name) or tops[name]]
    if left_out:
        used = _some([p.name + "/" for p in parts.values()])
        notes.append(f"left out: {_some(left_out)}, because {root} has the folders {used}")
    if "test" not in parts:
        notes.append(f"{root} has no test/: {parts['valid'].name}/ serves as the test part")
        parts["test"] = parts.pop("valid")
    return parts


def _refuse_unknown_parts(root: Path, tops: dict[str, list[str]]) -> None:
    """Stop where several top folders hold the same subfolders, as parts with unusual names do."""
    groups = {}
    for name, subfolders in tops.items():
        if len(subfolders) >= 2:
            groups.setdefault(tuple(subfolders), []).append(name)
    for subfolders, names in groups.items():
        if len(names) >= 2:
            raise UserError(
                f"{_some(names)} in {root} have the same subfolders ({_some(subfolders)}), so they look like parts of "
                f"a data set and not like classes; {EXPECTED}: rename them, or let --data_dir name one of them"
            )


def _holds_images(folder: Path) -> int:
    """How many files directly in the folder have the name of an image."""
    endings = IMAGE_ENDINGS | RAW_ENDINGS
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if not _is_litter(entry.name) and not entry.is_dir()]
    return sum(os.path.splitext(name)[1].lower() in endings for name in names)


def _check_same_classes(root: Path, train: Path, folder: Path, class_names: list[str], part: str) -> None:
    names = _subfolders(folder)
    if names == class_names and names:
        return
    flat = _holds_images(folder) or (
        len(names) == 1 and names[0] not in class_names and _holds_images(folder / names[0])
    )
    if flat and not set(names) & set(class_names) and (part != "train" or not names):
        advice = "sort them into one folder for each class"
        if part != "train" and len(class_names) >= 2:
            advice += f", or give --data_dir {train}, of which a fifth becomes the test part"
        raise UserError(f"{folder} has no class folders, so its pictures have no labels: {advice}")
    if part != "train":
        odd = sorted(set(names) ^ set(class_names))
        raise UserError(
            f"only one of {train.name}/ and {folder.name}/ in {root} has {_some(odd)}: give both the same class folders"
        )


def _some(names: list[str] | tuple[str, ...], n: int = 5) -> str:
    """The first few names, and how many more there are."""
    shown = ", ".join(names[:n])
    return f"{shown} and {len(names) - n} more" if len(names) > n else shown


def describe(class_names: list[str] | tuple[str, ...], counts: dict[str, list[int]], n: int = 10) -> str:
    """One line such as "2 classes: cat (30 train, 10 test), dog (30 train, 10 test)", with ``n`` classes at most.

    Args:
        counts: for each part, how many images each class has in it.
    """
    lines = []
    for label, name in enumerate(class_names[:n]):
        numbers = ", ".join(f"{counts[part][label]} {part}" for part in counts if counts[part][label])
        lines.append(f"{name} ({numbers})")
    more = f" ... {len(class_names) - n} more" if len(class_names) > n else ""
    return printable(f"{len(class_names)} classes: {', '.join(lines)}{more}")
