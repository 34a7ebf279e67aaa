"""Command line of the program: options to a Config, a Config to one mode."""

import os
import signal
import sys

if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))  # PYTHONSAFEPATH leaves it out
# Not by %run in a notebook, whose process and streams are somebody else's.
IS_PROGRAM = __name__ == "__main__" and any(os.path.basename(word) == "main.py" for word in sys.orig_argv)
if IS_PROGRAM:  # before the seconds in which torch and Matplotlib are imported
    os.environ.pop("MPLBACKEND", None)  # a notebook's, which may not be installed here; none is needed
    if sys.stderr is None or not sys.stderr.isatty():
        os.environ.setdefault("TQDM_MININTERVAL", "10")  # seconds; a log file wants fewer states of a bar
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # training saves a checkpoint for it, all else does nothing
    if signal.getsignal(signal.SIGINT) == signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # until ``main`` is there, Ctrl-C ends it without a traceback

from dataclasses import asdict
from typing import Any

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
from generation import sample, score
from logger import terminal
from logger.progress import check_room
from logger.run_dir import RunDir
from models.predict import predict
from trainer import Trainer
from utils import TrainingFailed, UserError

USES = {"test": evaluation.run.run, "sample": sample.run, "score": score.run, "export": export.run}
NOT_ENOUGH_MEMORY = "not enough memory: make --image_size, --batch_size, --width, --buffer_size or --n_samples smaller"


def main(arguments: list[str]) -> int:
    """Run one command line; returns the exit status that --help explains."""
    try:
        distributed.connect()
        with distributed.only_rank0_prints():
            status = run(arguments)
        if distributed.is_distributed():  # torchrun sends SIGTERM to all when one ends: our exit status is to stay
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            torch.distributed.destroy_process_group()
        return status
    except UserError as error:
        return complain(2, "error", str(error))
    except TrainingFailed as error:
        return complain(1, "failed", str(error))
    except (MemoryError, RuntimeError) as error:
        if distributed.lost_connection(error):
            reason = str(error).strip().partition("\n")[0]
            return complain(1, "failed", f"a process of this run has ended or cannot be reached ({reason})")
        if utils.out_of_memory(error):
            return complain(2, "error", NOT_ENOUGH_MEMORY)
        raise
    except KeyboardInterrupt:
        return 130


def complain(status: int, kind: str, message: str) -> int:
    """One line on stderr, from one of several processes that have the same to say; returns ``status``."""
    if distributed.first_to_say(message.partition(" (")[0]):  # what follows may differ between processes
        print(f"{kind}: {utils.printable(message)}", file=sys.stderr)
    return status


def run(arguments: list[str]) -> int:
    given = parse(arguments, Config)
    mode = given.get("mode", Config.mode)
    if mode not in USES:
        return train(given)
    if mode in ("export", "score") and distributed.current_world().size > 1:
        raise UserError(f"--mode {mode} takes one process: start it without torchrun")
    trained = distributed.broadcast_from_rank0(lambda: open_trained(given))
    if trained.content["data"].get("assumed"):  # another program's file does not tell the size of its images
        given.pop("image_size", None)
    note_unused(given, trained.cfg)
    return USES[mode](trained)


def train(given: dict[str, Any]) -> int:
    """Start a run, or continue the one that ``--resume`` names or, with ``auto``, that the options find."""
    resumed = distributed.broadcast_from_rank0(lambda: resume.named_run(given))
    cfg = resumed.cfg if resumed else Config(**given)
    device = utils.pick_device(cfg.gpu)
    utils.set_speed_options(device)
    where = cfg.dataset, cfg.data_dir, cfg.image_size, cfg.n_valid, device, cfg.data_device
    images = distributed.rank0_first(lambda: data.load(*where))
    if distributed.broadcast_from_rank0(lambda: images.description) != images.description:
        raise UserError(f"the images in {cfg.data_dir} are not the same on all machines: copy them from the first")
    if cfg.resume == "auto" and resumed is None:
        resumed = distributed.broadcast_from_rank0(lambda: resume.newest_run(cfg, given, images.description))
        cfg = resumed.cfg if resumed else cfg
    note_unused(given, cfg)
    if resumed and not resumed.content["data"].items() <= images.description.items():
        raise UserError(f"{resumed.path} was trained on other images than those in {cfg.data_dir}: change --data_dir")
    trainer = Trainer(cfg, images, device, distributed.current_world())
    if resumed is None:
        if cfg.load_ckpt:
            trainer.load_weights(*distributed.broadcast_from_rank0(lambda: open_checkpoint(cfg.load_ckpt, asdict(cfg))))
        predict(trainer.model, images.test.images[:2])  # a network of one's own may fail: before anything is written
        check_room(trainer)
        directory = distributed.broadcast_from_rank0(lambda: RunDir.create(cfg.logdir, cfg.mode, cfg.note))
        log_position = 0
    else:
        directory, path, log_position = resumed.directory, resumed.path, resumed.content["log_position"]
        trainer.resume(resumed.content["state"])
        if trainer.step >= trainer.total_steps:
            limit = "--max_steps" if trainer.total_steps == cfg.max_steps else "--epochs"
            advice = f"--resume {directory.path} with a larger {limit} continues it"
            print(f"{directory.path} is finished after {trainer.step} steps; {advice}.")
            return 0
        if path.name == "previous.pt":  # a broken last.pt must not become the checkpoint before the next
            distributed.broadcast_from_rank0(lambda: set_aside(path.with_name("last.pt")))
    del resumed  # all that a checkpoint holds
    return trainer.train(directory, log_position)


def note_unused(given: dict[str, Any], cfg: Config) -> None:
    if options := ", ".join(f"--{name}" for name in unused(given, cfg)):
        print(f"note: this run with --mode {cfg.mode} does not use {options}", file=sys.stderr)
    if cfg.recipe == "dat" and cfg.draws_samples and "folder" not in cfg.start_shares:
        print(f"note: without --start_dir, images of other data, chains start from {cfg.start_name}", file=sys.stderr)


if IS_PROGRAM:
    terminal.protect()
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    status = main(sys.argv[1:])
    terminal.leave(status, at_once="RANK" in os.environ)  # of several processes: torch may hang where it ends by itself
elif __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
