"""The machine that a run is on: device, arithmetic, signals; and the exceptions that cross module borders."""

import ctypes
import mmap
import os
import platform
import random
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

EVALUATION_PACKAGES = ("torchmetrics", "torch-fidelity", "pyautoattack")  # imported where needed
PACKAGES = ("torch", "torchvision", "numpy", "pillow", *EVALUATION_PACKAGES)


class UserError(Exception):
    """What the user can put right: ``main.py`` ends with the message, a line that says how; nothing is overwritten."""


class TrainingFailed(Exception):
    """Training cannot go on; ``main.py`` prints the message and exits with status 1."""


def printable(text: object, encoding: str | None = None) -> str:
    """The text with what is invisible or not in ``encoding`` escaped; None is the terminal's, "utf-8" that of files."""
    encoding = encoding or getattr(sys.stdout, "encoding", None) or "utf-8"
    visible = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))
    return visible.encode(encoding, "backslashreplace").decode(encoding)


def pick_device(gpu: str) -> torch.device:
    """The device that ``--gpu`` names: an index or "cpu"; without CUDA, the CPU and a line that says so.

    Of several processes on a machine, each takes its own: of a list, the one in its place, else that of its local rank.
    """
    listed, n_gpus = gpu.split(","), torch.cuda.device_count()
    n_local, local_rank = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    if len(listed) > 1 and n_local == 1:
        raise UserError(f"--gpu {gpu} is for several processes: torchrun --nproc_per_node={len(listed)} main.py ...")
    if gpu == "cpu" or not torch.cuda.is_available():
        if gpu != "cpu" and local_rank == 0:
            print(f"No CUDA device: running on the CPU instead of GPU {gpu}.", file=sys.stderr)
        return torch.device("cpu")
    if n_local > 1 and gpu == "0":  # the default
        listed = [str(i) for i in range(n_gpus)]
    if n_local > len(listed):
        raise UserError(f"{n_local} processes on this machine need a GPU each; --gpu {gpu} gives {len(listed)}")
    chosen = int(listed[local_rank])
    if chosen >= n_gpus:
        raise UserError(f"--gpu {chosen} does not exist: this machine has GPUs 0 to {n_gpus - 1}")
    return torch.device("cuda", chosen)


def pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The network's arithmetic: for "auto", bfloat16 where the hardware computes in it, float32 otherwise."""
    if precision == "auto":
        if device.type == "cuda":
            fast = torch.cuda.get_device_capability(device) >= (8, 0)
        else:
            avx512, cpu = torch.backends.cpu.get_cpu_capability() == "AVX512", torch.cpu.get_capabilities()
            fast = avx512 and (cpu.get("avx512_bf16", False) or cpu.get("amx_bf16", False))
        precision = "bf16" if fast else "fp32"
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]


def set_speed_options(device: torch.device) -> None:
    """Process-wide settings for speed; on CUDA, only algorithms that give the same result each time."""
    torch.backends.cudnn.deterministic = True
    if device.type == "cpu" and platform.libc_ver()[0] == "glibc":
        # Big freed buffers stay in the process (a third less time), 2 GiB of them on large pages where Linux allows it.
        libc, m_trim_threshold, m_mmap_threshold, largest = ctypes.CDLL(None), -1, -3, 2**31 - 1
        libc.mallopt(m_mmap_threshold, largest) or libc.mallopt(m_mmap_threshold, 2**25)  # older ones take no more
        libc.mallopt(m_trim_threshold, -1)
        libc.malloc.restype, size, page, madv_hugepage = ctypes.c_void_p, largest - 2**16, mmap.PAGESIZE, 14
        start = libc.malloc(size) or 0  # takes no memory until something is written to it
        libc.madvise(ctypes.c_void_p(start // page * page + page), size - page, madv_hugepage)
        libc.free(ctypes.c_void_p(start))
    elif device.index is not None:
        torch.cuda.set_device(device)  # where streams and graphs are made


def environment(device: torch.device) -> dict[str, Any]:
    """What a result depends on besides the options: versions, commit, device."""
    program = {"command": shlex.join(sys.argv), "git_commit": git_commit(Path(__file__).resolve().parent)}
    versions = {name: next((d.version for d in distributions(name=name)), "not installed") for name in PACKAGES}
    return program | {"python": platform.python_version()} | versions | {"device": device_name(device)}


def git_commit(folder: Path) -> str:
    """The commit that is checked out, if ``folder`` is the top of a repository; else "unknown"."""
    if not (folder / ".git").exists():  # a copy inside somebody's own repository is not that repository's commit
        return "unknown"
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty= with local changes"]
    try:
        return subprocess.check_output(command, stderr=subprocess.DEVNULL, encoding="utf-8", cwd=folder).strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"


class Signals:
    """Inside, Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 are noted instead of obeyed; a second Ctrl-C stops at once.

    ``status``: the exit status that a signal has asked for, 0 for none (SIGUSR1 asks for a checkpoint only). SIGHUP
    stays ignored under nohup; SIGINT does not, which a script's background jobs ignore at first.
    """

    def __enter__(self):
        self.received, self.status, self.before = False, 0, {}
        in_main_thread = threading.current_thread() is threading.main_thread()  # others get no signals
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1) if in_main_thread else ():
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                self.before[number] = signal.signal(number, self._note)
        return self

    def take(self) -> tuple[bool, int]:
        """Whether one has come since the last call, and the status."""
        if not self.received:
            return False, self.status
        self.received = False  # first of all: one that comes from now on is for the next call
        return True, self.status

    def _note(self, number, frame):
        if number != signal.SIGUSR1:
            self.status = 128 + number
        self.received = True  # last: ``take`` reads the status when this is True
        if number == signal.SIGINT and "TORCHELASTIC_RUN_ID" not in os.environ:  # torchrun repeats the terminal's
            signal.signal(signal.SIGINT, signal.default_int_handler)
            with suppress(OSError, ValueError, AttributeError):  # not print, which this may have interrupted
                os.write(sys.stderr.fileno(), b"\nStopping soon. Ctrl-C again stops at once.\n")

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def tree_to(tree: Any, device: torch.device | str | None = None) -> Any:
    """Nested dicts, lists and tuples with every tensor copied, to ``device`` if one is given."""
    return tree_map_only(Tensor, lambda leaf: leaf.detach().to(device or leaf.device, copy=True), tree)


class Generators:
    """A run's random generators: data and p_x, of the two streams of images, are the same in all processes.

    sgld (of chains), host (of what is drawn for them on the host) and PyTorch's global one (of dropout) differ.
    """

    FAR = 2**18  # between the seeds of two processes; a generator on the CPU uses only the last 32 bits of a seed

    def __init__(self, device: torch.device, rank: int):
        self.device, self.rank = device, rank
        self.data, self.p_x, self.sgld = torch.Generator(device), torch.Generator(device), torch.Generator(device)
        self.host = random.Random()

    def seed(self, seed: int) -> None:
        self.data.manual_seed(2 * seed)
        self.p_x.manual_seed(2**31 + seed)
        self.sgld.manual_seed(2 * seed + 1 + self.FAR * self.rank)
        self.host.seed(2 * seed + 1 + self.FAR * self.rank)
        torch.manual_seed(2**30 + seed + self.FAR * self.rank)

    def state_dict(self) -> dict[str, Any]:
        state = {name: getattr(self, name).get_state() for name in ("data", "p_x", "sgld")}
        cuda = {"cuda": torch.cuda.get_rng_state(self.device)} if self.device.type == "cuda" else {}
        return state | {"host": self.host.getstate(), "torch": torch.get_rng_state()} | cuda

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises RuntimeError if the state is of another kind of device; the global generator has it all the same."""
        state = tree_to(state, torch.device("cpu"))  # where generators of all devices take their states from
        self.host.setstate(state["host"])
        torch.set_rng_state(state["torch"])
        if "cuda" in state and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"], self.device)
        for name in ("data", "p_x", "sgld"):
            getattr(self, name).set_state(state[name])


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the host or the GPU has too little memory."""
    words = ("can't allocate memory", "out of memory", "ALLOC_FAILED", "ALLOCATION_FAILED", "unable to find an engine")
    return isinstance(error, MemoryError) or any(word in f"{error} {error.__context__}" for word in words)


@contextmanager
def evaluation_packages() -> Iterator[None]:
    """Inside, an evaluation package that is not installed is a UserError, which skips what needs it."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package.replace("_", "-") not in EVALUATION_PACKAGES:
            raise
        raise UserError(f"{package} is not installed: pip install -r requirements-eval.txt") from None
