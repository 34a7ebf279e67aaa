"""``load_run``: a trained network in a few lines of Python."""

import os
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Generator, Tensor

import utils
from checkpoints.load import Trained, load_model, open_trained
from config.checks import check_variance
from generation import counterfactual
from generation.chains import ChainResult, StartImages, run_chains
from generation.sample import fresh_start
from models import frozen_sampler_model, log_density
from models.predict import predict
from utils import UserError

LARGEST = 2.0  # of float images; noise and chains leave [-1, 1] by less, images of 0 to 255 by more


def load_run(path: str | os.PathLike, **options: Any) -> "TrainedRun":
    """A run directory, a .pt or a .safetensors file, ready for use.

    options: those of ``--mode sample``, by name, such as gpu="cpu" or data_dir="data". Raises UserError if there is no
    such file, or the options do not fit it.
    """
    return TrainedRun(open_trained(options | {"mode": "sample", "load_ckpt": os.path.expanduser(path)}))


class TrainedRun:
    """A trained network, and what it was trained with: ``cfg`` (options), ``class_names``, ``shape`` (C, H, W).

    Images are uint8 from 0 to 255, or float in [-1, 1]; (N, C, H, W) of that shape. What methods return is on the CPU.
    ``low_log_density``, where the file has it: log p(x) of 5 % of the training images is lower.
    """

    def __init__(self, trained: Trained):
        self.cfg, self.path, self.content = trained
        self.class_names, self.shape = tuple(self.content["data"]["class_names"]), tuple(self.content["data"]["shape"])
        self.low_log_density: float | None = self.content.get("low_log_density")
        self.device = utils.pick_device(self.cfg.gpu)
        utils.set_speed_options(self.device)
        self.model = load_model(*trained).to(self.device).eval().requires_grad_(False)

    def logits(self, images: Tensor) -> Tensor:
        """f(x), float32 (N, K): their softmax is p(y|x). Raises UserError for images of another kind or range."""
        return predict(self.model, self._checked(images)).cpu()

    def log_density(self, images: Tensor, y: Tensor | None = None) -> Tensor:
        """Unnormalised log p(x), or with classes y, int64 (N,), log p(x, y); float32 (N,), in nats.

        Values of one network can be compared, those of two cannot. Raises UserError as ``logits`` does.
        """
        return log_density(self.logits(images), y)

    def sample(self, n: int, y: int | Sequence[int] | None = None, **options: Any) -> Tensor:
        """The images of ``chains``: float32 (n, C, H, W), cut to [-1, 1]."""
        return self.chains(n, y, **options).x.clamp(-1, 1)

    @torch.no_grad()
    def chains(
        self,
        n: int,
        y: int | Sequence[int] | None = None,
        steps: int | None = None,
        seed: int | None = None,
        n_filmed: int = 0,
    ) -> ChainResult:
        """n SGLD chains, from where those of ``--mode sample`` start; with the same seed they are the same.

        Args:
            y: chains climb log p(x|y) of this class, or of these classes in turn; None: log p(x).
            steps: of a chain; by default ``cfg.fresh_steps``.
            seed: of all randomness; by default ``cfg.seed``.
            n_filmed: so many chains are in ``frames`` of the result, uint8 (n_filmed, T, C, H, W).

        ``x`` of the result are the chains' ends, which may lie outside [-1, 1]; see ``ChainResult``. The first use may
        read training images. Raises UserError if they are needed and not there.
        """
        cfg = replace(self.cfg, seed=self.cfg.seed if seed is None else seed)
        check_variance(cfg, self.shape, cfg.n_chains)
        classes = [y] if isinstance(y, int) else range(len(self.class_names)) if y is None else [int(k) for k in y]
        if not all(0 <= k < len(self.class_names) for k in classes):
            raise UserError(f"classes are numbers from 0 to {len(self.class_names) - 1}, not {y}")
        start = StartImages(cfg.start, n, self._start, classes, class_cond=y is not None)
        rng = Generator(self.device).manual_seed(cfg.seed)
        model = frozen_sampler_model(self.model, utils.pick_dtype(cfg.precision, self.device))
        return run_chains(model, start, cfg.fresh_steps if steps is None else steps, cfg, rng, n_filmed)

    def counterfactual(
        self, images: Tensor, y: int, eps: float = counterfactual.DEFAULT_EPS, steps: int = 200
    ) -> Tensor:
        """Images moved to class ``y`` by ascent on log p(x, y), at most by L2 ``eps`` on the [0, 1] scale.

        Float32 (N, C, H, W) in [-1, 1]; those of ``--mode sample --counterfactual``. Raises UserError as ``logits``.
        """
        images = self._checked(images)
        target = torch.full((len(images),), y, device=self.device)
        return counterfactual.changed(self.model, images, target, eps, steps, self.cfg.batch_size).x

    @cached_property
    def _start(self):
        return fresh_start(self.cfg, self.path, self.content, self.device)[1]

    def _checked(self, images: Tensor) -> Tensor:
        x, (channels, height, width) = torch.as_tensor(images), self.shape
        is_float = x.is_floating_point()
        if not (is_float or x.dtype == torch.uint8) or x.ndim != 4 or x.shape[1:] != self.shape or not len(x):
            expected = f"uint8 or float (N, {channels}, {height}, {width})"
            raise UserError(f"images must be {expected}, not {x.dtype} {tuple(x.shape)}")
        if is_float:
            low, high = x.min().item(), x.max().item()
            if not -LARGEST <= low <= high <= LARGEST:
                raise UserError(f"float images must be in [-1, 1], not from {low:g} to {high:g}: uint8 takes 0 to 255")
            if low >= 0 and high <= 1:
                warnings.warn("all values are in [0, 1]; float images are expected in [-1, 1]", stacklevel=3)
            x = x.float()
        return x.to(self.device)
