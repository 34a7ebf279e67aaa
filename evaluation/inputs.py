"""What an evaluation is given."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from config import Config
from data import ImageData, Split, to_float
from generation.chains import ChainResult
from models import JEM

GRADIENT_BATCH = 100  # images of 32x32 at once where gradients in the input need the memory of training


@dataclass(frozen=True)
class EvalInputs:
    """What is evaluated: a frozen model in evaluation mode and float32, its data, its replay buffer if it has one."""

    cfg: Config
    model: JEM
    data: ImageData
    buffer: Tensor | None  # float32 (M, C, H, W)
    feature_model: JEM | None  # the classifier of --feature_ckpt
    device: torch.device
    classifies: bool  # whether labels had a part in the training
    chains: Callable[..., ChainResult]  # ``TrainedRun.chains``

    def rng(self) -> Generator:
        """A generator that starts the same for each metric, whichever others run."""
        return Generator(self.device).manual_seed(self.cfg.seed)

    def subset(self, images: Split | Tensor, limit: int | None = None) -> Split | Tensor:
        """At most ``limit`` of the images, or else ``--max_images``: the same random ones in the same random order.

        So the first of them are a random choice, too, where the images lie class by class.
        """
        n = min(limit or self.cfg.max_images or len(images), len(images))
        return images[torch.randperm(len(images), generator=Generator().manual_seed(0))[:n]].to(self.device)

    def with_noise(self, images: Tensor) -> Tensor:
        """uint8 images as they are or, with the noise of ``--sigma_test``, as floats; the same ones always alike."""
        if not self.cfg.sigma_test:
            return images
        seed = zlib.crc32(images.cpu().contiguous().numpy(), self.cfg.seed)  # others get other noise
        rng = Generator(self.device).manual_seed(seed)
        noise = torch.randn(images.shape, generator=rng, device=self.device)
        return to_float(images) + self.cfg.sigma_test * noise

    @property
    def noise_protocol(self) -> str:
        sigma = self.cfg.sigma_test
        return f"with Gaussian noise of standard deviation {sigma:g} added" if sigma else "no noise added"
