"""Command line of the program: options to a Config, a Config to one mode."""

import os
import signal

if __name__ == "__main__":  # before the seconds in which torch and Matplotlib are imported
    os.environ.pop("MPLBACKEND", None)  # a notebook's, which may not be installed here; none is needed
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # training saves a checkpoint for it, all else does nothing

import sys
import threading
from dataclasses import asdict
from typing import Any, NamedTuple

import torch

import data
import distributed
import evaluation.run
import utils
from checkpoints import export, resume
from checkpoints.files import set_aside
from checkpoints.load import open_trained
from checkpoints.other_programs import open_checkpoint
from config import Config
from config.checks import unused
from config.cli import parse
from distributed import launch
from generation import sample
from logger import terminal
from logger.run_dir import RunDir
from trainer import Trainer
from utils import TrainingFailed, UserError

USES = {"test": evaluation.run.run, "sample": sample.run, "export": export.run}  # of a trained network
NOT_ENOUGH_MEMORY = (
    "not enough memory; a smaller --batch_size, --width, --buffer_size, --image_size, --n_samples or --max_images "
    "needs less"
)


def main(arguments: list[str]) -> int:
    """Run one command line; returns the exit status that --help explains."""
    try:
        launch.connect()
        with launch.only_rank0_prints():
            status = run(arguments)
        if distributed.is_distributed():  # torchrun sends SIGTERM to all when one ends: our exit status is to stay
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        launch.disconnect()
        return status
    except UserError as error:
        return complain(2, "error", str(error))
    except TrainingFailed as error:
        return complain(1, "failed", str(error))
    except (MemoryError, RuntimeError) as error:
        if launch.lost_connection(error):
            reason = str(error).strip().partition("\n")[0]
            return complain(1, "failed", f"a process of this run has ended or cannot be reached ({reason})")
        if not out_of_memory(error):
            raise
        return complain(2, "error", NOT_ENOUGH_MEMORY)
    except KeyboardInterrupt:
        return 130


def complain(status: int, kind: str, message: str) -> int:
    """One line on stderr, from one of several processes that have the same to say; returns ``status``."""
    if launch.first_to_say(message):
        print(f"{kind}: {utils.printable(message)}", file=sys.stderr)
    return status


def out_of_memory(error: Exception) -> bool:
    """Python, NumPy and CUDA's allocator have exceptions of their own for it, other parts of torch only messages."""
    messages = ("can't allocate memory", "out of memory")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(m in str(error) for m in messages)


def run(arguments: list[str]) -> int:
    given = parse(arguments, Config)
    mode = given.get("mode", Config.mode)
    if mode not in USES:
        return train(given)
    if mode == "export" and distributed.current_world().size > 1:
        raise UserError("--mode export takes one process: start it without torchrun")
    trained = distributed.broadcast_from_rank0(lambda: open_trained(given))
    note_unused(given, trained.cfg)
    try:
        return USES[mode](*trained)
    except UserError as error:
        raise with_data_dir(error, given, trained.cfg) from error


def train(given: dict[str, Any]) -> int:
    """Start a run, or continue the one that ``--resume`` names."""
    if not threading.main_thread().is_alive():
        raise UserError("the Python script that started this thread has ended: let it join() the thread")
    cfg, device, images, resumed = find_job(given)
    note_unused(given, cfg)
    trainer = Trainer(cfg, images, device, distributed.current_world())
    if resumed is None:
        if cfg.load_ckpt:
            trainer.load_weights(*distributed.broadcast_from_rank0(lambda: open_checkpoint(cfg.load_ckpt, asdict(cfg))))
        directory = distributed.broadcast_from_rank0(lambda: RunDir.create(cfg.logdir, cfg.mode, cfg.note))
        log_position = 0
    else:
        directory, path, log_position = resumed.directory, resumed.path, resumed.content["log_position"]
        if resumed.content["data"] != images.description:
            raise UserError(f"the images in {cfg.data_dir} are not those that {path} was trained on: change --data_dir")
        trainer.resume(resumed.content["state"])
        if trainer.step >= trainer.total_steps:
            limit = "--max_steps" if trainer.total_steps == cfg.max_steps else "--epochs"
            print(f"{directory.path} is finished after {trainer.step} steps; a larger {limit} continues it.")
            return 0
        if path.name == "previous.pt":  # a broken last.pt must not become the checkpoint before the next
            distributed.broadcast_from_rank0(lambda: set_aside(path.with_name("last.pt")))
    del resumed  # all that a checkpoint holds
    launch.remember("run", str(directory.path))  # for torchrun's next attempt, should this one fail
    return trainer.train(directory, log_position)


class Job(NamedTuple):
    """What is to be trained: a new run, or ``resumed``, a run that goes on."""

    cfg: Config
    device: torch.device
    images: data.ImageData
    resumed: resume.Resumed | None


def find_job(given: dict[str, Any]) -> Job:
    """The run that the options name, or that they find by ``--resume auto``, or else a new one; with its images."""
    resumed = distributed.broadcast_from_rank0(lambda: resume.named_run(given))
    cfg = resumed.cfg if resumed else Config(**given)
    device = utils.pick_device(cfg.gpu)
    utils.set_speed_options(device)
    images = load_images(cfg, device, given)
    if cfg.resume == "auto" and resumed is None:
        resumed = distributed.broadcast_from_rank0(lambda: resume.newest_run(cfg, given, images.description))
    return Job(resumed.cfg if resumed else cfg, device, images, resumed)


def load_images(cfg: Config, device: torch.device, given: dict[str, Any]) -> data.ImageData:
    """The data set, which must be the same for all processes."""
    where = cfg.dataset, cfg.data_dir, cfg.image_size, cfg.n_valid, device, cfg.data_device
    try:
        images = distributed.rank0_first(lambda: data.load(*where))
    except UserError as error:
        raise with_data_dir(error, given, cfg) from error
    if distributed.broadcast_from_rank0(lambda: images.description) != images.description:
        raise UserError(f"the images in {cfg.data_dir} are not the same on all machines: copy them from the first")
    return images


def with_data_dir(error: UserError, given: dict[str, Any], cfg: Config) -> UserError:
    """The error; where it is about a ``--data_dir`` that was not given but comes from a checkpoint, it says so."""
    if "data_dir" in given or cfg.data_dir not in str(error) or cfg.data_dir == os.path.abspath(Config.data_dir):
        return error
    return UserError(f"{error} (--data_dir {cfg.data_dir} comes from the checkpoint; give --data_dir to name another)")


def note_unused(given: dict[str, Any], cfg: Config) -> None:
    names = unused(given, cfg)
    if names:
        options = ", ".join(f"--{name}" for name in names)
        print(f"note: --mode {cfg.mode} does not use {options}", file=sys.stderr)


if __name__ == "__main__":
    terminal.protect()
    status = main(sys.argv[1:])
    terminal.leave(status, at_once=distributed.is_distributed())  # others are still connected only after an error
