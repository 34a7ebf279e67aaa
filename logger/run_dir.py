"""A run's directory: how it is made, found again and held by one process."""

import json
import os
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from logger.files import disk_errors, first_free, replace_file
from utils import UserError


class RunDir:
    """A run's directory ``path``, held by one process from its creation to ``close``, or to the end of the process."""

    def __init__(self, path: Path):
        self.path, self.lock = path, FileLock(path / "lock", timeout=0, fallback_to_soft=False)
        with disk_errors(path):
            (path / "lock").touch()
        try:
            self.lock.acquire()
        except Timeout:
            raise UserError(f"{path} is in use by another running process; wait for it or stop it") from None
        except (OSError, NotImplementedError) as error:  # a file system without locks
            print(f"Warning: {path} cannot be locked ({error}): make sure that one process uses it.", file=sys.stderr)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}  # a copy in another process does not hold it

    @classmethod
    def create(cls, logdir: str, mode: str, note: str) -> "RunDir":
        """Make ``<logdir>/<time>_<mode>[_<note>]``, with a number behind it if it is there already."""
        name = "_".join(filter(None, (time.strftime("%Y%m%d-%H%M%S"), mode, note)))
        with disk_errors(Path(logdir)):
            Path(logdir).mkdir(parents=True, exist_ok=True)
            return cls(first_free(Path(logdir, name), Path.mkdir))

    @classmethod
    def of(cls, name: str) -> "RunDir":
        """The run that ``--resume`` names by its directory, or by its newest checkpoint or the one before that."""
        path = Path(os.path.realpath(name))  # a link may lead elsewhere later
        if path.name in ("last.pt", "previous.pt"):
            path = path.parent.parent
        if not os.path.isfile(path / "config.json"):
            raise UserError(f"--resume takes a run directory, or its last.pt or previous.pt, not {name}")
        return cls(path)

    def close(self) -> None:
        """Let go, and delete what processes that were stopped had begun to write, but no file of a measurement."""
        with suppress(OSError):
            for folder in ("", "ckpt", "samples", "sgld"):
                for unfinished in (self.path / folder).glob(".*.tmp"):
                    unfinished.unlink()
        self.lock.release()

    def write_config(self, cfg: Any, environment: dict[str, Any], **further: Any) -> None:
        content = json.dumps({"options": asdict(cfg), "environment": environment, **further}, indent=2) + "\n"
        replace_file(self.path / "config.json", content.encode())


def read_config(run: Path) -> dict[str, Any]:
    """The content of a run directory's config.json; empty if there is no such file or it is broken."""
    try:
        content = json.loads((run / "config.json").read_text())
        return content if isinstance(content["options"], dict) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
