"""Command line of the program: options to a Config, a Config to one mode."""

import argparse
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch

import data
import evaluation
import sample
import utils
from config import CHANGEABLE, Config, add_options
from storage.checkpoint import find_checkpoint, set_aside
from storage.run_dir import RunDir, read_options
from trainer import Trainer, describe
from utils import TrainingFailed, UserError


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message}; see python main.py --help")


def main(arguments: list[str]) -> int:
    """Run one command line; returns the exit status that --help explains."""
    try:
        return run(arguments)
    except UserError as error:
        print("error:", one_line(error), file=sys.stderr)
        return 2
    except TrainingFailed as error:
        print("failed:", one_line(error), file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        print(
            "error: not enough memory; a smaller --batch_size, --width, --buffer_size, --image_size, --n_samples or "
            "--max_images needs less",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        return 130


def out_of_memory(error: Exception) -> bool:
    """Python, NumPy and CUDA's allocator have exceptions of their own for it, other parts of torch only messages."""
    messages = ("can't allocate memory", "out of memory")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(m in str(error) for m in messages)


def one_line(error: Exception) -> str:
    """The message with everything that a terminal would not print as one line escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(error))


def run(arguments: list[str]) -> int:
    parser = Parser(
        prog="main.py",
        allow_abbrev=False,
        description="Train a network as a classifier and as an energy-based model.",
        epilog="Exit status: 0 done; 1 training failed for good; 2 a bad option, a missing or broken input; 130, 143 "
        "stopped by Ctrl-C, SIGTERM, after a checkpoint was written.",
    )
    add_options(parser)
    given = vars(parser.parse_args(arguments))
    for name in ("load_ckpt", "resume"):
        if given.get(name) == "":  # a shell variable that is not set
            raise UserError(f"--{name} is empty: name a run directory or a checkpoint")
    for name in ("class_cond", "from_buffer", "inpaint", "denoise", "save_images"):
        if name in given and given.get("mode") != "sample":
            raise UserError(f"--{name} is for --mode sample")
    if given.get("mode") in ("sample", "test"):
        use = {"sample": sample.run, "test": evaluation.run}[given["mode"]]
        return use(*trained(given))
    cfg, resumed = continued(given) if given.get("resume") else (Config(**given), None)
    device = utils.pick_device(cfg.gpu)
    utils.set_speed_options(device)
    images = data.load(cfg.dataset, cfg.data_dir, cfg.image_size, cfg.n_valid, device)
    trainer = Trainer(cfg, images, device)
    if resumed is None:
        if cfg.load_ckpt:
            trainer.load_weights(cfg.load_ckpt)
        directory = RunDir.create(cfg.logdir, cfg.mode, cfg.note)
        directory.write_config(asdict(cfg), utils.environment(device))
        return trainer.train(directory)

    directory, path, content = resumed
    if content["data"] != describe(images):
        raise UserError(f"the images in {cfg.data_dir} are not those that {path} was trained on; mend --data_dir")
    trainer.load_state_dict(content["state"])
    if trainer.step >= trainer.total_steps:
        limit = "--max_steps" if trainer.total_steps == cfg.max_steps else "--epochs"
        print(f"{directory.path} is finished after {trainer.step} steps; a larger {limit} continues it.")
        return 0
    trainer.load_snapshots(directory.path / "snapshots", content["snapshots"])
    directory.write_config(asdict(cfg), utils.environment(device))
    if path.name == "previous.pt":  # a broken or forsaken last.pt must not become the checkpoint before the next
        set_aside(path.with_name("last.pt"))
    return trainer.train(directory, content["log_position"])


def trained(given: dict) -> tuple[Config, Path, dict]:
    """The Config with which to use the checkpoint of ``--load_ckpt``, and that checkpoint's path and content.

    Its own data, network and sampler stand where other options were not given.
    """
    if not given.get("load_ckpt"):
        raise UserError(f"--mode {given['mode']} needs --load_ckpt, a checkpoint or a run directory")
    if "resume" in given:
        raise UserError(f"--resume continues training; --mode {given['mode']} takes --load_ckpt alone")
    path, content = find_checkpoint(given["load_ckpt"])
    own = asdict(Config.from_dict(content["config"], str(path)))
    kept = {f.name: own[f.name] for f in fields(Config) if f.metadata["group"] in ("data", "model", "SGLD")}
    if given.get("dataset", own["dataset"]) != own["dataset"]:  # these belong to the checkpoint's images
        del kept["image_size"], kept["n_valid"]
    return Config(**kept | given), path, content


def continued(given: dict) -> tuple[Config, tuple[RunDir, Path, dict] | None]:
    """The Config of the run that ``--resume`` names, its directory, and its checkpoint's path and content.

    Options that were not given are the run's own; those given must agree with it where another value would make
    another run. If "auto" finds no run, a Config for a new one, and None.
    """
    place = given["resume"]
    if "load_ckpt" in given:
        raise UserError("--resume continues a run and --load_ckpt starts one: give one of them")
    if place == "auto":
        cfg = Config(**given)
        place = newest_run(cfg)
        if place is None:
            print(f"No run with this configuration in {cfg.logdir}: starting a new one.")
            return cfg, None
    directory = RunDir.of(place)
    path, content = find_checkpoint(place)
    cfg = Config.from_dict(content["config"], str(path))
    for name, value in given.items():
        if name not in CHANGEABLE and value != getattr(cfg, name):
            raise UserError(
                f"--{name} {value} would make another run of {path}, which has {getattr(cfg, name)}; "
                "leave it out, or start a new run with --load_ckpt"
            )
    changes = {name: value for name, value in given.items() if name in CHANGEABLE}
    return replace(cfg, **changes), (directory, path, content)


def newest_run(cfg: Config) -> str | None:
    """The newest run directory in logdir that has a checkpoint and the same configuration as ``cfg``."""
    same = {**cfg.identity, "load_ckpt": cfg.load_ckpt}  # one that started from other weights is another run
    default = asdict(Config())  # of options that an older run does not know
    try:
        found = sorted(Path(cfg.logdir).glob("*/ckpt/*.pt"), key=lambda p: p.parent.parent.name, reverse=True)
    except OSError as error:
        raise UserError(f"cannot read --logdir {cfg.logdir}: {error.strerror}") from None
    for path in found:
        run = path.parent.parent
        options = read_options(run)
        if options and {k: options.get(k, default[k]) for k in same} == same:
            return str(run)
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
