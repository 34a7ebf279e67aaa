"""--mode export: a checkpoint's network as a file that other programs open."""

import io
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from checkpoints.load import Trained, load_model
from checkpoints.other_programs import authors_weights
from config import Config
from config.cli import as_typed
from logger.files import replace_file
from sgld import uniform_images
from utils import UserError, printable

FRESH = 1000  # images of a replay buffer, where the checkpoint has none

# What each program of --export_for is called, and the values that options of its network can have.
FAMILY = {"backbone": ("jem",), "norm": ("none", "batch", "instance", "layer", "act"), "activation": ("leaky_relu",)}
FAMILY |= {"stages": (3,), "separate_energy": (False, True)}
ROBUST = {"backbone": ("robust",), "norm": ("batch",), "activation": ("relu", "silu"), "separate_energy": (False,)}
PROGRAMS = {
    "jem": ("JEM", FAMILY),
    "jem++": ("JEM++ (its --model yopo)", FAMILY),
    "sada-jem": ("SADA-JEM or M-JEM", FAMILY | {"stages": (3, 4)}),
    "robust": ("DAT (images in [0, 1])", FAMILY | ROBUST),
}


def run(trained: Trained) -> int:
    """Write a checkpoint's network to ``--export``, averaged where it is; returns 0.

    Raises UserError for a file that is there already, and for a network that the program of ``--export_for`` lacks.
    """
    cfg, content, target = trained.cfg, trained.content, Path(trained.cfg.export)
    weights, told = load_model(trained, torch.device("cpu")).state_dict(), []
    if os.path.exists(target):  # False where it may not be looked at
        raise UserError(f"--export {target} exists: name a new file")
    if not os.path.isdir(target.parent):
        raise UserError(f"--export {target}: there is no folder {target.parent}")
    if target.suffix == ".pt":
        program = program_for(cfg)
        written, told = authors_file(cfg, program, weights, content), about(cfg, program, content)
    else:
        written = safetensors_file(weights, content)
    replace_file(target, written)
    print("; ".join([f"Wrote {printable(target)} ({len(written) / 2**20:.1f} MiB)", *told]))
    return 0


def safetensors_file(tensors: dict[str, torch.Tensor], content: dict[str, Any], **further: Any) -> bytes:
    """A file that ``load_checkpoint`` reads: tensors, and what ``content`` and ``further`` say of them."""
    about = {"config": content["config"], "data": content["data"], "step": content["state"]["step"]}
    about |= {"averaged": "ema" in content["state"], "processes": content.get("processes", 1), **further}
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    return save(tensors, {name: json.dumps(value) for name, value in about.items()})


def program_for(cfg: Config) -> str:
    """The name of the program that a file is for. Raises UserError if it does not have the network of ``cfg``."""
    by_recipe = {"jem++": "jem++", "sada-jem": "sada-jem", "m-jem": "sada-jem"}.get(cfg.recipe, "jem")
    auto = "robust" if cfg.backbone == "robust" else "sada-jem" if cfg.stages == 4 else by_recipe
    name = auto if cfg.export_for == "auto" else cfg.export_for
    title, allowed = PROGRAMS[name]
    lacks = [as_typed(option, vars(cfg)[option]) for option in allowed if vars(cfg)[option] not in allowed[option]]
    if lacks:
        advice = "name another program, or give --export NAME.safetensors, which holds any network"
        raise UserError(f"--export_for {name}: the network of {title} has no {', '.join(lacks)}: {advice}")
    return name


def authors_file(cfg: Config, program: str, weights: dict[str, torch.Tensor], content: dict[str, Any]) -> bytes:
    """What the scripts of a program read: weights and replay buffer, or of robust classifiers just the weights."""
    written = authors_weights(weights, program)
    if program != "robust":
        rng, held = torch.Generator().manual_seed(cfg.seed), content["state"].get("buffer")
        images = held["images"].float() if held else uniform_images(FRESH, content["data"]["shape"], rng)
        written = {"model_state_dict": written, "replay_buffer": images.contiguous()}
    file = io.BytesIO()
    torch.save(written, file)
    return file.getvalue()


def about(cfg: Config, program: str, content: dict[str, Any]) -> list[str]:
    """What the line says that names the file: which program it is for, and whether that builds such a network."""
    usual = list(content["data"]["shape"]) == [3, 32, 32] and len(content["data"]["class_names"]) == 10
    notes = [f"for {PROGRAMS[program][0]}"]
    if not usual or cfg.stages == 4 or cfg.activation == "silu" or cfg.separate_energy:
        notes.append("whose scripts need options or changes for such a network: see docs/checkpoints.md")
    if program != "robust" and "buffer" not in content["state"]:
        notes.append(f"its replay buffer is {FRESH} images of noise, since the checkpoint has none")
    return notes
