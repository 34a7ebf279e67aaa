"""Files that are written whole or not at all, and what a run says where that fails."""

import itertools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from utils import UserError, printable


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns an OSError into a UserError that names the path; what was already on disk stays."""
    try:
        yield
    except OSError as error:
        advice = "put that right and run it again (training: with --resume)"
        raise UserError(f"cannot write to {path}: {error.strerror or error}; {advice}") from None


@contextmanager
def warn_on_error(what: str) -> Iterator[None]:
    """What fails inside is a warning on stderr, "``what``: the reason": training is worth more than its pictures."""
    try:
        yield
    except Exception as error:  # Matplotlib and OpenCV raise almost anything
        print(printable(f"Warning: {what}: {error}"), file=sys.stderr)


@contextmanager
def whole_file(path: Path, keep: Path | None = None) -> Iterator[BinaryIO]:
    """Open a file that takes the place of ``path`` once it is complete and on disk; if writing fails, nothing changes.

    Its folder is made. The file that it replaces is renamed to ``keep``.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")  # nobody's own file has such a name
    path.parent.mkdir(exist_ok=True)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def replace_file(path: Path, content: bytes) -> None:
    """Write a file so that a reader finds the old or the new content, whatever happens meanwhile."""
    with disk_errors(path), whole_file(path) as file:
        file.write(content)


def first_free(path: Path, claim: Callable[[Path], None]) -> Path:
    """Take the first of ``path``, ``path``-2, ``path``-3, ... for which ``claim`` raises no FileExistsError.

    ``claim`` makes the directory (``Path.mkdir``) or file, so that no two processes get the same.
    """
    for n in itertools.count(1):
        free = path.with_name(f"{path.name}-{n}") if n > 1 else path
        with suppress(FileExistsError):
            claim(free)
            return free
