"""``load_run``: a trained network in a few lines of Python."""

import os
import warnings
from collections.abc import Sequence
from dataclasses import fields, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

import data
import utils
from chain_init import StoredStarts, build_chain_init
from checkpoints.load import Trained, load_data, load_model, open_trained
from config import Config
from config.checks import check_variance, unused
from generation.chains import ChainResult, StartImages, run_chains
from models import JEM, frozen_sampler_model, log_density
from models.predict import predict
from pgd import pgd
from sgld import ChainInit
from utils import UserError, tree_to

Classes = int | str | Sequence[int | str] | None
COMMAND_LINE_ONLY = {f.name for f in fields(Config) if f.metadata["group"] == "sample"} | {"class_cond"}
LARGEST = 2.0  # of float images; noise and chains leave [-1, 1] by less, images of 0 to 255 by more


def load_run(path: str | os.PathLike, **options: Any) -> "TrainedRun":
    """A run directory, .pt or .safetensors file, or a UserError; options of the data and of chains, as gpu="cpu"."""
    trained = open_trained(options | {"mode": "sample", "load_ckpt": os.path.expanduser(path)})
    if names := sorted({*unused(options, trained.cfg), *COMMAND_LINE_ONLY & options.keys()} - {"n_sample_steps"}):
        warnings.warn(f"load_run does not use {', '.join(names)}", stacklevel=2)
    return TrainedRun(trained)


class TrainedRun:
    """A trained network, and what it was trained with: ``cfg`` (options), ``class_names``, ``shape`` (C, H, W).

    Images are (N, C, H, W) of that shape, uint8 from 0 to 255 or float in [-1, 1]; others are a UserError. Results are
    on the CPU. ``low_log_density``: log p(x) of 5 % of the training images is lower; None if the file does not say.
    """

    def __init__(self, trained: Trained):
        self.trained = trained
        self.cfg, self.path, self.content = trained
        self.class_names, self.shape = tuple(self.content["data"]["class_names"]), tuple(self.content["data"]["shape"])
        self.low_log_density: float | None = self.content.get("low_log_density")
        self.trained_with = Config.from_dict(self.content["config"], str(self.path))  # ``cfg`` is what it is used with
        self.classifies = self.trained_with.classifies
        self.device = utils.pick_device(self.cfg.gpu)
        utils.set_speed_options(self.device)
        self.dtype = utils.pick_dtype(self.cfg.precision, self.device)
        self.model = load_model(trained, self.device)

    def logits(self, images: Tensor) -> Tensor:
        """f(x), float32 (N, K): their softmax is p(y|x)."""
        return predict(self.model, self.checked(images)).cpu()

    def log_density(self, images: Tensor, y: Classes | Tensor = None) -> Tensor:
        """Unnormalised log p(x), or log p(x, y) of a class y, or one each; float32 (N,), in nats, without gradients."""
        logits = predict(self.model, self.checked(images)).cpu()
        if y is None:
            return log_density(logits)
        classes = torch.tensor(self.classes(y))
        if np.ndim(y) and len(classes) != len(logits):
            raise UserError(f"y has {len(classes)} classes for {len(logits)} images")
        return log_density(logits, classes.expand(len(logits)))

    def sample(self, n: int, y: Classes = None, **options: Any) -> Tensor:
        """The images of ``chains``, float32 (n, C, H, W), cut to [-1, 1]."""
        return self.chains(n, y, **options).x.clamp(-1, 1)

    def chains(
        self, n: int, y: Classes = None, steps: int | None = None, seed: int | None = None, n_filmed: int = 0
    ) -> ChainResult:
        """n SGLD chains; they start where those of ``--mode sample`` do, and with the same seed are the same.

        y: a class whose log p(x|y) they climb, or classes in turn; None: log p(x). steps: by default as there.
        n_filmed: how many chains are in ``frames``. Raises UserError if training images are missing.
        """
        if not isinstance(n, int | np.integer) or n < 1:
            raise UserError(f"n, how many chains, is a whole number of at least 1, not {n!r}")
        classes = range(len(self.class_names)) if y is None else self.classes(y)
        name, chain_init = self.fresh_start
        start = StartImages(name, n, chain_init, classes, class_cond=y is not None)
        cfg = self.cfg if steps is None else replace(self.cfg, n_sample_steps=steps)
        rng = Generator(self.device).manual_seed(cfg.seed if seed is None else seed)
        return run_chains(self.sampler_model(), start, cfg.fresh_steps, cfg, rng, n_filmed)

    def counterfactual(self, images: Tensor, y: int | str, eps: float = 2.5, steps: int = 200) -> Tensor:
        """Images moved up log p(x|y) (DAT), at most by L2 ``eps`` on the [0, 1] scale: (N, C, H, W) in [-1, 1]."""
        (y,) = self.classes([y] if np.ndim(y) else y)

        def log_p(x: Tensor) -> Tensor:  # log p(x, y), whose gradient in x is that of log p(x|y)
            return self.model.log_density(x, torch.full((len(x),), y, device=x.device)).sum()

        batches = self.checked(images).split(self.cfg.batch_size)
        return torch.cat([pgd(log_p, data.to_float(batch), 2 * eps, "L2", steps) for batch in batches]).cpu()

    def classes(self, y: Classes) -> list[int]:
        """Classes, by number or name, as numbers. Raises UserError for what is none, and for a model without labels."""
        if not self.classifies:
            raise UserError(f"{self.path} was trained without labels: leave the class out")
        y = [y] if isinstance(y, str) else y
        if isinstance(y, list | tuple):
            y = [self.class_names.index(k) if isinstance(k, str) and k in self.class_names else k for k in y]
        found = np.atleast_1d(y.numpy(force=True) if isinstance(y, Tensor) else np.asarray(y))
        if found.ndim > 1 or found.dtype.kind not in "iu" or not set(found) <= set(range(len(self.class_names))):
            names = ", ".join(self.class_names[:10]) + ", ..." * (len(self.class_names) > 10)
            raise UserError(f"there is no class {y}: classes are {names}, or from Python their numbers from 0 on")
        return found.tolist()

    def sampler_model(self) -> JEM:
        """The network as chains climb it. Raises UserError where a batch of them leaves its norm no variance."""
        check_variance(self.cfg, self.shape, self.cfg.n_chains)
        return frozen_sampler_model(self.model, self.dtype, self.cfg.norm_statistics)

    @cached_property
    def images(self) -> data.ImageData:
        """The data set. Another program's file assumes the size of its images: from here on it is that of these."""
        images = load_data(self.trained, self.device)
        self.shape = images.shape
        return images

    @cached_property
    def fresh_start(self) -> tuple[str, ChainInit]:
        """What ``--start`` names, in words and for chains: of the file, where it has it, or of training images."""
        cfg, stored = self.cfg, StoredStarts(self.shape, tree_to(self.content.get("starts", {}), self.device))
        if cfg.start_shares.keys() <= {"uniform", "smooth", "shapes", *stored.gaussians}:
            of_file = cfg.start_shares.keys() & stored.gaussians.keys()
            return f"{cfg.start} of {self.path.name}" if of_file else cfg.start, build_chain_init(cfg, stored)
        return cfg.start, build_chain_init(cfg, self.images)

    def checked(self, images: Tensor) -> Tensor:
        """The images on the network's device. Raises UserError for another shape, type or range."""
        x = torch.as_tensor(images)
        if not (x.is_floating_point() or x.dtype == torch.uint8) or x.shape[1:] != self.shape or not len(x):
            expected = f"uint8 or float (N, {', '.join(map(str, self.shape))})"
            raise UserError(f"images must be {expected}, not {x.dtype} {tuple(x.shape)}")
        if x.is_floating_point():
            low, high = x.min().item(), x.max().item()
            if not -LARGEST <= low <= high <= LARGEST:
                raise UserError(f"float images must be in [-1, 1], not from {low:g} to {high:g}: uint8 takes 0 to 255")
            if low >= 0 and high <= 1:
                warnings.warn("all values are in [0, 1]; float images are expected in [-1, 1]", stacklevel=3)
            x = x.float()
        return x.to(self.device)
