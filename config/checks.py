"""Which options go together, and which of those that were given a run does not use."""

import math
from collections.abc import Iterator
from dataclasses import fields
from inspect import signature
from pathlib import Path
from typing import Any

from config.options import TRAINING
from models import BACKBONES
from sgld import chain_options
from utils import UserError

FEWEST = 20  # images that a distance between sets of images needs
NOT_OF_BACKBONES = {"backbone", "separate_energy", "norm_statistics", "sync_batch_norm"}  # options of the model


def contradictions(cfg) -> Iterator[str]:
    """What is wrong with the options of a Config together, though each alone is right; a sentence each."""
    if cfg.gpu != "cpu" and not all(index.isdecimal() for index in cfg.gpu.split(",")):
        yield f"--gpu takes the index of a CUDA device or cpu, not {cfg.gpu!r}"
    for name, shares in (("start", cfg.start_shares), ("outlier_images", cfg.outlier_shares)):
        if "folder" in shares and not cfg.start_dir:
            yield f"--{name} folder needs --start_dir, a folder of images"
    if any(c in "/\\" or not c.isprintable() for c in cfg.note) or len(cfg.note.encode()) > 200:
        yield "--note becomes part of a directory's name: no slashes or unprintable characters, and at most 200 bytes"
    if cfg.mode in TRAINING and not cfg.draws_samples and cfg.p_y_x_weight == 0:
        yield "--p_y_x_weight is 0 and no samples are drawn: there is nothing to train"
    if cfg.mode in TRAINING and cfg.norm == "act" and not cfg.load_ckpt and cfg.resume in ("", "auto"):
        yield "--norm act has no first values of its own: give --load_ckpt, a trained network with act norm"
    if cfg.mode in TRAINING and cfg.schedule == "step" and not cfg.decay_at:
        yield "--schedule step needs --decay_epochs, the epochs after which the learning rate falls"
    if cfg.attacks not in ("all", None) and cfg.refinements and not cfg.refine_steps:
        yield "--attacks refined needs --refine_steps above 0: leave out one of them"
    if cfg.mode == "sample" and (cfg.inpaint != "") + (cfg.denoise is not None) + cfg.from_buffer > 1:
        yield "--inpaint, --denoise and --from_buffer start from different images: give one of them"
    if "quality" in cfg.metrics and cfg.fresh_steps == 0:
        yield "--eval quality measures chains: give --n_sample_steps of at least 1"
    if cfg.mode == "score" and not cfg.images:
        yield "--mode score needs --images, a picture or a folder of pictures"
    if cfg.mode == "export" and Path(cfg.export).suffix not in (".pt", ".safetensors"):
        yield "--mode export needs --export, a file whose name ends in .pt or .safetensors"
    if cfg.mode != "energy_train":
        return
    if cfg.draws_samples and cfg.buffer_size < cfg.n_chains:
        yield f"--buffer_size {cfg.buffer_size} is smaller than the {cfg.n_chains} chains of a step"
    if cfg.draws_samples and cfg.sgld_step_max is not None and cfg.sgld_step_max <= cfg.sgld_step:
        yield f"--sgld_step_max {cfg.sgld_step_max} must be above --sgld_step {cfg.sgld_step}"
    if cfg.draws_samples and cfg.sgld_step == 0 and cfg.sgld_step_max is None:
        yield "--sgld_step 0 needs --sgld_step_max, to which chains grow"
    if cfg.draws_samples and cfg.norm_statistics == "frozen" and not cfg.load_ckpt:
        yield "--norm_statistics frozen (as in oe-jem, a second phase) needs --load_ckpt, a trained run, as of m-jem"
    if cfg.outlier_weight and not cfg.draws_samples and cfg.resume in ("", "auto"):  # older runs could have it
        yield "--outlier_weight is for training with samples: give --p_x_weight above 0, or --outlier_weight 0"
    if cfg.outlier_shares and cfg.norm == "batch" and cfg.norm_statistics == "batch":
        yield "--outlier_weight needs log p(x) of single images: give --norm_statistics running or frozen"
    running = cfg.norm == "batch" and cfg.norm_statistics == "running"
    if cfg.p_x_y_weight and (cfg.adversarial_eps or cfg.dropout_rate or running):  # their logits are not log p(x, y)
        yield "--p_x_y_weight needs --adversarial_eps 0, --dropout_rate 0, and --norm_statistics batch or frozen"
    if cfg.p_x_y_weight and not cfg.class_cond:
        yield "--p_x_y_weight needs samples of p(x|y): give --class_cond as well"
    if ((cfg.draws_samples and cfg.class_cond) or cfg.labels_per_class) and not cfg.classifies:
        yield "--class_cond and --labels_per_class need labels to learn from: give --p_y_x_weight or --p_x_y_weight"
    if cfg.quality_every and (cfg.fresh_steps == 0 or (cfg.n_samples or FEWEST) < FEWEST):
        yield f"--quality_every needs --n_sample_steps of 1 and --n_samples of {FEWEST}, or more"
    if cfg.quality_every and cfg.sync_batch_norm:
        yield "--quality_every draws other samples in each process, which --sync_batch_norm would mix"


def unused(given: dict[str, Any], cfg) -> list[str]:
    """The names of those given options that a run with the options ``cfg`` does not use."""
    unread = {f.name for f in fields(cfg) if cfg.mode not in f.metadata["modes"]}
    needs = {f.name: f.metadata["needs"] for f in fields(cfg) if f.metadata["needs"]}
    unread |= {name for name, options in needs.items() if not any(is_on(option, cfg) for option in options)}
    if "unused" in (taken := signature(BACKBONES[cfg.backbone]).parameters):  # it ignores what it does not name
        unread |= {f.name for f in fields(cfg) if f.metadata["group"] == "model"} - taken.keys() - NOT_OF_BACKBONES
    if "folder" not in cfg.start_shares | cfg.outlier_shares:
        unread.add("start_dir")
    of_chains = {"norm_statistics", *(f.name for f in fields(cfg) if f.metadata["group"] == "SGLD")}
    if cfg.mode in TRAINING and not cfg.draws_samples:
        unread |= of_chains
    if cfg.mode == "export" and Path(cfg.export).suffix != ".pt":
        unread.add("export_for")
    if cfg.mode == "test" and "quality" not in cfg.metrics:  # no chains but those of the refinement
        unread |= of_chains | {"batch_size", "precision"}
        if cfg.refinements and cfg.refine_steps:
            unread -= {"sgld_lr", "sgld_std", *(f"sgld_{name}" for name in chain_options(cfg))}
    if cfg.mode == "sample" and (cfg.inpaint or cfg.denoise):
        unread |= {"classes", "n_sample_steps"} if cfg.denoise else {"classes"}
    elif cfg.mode in ("test", "sample") and cfg.n_sample_steps is not None:
        unread |= {"sgld_step", "sgld_step_max"}
    if cfg.mode == "sample" and cfg.from_buffer:
        unread |= {"start", "start_dir"}
    return [name for name in given if name in unread]


def is_on(option: str, cfg) -> bool:
    """Whether an option, NAME or NAME=VALUE, is not off, or has that value, or a list with it."""
    name, _, value = option.partition("=")
    found = getattr(cfg, name)
    if not value:
        return bool(found)
    return value in found if isinstance(found, list) else value == found


def check_sizes(cfg, n_images: dict[str, int], n_classes: int, n_processes: int, shape: tuple[int, int, int]) -> None:
    """Raise UserError where batches or the replay buffer do not suit the images, or cannot be divided among processes.

    ``n_images``: how many training images each batch draws from, by the option that is its size; ``shape``: (C, H, W).
    """
    sizes = {name: cfg.n_chains if name == "p_x_batch_size" else cfg.batch_size for name in n_images}
    if few := {name: n for name, n in n_images.items() if n < sizes[name]}:
        raise UserError("; ".join(f"--{k} {sizes[k]} is larger than the {few[k]} images that it may take" for k in few))
    check_variance(cfg, shape, min(sizes.values()) // n_processes)
    sizes |= {"buffer_size": cfg.buffer_size} if cfg.draws_samples else {}
    sizes |= {"outlier_batch_size": cfg.outlier_batch_size} if cfg.outlier_shares else {}
    for name, size in sizes.items():
        if size % n_processes:
            raise UserError(f"--{name} {size} cannot be divided evenly among {n_processes} processes")
    if cfg.draws_samples and cfg.class_cond:
        buffer, parts = f"--buffer_size {cfg.buffer_size}", n_processes * n_classes
        if n_processes > 1 and cfg.buffer_size % parts:
            raise UserError(f"{buffer} cannot be divided evenly among {n_processes} processes and {n_classes} classes")
        if cfg.buffer_size // parts < math.ceil(cfg.n_chains / parts):
            raise UserError(f"{buffer} has too few images of each of {n_classes} classes for {cfg.n_chains} chains")


def check_variance(cfg, shape: tuple[int, int, int], n: int) -> None:
    """Raise UserError where a batch of n images (C, H, W) leaves batch or instance normalisation no variance."""
    pixels = math.prod(math.ceil(side / 2 ** (cfg.stages - 1)) for side in shape[1:])  # in the last layer
    if cfg.norm in ("batch", "instance") and pixels * (n if cfg.norm == "batch" else 1) <= 1:
        advice = "give --stages 3 in training, larger images or, for batch, larger batches"
        raise UserError(f"--norm {cfg.norm} has one value of each channel in the last layer, no variance: {advice}")
