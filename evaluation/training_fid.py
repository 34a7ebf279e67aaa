"""Samples of a model, and how good those of a run are while it trains."""

import torch
from torch import Generator, Tensor

import distributed
from checkpoints.load import load_feature_model
from config import Config
from data import ImageData
from evaluation.fid import BATCH, Features, frechet_distance, inception, inception_outputs
from logger.images import to_uint8
from models.predict import images_per_batch, predict
from sgld import SGLD, ChainInit
from utils import UserError, evaluation_packages

IMAGES, REFERENCE = 2000, 10_000  # samples, unless --n_samples says another number; training images


def fresh_samples(
    sgld: SGLD,
    n: int,
    start: ChainInit,
    n_classes: int,
    steps: int,
    sgld_lr: float,
    sgld_std: float,
    generator: Generator,
    class_cond: bool = False,
) -> tuple[Tensor, Tensor]:
    """The starts of n chains, of each class in turn, and their ends after ``steps`` SGLD steps, uint8 (n, C, H, W)."""
    batch = min(n, images_per_batch(BATCH, start.shape))

    def samples(first: int) -> tuple[Tensor, Tensor]:
        # Always whole batches: a chain's CUDA graph has a fixed shape, and batch normalisation sees them all.
        classes = [i % n_classes for i in range(first, first + batch)]
        y = torch.tensor(classes, device=generator.device) if class_cond else None
        x = start(classes, generator)
        ends = sgld(x, steps, sgld_lr, sgld_std, generator, y).x
        return to_uint8(x[: n - first]), to_uint8(ends[: n - first])

    parts = distributed.sharded_map(range(0, n, batch), samples, generator.device, generator, "fresh samples")
    starts, ends = (torch.cat(part) for part in zip(*parts, strict=True))
    return starts, ends


class SampleQuality:
    """Fréchet distances of a run's samples to its training images, for ``--quality_every``.

    In the features of the classifier ``--feature_ckpt`` or, without, of Inception. The same training images serve each
    time. Raises UserError if there is no such network.
    """

    def __init__(self, cfg: Config, images: ImageData, start: ChainInit, device: torch.device):
        self.cfg, self.start, self.n_classes, self.device = cfg, start, len(images.class_names), device
        self.n = cfg.n_samples or IMAGES
        with evaluation_packages():
            if cfg.feature_ckpt:
                model = load_feature_model(cfg.feature_ckpt, cfg.dataset, images, device)
                self.features = lambda images: predict(Features(model), images)
            else:
                network = self.inception()
                self.features = lambda images: inception_outputs(network, images, "Inception's features")[0]
            order = torch.randperm(len(images.train), generator=Generator().manual_seed(0))[:REFERENCE]
            real = images.train.images[order.to(images.train.images.device)].to(device)
            self.distance = frechet_distance(self.features(real))

    def inception(self) -> torch.nn.Module:
        try:
            return distributed.rank0_first(lambda: inception(self.device))
        except UserError as error:
            raise UserError(f"--quality_every needs --feature_ckpt, a classifier, or Inception: {error}") from None

    def __call__(self, sgld: SGLD, buffer: Tensor, rng: Generator) -> dict[str, float]:
        """The distances of fresh chains, of what they start from, and of images of the replay buffer (N, C, H, W)."""
        sizes = self.cfg.fresh_steps, self.cfg.sgld_lr, self.cfg.sgld_std
        starts, fresh = fresh_samples(sgld, self.n, self.start, self.n_classes, *sizes, rng)
        chosen = torch.randperm(len(buffer), generator=rng, device=rng.device)[: distributed.shard_size(self.n)]
        held = distributed.all_gather_object(
            "images of the replay buffer", to_uint8(buffer[chosen].nan_to_num(0)).cpu()
        )
        sets = {"fresh_samples": fresh, "chain_starts": starts, "buffer": torch.cat(held).to(self.device)}
        return {f"quality/{name}": self.distance(self.features(images)) for name, images in sets.items()}
