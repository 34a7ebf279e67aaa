"""Adversarial robustness: accuracy under attack, with JEM's refinement too, and distal adversarials."""

import math
from functools import partial
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Generator, Tensor, nn

from config import Config
from config.options import ATTACKS
from evaluation import attacks
from evaluation.inputs import GRADIENT_BATCH, EvalInputs
from evaluation.report import Section
from logger.images import captioned, image_grid, to_uint8
from models.predict import images_per_batch
from sgld import chain_options, step_protocol, uniform_images
from utils import UserError, evaluation_packages

needs_labels = True


class Norm(NamedTuple):
    """A norm's epsilons on the [0, 1] scale, by the label they have in the report, and where AutoAttack is run."""

    name: str
    epsilons: dict[str, float]
    autoattack_eps: str


class PGDSweep(NamedTuple):
    """PGD over a norm's epsilons: a column of the report."""

    name: str
    attacked: attacks.Attacked
    steps: int
    restarts: int
    protocol: str = ""  # of the classifier


ATTACK_NORMS = (
    Norm("Linf", {f"{e}/255": e / 255 for e in (1, 2, 4, 8, 16)}, "8/255"),
    Norm("L2", {f"{e:g}": e for e in (0.25, 0.5, 1, 2)}, "0.5"),
)
ATTACKED_IMAGES, PGD_STEPS, RESTARTS = 1000, 40, 3
REFINED_IMAGES, REFINED_PGD_STEPS, CHAINS = 50, 20, 5  # a gradient through the refinement costs hundreds of plain ones
N_DISTAL = 10  # of each class
MASKED = 0.02  # accuracy beyond that of a constant answer, where no more is possible
TITLES = {
    "pgd": "PGD",
    "refined": "PGD through refinement",
    "refined_straight": "PGD past refinement",
    "autoattack": "AutoAttack",
    "distal": "distal adversarials",
}


def measure(inputs: EvalInputs, section: Section) -> None:
    """Robust accuracies, with and without refinement, and distal adversarials."""
    chosen = choose(inputs, section)
    if set(chosen) - {"distal"}:
        figure = Figure(figsize=(9, 4), layout="constrained")
        for norm, axes in zip(attack_norms(inputs.cfg), figure.subplots(1, 2, sharey=True), strict=True):
            for name in ("pgd", "refined", "refined_straight"):
                if name in chosen:
                    add_sweep(section, norm, pgd_sweep(inputs, name), axes)
            if "autoattack" in chosen:
                add_autoattack(section, norm, inputs, axes)
            axes.set(xlabel=f"{norm.name} epsilon ([0, 1] scale)", ylabel="accuracy", ylim=(-0.02, 1.02))
            axes.grid(alpha=0.3)
            axes.legend()
        section.picture("robustness", "Accuracy under attack", figure)
    if "distal" in chosen:
        add_distal_adversarials(inputs, section)


def choose(inputs: EvalInputs, section: Section) -> list[str]:
    """Those of ``--attacks`` that can be run; the report says of the others why they are absent."""
    cfg = inputs.cfg
    absent = {name: "left out by --attacks" for name in ATTACKS if name not in cfg.chosen_attacks}
    if not cfg.refine_steps:
        absent = dict.fromkeys(("refined", "refined_straight"), "left out by --refine_steps 0") | absent
    if "autoattack" not in absent:
        try:
            with evaluation_packages():
                attacks.check_autoattack(len(inputs.data.class_names), inputs.data.shape)
        except UserError as error:
            absent["autoattack"] = str(error)
    for name, reason in absent.items():
        section.add_absent(TITLES[name], reason)
    return [name for name in ATTACKS if name not in absent]


def attack_norms(cfg: Config) -> list[Norm]:
    """The norms, with ``--one_epsilon`` at the one where AutoAttack is run."""
    if not cfg.one_epsilon:
        return list(ATTACK_NORMS)
    return [norm._replace(epsilons={norm.autoattack_eps: norm.epsilons[norm.autoattack_eps]}) for norm in ATTACK_NORMS]


def attacked(
    inputs: EvalInputs, classifier: nn.Module, rng: Generator | None = None, refined: bool = False
) -> attacks.Attacked:
    """The classifier with the test images that are attacked: fewer, and fewer at once, where it refines them."""
    n = inputs.cfg.attack_images or inputs.cfg.max_images or ATTACKED_IMAGES
    test = inputs.subset(inputs.data.test, n)[: REFINED_IMAGES if refined else None]
    batch_size = images_per_batch(GRADIENT_BATCH, inputs.data.shape)
    if refined:
        batch_size = max(1, batch_size // (4 * CHAINS))  # a step's graph takes memory, too
    return attacks.Attacked(classifier, test.images.float() / 255, test.labels, batch_size, rng)


def pgd_sweep(inputs: EvalInputs, name: str) -> PGDSweep:
    """PGD on the classifier or on its refinement: through the chains ("refined"), or as JEM's authors do it."""
    cfg, model, rng = inputs.cfg, inputs.model, inputs.rng()
    if name == "pgd":
        return PGDSweep(TITLES[name], attacked(inputs, attacks.Classifier(model), rng), PGD_STEPS, RESTARTS)
    sizes = {"steps": cfg.refine_steps, "sgld_lr": cfg.sgld_lr, "sgld_std": cfg.sgld_std}
    chain = partial(attacks.differentiable_chain, model.log_density, generator=rng, **sizes, **chain_options(cfg))
    protocol = f"; classified after {cfg.refine_steps} SGLD steps ({step_protocol(cfg)}), "
    if name == "refined":
        refined = attacks.RefinedClassifier(model, chain, CHAINS)
        protocol += f"probabilities averaged over {CHAINS} chains, attacked through these chains"
    else:
        refined = attacks.StraightRefinedClassifier(model, chain, CHAINS, cfg.sigma_test, rng)
        protocol += f"begun with noise of {cfg.sigma_test:g}, logits averaged over {CHAINS} chains, attacked past these"
    return PGDSweep(TITLES[name], attacked(inputs, refined, rng, refined=True), REFINED_PGD_STEPS, 1, protocol)


def add_sweep(section: Section, norm: Norm, sweep: PGDSweep, axes: Axes) -> None:
    """A column of accuracies: without attack, at each epsilon, and where any image can become plain grey."""
    target, steps = sweep.attacked, sweep.steps
    answers = target.predicted()
    grey = 0.5 if norm.name == "Linf" else 0.5 * math.sqrt(target.x[0].numel())
    masks = {"0": answers == target.y}
    mask = masks["0"]
    for label, eps in {**norm.epsilons, f"{grey:.3g} (check)": grey}.items():
        attack = partial(attacks.pgd_attack, target.classifier, eps, norm.name, steps, target.rng)
        for restart in range(1, sweep.restarts + 1):
            mask = target.robust(attack, mask, f"{norm.name} {label}, {sweep.name} {restart}")
        masks[label] = mask
    protocol = (
        f"{norm.name} PGD, {steps} steps of epsilon / {steps / 2.5:g}, starts: {sweep.restarts}, "
        "[0, 1] scale, no noise added; an image counts while it has withstood the smaller epsilons too, "
        f"and one that has fallen stays fallen, whatever noise is drawn later{sweep.protocol}"
    )
    for label, mask in masks.items():
        section.add_proportion(f"accuracy under {norm.name} attack", mask, protocol, (label, sweep.name))
    shares = [mask.double().mean().item() for mask in masks.values()]
    axes.plot([0, *norm.epsilons.values()], shares[:-1], "o-", label=sweep.name)
    constant = answers.bincount().max().item() / len(answers)  # the share of the class that is predicted most often
    if shares[-1] > constant + MASKED:
        section.note(
            f"**Masked gradients?** At {norm.name} epsilon {grey:.3g} every image can be changed to plain grey, so an "
            f"attack that works leaves an accuracy of {constant:.3f} at most (the share of the class that is predicted "
            f"most often). {sweep.name} leaves {shares[-1]:.3f}: the attack does not work here, and the accuracies of "
            "this column are too high."
        )


def add_autoattack(section: Section, norm: Norm, inputs: EvalInputs, axes: Axes) -> None:
    target, eps = attacked(inputs, attacks.Classifier(inputs.model)), norm.epsilons[norm.autoattack_eps]
    n_classes = len(inputs.data.class_names)
    attack = attacks.autoattack(target.classifier, eps, norm.name, n_classes, inputs.cfg.seed, inputs.device)

    def moved(x: Tensor, y: Tensor) -> Tensor:
        return attack.run_standard_evaluation(x, y, batch_size=len(x))[0]

    mask = target.robust(moved, target.predicted() == target.y, f"{norm.name}, AutoAttack")
    protocol = (
        "AutoAttack, standard version by its authors (APGD-CE, APGD-T and FAB-T of 100 steps and "
        f"{min(9, n_classes - 1)} targets, Square of 5,000 queries), [0, 1] scale, no noise added"
    )
    at = norm.autoattack_eps, TITLES["autoattack"]
    section.add_proportion(f"accuracy under {norm.name} attack", mask, protocol, at)
    axes.plot(eps, mask.double().mean().item(), "k*", markersize=12, label="AutoAttack")


def add_distal_adversarials(inputs: EvalInputs, section: Section) -> None:
    names, starts = inputs.data.class_names, uniform_images(N_DISTAL, inputs.data.shape, inputs.rng())
    x, reached = attacks.distal_adversarials(inputs.model, starts, len(names))
    section.add_mean(
        "p(y|x) of distal adversarials",
        reached,
        f"gradient ascent from uniform noise until 0.9, at most {attacks.DISTAL_STEPS} steps of L2 "
        f"{attacks.DISTAL_STEP:g} times the root of the number of values ([-1, 1] scale); "
        f"{N_DISTAL} of each of {len(names)} classes",
    )
    section.add_proportion("share above 0.9 of distal adversarials", reached >= 0.9, "as p(y|x) of distal adversarials")
    section.picture(
        "distal",
        "Distal adversarials: uniform noise, changed until the model is 90 % sure of a class, or for all steps",
        captioned(image_grid(to_uint8(x[: 20 * N_DISTAL]), N_DISTAL), rows=names[:20]),
    )
