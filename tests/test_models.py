"""The network and the densities read from its logits."""

import copy
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import gradcheck

from losses import joint_loss
from models import JointForward, Logits, StepBatch, build_model, copy_weights, frozen_sampler_model
from models.predict import images_per_batch, predict
from utils import UserError

ROOT = Path(__file__).parent.parent


def tiny(**options):
    torch.manual_seed(0)
    return build_model((1, 8, 8), 3, **({"depth": 10, "width": 1} | options))


def loss_options(**changes):
    """The options that ``joint_loss`` reads, as plain JEM has them."""
    weights = {"p_y_x_weight": 1.0, "p_x_weight": 1.0, "p_x_y_weight": 0.0, "mean_energy_l2": 0.0}
    words = {"generative": "difference", "mean_energy_form": "means"}
    return SimpleNamespace(**words | weights | changes)


def test_wrn_28_10_has_the_published_size():
    parameters = sum(p.numel() for p in build_model((3, 32, 32), 10, 28, 10).parameters())
    assert round(parameters / 1e6, 1) == 36.5  # Zagoruyko & Komodakis, table 4


def test_robust_networks_start_as_their_authors_do():
    """Weights of deviation sqrt(2 / (k * k * channels out)), no bias in the heads; as tight as so many allow."""
    torch.manual_seed(0)
    model = build_model((3, 32, 32), 10, 16, 8, backbone="robust", norm="batch", separate_energy=True)
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Conv2d):
            n, w = layer.out_channels * layer.kernel_size[0] ** 2, layer.weight
            assert abs(w.std() / (2 / n) ** 0.5 - 1) < 5 / (2 * w.numel()) ** 0.5, name
            assert abs(w.mean()) < 5 * (2 / n / w.numel()) ** 0.5
            assert (w.abs() > 3 * (2 / n) ** 0.5).any() or w.numel() < 2000  # normal, not uniform
        elif isinstance(layer, (torch.nn.BatchNorm2d, torch.nn.Linear)):
            assert not layer.bias.any() and (isinstance(layer, torch.nn.Linear) or (layer.weight == 1).all())
    assert build_model((3, 32, 32), 10, 10, 1).class_output.bias.any()  # other networks are as before


def test_a_network_says_what_it_is_and_refuses_what_it_cannot_be():
    model = build_model((3, 32, 32), 7, 16, 2, backbone="robust")
    assert (model.name, model.in_channels, model.n_classes) == ("WRN-16-2", 3, 7)
    with pytest.raises(UserError, match="--backbone robust"):
        build_model((1, 8, 8), 7, 16, 2, backbone="robust")


def test_the_loss_imports_networks_and_nothing_else_of_the_program():
    files = {path.stem for path in ROOT.glob("*.py")} | {path.parent.name for path in ROOT.glob("*/__init__.py")}
    code = "import sys, losses; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert files & set(done.stdout.split()) == {"distributed", "losses", "models", "utils"}


@pytest.mark.parametrize("norm", ["batch", "instance", "group"])
def test_norms_make_what_they_say_have_mean_0_and_variance_1(norm):
    """Batch: each channel over the batch; instance: each channel of each image; group: each group of each image."""
    model, seen = tiny(norm=norm).train(), {}
    model.f.layer1[0].bn1.register_forward_hook(lambda module, inputs, out: seen.update(x=inputs[0], out=out))
    model(torch.rand(6, 1, 8, 8) * 2 - 1)
    dims = {"batch": (0, 2, 3), "instance": (2, 3), "group": (2, 3)}[norm]  # 16 channels: a group of 16 each
    out = seen["out"]
    assert out.mean(dims).abs().max() < 1e-4
    assert (out.var(dims, correction=0) - 1).abs().max() < 0.05  # eps, where a channel hardly varies
    assert (seen["x"].mean(dims).abs().max() > 0.05) and not torch.equal(out, seen["x"])


@pytest.mark.parametrize("norm", ["none", "batch"])
def test_all_images_of_a_step_in_one_call(norm):
    model = tiny(norm=norm).train()
    forward, batches = JointForward(model, model.logits), [torch.rand(n, 1, 8, 8) for n in (4, 5, 6, 7)]
    x, x_real, samples, outliers = batches
    for logits, batch in zip(forward(StepBatch(x, None, x_real, samples, outliers=outliers)), batches, strict=True):
        torch.testing.assert_close(logits, model.logits(batch))
    plain = forward(StepBatch(x, None, None, samples))
    assert plain.real is plain.labelled and len(plain.sampled) == 6 and plain.outliers is None
    assert forward(StepBatch(x, None, None, None)).sampled is None
    assert len(forward(StepBatch(x, None, x_real, None)).real) == 5


@pytest.mark.parametrize("statistics", ["running", "frozen"])
def test_log_density_of_one_image_in_training(statistics):
    """The loss's log p(x), the chains' and evaluation's are one function of one image; labelled images use batches."""
    torch.manual_seed(0)
    model = tiny(norm="batch").train()
    for _ in range(20):
        model(torch.rand(6, 1, 8, 8))  # statistics that are not those of the batches below
    x, x_real, samples = (torch.rand(n, 1, 8, 8) for n in (4, 5, 6))
    alone, chains = copy.deepcopy(model).eval(), frozen_sampler_model(model, torch.float32, statistics)
    by_batch = copy.deepcopy(model)(x)
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    forward = JointForward(model, model.logits, statistics)
    for second in (x_real, None):
        out = forward(StepBatch(x, None, second, samples))
        torch.testing.assert_close(out.real, alone(x if second is None else x_real))
        torch.testing.assert_close(out.sampled, alone(samples))
        torch.testing.assert_close(out.labelled, by_batch if statistics == "running" else alone(x))
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())
    torch.testing.assert_close(chains(samples[:1]), alone(samples)[:1])  # whatever is beside it
    assert (by_batch - alone(x)).abs().max() > 0.01 and all(layer.training for layer in model.modules())


@pytest.mark.parametrize("name, value", [("leaky_relu", -0.2), ("silu", -1 / (1 + math.e))])
def test_activation(name, value):
    model = tiny(activation=name)
    assert model.f.layer1[0].activation(torch.tensor([-1.0])).item() == pytest.approx(value, abs=1e-6)
    assert model.f.activation(torch.tensor([-1.0])).item() == pytest.approx(value, abs=1e-6)


def test_predict_leaves_every_part_in_its_mode():
    model, x = tiny(norm="batch").eval(), torch.rand(9, 1, 8, 8) * 2 - 1
    wrapper, expected = torch.nn.Sequential(model.f), model.f(x)
    mean = model.f.bn1.running_mean.clone()
    assert wrapper.training
    torch.testing.assert_close(predict(wrapper, x), expected)
    assert wrapper.training and not any(part.training for part in model.modules())
    assert torch.equal(model.f.bn1.running_mean, mean)
    model.train()
    assert images_per_batch(500, (3, 64, 64)) == 125
    model.f.bn1.eval()
    predict(model, x)
    with pytest.raises(RuntimeError):
        predict(model, x.expand(-1, 3, -1, -1))  # nor where it fails
    assert model.training and not model.f.bn1.training and model.f.layer1.training


@pytest.mark.parametrize("backbone, channels", [("jem", 1), ("robust", 3)])
def test_dropout_acts_in_training_only(backbone, channels):
    shape = (channels, 8, 8)
    model, x = build_model(shape, 3, 10, 1, backbone=backbone, dropout_rate=0.5).train(), torch.rand(2, *shape)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_log_density_against_a_direct_computation():
    model, x, y = tiny(), torch.rand(5, 1, 8, 8) * 2 - 1, torch.tensor([0, 1, 2, 0, 1])
    logits = model.logits(x)
    torch.testing.assert_close(model.log_density(x), logits.exp().sum(1).log())
    torch.testing.assert_close(model.log_density(x, y), logits[range(5), y])
    # log p(x, y) - log p(x) = log p(y|x)
    torch.testing.assert_close(model.log_density(x, y) - model.log_density(x), logits.log_softmax(1)[range(5), y])


def test_joint_loss_against_a_direct_computation():
    torch.manual_seed(0)
    labelled, real, sampled, far = (torch.randn(n, 3) for n in (4, 5, 6, 3))
    y, y_sampled, y_real = torch.tensor([0, 2, 1, 1]), torch.tensor([0, 1, 2, 2, 1, 0]), torch.arange(5) % 3
    cfg = loss_options(p_y_x_weight=0.7, p_x_weight=1.3, p_x_y_weight=0.4, mean_energy_l2=0.2)
    loss, parts = joint_loss(cfg, Logits(labelled, real, sampled), y, y_sampled, energy_l2=0.1)
    d_labelled, d_real, d_sampled, d_far = (x.double().exp().sum(1).log() for x in (labelled, real, sampled, far))
    of_labels, climbed = labelled[range(4), y].double(), sampled[range(6), y_sampled].double()
    m_real, m_sampled = d_real.mean(), d_sampled.mean()
    expected = {
        "loss/classification": (d_labelled - of_labels).mean(),
        "loss/generative": m_sampled - m_real,
        "loss/joint": climbed.mean() - of_labels.mean(),
        "loss/logistic": ((1 + (-d_real).exp()).log().mean() + (1 + d_sampled.exp()).log().mean()) / 2,
        "log_density/real": m_real,
        "log_density/sampled": m_sampled,
        "log_density/real_std": d_real.std(correction=0),
        "log_density/sampled_std": d_sampled.std(correction=0),
        "sgld/auroc": (d_real[:, None] > d_sampled).double().mean(),
        "accuracy/sampled": (sampled.argmax(1) == y_sampled).double().mean(),
    }
    expected = {name: value.item() for name, value in expected.items()}
    assert {name: parts[name].item() for name in expected} == pytest.approx(expected, rel=1e-5)
    assert parts["sgld/classes"].tolist() == sampled.argmax(1).bincount(minlength=3).tolist()
    total = 0.7 * expected["loss/classification"] + 1.3 * (m_sampled - m_real) + 0.4 * expected["loss/joint"]
    total += 0.1 * torch.cat([d_real, d_sampled]).square().mean() + 0.2 * (m_real**2 + m_sampled**2)
    assert loss.item() == pytest.approx(total.item(), rel=1e-5)
    cfg = loss_options(p_y_x_weight=0.0, p_x_weight=1.3, generative="logistic")
    loss, _ = joint_loss(cfg, Logits(labelled, real, sampled), y, y_sampled)
    assert loss.item() == pytest.approx(1.3 * expected["loss/logistic"], rel=1e-5)
    cfg = loss_options(p_y_x_weight=0.0, p_x_weight=0.0, outlier_weight=0.6, outlier_margin=1.5)
    loss, parts = joint_loss(cfg, Logits(labelled, real, sampled, far), y)
    outliers = (1 + (d_far - d_real[:, None] + 1.5).exp()).log().mean().item()
    won = (d_real[:, None] > d_far).double().mean().item()
    assert [loss.item(), parts["loss/outliers"].item()] == pytest.approx([0.6 * outliers, outliers], rel=1e-5)
    assert parts["outliers/auroc"].item() == pytest.approx(won) != 0.5
    assert joint_loss(cfg, Logits(labelled, real, sampled), labelled.argmax(1))[1]["accuracy/train"] == 1
    assert parts["log_density/outliers"].item() == pytest.approx(d_far.mean().item(), rel=1e-5)
    weights = {"p_y_x_weight": 0.0, "p_x_weight": 0.0, "outlier_weight": 0.0, "outlier_margin": 0.0}
    cfg = loss_options(**weights, mean_energy_l2=0.5, mean_energy_form="real_squares")
    loss, parts = joint_loss(cfg, Logits(labelled, real, sampled, far), y, y_sampled, y_real=y_real)
    assert loss.item() == pytest.approx(0.5 * (d_real.square().mean() + m_sampled**2).item(), rel=1e-5)
    won = (real[range(5), y_real][:, None] > climbed).double().mean().item()
    assert parts["sgld/auroc"].item() == pytest.approx(won, abs=1e-6)
    weights = torch.tensor([0.5, 2.0, 0.5])  # of classes 0, 1, 2; chains are of 0, 1, 2, 2, 1, 0
    for generative in ("difference", "logistic"):
        cfg = loss_options(p_x_weight=1.3, p_x_y_weight=0.4, mean_energy_l2=0.2, generative=generative)
        loss, parts = joint_loss(cfg, Logits(labelled, real, sampled), y, y_sampled, class_weights=weights)
        again = torch.tensor([0, 1, 1, 1, 1, 2, 4, 4, 4, 4, 3, 5])  # each sample as often as its class's weight says
        repeated = Logits(labelled, real, sampled[again])
        expected, others = joint_loss(cfg, repeated, y, y_sampled[again], class_weights=torch.ones(3))
        assert parts["sgld/auroc"].item() == pytest.approx(others["sgld/auroc"].item())
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        assert parts["log_density/sampled"].item() == pytest.approx(d_sampled[again].mean().item(), rel=1e-5)
    d, shift = 7 + d_sampled[:3].float(), torch.zeros((), requires_grad=True)
    logistic = ((1 + (-d_real).exp()).log().mean() + weights @ (1 + d.exp()).log() / 3) / 2
    expected = torch.stack([weights @ d / 3, weights @ (7 + sampled[:3].diagonal()) / 3, logistic.float()])
    for n in (1, 2, 5):  # chains of a step: over all classes with which they may begin, the mean is by the weights
        found = []
        for first in range(3):
            classes = torch.arange(first, first + n) % 3
            logits = Logits(labelled + shift, real + shift, 7 + sampled[classes] + shift)  # of class k here sample k
            _, p = joint_loss(cfg, logits, y, classes, class_weights=weights)
            for name in ("loss/generative", "loss/joint"):  # a constant in log p(x) changes nothing in any step
                assert torch.autograd.grad(p[name], shift, retain_graph=True)[0].abs() < 1e-6
            joint = p["loss/joint"] + of_labels.float().mean()
            found.append(torch.stack([p["log_density/sampled"], joint, p["loss/logistic"]]))
        torch.testing.assert_close(sum(found) / 3, expected)


@pytest.mark.parametrize("generative, mean_energy_form", [("difference", "means"), ("logistic", "real_squares")])
def test_gradient_of_the_joint_loss_against_finite_differences(generative, mean_energy_form):
    model = tiny(activation="silu").double()  # smooth, so that finite differences hold everywhere
    torch.manual_seed(1)
    real, sampled, y = torch.rand(3, 1, 8, 8).double(), torch.rand(2, 1, 8, 8).double(), torch.tensor([0, 1, 2])
    names = ("class_output.weight", "f.conv1.bias", "f.layer1.0.conv2.bias", "f.layer3.0.shortcut.0.bias")
    model.forward = lambda x: model.class_output(model.f(x))  # the head in float64 as well
    options = {"generative": generative, "mean_energy_form": mean_energy_form, "mean_energy_l2": 0.2}
    cfg = loss_options(p_x_y_weight=0.4, outlier_weight=0.6, outlier_margin=1.5, **options)

    def loss(*values):
        weights = dict(zip(names, values, strict=True))
        of_real, of_sampled = (torch.func.functional_call(model, weights, x) for x in (real, sampled))
        return joint_loss(cfg, Logits(of_real, of_real, of_sampled, of_sampled), y, y[:2], energy_l2=0.1)[0]

    assert gradcheck(loss, tuple(model.get_parameter(n).detach().requires_grad_() for n in names), atol=1e-6)


def test_sampling_copy_is_frozen_and_follows_the_weights():
    model = tiny(norm="batch", dropout_rate=0.3)
    frozen = frozen_sampler_model(model, torch.bfloat16)
    modes = {type(m).__name__: m.training for m in frozen.modules()}
    assert modes["BatchNorm2d"] and not modes["Dropout"] and not modes["JEM"]
    assert not any(p.requires_grad for p in frozen.parameters())
    assert all(m.training for m in model.modules()) and all(p.requires_grad for p in model.parameters())
    assert frozen.f.conv1.weight.dtype == torch.bfloat16 and frozen.class_output.weight.dtype == torch.float32
    assert frozen.f.bn1.running_var.dtype == torch.float32
    places = [p.data_ptr() for p in frozen.parameters()]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
        model.f.bn1.running_mean.fill_(3)
    copy_weights(model, frozen)
    assert [p.data_ptr() for p in frozen.parameters()] == places
    for mine, theirs in zip(frozen.parameters(), model.parameters(), strict=True):
        assert torch.equal(mine, theirs.to(mine.dtype))
    assert (frozen.f.bn1.running_mean == 3).all()


def test_separate_energy():
    model, x = tiny(separate_energy=True), torch.rand(5, 1, 8, 8) * 2 - 1
    logits, features = model.logits(x), model.f(x)
    torch.testing.assert_close(model.log_density(x), model.energy_output(features).squeeze(1))
    torch.testing.assert_close(logits.softmax(1), model.class_output(features).softmax(1))
    torch.nn.functional.cross_entropy(logits, torch.zeros(5, dtype=torch.int64)).backward(retain_graph=True)
    assert model.energy_output.weight.grad.abs().max() < 1e-6 < model.class_output.weight.grad.abs().max()
    model.zero_grad()
    model.log_density(x).sum().backward()
    assert model.class_output.weight.grad.abs().max() < 1e-6 < model.energy_output.weight.grad.abs().max()
