"""Attacks that lower a tiny model's accuracy and keep to their ball, and gradients through the refinement."""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
from matplotlib.figure import Figure
from small_runs import reference_chain, seeded

from config import Config
from data import load
from evaluation import robustness
from evaluation.inputs import EvalInputs
from evaluation.report import Section
from evaluation.robustness import Attacked, differentiable_chain, direct, pgd_attack, refined, refined_straight
from models import build_model
from pgd import random_offset
from sgld import normal_like
from utils import UserError


def two_classes(score):
    """A classifier by the sign of a score of each image."""
    return lambda x: torch.stack([score(x), -score(x)], 1)


@pytest.mark.parametrize("norm", ["L2", "Linf"])
def test_pgd_starts_at_random_on_all_sides_at_all_distances_and_repeats_with_its_seed(norm, images):
    start = random_offset(torch.zeros(4000, 1, 2, 2), 0.3, norm, seeded())
    flat, labels = two_classes(lambda x: 0 * x.sum((1, 2, 3))), torch.zeros(8, dtype=torch.int64)
    one, same, other = (pgd_attack(flat, 0.1, norm, 3, seeded(seed), images, labels) for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)
    order = math.inf if norm == "Linf" else 2
    length, distance = (torch.linalg.vector_norm(x.flatten(1), order, dim=1) for x in (start, one - images))
    assert length.max() <= 0.3 + 1e-6 and length.std() > 0.04 and start.mean(0).abs().max() < 0.01
    assert length.mean().item() == pytest.approx({"L2": 0.15, "Linf": 0.3 * 4 / 5}[norm], abs=0.01)
    assert distance.max() <= 0.1 + 1e-6 and distance.min() > 1e-3


def chain_of(model, steps, sgld_lr, sgld_std, seed=0):
    sizes = {"steps": steps, "sgld_lr": sgld_lr, "sgld_std": sgld_std}
    return partial(differentiable_chain, model.log_density, generator=seeded(seed), **sizes)


def column(classifier, norm, x, y, epsilons, batch_size=8):
    """Accuracies in a report: without attack, under PGD of each epsilon, where any image can be grey; and its notes."""
    section, epsilons = Section("robustness", Path()), {str(eps): eps for eps in epsilons}
    target, inputs = Attacked(classifier, x, y, batch_size, seeded()), SimpleNamespace(cfg=Config())
    with patch.multiple(robustness, EPSILONS={norm: epsilons}, attacked=lambda *_: target):
        robustness.add_pgd(inputs, section, norm, "pgd", Figure().subplots())
    return [cell["value"] for cell in section.measurements().values()], section.notes


@pytest.fixture
def model(request):
    torch.manual_seed(0)
    model = build_model((3, 32, 32), 4, depth=10, width=1, **getattr(request, "param", {})).eval().requires_grad_(False)
    model.class_output.weight *= 20  # confident enough to be attacked
    return model


@pytest.fixture
def images():
    return torch.rand(8, 3, 8, 8, generator=seeded())


@pytest.mark.parametrize(("norm", "epsilons"), [("Linf", [1e-4, 0.1, 0.5]), ("L2", [1e-3, 2.0, 7.0])])
def test_attacks_lower_the_accuracy_and_stay_in_their_ball(model, images, norm, epsilons):
    classifier = partial(direct, model=model)
    labels = classifier(images).argmax(1)
    shares, _ = column(classifier, norm, images, labels, epsilons, batch_size=3)
    assert shares[0] == 1 > shares[-1] and shares == sorted(shares, reverse=True)
    attacked = pgd_attack(classifier, epsilons[1], norm, 20, seeded(), images, labels)
    order = math.inf if norm == "Linf" else 2
    assert torch.linalg.vector_norm((attacked - images).flatten(1), order, dim=1).max() <= epsilons[1] * (1 + 1e-5)
    assert attacked.min() >= 0 and attacked.max() <= 1
    # what fooled the model under attack fools the bare model too
    assert (model(2 * attacked - 1).argmax(1) != labels).any()


@pytest.mark.parametrize("wrapper", ["plain", "refined"])
@pytest.mark.parametrize("model", [{"norm": "batch"}, {"dropout_rate": 0.5}], ids=["batch", "dropout"], indirect=True)
def test_attacks_leave_the_model_as_it_was(model, wrapper, images):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    after_chains = partial(refined, model=model, chain=chain_of(model, 1, 1e-6, 0.0), n_chains=1)
    classifier = {"plain": partial(direct, model=model), "refined": after_chains}[wrapper]
    labels = model(2 * images - 1).argmax(1)
    attack = partial(pgd_attack, classifier, 1e-7, "Linf", 1, seeded())
    kept = Attacked(classifier, images, labels, 8, seeded()).robust(attack, torch.ones(8) > 0)
    assert kept.all() and not model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_where_autoattack_can_be_run():
    for side in (8, 16, 28, 32):
        robustness.check_autoattack(10, (3, side, side))
    with pytest.raises(UserError, match="at least 4 classes, not 3"):
        robustness.check_autoattack(3, (3, 32, 32))
    for height, width in ((24, 32), (24, 24), (12, 12)):  # more than 5 of its tiles a side
        with pytest.raises(UserError, match=f"images of {height}x{width}"):
            robustness.check_autoattack(10, (3, height, width))


def test_a_linear_model_falls_exactly_where_its_margin_ends():
    direction, shifts = torch.tensor([1.0, -1.0, 1.0, -1.0]), torch.tensor([0.02, 0.06, 0.14])
    x = 0.5 + shifts[:, None] * direction  # the L-infinity distance to the boundary is the shift
    linear, labels = two_classes(lambda x: x.flatten(1) @ direction), torch.zeros(3, dtype=torch.int64)
    shares, _ = column(linear, "Linf", x.view(3, 1, 2, 2), labels, [0.05, 0.1, 0.2], 2)
    assert shares == pytest.approx([1, 2 / 3, 1 / 3, 0, 0])


def test_an_image_that_has_fallen_stays_fallen(monkeypatch):
    left = iter([True, True])

    def fools_the_first(classifier, eps, norm, steps, rng, x, y):
        return torch.cat([1 - x[:1], x[1:]]) if next(left, False) else x

    monkeypatch.setattr(robustness, "pgd_attack", fools_the_first)
    light, zeros = torch.full((4, 1, 4, 4), 0.9), torch.zeros(4, dtype=torch.int64)
    bright = two_classes(lambda x: x.mean((1, 2, 3)) - 0.5)
    assert column(bright, "Linf", light, zeros, [0.1, 0.2])[0] == [1, 0.5, 0.5, 0.5]


@pytest.mark.parametrize(("norm", "epsilon"), [("Linf", 0.01), ("L2", 0.2)])
def test_autoattack_is_the_standard_version_of_its_package(norm, epsilon, model, images, tmp_path, monkeypatch):
    fresh, made = robustness.autoattack, []

    def shortened(*arguments):
        whole = fresh(*arguments)
        for member in (whole.apgd, whole.apgd_targeted, whole.fab):
            member.n_iter = 6
        whole.square.n_queries = 10
        made.append(whole)
        return whole

    monkeypatch.setattr(robustness, "autoattack", shortened)
    classifier = partial(direct, model=model)
    labels = classifier(images).argmax(1)
    target = Attacked(classifier, images, labels, 8, seeded())
    monkeypatch.setattr(robustness, "attacked", lambda *_, **__: target)
    cfg, data = SimpleNamespace(seed=5), SimpleNamespace(class_names=tuple("abcd"))
    inputs = SimpleNamespace(cfg=cfg, data=data, model=model, device=torch.device("cpu"))
    section = Section("robustness", tmp_path)
    monkeypatch.setattr(robustness, "EPSILONS", {norm: {"e": epsilon}})
    monkeypatch.setattr(robustness, "AUTOATTACK_EPSILON", {norm: "e"})
    robustness.add_autoattack(inputs, section, norm, "autoattack", Figure().subplots())
    (found,) = section.measurements().values()
    (whole,) = made
    assert (whole.version, whole.apgd_targeted.n_target_classes) == ("standard", 3)
    assert whole.apgd.n_restarts == whole.fab.n_restarts == 1
    assert tuple(whole.attacks_to_run) == ("apgd-ce", "apgd-t", "fab-t", "square")
    kept = torch.ones(8) > 0
    for part in whole.attacks_to_run:
        alone = shortened(classifier, epsilon, norm, 4, 5, torch.device("cpu"))
        alone.attacks_to_run = [part]
        moved = images.clone()
        moved[kept] = alone.run_standard_evaluation(images[kept], labels[kept], batch_size=8)[0]
        kept &= classifier(moved).argmax(1) == labels
    assert found["value"] == kept.double().mean() and 0 < kept.sum() < 8


@pytest.mark.parametrize("limits", [{}, {"grad_clamp": 0.01, "clamp": True}, {"normalize": True}])
def test_the_differentiable_chain_is_the_reference_chain(limits, model, images):
    x = 2 * images - 1
    expected = reference_chain(model.log_density, x, 4, 1.0, 0.01, seeded(5), **limits).x
    for attacked in (False, True):
        start = x.clone().requires_grad_(attacked)
        found = differentiable_chain(model.log_density, start, 4, 1.0, 0.01, seeded(5), **limits)
        torch.testing.assert_close(found, expected)


def test_the_gradient_goes_through_the_whole_chain():
    x = torch.randn(2, 1, 2, 2, dtype=torch.float64, generator=seeded()).requires_grad_()
    chain = partial(differentiable_chain, lambda x: x.sin().flatten(1).prod(1), steps=3, sgld_lr=0.5, sgld_std=0.1)
    assert torch.autograd.gradcheck(lambda x: chain(x, generator=seeded(2)), x)


def test_refinement_averages_the_probabilities_of_its_chains(model, images):
    with torch.no_grad():
        found = refined(images, model, chain_of(model, 2, 1.0, 0.3, seed=7), n_chains=3)
    ends = reference_chain(model.log_density, (2 * images - 1).repeat(3, 1, 1, 1), 2, 1.0, 0.3, seeded(7)).x
    torch.testing.assert_close(found.exp(), sum(model(part).softmax(1) for part in ends.chunk(3)) / 3)


def test_refinement_is_attacked_straight_as_if_its_chains_added_a_constant(model, images):
    """The gradient by finite differences of the classifier alone, at the chains' ends; the logits are averaged."""
    x = images.clone().requires_grad_()
    found = refined_straight(x, model, chain_of(model, 2, 1.0, 0.3, seed=7), 3, 0.2, seeded(8))
    start = (2 * images - 1).repeat(3, 1, 1, 1)
    start = start + 0.2 * normal_like(start, seeded(8))
    ends = reference_chain(model.log_density, start, 2, 1.0, 0.3, seeded(7)).x
    torch.testing.assert_close(found, model(ends).unflatten(0, (3, -1)).mean(0))
    (grad,) = torch.autograd.grad(found[:, 1].sum(), x)
    direction, h = torch.randn(images.shape, generator=seeded(9)), 1e-3
    above, below = (model(ends + s * h * direction.repeat(3, 1, 1, 1))[:, 1].unflatten(0, (3, -1)) for s in (2, -2))
    slope = (above - below).mean(0) / (2 * h)  # a step of h in [0, 1] is one of 2 h in [-1, 1]
    torch.testing.assert_close((grad * direction).sum((1, 2, 3)), slope, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(("kind", "unchecked", "checked"), [("open", 1, 0), ("hidden", 1, 1), ("constant", 0.5, 0.5)])
def test_masked_gradients_are_noticed(kind, unchecked, checked):
    """Two classifiers with the same decisions, one of which shows attacks a gradient of zero, and a constant one."""
    shown = {"open": lambda s: s, "hidden": lambda s: 0 * s + s.sign(), "constant": lambda s: 0 * s - 1}[kind]
    classifier = two_classes(lambda x: shown(0.5 - x.mean((1, 2, 3))))  # by how dark an image is
    x = torch.cat([torch.full((4, 1, 4, 4), 0.1), torch.full((4, 1, 4, 4), 0.9)])
    shares, notes = column(classifier, "Linf", x, torch.tensor([0] * 4 + [1] * 4), [0.1])
    assert shares == [unchecked, unchecked, checked] and len(notes) == (kind == "hidden")


def test_options_reach_the_attacks():
    options = {"attack_images": 30, "max_images": 20, "sigma_test": 0.2}
    options |= {"sgld_grad_clamp": 0.5, "sgld_clamp": True, "sgld_lr": 0.5, "sgld_std": 0.2, "refine_steps": 4}
    cfg, usual = (Config(mode="test", load_ckpt="x", dataset="digits", **given) for given in (options, {}))
    model = build_model((1, 8, 8), 10, 10, 1).eval()
    inputs = EvalInputs(cfg, model, load("digits"), None, None, torch.device("cpu"), True, None)
    refined, straight = (robustness.attacked(inputs, name) for name in ("refined", "refined_straight"))
    assert "gradient clamped to 0.5, images clamped to [-1, 1]" in refined.protocol
    chain = {"grad_clamp": 0.5, "clamp": True, "steps": 4, "sgld_lr": 0.5, "sgld_std": 0.2}
    assert chain.items() <= refined.classifier.keywords["chain"].keywords.items()
    assert straight.classifier.keywords["n_chains"] == refined.classifier.keywords["n_chains"] == 5
    quiet = replace(inputs, cfg=replace(usual, sgld_std=0.0))  # all chains would be the same
    assert robustness.attacked(quiet, "refined").classifier.keywords["n_chains"] == 1
    assert straight.classifier.keywords["start_std"] == 0.2 and "begun with noise of 0.2" in straight.protocol
    x = robustness.attacked(inputs, "pgd").x
    assert len(x) == len(refined.x) == 30 and (x.min(), x.max()) == (0, 1)
    assert robustness.EPSILONS["Linf"]["8/255"] == 8 / 255
    for given, n in ((None, 50), (60, 60)):
        asked = replace(inputs, cfg=replace(usual, attack_images=given))
        assert len(robustness.attacked(asked, "refined").x) == n
