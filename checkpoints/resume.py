"""Which run a command line continues, and with which options; the state of several processes in one checkpoint."""

import math
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

import distributed
from checkpoints.files import CHECKPOINT_FORMAT, find_checkpoint, is_ours
from config import Config
from config.cli import as_typed
from distributed import World
from logger.run_dir import RunDir, read_config
from utils import UserError

RESUMABLE = frozenset(f.name for f in fields(Config) if f.metadata["resumable"])
# Resumable ones in which --resume auto wants a run to agree: with others it is another job.
OF_A_JOB = ("epochs", "max_steps", "load_ckpt", "start_dir", "note")
PER_PROCESS = ("rng", "meter")  # parts of a state that differ between processes, besides the buffer
OF_DISTANCES = {"feature_ckpt", "n_samples", "n_sample_steps"}  # with others, distances cannot be compared


class Resumed(NamedTuple):
    cfg: Config  # with which the run goes on
    directory: RunDir
    path: Path  # of its checkpoint
    content: dict[str, Any]


def named_run(given: dict[str, Any]) -> Resumed | None:
    """The run that ``--resume`` names, if any."""
    name = given.get("resume")
    if name in (None, "auto"):  # auto: see ``newest_run``, when the images are known
        return None
    if "load_ckpt" in given:
        raise UserError("--resume continues a run and --load_ckpt starts one: give one of them, or --resume auto")
    return continued(given, name)


def continued(given: dict[str, Any], run: str) -> Resumed:
    """``run``, a run directory or checkpoint, with its own options where none are given; a UserError if it cannot.

    Those given must agree with it where another value would make another run.
    """
    directory = RunDir.of(run)
    path, content = find_checkpoint(run)
    if not is_ours(content) or content["format"] != CHECKPOINT_FORMAT or "rng" not in content["state"]:
        raise UserError(f"{path} is of another program or version, or only weights: start a new run with --load_ckpt")
    cfg = Config.from_dict(content["config"], str(path))
    changed = {name: value for name, value in given.items() if value != getattr(cfg, name)}
    if others := sorted(changed.keys() - RESUMABLE):
        own, new = (" ".join(as_typed(name, of[name]) for name in others) for of in (vars(cfg), changed))
        advice = "needs a new run: leave it out, or start one with --load_ckpt"
        raise UserError(f"{path} was trained with {own}; {new} {advice}")
    if changed.keys() & OF_DISTANCES:
        content["state"]["best"].pop("best_quality.pt", None)
    return Resumed(replace(cfg, **changed), directory, path, content)


def newest_run(cfg: Config, given: dict[str, Any], description: dict[str, Any]) -> Resumed | None:
    """The run of ``--resume auto``: of those with the same options and images, the one that was saved last.

    Interrupted runs come before finished ones. A run that cannot be used is printed with the reason.
    """
    here = {name: getattr(cfg, name) for name in ("gpu", "data_dir", "data_device")}  # by which the images are loaded
    for run in sorted(same_runs(cfg, description), key=priority, reverse=True):
        try:
            resumed = continued(here | given, str(run))
        except UserError as error:  # another process holds it, for instance
            print(f"Skipping {run}: {error}.")
            continue
        print(f"--resume auto takes {run}, which was saved last after step {resumed.content['state']['step']}.")
        return resumed
    print(f"No run with these options and length in {cfg.logdir}: starting a new one. --resume RUN makes a run longer.")
    return None


def same_runs(cfg: Config, description: dict[str, Any]) -> Iterator[Path]:
    """The runs in ``--logdir`` with the same images and options, apart from those that leave the job the same."""
    same = {name: value for name, value in asdict(cfg).items() if name not in RESUMABLE or name in OF_A_JOB}
    default = asdict(Config())  # of options that an older run does not know
    try:
        runs = {path.parent.parent.resolve() for path in Path(cfg.logdir).glob("*/ckpt/*.pt")}
    except OSError as error:
        raise UserError(f"cannot read --logdir {cfg.logdir}: {error.strerror}") from None
    for run in runs:
        content = read_config(run)
        if content and same.items() <= (default | content["options"]).items():
            if content.get("data", {"digest": ""}).items() <= description.items():
                yield run
            else:
                print(f"Skipping {run}: it was trained on other images, or by an older version.")


def priority(run: Path) -> tuple[bool, float]:
    """Whether a run was interrupted, and when it was saved last (seconds since 1970): the larger, the sooner."""
    with suppress(UserError):  # ``continued`` says why
        path, content = find_checkpoint(str(run))
        if is_ours(content):
            interrupted = content["state"]["step"] < content.get("total_steps", math.inf)
            return interrupted, content.get("time") or path.stat().st_mtime  # older ones lack the time, and the length
    return False, 0.0


def gather_state(state: dict[str, Any]) -> dict[str, Any]:
    """In rank 0, its state with what the others have of their own: ``processes``, by rank, and the whole replay buffer.

    Image i of the process of rank r is image i * size + r of the whole, which keeps classes together.
    """
    rank, size = distributed.current_world()
    parts = [None] * size if rank == 0 else None
    torch.distributed.gather_object({name: state[name] for name in (*PER_PROCESS, "buffer") if name in state}, parts)
    if parts is None:
        return state
    buffers = [part.pop("buffer") for part in parts if "buffer" in part]
    if buffers:
        whole = {name: torch.stack([buffer[name] for buffer in buffers], 1).flatten(0, 1) for name in buffers[0]}
        state = state | {"buffer": whole}
    return state | {"processes": parts}


def shard_state(state: dict[str, Any], world: World) -> dict[str, Any]:
    """This process's part of a gathered state, or of a state that one process saved.

    If the number of processes has changed, each gets what rank 0 had of its own (``PER_PROCESS``).
    """
    everyone = state.get("processes", [{}])
    state = state | everyone[world.rank if len(everyone) == world.size else 0]
    buffer = {name: whole[world.rank :: world.size] for name, whole in state.get("buffer", {}).items()}
    return state | ({"buffer": buffer} if buffer else {})
