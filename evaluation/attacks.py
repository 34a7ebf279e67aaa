"""Adversarial attacks on a classifier, and JEM's refinement as a classifier that can be attacked.

Attacks see images in [0, 1], as their libraries and their epsilons do; the model sees [-1, 1].
"""

import logging
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import distributed
from evaluation.inputs import GRADIENT_BATCH
from models import JEM
from models.predict import images_per_batch
from pgd import adversarial_images, random_start
from sgld import LogDensity, langevin_step, normal_like
from utils import UserError

AUTOATTACK_PARTS = ("apgd-ce", "apgd-t", "fab-t", "square")  # of the standard version, in its order
DISTAL_STEPS, DISTAL_STEP, DISTAL_CONFIDENCE = 500, 0.05, 0.9


class Classifier(nn.Module):
    """A JEM as attacks want it: images (N, C, H, W) in [0, 1] to logits (N, K)."""

    def __init__(self, model: JEM):
        super().__init__()
        self.model = model
        self.eval()  # a module starts in training mode, and attacks leave the whole of it in the mode they found

    def forward(self, x: Tensor) -> Tensor:
        return self.model(to_model_scale(x))


def to_model_scale(x: Tensor) -> Tensor:
    """[0, 1] to [-1, 1]; gradients arrive contiguous, as attacks that flatten them with view() need."""
    return (2 * x - 1).flatten(1).unflatten(1, x.shape[1:])


class RefinedClassifier(Classifier):
    """Classification after SGLD from the input (JEM, section 5.4), averaged over several chains.

    ``chain`` is differentiable, with new noise in each call: a gradient attack on this module goes end to end
    through the refinement, in expectation over its noise (Athalye et al., ICML 2018).
    """

    def __init__(self, model: JEM, chain: Callable[[Tensor], Tensor], n_chains: int):
        super().__init__(model)
        self.chain, self.n_chains = chain, n_chains

    def forward(self, x: Tensor) -> Tensor:
        """Log of the chains' mean probabilities, (N, K), of images in [0, 1]."""
        x = self.chain(to_model_scale(x).repeat(self.n_chains, 1, 1, 1))
        log_p = self.model(x).log_softmax(1).unflatten(0, (self.n_chains, -1))  # (chains, N, K)
        return log_p.logsumexp(0) - math.log(self.n_chains)


class StraightRefinedClassifier(RefinedClassifier):
    """The same as JEM's authors attack it: what a chain adds counts as a constant in the gradient.

    Chains begin with noise of standard deviation ``start_std``, and logits are averaged.
    """

    def __init__(self, model: JEM, chain: Callable, n_chains: int, start_std: float, rng: Generator):
        super().__init__(model, chain, n_chains)
        self.start_std, self.rng = start_std, rng

    def forward(self, x: Tensor) -> Tensor:
        """The chains' mean logits, (N, K), of images in [0, 1]."""
        x = to_model_scale(x).repeat(self.n_chains, 1, 1, 1)
        start = x.detach() + self.start_std * normal_like(x, self.rng)
        refined = x + (self.chain(start) - x).detach()
        return self.model(refined).unflatten(0, (self.n_chains, -1)).mean(0)  # (chains, N, K) -> (N, K)


def differentiable_chain(
    log_density: LogDensity, x: Tensor, steps: int, sgld_lr: float, sgld_std: float, generator: Generator, **limits: Any
) -> Tensor:
    """SGLD whose end can be differentiated in its start x, (N, C, H, W) in [-1, 1]; ``limits`` as in ``langevin_step``.

    Under ``no_grad`` the same chain without a graph. Each step is computed again in the backward pass, because
    storing the graph of all steps would need ``steps`` times the memory of one.
    """
    attacked = torch.is_grad_enabled() and x.requires_grad

    def step(x: Tensor, noise: Tensor) -> Tensor:
        with torch.enable_grad():
            start = x if x.requires_grad else x.detach().requires_grad_()
            (grad,) = torch.autograd.grad(log_density(start).sum(), start, create_graph=attacked)
        return langevin_step(x, grad, noise, sgld_lr, sgld_std, **limits)

    for _ in range(steps):
        noise = normal_like(x, generator)
        x = checkpoint(step, x, noise, use_reentrant=False) if attacked else step(x, noise)
    return x


def pgd_attack(
    classifier: nn.Module, eps: float, norm: str, steps: int, rng: Generator, x: Tensor, y: Tensor
) -> Tensor:
    """Projected gradient descent (Madry et al., ICLR 2018) from a random start; step size 2.5 eps / steps."""
    radius = 2 * eps  # on the model's scale, which is twice as wide
    start = random_start(x, radius, norm, rng)
    moved = adversarial_images(lambda x: classifier((x + 1) / 2), 2 * x - 1, y, radius, norm, steps, start=start)
    return (moved + 1) / 2


def autoattack(classifier: nn.Module, eps: float, norm: str, n_classes: int, seed: int, device: torch.device):
    """AutoAttack's standard version (Croce & Hein, ICML 2020) as its authors' object, a ``pyautoattack.AutoAttack``.

    At least 4 classes; the targets are the 9 most likely wrong ones, or all of fewer.
    """
    import pyautoattack

    # it warns of images without a gradient; the check of the report for masked gradients says more
    logging.getLogger("auto-attack").setLevel(logging.ERROR)
    attack = pyautoattack.AutoAttack(classifier, norm=norm, eps=eps, seed=seed, device=device)
    attack.attacks_to_run = list(AUTOATTACK_PARTS)
    attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = min(9, n_classes - 1)
    return attack


def check_autoattack(n_classes: int, shape: tuple[int, int, int]) -> None:
    """Raise UserError if AutoAttack cannot be run on such images."""
    if n_classes < 4:
        raise UserError(f"it needs at least 4 classes, not {n_classes}")

    def first_class(x: Tensor) -> Tensor:
        return F.one_hot(torch.zeros(len(x), dtype=torch.int64), n_classes).float()

    square = autoattack(first_class, 0.5, "L2", n_classes, 0, torch.device("cpu")).square
    square.n_queries = 1
    try:  # it starts from tiles that do not fit into images of every size
        square.perturb(torch.zeros(1, *shape), torch.tensor([0]))
    except RuntimeError:
        raise UserError(f"its Square attack does not work on images of {shape[1]}x{shape[2]}") from None


class Attacked(NamedTuple):
    """A classifier and the images on which it is attacked."""

    classifier: nn.Module
    x: Tensor  # (N, C, H, W) in [0, 1]
    y: Tensor  # (N,)
    batch_size: int
    rng: Generator  # what the classifier and its attacks draw from, if they do
    protocol: str = ""  # of the classifier

    @torch.no_grad()
    def predicted(self) -> Tensor:
        """The classes (N,) without attack."""
        batches = self.x.split(self.batch_size)
        answers = distributed.sharded_map(batches, lambda x: self.classifier(x).argmax(1), self.x.device, self.rng)
        return torch.cat(answers)

    def robust(self, attack: Callable[[Tensor, Tensor], Tensor], mask: Tensor, title: str = "") -> Tensor:
        """Which of the images in ``mask``, bool (N,), are still classified as y after the attack, bool (N,).

        ``attack`` maps images and labels to moved images. ``title`` stands at a progress bar.
        """

        def withstands(batch: Tensor) -> Tensor:
            moved = attack(self.x[batch], self.y[batch])
            with torch.no_grad():
                return self.classifier(moved).argmax(1) == self.y[batch]

        batches = mask.nonzero().flatten().split(self.batch_size) if mask.any() else ()
        title = f"{title}, {mask.sum()} of {len(mask)} images left"
        kept, robust = distributed.sharded_map(batches, withstands, mask.device, self.rng, title), mask.clone()
        for batch, still in zip(batches, kept, strict=True):
            robust[batch] = still
        return robust


def distal_adversarials(model: JEM, starts: Tensor, n_classes: int) -> tuple[Tensor, Tensor]:
    """From noise, (n, C, H, W) in [-1, 1], up the gradient of log p(y|x) until p(y|x) is 0.9 (JEM, section 5.4).

    Returns images (n_classes * n, C, H, W), class by class, and the p(y|x) reached after at most ``DISTAL_STEPS``. A
    step has L2 norm ``DISTAL_STEP`` times the root of the number of values; images that have arrived stand still.
    """
    classes_at_once = max(1, images_per_batch(GRADIENT_BATCH, starts.shape[1:]) // len(starts))

    def climb_to(classes: Tensor) -> tuple[Tensor, Tensor]:
        x, y = starts.repeat(len(classes), 1, 1, 1), classes.repeat_interleave(len(starts))
        for step in tqdm(range(DISTAL_STEPS + 1), desc="distal adversarials", leave=False):
            x.requires_grad_()
            loss = F.cross_entropy(model(x), y, reduction="none")
            (grad,) = torch.autograd.grad(-loss.sum(), x)
            going = loss.detach() > -math.log(DISTAL_CONFIDENCE)
            if step == DISTAL_STEPS or not going.any():
                break
            length = grad.flatten(1).norm(dim=1).clamp(min=1e-12)
            move = DISTAL_STEP * math.sqrt(x[0].numel()) * going / length  # (N,)
            x = (x.detach() + move[:, None, None, None] * grad).clamp(-1, 1)
        return x.detach(), (-loss.detach()).exp()

    batches = torch.arange(n_classes, device=starts.device).split(classes_at_once)
    x, reached = zip(*distributed.sharded_map(batches, climb_to, starts.device), strict=True)
    return torch.cat(x), torch.cat(reached)
