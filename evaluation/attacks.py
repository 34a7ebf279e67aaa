"""Attacks on a classifier, how long they take at most, and JEM's refinement as a classifier that can be attacked.

Attacks see images in [0, 1], as their libraries and their epsilons do; the model sees [-1, 1].
"""

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import distributed
from evaluation.inputs import GRADIENT_BATCH
from logger.progress import bar_interval
from models import JEM
from models.predict import images_per_batch
from pgd import l2_norms, pgd, random_start
from sgld import normal_like, uniform_images

BAR = "{desc}{percentage:3.0f}% [{remaining} left{postfix}]"
AUTO_STEPS, AUTO_TARGETS, AUTO_QUERIES = 100, 9, 5000  # of AutoAttack's standard version
DISTAL_STEPS, DISTAL_STEP = 500, 0.05


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


class RefinedClassifier(nn.Module):
    """Classification after SGLD from the input (JEM, section 5.4), averaged over several chains.

    The chains are differentiable, with new noise in each call: a gradient attack on this module goes end to end
    through the refinement, in expectation over its noise (Athalye et al., ICML 2018).
    """

    def __init__(
        self,
        model: JEM,
        steps: int,
        sgld_lr: float,
        sgld_std: float,
        n_chains: int,
        generator: Generator,
        **limits: Any,
    ):
        """``limits``: those of a chain's steps, as for ``SGLD``."""
        super().__init__()
        self.model, self.steps, self.n_chains = model, steps, n_chains
        self.chain = partial(differentiable_chain, model.log_density, steps=steps, sgld_lr=sgld_lr, sgld_std=sgld_std)
        self.chain = partial(self.chain, generator=generator, **limits)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Log of the chains' mean probabilities, (N, K), of images in [0, 1]."""
        x = to_model_scale(x).repeat(self.n_chains, 1, 1, 1)
        log_p = self.model(self.chain(x)).log_softmax(1).unflatten(0, (self.n_chains, -1))  # (chains, N, K)
        return log_p.logsumexp(0) - math.log(self.n_chains)


def differentiable_chain(
    log_density,
    x: Tensor,
    steps: int,
    sgld_lr: float,
    sgld_std: float,
    generator: Generator,
    grad_clamp: float | None = None,
    clamp: bool = False,
    normalize: bool = False,
) -> Tensor:
    """SGLD (see ``reference_chain``) whose end can be differentiated in its start x, (N, C, H, W) in [-1, 1].

    Under ``no_grad`` the same chain without a graph. Each step is computed again in the backward pass, because
    storing the graph of all steps would need ``steps`` times the memory of one.
    """
    attacked = torch.is_grad_enabled() and x.requires_grad

    def step(x: Tensor, noise: Tensor) -> Tensor:
        with torch.enable_grad():
            start = x if x.requires_grad else x.detach().requires_grad_()
            (grad,) = torch.autograd.grad(log_density(start).sum(), start, create_graph=attacked)
        if normalize:
            grad = grad / l2_norms(grad)
        if grad_clamp is not None:
            grad = grad.clamp(-grad_clamp, grad_clamp)
        x = x + sgld_lr * grad + sgld_std * noise
        return x.clamp(-1, 1) if clamp else x

    for _ in range(steps):
        noise = normal_like(x, generator)
        x = checkpoint(step, x, noise, use_reentrant=False) if attacked else step(x, noise)
    return x


class Attack(NamedTuple):
    """An attack, and the largest number of network passes that it needs for an image, with the final check."""

    name: str
    on: Callable[[nn.Module, float], Callable[[Tensor, Tensor], Tensor]]  # classifier, epsilon -> (x, y) -> x
    gradients: int  # passes forward and back
    forwards: int  # passes forward only

    @property
    def passes(self) -> int:
        return self.gradients + self.forwards


def pgd_attack(norm: str, steps: int, generator: Generator, name: str = "PGD") -> Attack:
    """Projected gradient descent (Madry et al., ICLR 2018) from a random start; step size 2.5 epsilon / steps."""

    def on(classifier: nn.Module, epsilon: float) -> Callable[[Tensor, Tensor], Tensor]:
        def perturb(x: Tensor, y: Tensor) -> Tensor:
            def loss(moved: Tensor) -> Tensor:
                return F.cross_entropy(classifier((moved + 1) / 2), y, reduction="sum")

            start = random_start(x, 2 * epsilon, norm, generator)
            return (pgd(loss, 2 * x - 1, 2 * epsilon, norm, steps, start) + 1) / 2

        return perturb

    return Attack(name, on, steps, 1)


def auto_attack(norm: str, n_classes: int, seed: int) -> list[Attack]:
    """The four attacks of AutoAttack's standard version (Croce & Hein, ICML 2020), in its order.

    Each attacks what the one before has left. They are the authors' code, and each starts from ``seed`` for each batch.
    At least 4 classes; the targets are the 9 most likely wrong classes, or all where there are fewer.
    """
    targets = min(AUTO_TARGETS, n_classes - 1)

    def member(attribute: str) -> Callable[[nn.Module, float], Callable[[Tensor, Tensor], Tensor]]:
        def on(classifier: nn.Module, epsilon: float) -> Callable[[Tensor, Tensor], Tensor]:
            @torch.no_grad()
            def perturb(x: Tensor, y: Tensor) -> Tensor:
                attacks = standard_version(classifier, norm, epsilon, targets, seed, x.device)
                return getattr(attacks, attribute).perturb(x, y)

            return perturb

        return on

    # Besides its steps, each member classifies the images at its start, and where it has targets again for each.
    return [
        Attack("AutoAttack APGD-CE", member("apgd"), AUTO_STEPS + 1, 2),
        Attack("AutoAttack APGD-T", member("apgd_targeted"), targets * (AUTO_STEPS + 1), targets + 2),
        Attack("AutoAttack FAB-T", member("fab"), targets * AUTO_STEPS, targets * (AUTO_STEPS + 3) + 2),
        Attack("AutoAttack Square", member("square"), 0, AUTO_QUERIES + 4),
    ]


def standard_version(classifier: nn.Module, norm: str, epsilon: float, targets: int, seed: int, device: torch.device):
    """A ``pyautoattack.AutoAttack`` whose members are ready for use one by one."""
    from pyautoattack import AutoAttack

    # it warns of images without a gradient; the check of the report for masked gradients says more
    logging.getLogger("auto-attack").setLevel(logging.ERROR)
    whole = AutoAttack(classifier, norm=norm, eps=epsilon, seed=seed, device=device, version="standard")
    whole.fab.targeted = True
    whole.apgd_targeted.n_target_classes = whole.fab.n_target_classes = targets
    return whole


def no_auto_attack(n_classes: int, shape: tuple[int, int, int]) -> str:
    """Why AutoAttack cannot be run on such images, or an empty string."""
    if n_classes < 4:
        return f"it needs at least 4 classes, not {n_classes}"
    unmoved = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), n_classes)).requires_grad_(False)
    for parameter, values in zip(unmoved[1].parameters(), (torch.zeros(()), torch.eye(n_classes)[0]), strict=True):
        parameter.copy_(values)
    square = standard_version(unmoved, "L2", 0.5, 3, 0, torch.device("cpu")).square
    square.n_queries = 1
    try:  # it starts from tiles that do not fit into images of every size
        square.perturb(torch.zeros(1, *shape), torch.tensor([0]))
    except RuntimeError:
        return f"its Square attack does not work on images of {shape[1]}x{shape[2]}"
    return ""


@torch.no_grad()
def predicted(classifier: nn.Module, x: Tensor, batch_size: int, rng: Generator | None = None) -> Tensor:
    """The classes (N,) of images (N, C, H, W) in [0, 1]; ``rng`` is what the classifier draws from, if it does."""
    batches = x.split(batch_size)
    return torch.cat(distributed.sharded_map(batches, lambda x: classifier(x).argmax(1), x.device, rng))


def robust_mask(
    classifier: nn.Module,
    attacks: list[Attack],
    x: Tensor,
    y: Tensor,
    epsilons: list[float],
    batch_size: int,
    title: str = "",
    rng: Generator | None = None,
) -> list[Tensor]:
    """Which images are still classified correctly, bool (N,): first without attack, then for each epsilon.

    x: (N, C, H, W) in [0, 1]; y: (N,); epsilons ascending, on the [0, 1] scale. At each epsilon the attacks follow one
    another. An image that has fallen stays fallen, for what fooled the model lies within any larger epsilon too.
    ``rng``: what classifier and attacks draw from, if they do.
    """
    alive = predicted(classifier, x, batch_size, rng) == y
    results = [alive.clone()]
    total = len(x) * len(epsilons) * sum(attack.passes for attack in attacks)
    with progress_bar(title, total) as bar, counted(classifier, bar):
        done = 0
        for epsilon in epsilons:
            for attack in attacks:
                bar.set_description(f"{title} {epsilon:.3g}, {attack.name}", refresh=False)
                bar.set_postfix_str(f"{alive.sum()} of {len(x)} images not fooled", refresh=False)
                perturb = attack.on(classifier, epsilon)

                def withstand(part: Tensor, perturb=perturb) -> Tensor:
                    moved = perturb(x[part], y[part])
                    with torch.no_grad():
                        return classifier(moved).argmax(1) == y[part]

                parts = alive.nonzero().flatten().split(batch_size) if alive.any() else ()
                for part, kept in zip(parts, distributed.sharded_map(parts, withstand, x.device, rng), strict=True):
                    alive[part] = kept
                done += len(x) * attack.passes
                bar.update(done - bar.n)  # fallen images need no more passes
            results.append(alive.clone())
    return results


def progress_bar(title: str, total: int) -> tqdm:
    return tqdm(desc=f"{title}: ", total=total, bar_format=BAR, mininterval=bar_interval(), leave=False)


@contextmanager
def counted(classifier: nn.Module, bar: tqdm) -> Iterator[None]:
    """Inside, each image that passes the classifier moves the bar."""

    def count(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        bar.update(len(output))

    handle = classifier.register_forward_hook(count)
    try:
        yield
    finally:
        handle.remove()


# ---------------------------------------------------------------------------------------------- how long it takes


class Speed(NamedTuple):
    """Seconds of one image's pass."""

    gradient: float
    forward: float

    def of(self, attacks: list[Attack], n_images: int, n_epsilons: int) -> float:
        """Seconds that ``robust_mask`` takes if no image falls."""
        cost = sum(attack.gradients * self.gradient + attack.forwards * self.forward for attack in attacks)
        return n_images * n_epsilons * cost


def measure_speed(classifier: nn.Module, x: Tensor, y: Tensor) -> Speed:
    """Time passes of one batch of images x, (N, C, H, W) in [0, 1], with labels y, (N,)."""

    def gradient() -> None:
        start = x.clone().requires_grad_()
        torch.autograd.grad(F.cross_entropy(classifier(start), y), start)

    @torch.no_grad()
    def forward() -> None:
        classifier(x)

    return Speed(seconds(gradient, x.device) / len(x), seconds(forward, x.device) / len(x))


def seconds(call: Callable[[], None], device: torch.device, clock: Callable[[], float] = time.perf_counter) -> float:
    """The shortest of three calls, for the first one of a GPU is slow; what takes more than a second is called once."""
    times = []
    while len(times) < 3 and sum(times) < 1:
        start = clock()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(clock() - start)
    return min(times)


def estimate(times: dict[str, float], n_images: int) -> str:
    """The line that says how long the attacks take, from the seconds of each."""
    total = sum(times.values())
    unit, size = ("hours", 3600) if total >= 7200 else ("minutes", 60)

    def words(seconds: float) -> str:
        return f"{seconds / size:.{0 if seconds >= 10 * size else 1}f}"

    parts = ", ".join(f"{name} {words(time)}" for name, time in times.items())
    return f"robustness: at most about {words(total)} {unit} for {n_images} images ({parts})"


# ---------------------------------------------------------------------------------------------- distal adversarials


def distal_adversarials(
    model: JEM,
    shape: tuple[int, int, int],
    n_classes: int,
    n_each: int,
    generator: Generator,
    confidence: float = 0.9,
    max_steps: int = DISTAL_STEPS,
) -> tuple[Tensor, Tensor]:
    """From uniform noise up the gradient of log p(y|x) until p(y|x) reaches ``confidence`` (JEM, section 5.4).

    Returns images (n_classes * n_each, C, H, W) in [-1, 1], class by class, and the p(y|x) reached. A step has L2 norm
    ``DISTAL_STEP`` times the square root of the number of pixels; images that have arrived stand still.
    """
    starts = uniform_images(n_each, shape, generator)
    batches = torch.arange(n_classes, device=starts.device).split(
        max(1, images_per_batch(GRADIENT_BATCH, shape) // n_each)
    )

    def climb_to(classes: Tensor) -> tuple[Tensor, Tensor]:
        x, y = starts.repeat(len(classes), 1, 1, 1), classes.repeat_interleave(n_each)
        for step in range(max_steps + 1):
            x.requires_grad_()
            loss = F.cross_entropy(model(x), y, reduction="none")
            (grad,) = torch.autograd.grad(-loss.sum(), x)
            bar.update()
            going = loss.detach() > -math.log(confidence)
            if step == max_steps or not going.any():
                break
            length = grad.flatten(1).norm(dim=1).clamp(min=1e-12)
            move = DISTAL_STEP * math.sqrt(math.prod(shape)) * going / length  # (N,)
            x = (x.detach() + move[:, None, None, None] * grad).clamp(-1, 1)
        bar.update(max_steps - step)
        return x.detach(), (-loss.detach()).exp()

    with progress_bar("distal adversarials", distributed.shard_size(len(batches)) * (max_steps + 1)) as bar:
        parts = distributed.sharded_map(batches, climb_to, starts.device)
    x, reached = (torch.cat(part) for part in zip(*parts, strict=True))
    return x, reached
