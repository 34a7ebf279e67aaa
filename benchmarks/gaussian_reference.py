"""A log p(x) sampled at temperature one: a network that corrects a Gaussian.

    python benchmarks/gaussian_reference.py --load_ckpt assets/cifar10_cpu_robust_oe.safetensors --data_dir PATH

Trains p(x, y) ~ q(x) exp(f(x)[y]), where q is the Gaussian with the mean and covariance of the training images, and
then measures bits per dimension of test images of 256 grey levels, by annealed importance sampling from q. (A density
relative to another one: Xie et al., ICML 2016, where q is white noise.) p(y|x) and the loss are those of JEM, since q
has no parameters. Only the chains differ: they climb log q(x) + logsumexp_y f(x)[y], by steps that the covariance of q
preconditions. With noise of sqrt(s (2 - s)) for a step of size s they leave q as it is where f is constant
(preconditioned Crank-Nicolson with a gradient: Cotter et al., Statistical Science 2013, who also reject some steps), so
that samples are of temperature one, but for the error of a step. Other options of main.py's --mode energy_train may
follow. Batch normalisation stays frozen: f is one function of one image. The run's checkpoints do not hold q: for
main.py they are a JEM whose log p(x) is the logsumexp alone.
"""

import argparse
import json
import math
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Generator, Tensor
from torch.distributions import MultivariateNormal

sys.path.insert(0, str(Path(__file__).parent.parent))

import data  # noqa: E402
import utils  # noqa: E402
from benchmarks.command import run_script  # noqa: E402
from checkpoints.other_programs import open_checkpoint  # noqa: E402
from config import Config  # noqa: E402
from config.cli import parse  # noqa: E402
from evaluation import ais  # noqa: E402
from logger.run_dir import RunDir  # noqa: E402
from models import JEM, log_density  # noqa: E402
from models.predict import accuracy, predict  # noqa: E402
from sgld import SGLD, Chain, LogDensity, input_gradient, langevin_step, normal_like  # noqa: E402
from trainer import Trainer  # noqa: E402
from utils import UserError  # noqa: E402

LEVELS = 256
OPTIONS = {
    "dataset": "folder",
    "depth": 16,
    "width": 2,
    "norm": "batch",
    "norm_statistics": "frozen",
    "optimizer": "sgd",
    "lr": 5e-4,
    "warmup_steps": 50,
    "grad_clip": 1.0,
    "batch_size": 64,
    "p_x_batch_size": 32,
    "p_x_weight": 0.02,
    "mean_energy_l2": 1e-4,
    "sigma": 1 / LEVELS / math.sqrt(3),  # the deviation of a uniform number within a grey level, [-1, 1] scale
    "start": "gaussian",
    "buffer_size": 96,  # few chains, each of which moves in every third step
    "reinit_freq": 0.0,
    "sgld_step": 10,
    "sgld_lr": 0.1,
    "max_steps": 1000,
    "gif_every": 100_000,
    "note": "gaussian_reference",
}
NOT_HERE = {"mode", "recipe", "resume", "start", "start_dir", "quality_every"}  # would act otherwise than they say
NOT_HERE |= {"sgld_std", "sgld_clamp", "sgld_grad_clamp", "sgld_normalize", "p_x_no_augment"}


class GaussianReference:
    """The Gaussian q of images with normal noise of deviation sigma.

    An image x, float32 (N, C, H, W), is mean + z @ factor; in its white coordinates z, (N, D), q is standard normal.
    """

    def __init__(self, images: Tensor, sigma: float, device: torch.device):
        """``images``: uint8 (N, C, H, W). In float64: variances differ by factors of millions."""
        self.shape, d = images.shape[1:], images[0].numel()
        parts = images.split(1000)
        mean = sum(data.to_float(part.to(device)).flatten(1).double().sum(0) for part in parts) / len(images)
        covariance = sigma**2 * torch.eye(d, dtype=torch.float64, device=device)
        for part in parts:
            x = data.to_float(part.to(device)).flatten(1).double() - mean
            covariance.addmm_(x.T, x, alpha=1 / len(images))
        self.mean, self.factor = mean.float(), torch.linalg.cholesky(covariance).T.float().contiguous()  # (D,), (D, D)

    def images(self, z: Tensor) -> Tensor:
        return (self.mean + z @ self.factor).unflatten(1, self.shape).contiguous(memory_format=torch.channels_last)

    def white(self, x: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(self.factor, x.flatten(1) - self.mean, upper=True, left=False)

    def log_prob(self, x: Tensor) -> Tensor:
        """log q(x), normalised, in nats, (N,)."""
        return MultivariateNormal(self.mean, scale_tril=self.factor.T).log_prob(x.flatten(1))

    def precondition(self, x: Tensor, grad: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The covariance times d log(q(x) exp(f)) / dx, from grad = df / dx, and noise with q's covariance."""
        drift = grad.flatten(1) @ self.factor.T @ self.factor + self.mean - x.flatten(1)
        return drift.view_as(x), (noise.flatten(1) @ self.factor).view_as(x)


class PreconditionedSGLD(SGLD):
    """Chains of log q(x) + log_density(x), neither compiled nor captured."""

    def __init__(self, log_density: LogDensity, reference: GaussianReference):
        super().__init__(log_density)
        self.log_density, self.reference = log_density, reference

    @torch.no_grad()
    def __call__(
        self, x: Tensor, steps: int, step_size: float, noise_std: float, generator: Generator, y: Tensor | None = None
    ) -> Chain:
        grad = torch.zeros_like(x)
        for _ in range(steps):
            grad = input_gradient(self.log_density, x, y)
            drift, noise = self.reference.precondition(x, grad, normal_like(x, generator))
            x = langevin_step(x, drift, noise, step_size, noise_std).contiguous(memory_format=torch.channels_last)
        return Chain(x, grad)


class NoisyBatches(data.Batches):
    """Images without crop and flip, with noise: a density needs images between the grey levels."""

    def next(self) -> tuple[Tensor, Tensor]:
        x, y = super().next()
        return x + self.sigma * normal_like(x, self.rng), y


class ReferenceTrainer(Trainer):
    """Other real images for log p(x), other chains; the step, the loss and the loop are the program's."""

    def build_batches(self) -> None:
        super().build_batches()
        self.reference = GaussianReference(self.data.train.images, self.cfg.sigma, self.device)
        own = self.real_batches
        self.real_batches = NoisyBatches(own.split, own.batch_size, False, own.sigma, own.rng, "none", own.world)

    def build_sampler(self) -> None:
        self.chain_init = self.draw_reference
        super().build_sampler()
        self.gif_engine = PreconditionedSGLD(self.sampler_model.log_density, self.reference)
        self.sampler.engine = self.gif_engine

    def draw_reference(self, classes: list[int], rng: Generator) -> Tensor:
        z = torch.randn(len(classes), len(self.reference.mean), generator=rng, device=rng.device)
        return self.reference.images(z)


class White(NamedTuple):
    """q as the base of ``evaluation.ais``, in white coordinates."""

    reference: GaussianReference

    @property
    def shape(self) -> tuple[int]:
        return self.reference.mean.shape

    def sample(self, n: int, generator: Generator) -> Tensor:
        return torch.randn(n, *self.shape, generator=generator, device=generator.device)

    def log_prob(self, z: Tensor) -> Tensor:
        return -0.5 * z.square().sum(1)  # up to a constant

    def score(self, z: Tensor) -> Tensor:
        return -z

    def log_ratio(self, log_density: LogDensity, z: Tensor) -> Tensor:
        return log_density(self.reference.images(z))

    def from_image(self, x: Tensor) -> Tensor:
        return self.reference.white(x)


def measure(
    model: JEM, reference: GaussianReference, buffer: Tensor, test: Tensor, chains: int, temperatures: int, burn_in: int
) -> dict[str, float]:
    """Bits per dimension of test images uint8 (N, C, H, W), by q alone and by both bounds of log Z, and log Z."""
    rng, dim = Generator(reference.mean.device).manual_seed(1), len(reference.mean)
    x = ais.dequantise(test.to(rng.device), LEVELS, rng)
    f, log_q = log_density(predict(model, x)), reference.log_prob(x)
    path = ais.GeometricPath(model.log_density, White(reference), ais.sigmoid_schedule(temperatures))
    sizes = ais.tune_step_sizes(path, chains, 20, rng)
    found = {"bits, q alone": ais.bits_per_dim(log_q, dim, LEVELS).mean().item(), "f, test images": f.mean().item()}
    start = buffer[torch.randperm(len(buffer), generator=rng, device=rng.device)[:chains]]
    start = ais.burn_in(path, path.base.from_image(start), burn_in, sizes[-1], rng)
    found["f, chains"] = model.log_density(reference.images(start)).mean().item()
    for name, z, sign in (("forward", path.base.sample(chains, rng), 1), ("reverse", start, -1)):
        result = ais.anneal(path, z, sizes, rng, sign)
        log_z = result.log_z()[-1].item()
        bits = ais.bits_per_dim(f + log_q - log_z, dim, LEVELS).mean().item()
        found |= {f"log Z, {name}": log_z, f"effective chains, {name}": result.ess(), f"bits, {name}": bits}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="gaussian_reference.json", help="JSON file of the measurements")
    parser.add_argument("--chains", type=int, default=32, help="of annealed importance sampling, all at once")
    parser.add_argument("--temperatures", type=int, default=200, help="of annealed importance sampling")
    parser.add_argument("--burn_in", type=int, default=50, help="HMC steps from the buffer, before the way back")
    parser.add_argument("--n_test", type=int, default=1000, help="test images whose bits are measured")
    args, others = parser.parse_known_args()
    given = parse(others, Config)
    if wrong := NOT_HERE & given.keys():
        raise UserError(f"this script does not take {', '.join(f'--{name}' for name in sorted(wrong))}")
    options = {"mode": "energy_train", **OPTIONS, **given}
    step = options["sgld_lr"]
    if not (0 < step <= 1 and options["sigma"] > 0) or int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("this script takes one process, --sgld_lr up to 1 and --sigma above 0")
    cfg = Config(**options, sgld_std=math.sqrt(step * (2 - step)))
    device = utils.pick_device(cfg.gpu)
    utils.set_speed_options(device)
    images = data.load(cfg.dataset, cfg.data_dir, cfg.image_size, cfg.n_valid, device, cfg.data_device)
    trainer = ReferenceTrainer(cfg, images, device)
    if cfg.load_ckpt:
        trainer.load_weights(*open_checkpoint(cfg.load_ckpt, asdict(cfg)))
    status = trainer.train(RunDir.create(cfg.logdir, cfg.mode, cfg.note))
    if status:
        sys.exit(status)
    model = trainer.eval_model.eval().requires_grad_(False)
    model.dtype = torch.float32
    order = torch.randperm(len(images.test), generator=Generator().manual_seed(0))[: args.n_test]
    sizes = args.chains, args.temperatures, args.burn_in
    found = {"accuracy": accuracy(model, images.test)}
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):  # TF32 is too rough
        found |= measure(model, trainer.reference, trainer.buffer.images, images.test.images[order], *sizes)
    for name, value in found.items():
        print(f"{name}: {value:.4f}")
    Path(args.out).write_text(json.dumps({"options": asdict(cfg), "sizes": sizes} | found, indent=1))


if __name__ == "__main__":
    run_script(main)
