"""Adversarial robustness: accuracy under attack, with JEM's refinement too, and distal adversarials."""

import math
from functools import partial

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

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


EPSILONS = {  # on the [0, 1] scale, by the label they have in the report
    "Linf": {f"{e}/255": e / 255 for e in (1, 2, 4, 8, 16)},
    "L2": {f"{e:g}": e for e in (0.25, 0.5, 1, 2)},
}
AUTOATTACK_EPSILON = {"Linf": "8/255", "L2": "0.5"}
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
        for norm, axes in zip(EPSILONS, figure.subplots(1, 2, sharey=True), strict=True):
            for name in ("pgd", "refined", "refined_straight"):
                if name in chosen:
                    add_pgd(section, norm, epsilons(inputs.cfg, norm), name, attacked(inputs, name), axes)
            if "autoattack" in chosen:
                add_autoattack(section, norm, inputs, axes)
            axes.set(xlabel=f"{norm} epsilon ([0, 1] scale)", ylabel="accuracy", ylim=(-0.02, 1.02))
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


def epsilons(cfg: Config, norm: str) -> dict[str, float]:
    """A norm's epsilons, with ``--one_epsilon`` the one where AutoAttack is run."""
    one = AUTOATTACK_EPSILON[norm]
    return {one: EPSILONS[norm][one]} if cfg.one_epsilon else EPSILONS[norm]


def attacked(inputs: EvalInputs, name: str) -> attacks.Attacked:
    """What the attack ``name`` is on: the classifier, or its refinement, for which there are fewer images.

    PGD goes through the chains of the refinement ("refined"), or past them, as JEM's authors do it.
    """
    cfg, model, rng = inputs.cfg, inputs.model, inputs.rng()
    test = inputs.subset(inputs.data.test, cfg.attack_images or cfg.max_images or ATTACKED_IMAGES)
    classifier, protocol = attacks.Classifier(model), ""
    batch_size = images_per_batch(GRADIENT_BATCH, inputs.data.shape)
    if name in ("refined", "refined_straight"):
        test = test[:REFINED_IMAGES]
        batch_size = max(1, batch_size // (4 * CHAINS))  # a step's graph takes memory, too
        sizes = {"steps": cfg.refine_steps, "sgld_lr": cfg.sgld_lr, "sgld_std": cfg.sgld_std}
        chain = partial(attacks.differentiable_chain, model.log_density, generator=rng, **sizes, **chain_options(cfg))
        protocol = f"; classified after {cfg.refine_steps} SGLD steps ({step_protocol(cfg)}), "
    if name == "refined":
        classifier = attacks.RefinedClassifier(model, chain, CHAINS)
        protocol += f"probabilities averaged over {CHAINS} chains, attacked through these chains"
    elif name == "refined_straight":
        classifier = attacks.StraightRefinedClassifier(model, chain, CHAINS, cfg.sigma_test, rng)
        protocol += f"begun with noise of {cfg.sigma_test:g}, logits averaged over {CHAINS} chains, attacked past these"
    return attacks.Attacked(classifier, test.images.float() / 255, test.labels, batch_size, rng, protocol)


def add_pgd(
    section: Section, norm: str, epsilons: dict[str, float], name: str, target: attacks.Attacked, axes: Axes
) -> None:
    """A column of accuracies: without attack, at each epsilon, and where any image can become plain grey."""
    steps, starts = (PGD_STEPS, RESTARTS) if name == "pgd" else (REFINED_PGD_STEPS, 1)
    title, table = TITLES[name], f"accuracy under {norm} attack"
    answers = target.predicted()
    grey = 0.5 if norm == "Linf" else 0.5 * math.sqrt(target.x[0].numel())
    protocol = (
        f"{norm} PGD, {steps} steps of epsilon / {steps / 2.5:g}, starts: {starts}, [0, 1] scale, no noise added; "
        "an image counts while it has withstood the smaller epsilons too, and one that has fallen stays fallen, "
        f"whatever noise is drawn later{target.protocol}"
    )
    mask, shares = answers == target.y, []
    for label, eps in {"0": 0.0, **epsilons, f"{grey:.3g} (check)": grey}.items():
        attack = partial(attacks.pgd_attack, target.classifier, eps, norm, steps, target.rng)
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


def add_autoattack(section: Section, norm: str, inputs: EvalInputs, axes: Axes) -> None:
    target, n_classes = attacked(inputs, "autoattack"), len(inputs.data.class_names)
    label = AUTOATTACK_EPSILON[norm]
    eps = EPSILONS[norm][label]
    attack = attacks.autoattack(target.classifier, eps, norm, n_classes, inputs.cfg.seed, inputs.device)

    def moved(x: Tensor, y: Tensor) -> Tensor:
        return attack.run_standard_evaluation(x, y, batch_size=len(x))[0]

    mask = target.robust(moved, target.predicted() == target.y, f"{norm}, AutoAttack")
    protocol = (
        "AutoAttack, standard version by its authors (APGD-CE, APGD-T and FAB-T of 100 steps and "
        f"{min(9, n_classes - 1)} targets, Square of 5,000 queries), [0, 1] scale, no noise added"
    )
    section.add_proportion(f"accuracy under {norm} attack", mask, protocol, (label, TITLES["autoattack"]))
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
