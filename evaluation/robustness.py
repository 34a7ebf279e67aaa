"""Accuracy under attack, with JEM's refinement too. Attacks see images in [0, 1], the model sees [-1, 1]."""

import logging
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Generator, Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import distributed
from config.options import ATTACKS
from evaluation.inputs import GRADIENT_BATCH, EvalInputs
from evaluation.report import Section
from models import JEM
from models.predict import images_per_batch
from pgd import adversarial_images, random_offset
from sgld import LogDensity, chain_options, langevin_step, normal_like, step_protocol
from utils import UserError

needs_labels = True
Classifier = Callable[[Tensor], Tensor]  # images (N, C, H, W) in [0, 1] to logits (N, K)
EPSILONS = {  # on the [0, 1] scale, by the label they have in the report
    "Linf": {f"{e}/255": e / 255 for e in (1, 2, 4, 8, 16)},
    "L2": {f"{e:g}": e for e in (0.25, 0.5, 1, 2)},
}
AUTOATTACK_EPSILON = {"Linf": "8/255", "L2": "0.5"}
ATTACKED_IMAGES, PGD_STEPS, RESTARTS = 1000, 40, 3
REFINED_IMAGES, REFINED_PGD_STEPS, CHAINS = 50, 20, 5  # a gradient through the refinement costs hundreds of plain ones
MASKED = 0.02  # accuracy beyond that of a constant answer, where no more is possible
TITLES = {"pgd": "PGD", "refined": "PGD through refinement", "refined_straight": "PGD past refinement"}
TITLES |= {"autoattack": "AutoAttack"}


def to_model_scale(x: Tensor) -> Tensor:
    """[0, 1] to [-1, 1]; gradients arrive contiguous, as attacks that flatten them with view() need."""
    return (2 * x - 1).flatten(1).unflatten(1, x.shape[1:])


def direct(x: Tensor, model: JEM) -> Tensor:
    """Logits (N, K) of images x in [0, 1]."""
    return model(to_model_scale(x))


def refined(x: Tensor, model: JEM, chain: Callable[[Tensor], Tensor], n_chains: int) -> Tensor:
    """Log of the mean probabilities (N, K) of several SGLD chains from images x in [0, 1] (JEM, section 5.4).

    ``chain`` is differentiable, with new noise in each call: a gradient attack goes end to end through the refinement,
    in expectation over its noise (Athalye et al., ICML 2018).
    """
    x = chain(to_model_scale(x).repeat(n_chains, 1, 1, 1))
    return model(x).log_softmax(1).unflatten(0, (n_chains, -1)).logsumexp(0) - math.log(n_chains)


def refined_straight(
    x: Tensor, model: JEM, chain: Callable[[Tensor], Tensor], n_chains: int, start_std: float, rng: Generator
) -> Tensor:
    """The chains' mean logits (N, K) of images x in [0, 1], as JEM's authors attack them.

    What a chain adds, begun with noise of ``start_std``, counts as a constant.
    """
    x = to_model_scale(x).repeat(n_chains, 1, 1, 1)
    start = x.detach() + start_std * normal_like(x, rng)
    moved = x + (chain(start) - x).detach()
    return model(moved).unflatten(0, (n_chains, -1)).mean(0)  # (chains, N, K) -> (N, K)


def differentiable_chain(
    log_density: LogDensity, x: Tensor, steps: int, sgld_lr: float, sgld_std: float, generator: Generator, **limits: Any
) -> Tensor:
    """SGLD whose end can be differentiated in its start x, (N, C, H, W) in [-1, 1]; ``limits`` as in ``langevin_step``.

    Each step is computed again in the backward pass: to store the graphs of all needs ``steps`` times as much memory.
    """
    attacked = torch.is_grad_enabled() and x.requires_grad

    def step(x: Tensor, noise: Tensor) -> Tensor:
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # other attention has no second derivative
            start = x if x.requires_grad else x.detach().requires_grad_()
            (grad,) = torch.autograd.grad(log_density(start).sum(), start, create_graph=attacked)
        return langevin_step(x, grad, noise, sgld_lr, sgld_std, **limits)

    for _ in range(steps):
        noise = normal_like(x, generator)
        x = checkpoint(step, x, noise, use_reentrant=False) if attacked else step(x, noise)
    return x


def pgd_attack(
    classifier: Classifier, eps: float, norm: str, steps: int, rng: Generator, x: Tensor, y: Tensor
) -> Tensor:
    """Projected gradient descent (Madry et al., ICLR 2018) from a random start; step size 2.5 eps / steps."""
    radius = 2 * eps  # on the model's scale, which is twice as wide
    offset = random_offset(x, radius, norm, rng)
    moved = adversarial_images(lambda x: classifier((x + 1) / 2), 2 * x - 1, y, radius, norm, steps, offset=offset)
    return (moved + 1) / 2


def autoattack(classifier: Classifier, eps: float, norm: str, n_classes: int, seed: int, device: torch.device):
    """AutoAttack's standard version (Croce & Hein, ICML 2020) as its authors' object, for at least 4 classes.

    The targets are the 9 most likely wrong classes, or all of fewer.
    """
    from pyautoattack import AutoAttack

    logging.getLogger("auto-attack").setLevel(logging.ERROR)  # of masked gradients the report says more
    attack = AutoAttack(classifier, norm=norm, eps=eps, seed=seed, device=device)
    attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = min(9, n_classes - 1)
    return attack


def check_autoattack(n_classes: int, shape: tuple[int, int, int]) -> None:
    """Raise UserError if AutoAttack cannot be run on such images."""
    if n_classes < 4:
        raise UserError(f"it needs at least 4 classes, not {n_classes}")
    first_class = F.one_hot(torch.tensor([0]), n_classes).float()  # the answer for every image
    square = autoattack(lambda x: first_class, 0.5, "L2", n_classes, 0, torch.device("cpu")).square
    square.n_queries = 1
    try:  # it starts from tiles that do not fit into images of every size
        square.perturb(torch.zeros(1, *shape), torch.tensor([0]))
    except RuntimeError:
        raise UserError(f"its Square attack does not work on images of {shape[1]}x{shape[2]}") from None


class Attacked(NamedTuple):
    """A classifier and the images on which it is attacked."""

    classifier: Classifier
    x: Tensor  # (N, C, H, W) in [0, 1]
    y: Tensor  # (N,)
    batch_size: int
    rng: Generator  # what the classifier and its attacks draw from, if they do
    protocol: str = "; no noise added"  # of the classifier

    @torch.no_grad()
    def predicted(self) -> Tensor:
        """The classes (N,) without attack."""
        batches = self.x.split(self.batch_size)
        answers = distributed.sharded_map(batches, lambda x: self.classifier(x).argmax(1), self.x.device, self.rng)
        return torch.cat(answers)

    def robust(self, attack: Callable[[Tensor, Tensor], Tensor], mask: Tensor, title: str = "") -> Tensor:
        """Which of the images in ``mask``, bool (N,), are still classified as y after ``attack``, bool (N,).

        It maps images and labels to moved images. ``title`` stands at a progress bar.
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


def measure(inputs: EvalInputs, section: Section) -> None:
    """Robust accuracies, with and without refinement."""
    chosen, figure = choose(inputs, section), Figure(figsize=(9, 4), layout="constrained")
    for norm, axes in zip(EPSILONS, figure.subplots(1, 2, sharey=True), strict=True):
        for name in chosen:
            add = add_autoattack if name == "autoattack" else add_pgd
            section.attempt(f"{TITLES[name]}, {norm}", partial(add, inputs, section, norm, name, axes))
        axes.set(xlabel=f"{norm} epsilon ([0, 1] scale)", ylabel="accuracy", ylim=(-0.02, 1.02))
        axes.grid(alpha=0.3)
        axes.legend(handles=axes.lines)  # none where attacks failed
    if any(axes.lines for axes in figure.axes):
        section.picture("robustness", "Accuracy under attack", figure)


def choose(inputs: EvalInputs, section: Section) -> list[str]:
    """Those of ``--attacks`` that can be run; the report says of the others why they are absent."""
    cfg = inputs.cfg
    absent = {name: "left out by --attacks" for name in ATTACKS if name not in cfg.chosen_attacks}
    if not cfg.refine_steps:
        absent = dict.fromkeys(("refined", "refined_straight"), "left out by --refine_steps 0") | absent
    for name, reason in absent.items():
        section.add_absent(TITLES[name], reason)
    if "autoattack" not in absent:
        check = partial(check_autoattack, len(inputs.data.class_names), inputs.data.shape)
        section.attempt(TITLES["autoattack"], check)
    return [name for name in ATTACKS if TITLES[name] not in section.absent]


def attacked(inputs: EvalInputs, name: str) -> Attacked:
    """What the attack ``name`` is on: the classifier, or its refinement, by default on fewer images.

    PGD goes through the chains of the refinement ("refined"), or past them, as JEM's authors do it.
    """
    cfg, model, rng = inputs.cfg, inputs.model, inputs.rng()
    test = inputs.subset(inputs.data.test, cfg.attack_images or cfg.max_images or ATTACKED_IMAGES)
    batch_size = images_per_batch(GRADIENT_BATCH, inputs.data.shape)
    if name in ("pgd", "autoattack"):
        return Attacked(partial(direct, model=model), test.images.float() / 255, test.labels, batch_size, rng)
    n_chains = CHAINS if cfg.sgld_std or (name == "refined_straight" and cfg.sigma_test) else 1  # all would be the same
    test = test if cfg.attack_images else test[:REFINED_IMAGES]
    batch_size = max(1, batch_size // (4 * n_chains))  # a step's graph takes memory, too
    sizes = {"steps": cfg.refine_steps, "sgld_lr": cfg.sgld_lr, "sgld_std": cfg.sgld_std}
    chain = partial(differentiable_chain, model.log_density, generator=rng, **sizes, **chain_options(cfg))
    protocol = f"; classified after {cfg.refine_steps} SGLD steps ({step_protocol(cfg)}), "
    if name == "refined":
        classifier = partial(refined, model=model, chain=chain, n_chains=n_chains)
        protocol += f"probabilities averaged over {n_chains} chains, attacked through these chains"
    else:
        noise = {"start_std": cfg.sigma_test, "rng": rng}
        classifier = partial(refined_straight, model=model, chain=chain, n_chains=n_chains, **noise)
        protocol += f"begun with noise of {cfg.sigma_test:g}, logits of {n_chains} chains averaged, attacked past them"
    return Attacked(classifier, test.images.float() / 255, test.labels, batch_size, rng, protocol)


def add_pgd(inputs: EvalInputs, section: Section, norm: str, name: str, axes: Axes) -> None:
    """A column of accuracies: without attack, at each epsilon, and where any image can become plain grey."""
    target, one, epsilons = attacked(inputs, name), AUTOATTACK_EPSILON[norm], EPSILONS[norm]
    epsilons = {one: epsilons[one]} if inputs.cfg.one_epsilon else epsilons
    steps, starts = (PGD_STEPS, RESTARTS) if name == "pgd" else (REFINED_PGD_STEPS, 1)
    title, table = TITLES[name], f"accuracy under {norm} attack"
    answers = target.predicted()
    grey = 0.5 if norm == "Linf" else 0.5 * math.sqrt(target.x[0].numel())
    protocol = f"{norm} PGD, {steps} steps of epsilon / {steps / 2.5:g}, starts: {starts}, [0, 1] scale"
    protocol += f"{target.protocol}; an image counts while it has withstood the smaller epsilons "
    protocol += "too; one that has fallen stays fallen, whatever noise is drawn later"
    mask, shares = answers == target.y, []
    for label, eps in {"0": 0.0, **epsilons, f"{grey:.3g} (check)": grey}.items():
        attack = partial(pgd_attack, target.classifier, eps, norm, steps, target.rng)
        for start in range(starts if eps else 0):
            mask = target.robust(attack, mask, f"{norm} {label}, {title} {start + 1}")
        section.add_proportion(table, mask, protocol, (label, title))
        shares.append(mask.double().mean().item())
    axes.plot([0, *epsilons.values()], shares[:-1], "o-", label=title)
    constant = answers.bincount().max().item() / len(answers)  # the share of the class that is predicted most often
    if shares[-1] > constant + MASKED:
        section.note(
            f"**Masked gradients?** At {norm} epsilon {grey:.3g} every image can become plain grey, of which at most "
            f"{constant:.3f}, the share of the class that is predicted most often, is right. {title} leaves "
            f"{shares[-1]:.3f}: the attack does not work here, and the accuracies of this column are too high."
        )


def add_autoattack(inputs: EvalInputs, section: Section, norm: str, name: str, axes: Axes) -> None:
    target, n_classes = attacked(inputs, name), len(inputs.data.class_names)
    label, title = AUTOATTACK_EPSILON[norm], TITLES[name]
    eps = EPSILONS[norm][label]
    run = autoattack(target.classifier, eps, norm, n_classes, inputs.cfg.seed, inputs.device).run_standard_evaluation
    right = target.predicted() == target.y
    mask = target.robust(lambda x, y: run(x, y, batch_size=len(x))[0], right, f"{norm}, {title}")
    protocol = "AutoAttack, standard version by its authors (APGD-CE, APGD-T and FAB-T of 100 steps and "
    protocol += f"{min(9, n_classes - 1)} targets, Square of 5,000 queries), [0, 1] scale, no noise added"
    section.add_proportion(f"accuracy under {norm} attack", mask, protocol, (label, title))
    axes.plot(eps, mask.double().mean().item(), "k*", markersize=12, label=title)
