"""Adversarial robustness: attacks, JEM's refinement and attacks through it, distal adversarials.

Attacks see images in [0, 1], as their libraries and their epsilons do; the model sees [-1, 1].
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Generator, Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from evaluation.inputs import Inputs
from evaluation.report import Section
from models import JEM
from models.predict import images_per_batch
from sgld import normal_like, uniform_images
from storage.pictures import image_grid, to_uint8

Attack = Callable[[nn.Module, float], Callable[[Tensor, Tensor], Tensor]]


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

    def __init__(self, model: JEM, steps: int, sgld_lr: float, sgld_std: float, n_chains: int, generator: Generator):
        super().__init__()
        self.model = model
        self.steps, self.sgld_lr, self.sgld_std = steps, sgld_lr, sgld_std
        self.n_chains, self.generator = n_chains, generator
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Log of the chains' mean probabilities, (N, K), of images in [0, 1]."""
        x = to_model_scale(x).repeat(self.n_chains, 1, 1, 1)
        x = differentiable_chain(self.model.log_density, x, self.steps, self.sgld_lr, self.sgld_std, self.generator)
        log_p = self.model(x).log_softmax(1).unflatten(0, (self.n_chains, -1))  # (chains, N, K)
        return log_p.logsumexp(0) - math.log(self.n_chains)


def differentiable_chain(
    log_density, x: Tensor, steps: int, sgld_lr: float, sgld_std: float, generator: Generator
) -> Tensor:
    """SGLD whose end can be differentiated in its start x, (N, C, H, W) in [-1, 1].

    Under ``no_grad`` the same chain without a graph. Each step is computed again in the backward pass, for a graph of
    all steps would need their number times the memory of a second derivative.
    """
    attacked = torch.is_grad_enabled() and x.requires_grad

    def step(x: Tensor, noise: Tensor) -> Tensor:
        with torch.enable_grad():
            start = x if x.requires_grad else x.detach().requires_grad_()
            (grad,) = torch.autograd.grad(log_density(start).sum(), start, create_graph=attacked)
        return x + sgld_lr * grad + sgld_std * noise

    for _ in range(steps):
        noise = normal_like(x, generator)
        x = checkpoint(step, x, noise, use_reentrant=False) if attacked else step(x, noise)
    return x


def pgd(norm: str, steps: int) -> Attack:
    """Projected gradient descent (Madry et al., ICLR 2018) from a random start; step size 2.5 epsilon / steps."""
    import torchattacks

    kind = {"Linf": torchattacks.PGD, "L2": torchattacks.PGDL2}[norm]
    return lambda classifier, epsilon: kind(classifier, eps=epsilon, alpha=2.5 * epsilon / steps, steps=steps)


def auto_attack(norm: str, n_classes: int, seed: int, steps: int = 100) -> Attack:
    """AutoAttack's standard version (Croce & Hein, ICML 2020) against at least 4 classes, up to 9 of them as targets.

    Put together here because torchattacks.AutoAttack gives its members 10 steps instead of their authors' 100.
    """
    import torchattacks

    def attack(classifier: nn.Module, epsilon: float) -> torchattacks.MultiAttack:
        ball = {"norm": norm, "eps": epsilon, "seed": seed}
        targets = {"n_classes": min(n_classes, 10), "steps": steps}
        return torchattacks.MultiAttack(
            [
                torchattacks.APGD(classifier, loss="ce", steps=steps, **ball),
                torchattacks.APGDT(classifier, **targets, **ball),
                torchattacks.FAB(classifier, multi_targeted=True, **targets, **ball),
                torchattacks.Square(classifier, n_queries=5000, **ball),
            ]
        )

    return attack


def no_auto_attack(n_classes: int, shape: tuple[int, int, int]) -> str:
    """Why AutoAttack cannot be run on such images, or an empty string."""
    import torchattacks

    if n_classes < 4:
        return f"it needs at least 4 classes, not {n_classes}"
    unmoved = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), n_classes)).requires_grad_(False)
    for parameter, values in zip(unmoved[1].parameters(), (torch.zeros(()), torch.eye(n_classes)[0]), strict=True):
        parameter.copy_(values)
    try:  # its Square attack draws squares and stripes that do not fit into images of every size
        torchattacks.Square(unmoved, norm="L2", n_queries=1000)(torch.zeros(1, *shape), torch.tensor([0]))
    except RuntimeError:
        return f"torchattacks' Square attack does not work on images of {shape[1]}x{shape[2]}"
    return ""


@torch.no_grad()
def is_correct(classifier: nn.Module, x: Tensor, y: Tensor, batch_size: int) -> Tensor:
    batches = zip(x.split(batch_size), y.split(batch_size), strict=True)
    return torch.cat([classifier(images).argmax(1) == labels for images, labels in batches])


@torch.no_grad()
def most_frequent_share(classifier: nn.Module, x: Tensor, batch_size: int) -> float:
    """The share of images (N, C, H, W) in the class that is predicted most often."""
    predicted = torch.cat([classifier(images).argmax(1) for images in x.split(batch_size)])
    return predicted.bincount().max().item() / len(x)


def survivors(
    classifier: nn.Module,
    attack: Attack,
    x: Tensor,
    y: Tensor,
    epsilons: list[float],
    restarts: int,
    batch_size: int,
    title: str,
) -> list[Tensor]:
    """Which images are still classified correctly, bool (N,): first without attack, then for each epsilon.

    x: (N, C, H, W) in [0, 1]; y: (N,); epsilons ascending, on the [0, 1] scale. An image that has fallen stays
    fallen, for what fooled the model lies within any larger epsilon too.
    """
    alive = is_correct(classifier, x, y, batch_size)
    results = [alive.clone()]
    with tqdm(total=len(epsilons) * restarts, desc=title, leave=False) as bar:
        for epsilon in epsilons:
            perturb = attack(classifier, epsilon)
            for _ in range(restarts):
                for part in alive.nonzero().flatten().split(batch_size) if alive.any() else ():
                    alive[part] = is_correct(classifier, perturb(x[part], y[part]), y[part], batch_size)
                bar.update()
            results.append(alive.clone())
    return results


def distal_adversarials(
    model: JEM,
    shape: tuple[int, int, int],
    n_classes: int,
    n_each: int,
    generator: Generator,
    confidence: float = 0.9,
    max_steps: int = 500,
    step_size: float = 0.05,
) -> tuple[Tensor, Tensor]:
    """From uniform noise up the gradient of log p(y|x) until p(y|x) reaches ``confidence`` (JEM, section 5.4).

    Returns images (n_classes * n_each, C, H, W) in [-1, 1], class by class, and the p(y|x) reached. A step has L2 norm
    ``step_size`` times the square root of the number of pixels; images that have arrived stand still.
    """
    starts = uniform_images(n_each, shape, generator)
    batch = max(1, images_per_batch(BATCH, shape) // n_each)  # classes
    parts = []
    for classes in tqdm(
        torch.arange(n_classes, device=starts.device).split(batch), desc="distal adversarials", leave=False
    ):
        x, y = starts.repeat(len(classes), 1, 1, 1), classes.repeat_interleave(n_each)
        for step in range(max_steps + 1):
            x.requires_grad_()
            loss = F.cross_entropy(model(x), y, reduction="none")
            (grad,) = torch.autograd.grad(-loss.sum(), x)
            going = loss.detach() > -math.log(confidence)
            if step == max_steps or not going.any():
                break
            length = grad.flatten(1).norm(dim=1).clamp(min=1e-12)
            move = step_size * math.sqrt(math.prod(shape)) * going / length  # (N,)
            x = (x.detach() + move[:, None, None, None] * grad).clamp(-1, 1)
        parts.append((x.detach(), (-loss.detach()).exp()))
    x, reached = (torch.cat(part) for part in zip(*parts, strict=True))
    return x, reached


# ---------------------------------------------------------------------------------------------- the metric


class Norm(NamedTuple):
    """A norm's epsilons on the [0, 1] scale, by the label they have in the report, and where AutoAttack is run."""

    name: str
    epsilons: dict[str, float]
    standard: str
    unit: float  # of the figure's axis

    def grey_epsilon(self, dim: int) -> float:
        """From here on any image of ``dim`` values can become plain grey: no model can be right."""
        return 0.5 if self.name == "Linf" else 0.5 * math.sqrt(dim)


class Sweep(NamedTuple):
    """PGD against a classifier, over a norm's epsilons."""

    name: str
    classifier: nn.Module
    n: int  # images
    steps: int
    restarts: int
    batch_size: int
    protocol: str


NORMS = (
    Norm("Linf", {f"{e}/255": e / 255 for e in (1, 2, 4, 8, 16)}, "8/255", 1 / 255),
    Norm("L2", {f"{e:g}": e for e in (0.25, 0.5, 1, 2)}, "0.5", 1),
)
BATCH = 100  # images of 3x32x32 at once; these need the memory of training
IMAGES, PGD_STEPS, RESTARTS = 1000, 40, 3
REFINED_IMAGES, REFINED_PGD_STEPS, CHAINS = 50, 20, 5  # a gradient through the refinement costs hundreds of plain ones
MASKED = 0.02  # accuracy beyond that of a constant answer, where no more is possible


def measure(inputs: Inputs, section: Section) -> None:
    """Robust accuracies, with and without refinement, and distal adversarials."""
    cfg, batch = inputs.cfg, images_per_batch(BATCH, inputs.data.shape)
    test = inputs.subset(inputs.data.test, IMAGES)
    x, y = test.images.float() / 255, test.labels
    plain, n_classes = Classifier(inputs.model), len(inputs.data.class_names)
    obstacle = no_auto_attack(n_classes, inputs.data.shape)
    if obstacle:
        section.skip("AutoAttack", obstacle)
    sweeps = [Sweep("PGD", plain, len(x), PGD_STEPS, RESTARTS, batch, "")]
    if cfg.refine_steps:
        refined = RefinedClassifier(inputs.model, cfg.refine_steps, cfg.sgld_lr, cfg.sgld_std, CHAINS, inputs.rng())
        protocol = (
            f"; classified after {cfg.refine_steps} SGLD steps, probabilities averaged over {CHAINS} chains, "
            "attacked through these chains"
        )
        sweeps.append(
            Sweep(
                "PGD through refinement",
                refined,
                min(REFINED_IMAGES, len(x)),
                REFINED_PGD_STEPS,
                1,
                max(1, batch // (4 * CHAINS)),
                protocol,
            )
        )

    figure = Figure(figsize=(9, 4), layout="constrained")
    for norm, axes in zip(NORMS, figure.subplots(1, 2, sharey=True), strict=True):
        for sweep in sweeps:
            add_sweep(section, norm, sweep, x, y, axes)
        if not obstacle:
            strongest, epsilon = auto_attack(norm.name, n_classes, cfg.seed), norm.epsilons[norm.standard]
            kept = survivors(plain, strongest, x, y, [epsilon], 1, batch, f"{norm.name}, AutoAttack")[-1]
            section.share(
                f"accuracy under {norm.name} attack",
                kept,
                "AutoAttack, standard version (APGD-CE, APGD-T, "
                "FAB-T of 100 steps, Square of 5,000 queries), no noise added",
                (norm.standard, "AutoAttack"),
            )
            axes.plot(epsilon / norm.unit, kept.double().mean().item(), "k*", markersize=12, label="AutoAttack")
        unit = "1/255 of the [0, 1] scale" if norm.unit < 1 else "[0, 1] scale"
        axes.set(xlabel=f"{norm.name} epsilon ({unit})", ylabel="accuracy", ylim=(-0.02, 1.02))
        axes.grid(alpha=0.3)
        axes.legend()
    section.picture("robustness", "Accuracy under attack", figure)
    add_distal_adversarials(inputs, section)


def add_sweep(section: Section, norm: Norm, sweep: Sweep, x: Tensor, y: Tensor, axes) -> None:
    grey = norm.grey_epsilon(math.prod(x.shape[1:]))
    epsilons = {**norm.epsilons, f"{grey:.3g} (check)": grey}
    alive = survivors(
        sweep.classifier,
        pgd(norm.name, sweep.steps),
        x[: sweep.n],
        y[: sweep.n],
        list(epsilons.values()),
        sweep.restarts,
        sweep.batch_size,
        f"{norm.name}, {sweep.name}",
    )
    protocol = (
        f"{norm.name} PGD, {sweep.steps} steps of epsilon / {sweep.steps / 2.5:g}, starts: {sweep.restarts}, "
        "[0, 1] scale, no noise added; an image counts while it has withstood the smaller epsilons too, "
        "and one that has fallen stays fallen, whatever noise is drawn later"
        f"{sweep.protocol}"
    )
    for label, kept in zip(["0", *epsilons], alive, strict=True):
        section.share(f"accuracy under {norm.name} attack", kept, protocol, (label, sweep.name))
    shares = [kept.double().mean().item() for kept in alive]
    axes.plot([e / norm.unit for e in (0, *norm.epsilons.values())], shares[:-1], "o-", label=sweep.name)
    constant = most_frequent_share(sweep.classifier, x[: sweep.n], sweep.batch_size)
    if shares[-1] > constant + MASKED:
        section.note(
            f"**Masked gradients?** At {norm.name} epsilon {grey:.3g}, where any image can become plain grey, "
            f"{sweep.name} leaves an accuracy of {shares[-1]:.3f}, and a constant answer keeps {constant:.3f} at most "
            "(the share of the class that is predicted most often): it is the attack that fails there, and the "
            "accuracies of this column are too high."
        )


def add_distal_adversarials(inputs: Inputs, section: Section, n_each: int = 10) -> None:
    names = inputs.data.class_names
    x, reached = distal_adversarials(inputs.model, inputs.data.shape, len(names), n_each, inputs.rng())
    section.mean(
        "p(y|x) of distal adversarials",
        reached,
        f"gradient ascent from uniform noise until 0.9; {n_each} of each of {len(names)} classes",
    )
    section.picture(
        "distal",
        "Distal adversarials: uniform noise, changed until the model is 90 % sure of a class",
        distal_figure(to_uint8(x[: 20 * n_each]), names, n_each),
    )


def distal_figure(images: Tensor, names: tuple[str, ...], n_each: int) -> Figure:
    """Images (N, C, H, W), a row of ``n_each`` for each class."""
    grid = image_grid(images, n_each, padding=8)
    n_rows = len(images) // n_each
    figure = Figure(figsize=(7, 0.7 * n_rows), layout="constrained")
    axes = figure.subplots()
    axes.imshow(grid)
    middles = [(i + 0.5) * len(grid) / n_rows for i in range(n_rows)]
    axes.set_yticks(middles, names[:n_rows], parse_math=False)
    axes.set(xticks=[], frame_on=False)
    return figure
