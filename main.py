"""Command line of the program: options to a Config, a Config to one mode."""

import os
import signal

if __name__ == "__main__":  # before the seconds in which torch and Matplotlib are imported
    os.environ.pop(
        "MPLBACKEND", None
    )  # a notebook's: Matplotlib refuses one that is not installed, and needs none here
    if hasattr(signal, "SIGUSR1"):
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # training saves a checkpoint for it, all else does nothing

import argparse
import difflib
import re
import sys
import threading
from dataclasses import asdict, fields
from pathlib import Path

import torch

import data
import distributed
import evaluation.run
import utils
from checkpoints import export
from checkpoints.files import set_aside
from checkpoints.other_programs import open_checkpoint
from checkpoints.resume import before_restart, continued, newest_continued
from config import Config
from config.cli import absolute_paths, add_options, option_names
from config.recipes import with_recipe
from config.use import check_training, check_use
from distributed import launch
from generation import sample
from logger import terminal
from logger.progress import check_room
from logger.run_dir import RunDir
from trainer import Trainer
from utils import TrainingFailed, UserError


class Parser(argparse.ArgumentParser):
    def error(self, message):
        unknown = re.findall(r"(?<!\S)--?[A-Za-z][^\s=]*", message)  # without the values of --name=value
        if message.startswith("unrecognized arguments") and unknown:
            known = [name for f in fields(Config) for name in option_names(f)]
            near = difflib.get_close_matches("--" + unknown[0].lstrip("-").replace("-", "_"), known, 1)
            message = f"there is no option {unknown[0]}" + (f", did you mean {near[0]}?" if near else "")
        raise UserError(f"{message}; see python main.py --help")


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
        complain("error", one_line(error))
        return 2
    except TrainingFailed as error:
        complain("failed", one_line(error))
        return 1
    except (MemoryError, RuntimeError) as error:
        if launch.lost_connection(error):
            reason = str(error).strip().partition("\n")[0]
            complain("failed", f"a process of this run has ended or cannot be reached ({one_line(reason)})")
            return 1
        if not out_of_memory(error):
            raise
        complain(
            "error",
            "not enough memory; a smaller --batch_size, --width, --buffer_size, --image_size, --n_samples or "
            "--max_images needs less",
        )
        return 2
    except KeyboardInterrupt:
        return 130


def complain(kind: str, message: str) -> None:
    """One line on stderr, from one of several processes that have the same to say."""
    if launch.first_to_say(message):
        print(f"{kind}: {message}", file=sys.stderr)


def out_of_memory(error: Exception) -> bool:
    """Python, NumPy and CUDA's allocator have exceptions of their own for it, other parts of torch only messages."""
    messages = ("can't allocate memory", "out of memory")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(m in str(error) for m in messages)


def one_line(error: Exception | str) -> str:
    """The message with everything that a terminal would not print as one line escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(error))


def run(arguments: list[str]) -> int:
    parser = Parser(
        prog="main.py",
        allow_abbrev=False,
        description="Train a network as a classifier and as an energy-based model.",
        epilog="Exit status: 0 done; 1 training failed for good; 2 a bad option, a missing or broken input; 129, 130, "
        "143 stopped by SIGHUP, Ctrl-C, SIGTERM, after a checkpoint was written.",
    )
    add_options(parser, Config)
    given = vars(parser.parse_args(arguments))
    for f in fields(Config):
        if given.get(f.name) == "" and f.metadata["path_but"] is not None:  # a shell variable that is not set
            raise UserError(f"--{f.name} is empty: give a path")
    given |= absolute_paths(Config, given)
    check_use(given)
    if given.get("mode") == "export" and distributed.current_world().size > 1:
        raise UserError("--mode export takes one process: start it without torchrun")
    uses = {"sample": sample.run, "test": evaluation.run.run, "export": export.run}
    if use := uses.get(given.get("mode")):
        cfg, path, content = distributed.broadcast_from_rank0(lambda: trained(given))
        try:
            return use(cfg, path, content)
        except UserError as error:
            about_data = cfg.data_dir in str(error)
            raise UserError(f"{error}{remembered(cfg, given) if about_data else ''}") from error
    return train(given)


def train(given: dict) -> int:
    """Start a run, or continue the one that ``--resume`` names."""
    if not threading.main_thread().is_alive():
        raise UserError("the Python script that started this thread has ended: let it join() the thread")
    resume = given.get("resume", "")
    if resume and resume != "auto" and "load_ckpt" in given:
        raise UserError("--resume continues a run and --load_ckpt starts one: give one of them, or --resume auto")
    resumed = distributed.broadcast_from_rank0(lambda: before_restart(given))
    if not resumed and resume not in ("", "auto"):
        resumed = distributed.broadcast_from_rank0(lambda: continued(given, resume))
    cfg = resumed.cfg if resumed else Config(**with_recipe(given))
    check_training(given, cfg)
    device = utils.pick_device(cfg.gpu)
    utils.set_speed_options(device)
    where = cfg.dataset, cfg.data_dir, cfg.image_size, cfg.n_valid, device, cfg.data_device
    try:
        images = distributed.rank0_first(lambda: data.load(*where))
    except UserError as error:
        raise UserError(f"{error}{remembered(cfg, given)}") from error
    if distributed.broadcast_from_rank0(lambda: images.description) != images.description:
        raise UserError(f"the images in {cfg.data_dir} are not the same on all machines: copy them from the first")
    if resume == "auto" and not resumed:
        resumed = distributed.broadcast_from_rank0(lambda: newest_continued(cfg, given, images.description))
        cfg = resumed.cfg if resumed else cfg
    trainer = Trainer(cfg, images, device, distributed.current_world())
    if resumed is None:
        if cfg.load_ckpt:
            trainer.load_weights(*distributed.broadcast_from_rank0(lambda: open_checkpoint(cfg.load_ckpt, asdict(cfg))))
        check_room(trainer, Path(cfg.logdir))
        return started(trainer, distributed.broadcast_from_rank0(lambda: RunDir.create(cfg.logdir, cfg.mode, cfg.note)))

    _, directory, path, content = resumed
    if content["data"] != images.description:
        raise UserError(f"the images in {cfg.data_dir} are not those that {path} was trained on: change --data_dir")
    trainer.resume(content["state"])
    if trainer.step >= trainer.total_steps:
        limit = "--max_steps" if trainer.total_steps == cfg.max_steps else "--epochs"
        print(f"{directory.path} is finished after {trainer.step} steps; a larger {limit} continues it.")
        return 0
    if path.name == "previous.pt":  # a broken last.pt must not become the checkpoint before the next
        distributed.broadcast_from_rank0(lambda: set_aside(path.with_name("last.pt")))
    position = content["log_position"]
    del resumed, content  # all that a checkpoint holds
    return started(trainer, directory, position)


def started(trainer: Trainer, directory: RunDir, log_position: int = 0) -> int:
    """Train in a run directory, which torchrun's next attempt will find if this one fails."""
    launch.remember("run", str(directory.path))
    return trainer.train(directory, log_position)


def remembered(cfg: Config, given: dict) -> str:
    """What to add to an error about ``--data_dir`` that was not given, but comes from a checkpoint."""
    default = os.path.abspath(Config.data_dir)
    reused = given.get("resume", "auto") != "auto" or cfg.mode in ("test", "sample")
    if "data_dir" in given or not reused or cfg.data_dir == default:
        return ""
    return f" (--data_dir {cfg.data_dir} comes from the checkpoint; give --data_dir to name another)"


def trained(given: dict) -> tuple[Config, Path, dict]:
    """The Config with which to use the checkpoint of ``--load_ckpt``, and that checkpoint's path and content.

    Its own data, network and sampler stand where other options were not given.
    """
    if not given.get("load_ckpt"):
        raise UserError(f"--mode {given['mode']} needs --load_ckpt, a checkpoint or a run directory")
    if "resume" in given:
        raise UserError(f"--resume continues training; --mode {given['mode']} takes --load_ckpt alone")
    path, content = open_checkpoint(given["load_ckpt"], given)
    own = asdict(Config.from_dict(content["config"], str(path)))
    if given.get("recipe", own["recipe"]) != own["recipe"]:
        raise UserError(f"{path} was trained with --recipe {own['recipe']}: give single options for other chains")
    kept = {f.name: own[f.name] for f in fields(Config) if f.metadata["group"] in ("data", "model", "SGLD")}
    kept["recipe"] = own["recipe"]
    del kept["class_cond"]  # of the chains in training: samples are of log p(x) unless it is given
    if given.get("dataset", own["dataset"]) != own["dataset"]:  # these belong to the checkpoint's images
        del kept["image_size"], kept["n_valid"]
        if "folder" in (given["dataset"], own["dataset"]):
            del kept["data_dir"]
    if given.get("start", own["start"]) != "folder":
        del kept["start_dir"]
    return Config(**kept | given), path, content


if __name__ == "__main__":
    terminal.protect()
    terminal.leave(
        main(sys.argv[1:]), at_once=distributed.is_distributed()
    )  # others are still connected only after an error
