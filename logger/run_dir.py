"""A run's directory: how it is made, found again and held by one process."""

import json
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from logger.files import NO_PERMISSION, NO_SPACE, disk_errors, replace_file
from utils import UserError


class RunDir:
    """A run's directory ``path``, held by one process at a time."""

    def __init__(self, path: Path):
        self.path, self.lock = path, FileLock(path / "lock", timeout=0, fallback_to_soft=False)
        try:
            self.lock.acquire()  # the system frees it when the process ends
        except Timeout:
            raise UserError(f"{path} is in use by another running process; wait for it or stop it") from None
        except (OSError, NotImplementedError) as error:
            if isinstance(error, OSError) and error.errno in (*NO_SPACE, *NO_PERMISSION):
                with disk_errors(path):
                    raise
            reason = getattr(error, "strerror", None) or "its file system has no locks"
            print(f"Warning: {path} cannot be locked ({reason}): make sure that one process uses it.", file=sys.stderr)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}  # a copy in another process does not hold it

    @classmethod
    def create(cls, logdir: str, mode: str, note: str) -> "RunDir":
        """Make ``<logdir>/<time>_<mode>[_<note>]``, with a number behind it if it is there already."""
        name = "_".join(filter(None, (time.strftime("%Y%m%d-%H%M%S"), mode, note)))
        with disk_errors(Path(logdir)):
            Path(logdir).mkdir(parents=True, exist_ok=True)
            for end in ("", *(f"-{n}" for n in range(2, 100))):
                path = Path(logdir) / (name + end)
                try:
                    path.mkdir()
                except FileExistsError:
                    continue
                return cls(path)
        raise UserError(f"{Path(logdir) / name} and 98 directories like it exist already; choose another --note")

    @classmethod
    def of(cls, name: str) -> "RunDir":
        """The run that ``--resume`` names by its directory, or by its newest checkpoint or the one before that."""
        path = Path(name)
        try:
            if not path.is_dir():
                if not path.exists():
                    raise UserError(f"no checkpoint at {name}")
                if path.name not in ("last.pt", "previous.pt"):
                    raise UserError(
                        f"--resume takes a run directory, or its last.pt or previous.pt; {name} can start "
                        "a new run with --load_ckpt"
                    )
                path = path.resolve().parent.parent
            if not (path / "config.json").is_file():
                raise UserError(f"{path} is not a run directory: it has no config.json")
        except OSError as error:
            raise UserError(f"cannot read {name}: {error.strerror}") from None
        return cls(path)

    def __enter__(self) -> "RunDir":
        self.remove_unfinished()
        return self

    def __exit__(self, *_) -> None:
        self.remove_unfinished()
        self.lock.release()

    def remove_unfinished(self) -> None:
        """Delete the files that were being written when a process was stopped, but none of a measurement's."""
        with suppress(OSError):
            for folder in ("", "ckpt", "samples", "sgld"):
                for unfinished in (self.path / folder).glob("*.tmp"):
                    unfinished.unlink()

    def write_config(self, options: dict[str, Any], environment: dict[str, Any], **further: Any) -> None:
        content = json.dumps({"options": options, "environment": environment, **further}, indent=2) + "\n"
        with disk_errors(self.path):
            replace_file(self.path / "config.json", content.encode())


def read_config(run: Path) -> dict[str, Any]:
    """The content of a run directory's config.json; no options if there is no such file or it is broken."""
    try:
        content = json.loads((run / "config.json").read_text())
        return content if isinstance(content["options"], dict) else {"options": {}}
    except (OSError, ValueError, KeyError, TypeError):
        return {"options": {}}
