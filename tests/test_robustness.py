"""Attacks that lower a tiny model's accuracy and keep to their ball, and gradients through the refinement."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from matplotlib.figure import Figure
from reference import reference_chain

from config import Config
from data import load
from evaluation import attacks, robustness
from evaluation.attacks import (
    AUTOATTACK_PARTS,
    Attacked,
    AutoAttack,
    Classifier,
    PGDAttack,
    RefinedClassifier,
    check_autoattack,
    differentiable_chain,
    distal_adversarials,
)
from evaluation.inputs import EvalInputs
from evaluation.report import Section
from evaluation.robustness import Norm, PGDSweep, add_sweep
from models import build_model
from utils import UserError


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def chain_of(model, steps, sgld_lr, sgld_std, seed=0):
    sizes = {"steps": steps, "sgld_lr": sgld_lr, "sgld_std": sgld_std}
    return partial(differentiable_chain, model.log_density, generator=seeded(seed), **sizes)


def masks(classifier, attacks, x, y, epsilons, batch_size):
    """Who is classified correctly without attack, then under all attacks of each epsilon and those before."""
    target = Attacked(classifier, x, y, batch_size)
    found = [target.predicted() == y]
    for eps in epsilons:
        mask = found[-1]
        for attack in attacks:
            mask = target.robust(attack, eps, mask)
        found.append(mask)
    return found


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = build_model(3, 4, depth=10, width=1).eval().requires_grad_(False)
    model.class_output.weight *= 20  # confident enough to be attacked
    return model


@pytest.fixture
def images():
    return torch.rand(8, 3, 8, 8, generator=seeded())


@pytest.mark.parametrize(("norm", "epsilons"), [("Linf", [1e-4, 0.1, 0.5]), ("L2", [1e-3, 2.0, 7.0])])
def test_attacks_lower_the_accuracy_and_stay_in_their_ball(model, images, norm, epsilons):
    classifier = Classifier(model)
    labels = classifier(images).argmax(1)
    alive = masks(classifier, 2 * [PGDAttack(norm, 20, seeded())], images, labels, epsilons, batch_size=3)
    counts = [kept.sum().item() for kept in alive]
    assert counts[0] == 8 and counts[-1] < counts[0]
    assert counts == sorted(counts, reverse=True)

    attacked = PGDAttack(norm, 20, seeded()).perturb(classifier, epsilons[1], images, labels)
    order = math.inf if norm == "Linf" else 2
    assert torch.linalg.vector_norm((attacked - images).flatten(1), order, dim=1).max() <= epsilons[1] * (1 + 1e-5)
    assert attacked.min() >= 0 and attacked.max() <= 1
    # what fooled the model under attack fools the bare model too
    assert (model(2 * attacked - 1).argmax(1) != labels).any()


@pytest.mark.parametrize("wrapper", ["plain", "refined"])
@pytest.mark.parametrize("options", [{"norm": "batch"}, {"dropout_rate": 0.5}], ids=["batch", "dropout"])
def test_attacks_leave_the_model_as_it_was(options, wrapper, images):
    torch.manual_seed(0)
    model = build_model(3, 4, depth=10, width=1, **options).eval().requires_grad_(False)
    model.class_output.weight *= 20
    before = {name: value.clone() for name, value in model.state_dict().items()}
    refined = RefinedClassifier(model, chain_of(model, 1, 1e-6, 0.0), n_chains=1)
    classifier = {"plain": Classifier(model), "refined": refined}[wrapper]
    labels = model(2 * images - 1).argmax(1)
    attack = PGDAttack("Linf", 1, seeded())
    kept = Attacked(classifier, images, labels, 8).robust(attack, 1e-7, torch.ones(8) > 0)
    assert kept.all() and not model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_where_autoattack_can_be_run():
    for side in (8, 16, 28, 32):
        check_autoattack(10, (3, side, side))
    with pytest.raises(UserError, match="at least 4 classes, not 3"):
        check_autoattack(3, (3, 32, 32))
    for height, width in ((24, 32), (24, 24), (12, 12)):  # more than 5 of its tiles a side
        with pytest.raises(UserError, match=f"images of {height}x{width}"):
            check_autoattack(10, (3, height, width))


def test_a_linear_model_falls_exactly_where_its_margin_ends():
    direction = torch.tensor([1.0, -1.0, 1.0, -1.0])

    class Linear(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(direction)

        def forward(self, x):
            score = x.flatten(1) @ self.weight
            return torch.stack([score, -score], 1)

    shifts = torch.tensor([0.02, 0.06, 0.14])
    x = 0.5 + shifts[:, None] * direction  # the L-infinity distance to the boundary is the shift
    labels = torch.zeros(3, dtype=torch.int64)
    alive = masks(Linear(), [PGDAttack("Linf", 20, seeded())], x.view(3, 1, 2, 2), labels, [0.05, 0.1, 0.2], 2)
    assert [kept.tolist() for kept in alive] == [
        [True, True, True],
        [False, True, True],
        [False, False, True],
        [False, False, False],
    ]


@pytest.fixture
def short(monkeypatch):
    """AutoAttack of fewer steps and queries."""
    package = AutoAttack.package

    def shortened(*arguments):
        whole = package(*arguments)
        for member in (whole.apgd, whole.apgd_targeted, whole.fab):
            member.n_iter = 6
        whole.square.n_queries = 10
        return whole

    monkeypatch.setattr(AutoAttack, "package", shortened)


def auto_attack(norm, seed):
    return [AutoAttack(norm, part, 4, seed) for part in AUTOATTACK_PARTS]


@pytest.mark.parametrize(("norm", "epsilon"), [("Linf", 0.01), ("L2", 0.2)])
def test_autoattack_is_the_standard_version_of_its_package(norm, epsilon, model, images, short):
    """One attack after the other is what the package does in one call, with fewer than 10 classes, too."""
    classifier = Classifier(model)
    labels = classifier(images).argmax(1)
    whole = AutoAttack(norm, "square", 4, seed=5).package(classifier, epsilon, torch.device("cpu"))
    assert (whole.version, whole.apgd_targeted.n_target_classes) == ("standard", 3)
    assert whole.apgd.n_restarts == whole.fab.n_restarts == 1
    whole.attacks_to_run = list(AUTOATTACK_PARTS)
    attacked, _ = whole.run_standard_evaluation(images, labels, batch_size=8)
    expected = classifier(attacked).argmax(1) == labels
    assert torch.equal(masks(classifier, auto_attack(norm, 5), images, labels, [epsilon], 8)[-1], expected)
    assert 0 < expected.sum() < 8


@pytest.mark.parametrize(("norm", "order"), [("Linf", math.inf), ("L2", 2)])
def test_pgd_starts_at_random_and_repeats_with_its_seed(norm, order, images):
    """Without a gradient it stays where it started."""

    class Flat(torch.nn.Module):
        def forward(self, x):
            return torch.stack([0 * x.sum((1, 2, 3))] * 2, 1)

    def start(seed):
        return PGDAttack(norm, 3, seeded(seed)).perturb(Flat(), 0.1, images, torch.zeros(8, dtype=torch.int64))

    assert torch.equal(start(1), start(1)) and not torch.equal(start(1), start(2))
    distance = torch.linalg.vector_norm((start(1) - images).flatten(1), order, dim=1)
    assert distance.max() <= 0.1 + 1e-6 and distance.min() > 1e-3


@pytest.mark.parametrize("limits", [{}, {"grad_clamp": 0.01, "clamp": True}, {"normalize": True}])
def test_the_differentiable_chain_is_the_reference_chain(limits, model, images):
    x = 2 * images - 1
    expected = reference_chain(model.log_density, x, 4, 1.0, 0.01, seeded(5), **limits).x
    for attacked in (False, True):
        start = x.clone().requires_grad_(attacked)
        found = differentiable_chain(model.log_density, start, 4, 1.0, 0.01, seeded(5), **limits)
        torch.testing.assert_close(found, expected)


def test_the_gradient_goes_through_the_whole_chain():
    """Of a density that is not linear, by finite differences."""
    x = torch.randn(2, 1, 2, 2, dtype=torch.float64, generator=seeded()).requires_grad_()

    def chain(x):
        return differentiable_chain(lambda x: x.sin().flatten(1).prod(1), x, 3, 0.5, 0.1, seeded(2))

    assert torch.autograd.gradcheck(chain, x)


def test_refinement_averages_the_probabilities_of_its_chains(model, images):
    refined = RefinedClassifier(model, chain_of(model, 2, 1.0, 0.3, seed=7), n_chains=3)
    with torch.no_grad():
        found = refined(images)
    ends = reference_chain(model.log_density, (2 * images - 1).repeat(3, 1, 1, 1), 2, 1.0, 0.3, seeded(7)).x
    expected = sum(model(part).softmax(1) for part in ends.chunk(3)) / 3
    torch.testing.assert_close(found.exp(), expected)


@pytest.mark.parametrize(("steps", "batch"), [(None, 100), (3, 100), (1, 1)])
def test_distal_adversarials_reach_a_confidence_or_run_out_of_steps(model, steps, batch, monkeypatch):
    monkeypatch.setattr(attacks, "images_per_batch", lambda *_: batch)
    limits = {"confidence": 0.999, "max_steps": steps} if steps else {}
    x, reached = distal_adversarials(model, (3, 8, 8), 4, 2, seeded(), **limits)
    assert x.abs().max() <= 1 and (steps or (reached > 0.9).all())
    torch.testing.assert_close(model(x).softmax(1)[torch.arange(8), torch.arange(4).repeat_interleave(2)], reached)


@pytest.mark.parametrize(("kind", "unchecked", "checked"), [("open", 1, 0), ("hidden", 1, 1), ("constant", 0.5, 0.5)])
def test_masked_gradients_are_noticed(tmp_path, kind, unchecked, checked):
    """Two classifiers with the same decisions, one of which shows attacks a gradient of zero, and a constant one."""

    class Brightness(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(()))

        def forward(self, x):
            score = self.weight * (x.mean((1, 2, 3)) - 0.5)
            if kind != "open":
                score = 0 * score + (score.sign() if kind == "hidden" else 1)
            return torch.stack([-score, score], 1)

    x = torch.cat([torch.full((4, 1, 4, 4), 0.1), torch.full((4, 1, 4, 4), 0.9)])
    section, labels = Section("robustness", tmp_path), torch.tensor([0] * 4 + [1] * 4)
    norm = Norm("Linf", {"0.1": 0.1, "0.45": 0.45}, "0.1", 1)
    sweep = PGDSweep("PGD", Attacked(Brightness(), x, labels, 8, seeded()), 10, 1)
    add_sweep(section, norm, sweep, Figure().subplots())
    column = {row: m.value for (_, row, _), m in section.measurements.items()}
    assert column == {"0": unchecked, "0.1": unchecked, "0.45": column["0.45"], "0.5 (check)": checked}
    assert len(section.notes) == (kind == "hidden")


def test_options_reach_the_attacks():
    """The refinement runs the chains of training; --one_epsilon and --attack_images make less of it all."""
    options = {"attack_images": 30, "one_epsilon": True, "sgld_grad_clamp": 0.5, "sgld_clamp": True}
    cfg, usual = (Config(mode="test", load_ckpt="x", dataset="digits", **given) for given in (options, {}))
    inputs = EvalInputs(cfg, build_model(1, 10, 10, 1).eval(), load("digits"), None, None, torch.device("cpu"))
    refined = robustness.refined_sweep(inputs)
    assert "gradient clamped to 0.5, images clamped to [-1, 1]" in refined.protocol
    assert {"grad_clamp": 0.5, "clamp": True}.items() <= refined.attacked.classifier.chain.keywords.items()
    assert [list(norm.epsilons) for norm in robustness.attack_norms(cfg)] == [["8/255"], ["0.5"]]
    assert len(robustness.pgd_sweep(inputs).attacked.x) == len(refined.attacked.x) == 30
    assert len(robustness.refined_sweep(replace(inputs, cfg=usual)).attacked.x) == 50
    assert len(robustness.attack_norms(usual)[0].epsilons) == 5
