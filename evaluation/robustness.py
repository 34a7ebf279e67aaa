"""Adversarial robustness: accuracy under attack, with JEM's refinement too, and distal adversarials."""

import math
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Generator, Tensor, nn

import distributed
from config.options import ATTACKS
from evaluation.attacks import (
    AUTO_TARGETS,
    DISTAL_STEP,
    DISTAL_STEPS,
    Attack,
    Classifier,
    RefinedClassifier,
    auto_attack,
    distal_adversarials,
    estimate,
    measure_speed,
    no_auto_attack,
    pgd_attack,
    predicted,
    robust_mask,
)
from evaluation.inputs import GRADIENT_BATCH, EvalInputs
from evaluation.report import Section
from logger.images import image_grid, to_uint8
from models.predict import images_per_batch
from sgld import chain_options, step_protocol
from utils import UserError, evaluation_packages


class Norm(NamedTuple):
    """A norm's epsilons on the [0, 1] scale, by the label they have in the report, and where AutoAttack is run."""

    name: str
    epsilons: dict[str, float]
    autoattack_eps: str
    unit: float  # of the figure's axis

    def eps_to_grey(self, dim: int) -> float:
        """From here on any image of ``dim`` values can become plain grey: no model can be right."""
        return 0.5 if self.name == "Linf" else 0.5 * math.sqrt(dim)


class PGDSweep(NamedTuple):
    """PGD against a classifier, over a norm's epsilons: a column of the report."""

    name: str
    classifier: nn.Module
    n: int  # images
    steps: int
    restarts: int
    batch_size: int
    protocol: str
    rng: Generator  # of the attack's starts and of the classifier

    def attacks(self, norm: str) -> list[Attack]:
        names = [f"{self.name}, start {i}" for i in range(1, self.restarts + 1)] if self.restarts > 1 else [self.name]
        return [pgd_attack(norm, self.steps, self.rng, name) for name in names]


ATTACK_NORMS = (
    Norm("Linf", {f"{e}/255": e / 255 for e in (1, 2, 4, 8, 16)}, "8/255", 1 / 255),
    Norm("L2", {f"{e:g}": e for e in (0.25, 0.5, 1, 2)}, "0.5", 1),
)
ATTACKED_IMAGES, PGD_STEPS, RESTARTS = 1000, 40, 3
REFINED_IMAGES, REFINED_PGD_STEPS, CHAINS = 50, 20, 5  # a gradient through the refinement costs hundreds of plain ones
N_DISTAL = 10  # of each class
MASKED = 0.02  # accuracy beyond that of a constant answer, where no more is possible
TITLES = dict(zip(ATTACKS, ("PGD", "PGD through refinement", "AutoAttack", "distal adversarials"), strict=True))


def measure(inputs: EvalInputs, section: Section) -> None:
    """Robust accuracies, with and without refinement, and distal adversarials."""
    chosen = choose(inputs, section)
    if not chosen:
        return
    test = inputs.subset(inputs.data.test, inputs.cfg.max_images or ATTACKED_IMAGES)
    x, y = test.images.float() / 255, test.labels
    sweeps = {name: sweep for name, sweep in pgd_sweeps(inputs, len(x)).items() if name in chosen}
    print(estimate(durations(inputs, chosen, sweeps, x, y), len(x)), flush=True)

    if set(chosen) - {"distal"}:
        figure = Figure(figsize=(9, 4), layout="constrained")
        for norm, axes in zip(ATTACK_NORMS, figure.subplots(1, 2, sharey=True), strict=True):
            for sweep in sweeps.values():
                add_sweep(section, norm, sweep, x, y, axes, inputs.cfg.seed)
            if "autoattack" in chosen:
                add_auto_attack(section, norm, inputs, x, y, axes)
            unit = "1/255 of the [0, 1] scale" if norm.unit < 1 else "[0, 1] scale"
            axes.set(xlabel=f"{norm.name} epsilon ({unit})", ylabel="accuracy", ylim=(-0.02, 1.02))
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
        absent.setdefault("refined", "left out by --refine_steps 0")
    if "autoattack" not in absent:
        try:
            with evaluation_packages():
                obstacle = no_auto_attack(len(inputs.data.class_names), inputs.data.shape)
        except UserError as error:
            obstacle = str(error)
        absent |= {"autoattack": obstacle} if obstacle else {}
    for name, reason in absent.items():
        section.add_absent(TITLES[name], reason)
    return [name for name in ATTACKS if name not in absent]


def pgd_sweeps(inputs: EvalInputs, n: int) -> dict[str, PGDSweep]:
    """PGD on n images, and on fewer through the refinement, by their names in ``--attacks``."""
    cfg, model, batch = inputs.cfg, inputs.model, images_per_batch(GRADIENT_BATCH, inputs.data.shape)
    rng, rng_refined = inputs.rng(), inputs.rng()
    sizes = cfg.refine_steps, cfg.sgld_lr, cfg.sgld_std
    refined = RefinedClassifier(model, *sizes, CHAINS, rng_refined, **chain_options(cfg))
    protocol = (
        f"; classified after {cfg.refine_steps} SGLD steps ({step_protocol(cfg)}), "
        f"probabilities averaged over {CHAINS} chains, attacked through these chains"
    )
    few, small = min(REFINED_IMAGES, n), max(1, batch // (4 * CHAINS))
    return {
        "pgd": PGDSweep(TITLES["pgd"], Classifier(model), n, PGD_STEPS, RESTARTS, batch, "", rng),
        "refined": PGDSweep(TITLES["refined"], refined, few, REFINED_PGD_STEPS, 1, small, protocol, rng_refined),
    }


def durations(
    inputs: EvalInputs, chosen: list[str], sweeps: dict[str, PGDSweep], x: Tensor, y: Tensor
) -> dict[str, float]:
    """Seconds that each attack takes at most, by its title, from the measured time of a pass."""
    shape, n_classes = inputs.data.shape, len(inputs.data.class_names)
    batch = images_per_batch(GRADIENT_BATCH, shape)
    plain = measure_speed(Classifier(inputs.model), x[:batch], y[:batch])
    times = {}
    for name, sweep in sweeps.items():
        speed = plain
        if name == "refined":  # its chains draw: a copy, so that the attack sees the same noise whatever was timed
            copy = pgd_sweeps(inputs, len(x))[name]
            speed = measure_speed(copy.classifier, x[: copy.batch_size], y[: copy.batch_size])
        times[name] = sum(speed.of(sweep.attacks(n.name), sweep.n, len(n.epsilons) + 1) for n in ATTACK_NORMS)
    if "autoattack" in chosen:
        times["autoattack"] = sum(plain.of(auto_attack(n.name, n_classes, 0), len(x), 1) for n in ATTACK_NORMS)
    if "distal" in chosen:
        times["distal"] = N_DISTAL * n_classes * (DISTAL_STEPS + 1) * plain.gradient
    return {TITLES[name]: seconds / distributed.current_world().size for name, seconds in times.items()}


def add_auto_attack(section: Section, norm: Norm, inputs: EvalInputs, x: Tensor, y: Tensor, axes: Axes) -> None:
    epsilon, n_classes = norm.epsilons[norm.autoattack_eps], len(inputs.data.class_names)
    attacks, batch = (
        auto_attack(norm.name, n_classes, inputs.cfg.seed),
        images_per_batch(GRADIENT_BATCH, inputs.data.shape),
    )
    kept = robust_mask(Classifier(inputs.model), attacks, x, y, [epsilon], batch, norm.name)[-1]
    section.add_proportion(
        f"accuracy under {norm.name} attack",
        kept,
        "AutoAttack, standard version by its authors (APGD-CE, APGD-T and FAB-T of 100 steps and "
        f"{min(AUTO_TARGETS, n_classes - 1)} targets, Square of 5,000 queries), [0, 1] scale, no noise added",
        (norm.autoattack_eps, TITLES["autoattack"]),
    )
    axes.plot(epsilon / norm.unit, kept.double().mean().item(), "k*", markersize=12, label="AutoAttack")


def add_sweep(section: Section, norm: Norm, sweep: PGDSweep, x: Tensor, y: Tensor, axes: Axes, seed: int) -> None:
    grey = norm.eps_to_grey(math.prod(x.shape[1:]))
    epsilons = {**norm.epsilons, f"{grey:.3g} (check)": grey}
    sweep.rng.manual_seed(seed)  # the same for each norm, whichever attacks ran before
    alive = robust_mask(
        sweep.classifier,
        sweep.attacks(norm.name),
        x[: sweep.n],
        y[: sweep.n],
        list(epsilons.values()),
        sweep.batch_size,
        norm.name,
        sweep.rng,
    )
    protocol = (
        f"{norm.name} PGD, {sweep.steps} steps of epsilon / {sweep.steps / 2.5:g}, starts: {sweep.restarts}, "
        "[0, 1] scale, no noise added; an image counts while it has withstood the smaller epsilons too, "
        "and one that has fallen stays fallen, whatever noise is drawn later"
        f"{sweep.protocol}"
    )
    for label, kept in zip(["0", *epsilons], alive, strict=True):
        section.add_proportion(f"accuracy under {norm.name} attack", kept, protocol, (label, sweep.name))
    shares = [kept.double().mean().item() for kept in alive]
    axes.plot([e / norm.unit for e in (0, *norm.epsilons.values())], shares[:-1], "o-", label=sweep.name)
    answers = predicted(sweep.classifier, x[: sweep.n], sweep.batch_size, sweep.rng)
    constant = answers.bincount().max().item() / sweep.n  # the share of the class that is predicted most often
    if shares[-1] > constant + MASKED:
        section.note(
            f"**Masked gradients?** At {norm.name} epsilon {grey:.3g} every image can be changed to plain grey, so an "
            f"attack that works leaves an accuracy of {constant:.3f} at most (the share of the class that is predicted "
            f"most often). {sweep.name} leaves {shares[-1]:.3f}: the attack does not work here, and the accuracies of "
            "this column are too high."
        )


def add_distal_adversarials(inputs: EvalInputs, section: Section) -> None:
    names = inputs.data.class_names
    x, reached = distal_adversarials(inputs.model, inputs.data.shape, len(names), N_DISTAL, inputs.rng())
    section.add_mean(
        "p(y|x) of distal adversarials",
        reached,
        f"gradient ascent from uniform noise until 0.9, at most {DISTAL_STEPS} steps of L2 {DISTAL_STEP:g} times the "
        f"root of the number of values ([-1, 1] scale); {N_DISTAL} of each of {len(names)} classes",
    )
    section.add_proportion("share above 0.9 of distal adversarials", reached >= 0.9, "as p(y|x) of distal adversarials")
    section.picture(
        "distal",
        "Distal adversarials: uniform noise, changed until the model is 90 % sure of a class, or for all steps",
        distal_figure(to_uint8(x[: 20 * N_DISTAL]), names, N_DISTAL),
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
