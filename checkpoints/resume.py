"""Which run a command line continues, and with which options."""

import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from checkpoints.files import CHECKPOINT_FORMAT, find_checkpoint
from config import CHANGEABLE, Config
from config.cli import as_typed
from config.recipes import with_recipe
from distributed import launch
from logger.run_dir import RunDir, read_config
from utils import UserError

OF_DISTANCES = ("feature_ckpt", "n_samples", "n_sample_steps")  # with others, distances cannot be compared


class Resumed(NamedTuple):
    cfg: Config  # with which the run goes on
    directory: RunDir
    path: Path  # of its checkpoint
    content: dict[str, Any]


def continued(given: dict, run: str) -> Resumed:
    """``run``, a run directory or checkpoint, to go on with. Raises UserError if it cannot.

    Options that were not given are the run's own; those given must agree with it where another value would make
    another run.
    """
    directory = RunDir.of(run)
    path, content = find_checkpoint(run)
    if content["format"] != CHECKPOINT_FORMAT:
        raise UserError(f"{path} was written by an older version: it can start a new run with --load_ckpt")
    cfg = Config.from_dict(content["config"], str(path))
    changeable = CHANGEABLE | {"start_dir"}  # its images may have moved
    for name, value in given.items():
        if name not in changeable and value != getattr(cfg, name):
            raise UserError(
                f"{path} was trained with {as_typed(name, getattr(cfg, name))}; {as_typed(name, value)} needs a new "
                "run: leave it out, or start one with --load_ckpt"
            )
    changes = {name: value for name, value in given.items() if name in changeable}
    if any(changes.get(name, getattr(cfg, name)) != getattr(cfg, name) for name in OF_DISTANCES):
        content["state"]["best"].pop("best_quality.pt", None)
    if changes.get("start_dir", cfg.start_dir) != cfg.start_dir:
        print("The images of --start_dir are not compared with those that the run had before.")
    return Resumed(replace(cfg, **changes), directory, path, content)


def before_restart(given: dict) -> Resumed | None:
    """The result of ``continued`` for the run that an earlier torchrun attempt started, if it has a checkpoint."""
    run = launch.remembered("run")
    if run is None or not any(Path(run, "ckpt").glob("*.pt")):
        return None
    began = with_recipe(given) if given.get("resume", "auto") == "auto" else given  # --resume RUN keeps the run's own
    return continued(without_beginning(began), run)


def without_beginning(options: dict) -> dict:
    """The options, but not what says where a run begins."""
    return {name: value for name, value in options.items() if name not in ("load_ckpt", "resume")}


def newest_continued(cfg: Config, given: dict, description: dict) -> Resumed | None:
    """The result of ``continued`` for the newest run with the same options and images, if there is one."""
    newest = newest_run(cfg, description)
    if newest:
        return continued(without_beginning(with_recipe(given)), newest)
    print(f"No run with this configuration in {cfg.logdir}: starting a new one.")
    return None


def newest_run(cfg: Config, description: dict) -> str | None:
    """The newest run directory in logdir with the same options and images that can be written to.

    A run that has the same options but cannot be used is printed with the reason.
    """
    same = {**cfg.identity, "load_ckpt": cfg.load_ckpt, "note": cfg.note}
    default = asdict(Config())  # of options that an older run does not know
    try:
        found = sorted(Path(cfg.logdir).glob("*/ckpt/*.pt"), key=lambda p: p.parent.parent.name, reverse=True)
    except OSError as error:
        raise UserError(f"cannot read --logdir {cfg.logdir}: {error.strerror}") from None
    for run in dict.fromkeys(path.parent.parent for path in found):
        content = read_config(run)
        options = content["options"]
        if not options or {k: options.get(k, default[k]) for k in same} != same:
            continue
        if content.get("data") != description:
            print(f"Skipping {run}: it was trained on other images, or by an older version.")
        elif not os.access(run, os.W_OK):
            print(f"Skipping {run}: it cannot be written to.")
        else:
            return str(run)
    return None
