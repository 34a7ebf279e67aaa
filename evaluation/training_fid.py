"""The Fréchet distance of samples while a run trains: --quality_every."""

import math

import numpy as np
import torch
from torch import Generator, Tensor

import distributed
from checkpoints.load import load_feature_model
from config import Config
from data import ImageData
from evaluation.fid import ClassifierSpace, InceptionSpace, feature_statistics, frechet_distance
from generation.chains import StartImages, run_chains
from logger.images import to_uint8
from models import JEM
from sgld import ChainInit
from utils import UserError, evaluation_packages

N_SAMPLES = 2000  # unless --n_samples says another number
N_REFERENCE = 10_000  # training images


class SampleQuality:
    """Fréchet distances of a run's samples to always the same of its training images.

    The features are those of the classifier ``--feature_ckpt``, or else Inception's. UserError if there is neither.
    """

    def __init__(self, cfg: Config, images: ImageData, chain_init: ChainInit, device: torch.device):
        self.cfg, self.device, classes = cfg, device, range(len(images.class_names))
        self.start = StartImages(cfg.start, cfg.n_samples or N_SAMPLES, chain_init, classes)
        classifier = load_feature_model(cfg.feature_ckpt, cfg.dataset, images, device)
        with evaluation_packages():
            try:
                self.space = ClassifierSpace(classifier, cfg.feature_ckpt) if classifier else InceptionSpace(device)
            except UserError as error:
                raise UserError(f"--quality_every needs --feature_ckpt, a classifier, or Inception: {error}") from None
            order = torch.randperm(len(images.train), generator=Generator().manual_seed(0))[:N_REFERENCE]
            self.real = self.statistics(images.train.images[order.to(images.train.images.device)])

    def statistics(self, images: Tensor) -> dict[str, np.ndarray]:
        return feature_statistics(self.space.outputs(images.to(self.device))["features"])

    def __call__(self, model: JEM, buffer: Tensor, rng: Generator) -> dict[str, float]:
        """The distances of fresh chains, of what they start from, and of images of the replay buffer (N, C, H, W).

        ``model`` is the ``frozen_sampler_model`` that the chains climb.
        """
        chains = run_chains(model, self.start, self.cfg.fresh_steps, self.cfg, rng)
        n = math.ceil(self.start.n / distributed.current_world().size)
        chosen = torch.randperm(len(buffer), generator=rng, device=rng.device)[:n]
        held = torch.cat(distributed.all_gather_object(to_uint8(buffer[chosen].nan_to_num(0)).cpu()))
        sets = {"fresh_samples": to_uint8(chains.x), "chain_starts": to_uint8(chains.start), "buffer": held}
        return {f"quality/{k}": frechet_distance(self.statistics(images), self.real) for k, images in sets.items()}
