"""What a run leaves on disk: its directory, log, pictures and checkpoints; and the machine it runs on."""

import ctypes
import fcntl
import functools
import json
import math
import os
import platform
import queue
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import cv2
import imageio.v3 as imageio
import numpy as np
import torch
from torch import Tensor
from torchvision.utils import make_grid

from errors import UserError

CHECKPOINT_FORMAT = 2
METRIC_PACKAGES = ("torchmetrics", "torch-fidelity", "torchattacks")

# ---------------------------------------------------------------------------------------------- the machine


def pick_device(gpu: str) -> torch.device:
    """The device that ``--gpu`` names: an index or "cpu"; without CUDA, the CPU and a line that says so."""
    if gpu == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        print(f"No CUDA device: running on the CPU instead of GPU {gpu}.", file=sys.stderr)
        return torch.device("cpu")
    if int(gpu) >= torch.cuda.device_count():
        raise UserError(f"--gpu {gpu} does not exist: this machine has GPUs 0 to {torch.cuda.device_count() - 1}")
    return torch.device("cuda", int(gpu))


def pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The network's arithmetic: for "auto", bfloat16 where the hardware computes in it, float32 otherwise."""
    if precision == "auto":
        if device.type == "cuda":
            fast = torch.cuda.get_device_capability(device) >= (8, 0)
        else:
            fast = torch.backends.cpu.get_cpu_capability() == "AVX512" and cpu_has("avx512_bf16", "amx_bf16")
        precision = "bf16" if fast else "fp32"
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]


def cpu_has(*flags: str) -> bool:
    """Whether the processor reports one of these instruction sets (Linux; elsewhere False)."""
    try:
        return any(flag in Path("/proc/cpuinfo").read_text().split() for flag in flags)
    except OSError:
        return False


def keep_freed_memory() -> None:
    """Ask glibc to keep big freed buffers; giving them back to the kernel at every layer costs a third of the time."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        m_trim_threshold, m_mmap_threshold, largest = -1, -3, 2**31 - 1
        libc.mallopt(m_mmap_threshold, largest) or libc.mallopt(m_mmap_threshold, 2**25)  # older ones take no more
        libc.mallopt(m_trim_threshold, largest)


def tune(device: torch.device) -> None:
    """Process-wide settings for speed; on CUDA, only algorithms that give the same result each time."""
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.deterministic = True
    if device.type == "cpu":
        keep_freed_memory()
    elif device.index is not None:
        torch.cuda.set_device(device)  # where streams and graphs are made


def environment(device: torch.device) -> dict[str, Any]:
    """What a result depends on besides the options: versions, commit, device."""
    here = Path(__file__).parent
    try:
        git = ["git", "-C", str(here)]
        commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True).stdout.strip()
        commit += " with local changes" if changed else ""
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    return {
        "command": " ".join(sys.argv),
        "git_commit": commit,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "opencv": cv2.__version__,
        **{name: installed(name) for name in METRIC_PACKAGES},
        "device": device_name(device),
    }


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


# ---------------------------------------------------------------------------------------------- the run directory


class RunDir:
    """A run's directory ``path``, held by one process at a time."""

    def __init__(self, path: Path):
        self.path = path
        with disk_errors(path):
            self.lock = open(path / "lock", "w")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel frees it when the process ends
        except BlockingIOError:
            raise UserError(f"{path} is in use by another running process; wait for it or stop it") from None
        except OSError as error:  # some network file systems have no locks
            print(
                f"Warning: {path} cannot be locked ({error.strerror}): see to it that one process uses it.",
                file=sys.stderr,
            )

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
        raise UserError(f"{Path(logdir) / name} and 98 like it are there already; choose another --note")

    @classmethod
    def of(cls, place: str) -> "RunDir":
        """The run that ``--resume`` names by its directory, or by its newest checkpoint or the one before that."""
        path = Path(place)
        try:
            if not path.is_dir():
                if not path.exists():
                    raise UserError(f"no checkpoint at {place}")
                if path.name not in ("last.pt", "previous.pt"):
                    raise UserError(
                        f"--resume takes a run directory, or its last.pt or previous.pt; {place} can start "
                        "a new run with --load_ckpt"
                    )
                path = path.resolve().parent.parent
            if not (path / "config.json").is_file():
                raise UserError(f"{path} is not a run directory: it has no config.json")
        except OSError as error:
            raise UserError(f"cannot read {place}: {error.strerror}") from None
        return cls(path)

    def __enter__(self) -> "RunDir":
        return self

    def __exit__(self, *_) -> None:
        self.lock.close()

    def write_config(self, options: dict[str, Any], environment: dict[str, Any]) -> None:
        content = json.dumps({"options": options, "environment": environment}, indent=2) + "\n"
        with disk_errors(self.path):
            replace_file(self.path / "config.json", content.encode())


def read_options(run: Path) -> dict[str, Any] | None:
    """The options in a run directory's config.json, or None if there is no such file or it is broken."""
    try:
        options = json.loads((run / "config.json").read_text())["options"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return options if isinstance(options, dict) else None


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turns an OSError into a UserError that names the place; what was already on disk stays."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write to {path}: {error.strerror or error}; free some space or mend the permissions, "
            "then run it again (training: with --resume)"
        ) from None


class Writer:
    """Runs writing jobs in one thread, in order; at most 8 wait, so that a slow disk slows training, not memory.

    Jobs call no torch operation (``torch.save`` of CPU tensors is none): in a second thread it would start a second
    OpenMP team, after which the threads of both sleep between operations and a step on the CPU takes twice as long.
    """

    def __init__(self):
        self.jobs: queue.Queue = queue.Queue(maxsize=8)
        self.error: Exception | None = None
        threading.Thread(target=self._work, daemon=True).start()

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        """Wait until everything is written, unless Ctrl-C asks to stop at once."""
        if kind is None or issubclass(kind, Exception):
            self.jobs.join()
            self.jobs.put(None)
        if kind is None:
            self.check()

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


class Signals:
    """Inside, Ctrl-C, SIGTERM and SIGUSR1 are noted instead of obeyed; a second Ctrl-C stops at once.

    ``received``: one has come since this was last set to False. ``status``: the exit status that it asks for, 0 for
    none (SIGUSR1 asks for a checkpoint only).
    """

    def __enter__(self):
        self.received, self.status = False, 0
        self.before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
        return self

    def _note(self, number, frame):
        self.received = True
        if number != signal.SIGUSR1:
            self.status = 128 + number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------------------------------------- the log


def on_disk(method: Callable) -> Callable:
    """A method of ``Log`` in which the file system's errors are UserErrors."""

    @functools.wraps(method)
    def guarded(self, *args):
        with disk_errors(self.path):
            return method(self, *args)

    return guarded


def tensorboard_writer(directory: Path, purge_step: int | None = None):
    """A SummaryWriter. What its thread cannot write is raised where it is next used, and not printed besides."""
    from torch.utils.tensorboard import SummaryWriter

    threading.excepthook = print_thread_error
    return SummaryWriter(str(directory), purge_step=purge_step)


def print_thread_error(args: threading.ExceptHookArgs) -> None:
    if not (type(args.thread).__name__ == "_AsyncWriterThread" and issubclass(args.exc_type, OSError)):
        threading.__excepthook__(args)


class Log:
    """metrics.jsonl (one object a line) and, unless switched off, the same in TensorBoard's event file.

    Lines of measurements carry "step" and the values; lines of events carry "step", "event" and a message.
    """

    def __init__(self, directory: Path, tensorboard: bool, position: int = 0, step: int = 0):
        """Continue at byte ``position`` of metrics.jsonl and at ``step``: what lies behind them is cut."""
        self.path = directory / "metrics.jsonl"
        with disk_errors(directory):
            self.path.touch()
            whole = self.path.read_bytes()[:position].rfind(b"\n") + 1  # a file that lost its end may stop in a line
            os.truncate(self.path, whole)
            self.file = open(self.path, "a")
            self.board = tensorboard_writer(directory, step + 1) if tensorboard else None

    def _line(self, content: dict[str, Any]) -> None:
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in content.items()}
        self.file.write(json.dumps(plain) + "\n")
        self.file.flush()

    @on_disk
    def values(self, step: int, values: dict[str, float | list[int]]) -> None:
        """Scalars; a list holds how often each of K classes occurred, in TensorBoard a histogram."""
        self._line({"step": step, **values})
        if not self.board:
            return
        for name, value in values.items():
            if isinstance(value, list):
                classes = np.repeat(np.arange(len(value)), value)
                self.board.add_histogram(name, classes, step, bins=np.arange(len(value) + 1) - 0.5)
            else:
                self.board.add_scalar(name, value, step)

    @on_disk
    def recovery(self, step: int, back_to: int, message: str) -> None:
        """Training diverged at ``step``; the measurements after ``back_to`` no longer count (see ``read_log``)."""
        if self.board:
            from tensorboard.compat.proto.event_pb2 import Event, SessionLog

            start = SessionLog(status=SessionLog.START)  # TensorBoard's word for: forget what was at later steps
            self.board.file_writer.add_event(Event(session_log=start), back_to + 1)
        self._line({"step": step, "event": "recovery", "back_to": back_to, "message": message})
        self.text(step, "event/recovery", message)

    @on_disk
    def text(self, step: int, name: str, text: str) -> None:
        if self.board:
            self.board.add_text(name, text, step)

    @on_disk
    def encoded_image(self, step: int, name: str, encoded: bytes, height: int, width: int) -> None:
        """A PNG or GIF file's bytes as an image; TensorBoard plays a GIF."""
        if self.board:
            from tensorboard.compat.proto.summary_pb2 import Summary

            image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=encoded)
            self.board.file_writer.add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), step)

    @on_disk
    def hyperparameters(self, options: dict[str, Any]) -> None:
        """The options as TensorBoard's HPARAMS tab and as a table."""
        if self.board:
            from torch.utils.tensorboard.summary import hparams

            known = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in options.items()}
            for summary in hparams(known, {"accuracy/valid": 0.0, "accuracy/test": 0.0}):
                self.board.file_writer.add_summary(summary)
            rows = "\n".join(f"| {k} | {v} |" for k, v in options.items())
            self.text(0, "options", f"| option | value |\n|---|---|\n{rows}")

    def position(self) -> int:
        """Length of metrics.jsonl in bytes."""
        return self.file.tell()

    @on_disk
    def flush(self) -> None:
        """Have all of it on disk."""
        if self.board:
            self.board.flush()
        os.fsync(self.file.fileno())

    @on_disk
    def close(self) -> None:
        self.file.close()
        if self.board:
            self.board.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that count.

    Left out are a last line that was cut short, and the measurements behind which a recovery went back. The file only
    grows, so that a checkpoint's position in it stays true.
    """
    lines = []
    for text in path.read_text().splitlines(keepends=True):
        if text.endswith("\n"):
            line = json.loads(text)
            if "back_to" in line:
                lines = [before for before in lines if "event" in before or before["step"] <= line["back_to"]]
            lines.append(line)
    return lines


def replace_file(path: Path, content: bytes) -> None:
    """Write a file, and its folder, so that a reader finds the old or the new content, whatever happens meanwhile."""
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


# ---------------------------------------------------------------------------------------------- pictures


def to_uint8(x: Tensor) -> Tensor:
    """Images in [-1, 1], clamped, to uint8 of the same shape; values that are not finite become 0."""
    return x.add(1).mul(127.5).nan_to_num(0, 255, 0).clamp(0, 255).round().to(torch.uint8)


def image_grid(images: Tensor, columns: int = 8, tile: int = 64, padding: int = 2) -> np.ndarray:
    """uint8 images (N, C, H, W), C = 1 or 3, as one RGB picture (H', W', 3).

    Small images are enlarged by a whole factor, without smoothing, until a side has about ``tile`` pixels.
    """
    factor = max(1, round(tile / images.shape[-1]))
    large = images.cpu().repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    grid = make_grid(large, nrow=columns, padding=padding, pad_value=128)
    return grid.permute(1, 2, 0).contiguous().numpy()


def save_png(path: Path, picture: np.ndarray) -> bytes:
    """Write an RGB picture (H, W, 3) uint8; returns the file's bytes."""
    ok, encoded = cv2.imencode(".png", cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
    assert ok
    with disk_errors(path):
        replace_file(path, encoded.tobytes())
    return encoded.tobytes()


def save_gif(path: Path, pictures: Sequence[np.ndarray], captions: Sequence[str]) -> bytes:
    """Write RGB pictures (H, W, 3), all of one size, as a looping film, each with its caption below.

    The first and the last frame stay for a second. Returns the file's bytes.
    """
    film = []
    for picture, caption in zip(pictures, captions, strict=True):
        picture = cv2.copyMakeBorder(picture, 0, 18, 0, 0, cv2.BORDER_CONSTANT, value=(255, 255, 255))
        cv2.putText(
            picture, caption, (4, picture.shape[0] - 5), cv2.FONT_HERSHEY_SIMPLEX, 0.4, (0, 0, 0), 1, cv2.LINE_AA
        )
        film.append(picture)
    durations = [1000, *[100] * (len(film) - 2), 1000][: len(film)]  # milliseconds
    encoded = imageio.imwrite("<bytes>", np.stack(film), extension=".gif", duration=durations, loop=0)
    with disk_errors(path):
        replace_file(path, encoded)
    return encoded


# ---------------------------------------------------------------------------------------------- checkpoints


def save_checkpoint(directory: Path, name: str, state: dict[str, Any], keep: str | None = None) -> None:
    """Write ``directory/name`` so that a power cut leaves the old file or the new one, never half of one.

    The file it replaces lives on as ``keep``. The archive carries a CRC-32 of each of its records.
    """
    path, temporary = directory / name, directory / f"{name}.tmp"
    with disk_errors(directory):
        directory.mkdir(exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                torch.save({"format": CHECKPOINT_FORMAT, **state}, file)
                file.flush()
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            temporary.unlink(missing_ok=True)
            raise error if isinstance(error, OSError) else OSError(str(error).splitlines()[0]) from None
        if keep and path.exists():
            os.replace(path, directory / keep)
        os.replace(temporary, path)
        handle = os.open(directory, os.O_RDONLY)
        os.fsync(handle)  # the rename itself
        os.close(handle)


def set_aside(path: Path) -> None:
    """Rename a checkpoint, if it is there, so that it stays but counts no more."""
    with disk_errors(path), suppress(FileNotFoundError):
        path.replace(path.with_name(f"{path.stem}_set_aside.pt"))


def remove_others(directory: Path, keep: set[str]) -> None:
    """Delete the files of ``directory`` whose names are not in ``keep``."""
    with disk_errors(directory):
        for path in directory.iterdir():
            if path.name not in keep:
                path.unlink()


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read one checkpoint file to the CPU. It may hold tensors and plain values, never code to run.

    Raises UserError for a file that is missing, torn, corrupted, not ours, or of another format version.
    """
    try:
        if not path.is_file():
            raise UserError(f"no checkpoint at {path}")
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()  # checks every record's CRC-32
        if broken:
            raise UserError(f"{path} is corrupted (record {broken}); use another checkpoint")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except zipfile.BadZipFile:
        raise UserError(f"{path} is empty, torn or no checkpoint; use another checkpoint") from None
    except Exception as error:
        code = "weights_only" in str(error).lower()
        reason = "it holds more than tensors and plain values" if code else "it is broken"
        raise UserError(f"{path} was refused: {reason}; use another checkpoint") from None
    if not isinstance(state, dict) or "format" not in state:
        raise UserError(f"{path} is not a checkpoint of this program")
    if state["format"] != CHECKPOINT_FORMAT:
        raise UserError(f"{path} has checkpoint format {state['format']}, this version reads {CHECKPOINT_FORMAT}")
    return state


def find_checkpoint(path: str) -> tuple[Path, dict[str, Any]]:
    """The checkpoint that a user names by its file or its run directory: of a run, the newest that is whole."""
    place = Path(path)
    try:
        is_run = place.is_dir()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if not is_run:
        state = load_checkpoint(place)
        if "config" not in state:
            raise UserError(f"{path} is a state to go back to after divergence, no checkpoint; name its run directory")
        return place, state
    candidates = [place / "ckpt" / name for name in ("last.pt", "previous.pt")]
    error = None
    for candidate in candidates:
        try:
            state = load_checkpoint(candidate)
        except UserError as e:
            error = error or e
            continue
        if error and os.path.exists(candidates[0]):
            print(f"Warning: {error}; taking {candidate} instead.", file=sys.stderr)
        return candidate, state
    if not any(map(os.path.exists, candidates)):
        raise UserError(f"no checkpoint in {place} (looked for ckpt/last.pt and ckpt/previous.pt)")
    raise error
