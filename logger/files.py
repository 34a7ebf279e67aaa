"""Files that are written whole or not at all, in the calling thread or behind it."""

import errno
import io
import json
import os
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from utils import UserError

NO_SPACE = (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", None))
NO_PERMISSION = (errno.EACCES, errno.EPERM, errno.EROFS)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns an OSError into a UserError that names the path; what was already on disk stays."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_SPACE:
            advice = "; free some space, then run it again (training: with --resume)"
        elif error.errno in NO_PERMISSION:
            advice = "; check its permissions, then run it again (training: with --resume)"
        else:
            advice = ""
        raise UserError(f"cannot write to {path}: {error.strerror or error}{advice}") from None


def replace_file(path: Path, content: bytes) -> None:
    """Write a file, and its folder, so that a reader finds the old or the new content, whatever happens meanwhile."""
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def save_arrays(path: Path, arrays: dict[str, Tensor], settings: dict[str, Any]) -> None:
    """Write tensors, and settings as JSON text, as a compressed NumPy archive; equal ones give equal bytes."""
    archive = io.BytesIO()
    np.savez_compressed(
        archive,
        settings=json.dumps(settings),
        **{name: array.cpu().contiguous().numpy() for name, array in arrays.items()},
    )
    with disk_errors(path):
        replace_file(path, archive.getvalue())


class Writer:
    """Runs writing jobs in one thread, in order; at most 8 wait, so that a slow disk slows training, not memory.

    Jobs call no torch operation (``torch.save`` of CPU tensors is none): in a second thread it would start a second
    OpenMP team, after which the threads of both sleep between operations and a step on the CPU takes twice as long.
    """

    def __init__(self):
        self.jobs: queue.Queue = queue.Queue(maxsize=8)
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        """Wait until everything is written, unless Ctrl-C asks to stop at once."""
        try:
            if kind is None or issubclass(kind, Exception):
                self.jobs.put(None)
                self.thread.join()
                kind or self.check()
            else:
                self.error = error
        except BaseException as interruption:
            self.error = self.error or interruption  # what waits is left undone
            raise

    def _work(self):
        while task := self.jobs.get():
            job, args = task
            try:
                if not self.error:  # after a checkpoint that failed, what the one before it needs must stay
                    job(*args)
            except Exception as error:
                self.error = error
            finally:
                self.jobs.task_done()

    def submit(self, job: Callable, *args: Any) -> None:
        self.check()
        self.jobs.put((job, args))

    def check(self) -> None:
        """Raise, in the caller's thread, what a job raised."""
        if self.error:
            raise self.error
