"""The training step against a loop as one writes it down from the paper."""

import copy
import math
import random
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
import torch.nn.functional as F
from small_runs import broken_compiler, reference_chain, seeded, trained
from torch.utils._python_dispatch import TorchDispatchMode

import data
import distributed
import optim
import sgld
import trainer
from acceleration import CompiledOrEager
from config import Config
from data import Split
from distributed import World
from logger import progress
from logger.meter import Meter
from models import BACKBONES, build_model, frozen_sampler_model
from models.batch_norm import SyncedBatchNorm, convert_sync_batchnorm
from models.wide_resnet import NORMS, WideResNet
from sgld import ReplayBuffer, Sampler, uniform_images


def test_synchronised_batch_norm_in_one_process_leaves_the_fast_path_on():
    alone = trained(0, norm="batch", sync_batch_norm=True, compile="on")
    several = trainer.Trainer(alone.cfg, alone.data, alone.device, World(0, 2))
    assert isinstance(alone.forward, CompiledOrEager) and not isinstance(several.forward, CompiledOrEager)
    assert alone.gif_engine.capture and not several.gif_engine.capture


def plain_losses(cfg, images, steps):
    """Losses of a plain loop: the model itself sampled with autograd.grad, a forward pass for each term of the loss."""
    torch.manual_seed(cfg.seed)
    data_rng, sgld_rng = seeded(2 * cfg.seed), seeded(2 * cfg.seed + 1)
    model = build_model((1, 8, 8), 10, cfg.depth, cfg.width, norm=cfg.norm)
    optimizer = torch.optim.Adam(model.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay)
    start = lambda classes, rng: uniform_images(len(classes), images.shape, rng)  # noqa: E731
    buffer = ReplayBuffer(cfg.buffer_size, 10, start, sgld_rng)
    host_rng = random.Random(2 * cfg.seed + 1)
    sampler = Sampler(None, buffer, start, cfg.reinit_freq, cfg.sgld_lr, cfg.sgld_std, sgld_rng, host_rng)
    per_epoch, losses = len(images.train) // cfg.batch_size, []
    for step in range(1, steps + 1):
        if (step - 1) % per_epoch == 0:
            order = torch.randperm(len(images.train), generator=data_rng)
        batch = images.train[order[(step - 1) % per_epoch * cfg.batch_size :][: cfg.batch_size]]
        x = data.augment(batch.images, images.flip, cfg.sigma, data_rng)
        start, places, _ = sampler.draw(cfg.batch_size, class_cond=False)
        samples = reference_chain(model.log_density, start, cfg.sgld_step, cfg.sgld_lr, cfg.sgld_std, sgld_rng).x
        buffer.store(places, samples)
        real, sampled = model(x), model(samples)
        loss = F.cross_entropy(real, batch.labels) + sampled.logsumexp(1).mean() - real.logsumexp(1).mean()
        cosine = 1e-6 + (cfg.lr - 1e-6) * (1 + math.cos(math.pi * (step - 5) / 45)) / 2
        optimizer.param_groups[0]["lr"] = cfg.lr * step / 5 if step <= 5 else cosine
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def trained_losses(run, steps):
    losses = []
    for run.step in range(1, steps + 1):
        run.training_step()
        losses.append(run.meter.read()["loss/total"])
    return losses


def test_fifty_losses_equal_those_of_a_plain_loop_and_bf16_stays_near():
    options = {"seed": 3, "sigma": 0.1, "sgld_lr": 0.5, "sgld_std": 0.02, "reinit_freq": 0.3, "weight_decay": 0.1}
    run = trained(0, **options)
    ours, plain = trained_losses(run, 50), plain_losses(run.cfg, run.data, 50)
    assert ours[:10] == pytest.approx(plain[:10], abs=1e-5)
    assert ours == pytest.approx(plain, abs=2e-3)  # rounding grows along the chains
    half = trained_losses(trained(0, precision="bf16", **options), 20)
    assert half == pytest.approx(ours[:20], abs=0.1) and half != ours[:20]


def test_batch_norm_keeps_real_and_sampled_statistics_apart():
    for norm, sizes in (("batch", [16, 16]), ("group", [32])):
        run, seen = trained(norm=norm), []
        run.joint_forward.logits = lambda x, run=run, seen=seen: (seen.append(len(x)), run.model.logits(x))[1]
        run.training_step()
        assert seen == sizes


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "options",
    [{"norm": norm, "load_ckpt": "."} for norm in NORMS]
    + [{"norm": "batch", "backbone": "robust"}, {"separate_energy": True}]
    + [{"norm": "batch", "norm_statistics": statistics, "load_ckpt": "."} for statistics in ("running", "frozen")]
    + [{"dropout_rate": 0.5, "norm": "none"}, {"dropout_rate": 0.5, "norm": "batch"}],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_sampler_and_loss_see_one_energy(options, precision):
    """Of the same images, the network that chains climb and the one that the loss scores say the same log p(x)."""
    images = data.load("digits")
    if "backbone" in options:  # it takes colours
        images = replace(images, train=Split(images.train.images.expand(-1, 3, -1, -1), images.train.labels))
    run = trained(3, images, **options, precision=precision)  # statistics are no longer those of the start
    samples = run.training_step()
    with torch.no_grad():  # --mode sample and --mode test copy a network once
        climbed = frozen_sampler_model(run.model, run.dtype, run.cfg.norm_statistics).log_density(samples)
    x_real = samples if "dropout_rate" in options else None
    batch = trainer.StepBatch(samples, torch.zeros(16, dtype=torch.int64), x_real, samples)
    scored = run.loss_and_gradient(batch)
    for name in ("log_density/real", "log_density/sampled"):
        assert scored[name].item() == pytest.approx(climbed.mean().item(), abs=1e-5)


class NormalisedFeatures(WideResNet):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.last = torch.nn.BatchNorm1d(self.n_features)

    def forward(self, x):
        return self.last(super().forward(x))


def test_batch_normalisation_of_features_is_one_too(monkeypatch):
    monkeypatch.setitem(BACKBONES, "jem", NormalisedFeatures)
    test_sampler_and_loss_see_one_energy({"norm": "none"}, "fp32")
    for kind, shape in ((torch.nn.BatchNorm1d, (6, 5)), (torch.nn.BatchNorm2d, (6, 5, 2, 3))):
        x, own, synced = torch.randn(shape), kind(5, momentum=None), kind(5, momentum=None)
        convert_sync_batchnorm(synced)
        assert type(synced) is SyncedBatchNorm
        torch.testing.assert_close(synced(x), own(x))
        torch.testing.assert_close(synced.eval()(x), own.eval()(x))  # by running statistics


@pytest.mark.parametrize("statistics", ["batch", "running"])
def test_running_statistics_are_those_of_real_images(statistics):
    run, alone = trained(norm="batch", norm_statistics=statistics), trained(norm="batch", mode="baseline_train")
    assert torch.equal(run.model.f.bn1.running_mean, alone.model.f.bn1.running_mean)
    assert torch.equal(run.model.f.layer2[0].bn2.running_var, alone.model.f.layer2[0].bn2.running_var)
    assert run.model.f.bn1.num_batches_tracked == 1
    if statistics == "batch":  # those of both streams
        assert trained(norm="batch", p_x_batch_size=12).model.f.bn1.num_batches_tracked == 2


def test_averaged_weights_get_statistics_of_their_own(monkeypatch):
    """Each image counts alike: in batches of at most 250 images, the last one of 251 is not half of the mean."""
    run = trained(5, norm="batch", ema=0.9, dropout_rate=0.5)
    images, first, seen, before = run.data.train.images[:251], run.ema.f.layer1[0].bn2, {}, torch.get_rng_state()
    first.register_forward_hook(lambda module, inputs, _: seen.update(x=inputs[0]))
    for size, least, tolerance in ((251, 1, 1e-4), (250, 1, 1e-3), (1, 251, 1e-4)):
        monkeypatch.setattr(optim, "images_per_batch", lambda *_, size=size: size)
        optim.recalibrate_batch_norm(run.ema, images, least)
        run.ema(data.to_float(images))
        torch.testing.assert_close(first.running_mean, seen["x"].mean((0, 2, 3)), rtol=0, atol=tolerance)
        torch.testing.assert_close(first.running_var, seen["x"].var((0, 2, 3)), rtol=0, atol=tolerance)
    assert first.running_mean.abs().max() > 0.1 and torch.equal(torch.get_rng_state(), before)


def test_averaged_weights_have_them_where_they_are_used(monkeypatch):
    monkeypatch.setattr(optim, "images_per_batch", lambda *_: 1)
    for mode, statistics in (("baseline_train", "frozen"), ("energy_train", "running"), ("energy_train", "frozen")):
        run = trained(3, norm="batch", ema=0.9, mode=mode, norm_statistics=statistics, load_ckpt=".")
        run.logger = Mock()
        for model, value in ((run.model, 1.0), (run.ema, 0.0)):  # a network's own buffer
            model.f.register_buffer("own", torch.tensor(value), persistent=False)
        optim.update_ema(run.ema, run.model, 0.9, 4)
        run.dump_gif() if mode == "energy_train" else run.recalibrate_ema()
        used = run.ema.f.bn1.running_mean.clone()
        optim.recalibrate_batch_norm(run.ema, run.data.train.images, run.cfg.batch_size)
        frozen = mode == "energy_train" and statistics == "frozen"  # as they were before the first step
        assert run.ema.f.own == 1 and used.any() != frozen and torch.equal(run.ema.f.bn1.running_mean, used) != frozen


def test_pictures_are_of_all_classes_and_of_those_that_chains_climb():
    still = {"sgld_std": 0.0, "sgld_grad_clamp": 1e-9}
    run = trained(0, max_steps=1, batch_size=20, buffer_size=200, class_cond=True, sample_every=1, ema=0.9, **still)
    run.logger, run.gif_engine = Mock(), Mock(wraps=run.gif_engine)
    run.loop(Mock(take=lambda: (False, 0)))
    (_, shown), held = run.logger.save_samples.call_args.args, run.buffer.images
    assert len(shown) == 64 and torch.equal(shown[20:], held[[i * 200 // 44 for i in range(44)]])
    run.dump_gif()
    film = run.logger.save_gif.call_args.args[1]
    assert (film[-1] - film[0]).abs().max() < 1e-6
    assert run.gif_engine.call_args.args[-1].tolist() == [i % 10 for i in range(16)]
    assert torch.equal(run.sampler_model.class_output.weight, run.ema.class_output.weight)


def test_a_run_s_seed_is_that_of_its_restarts_and_the_first_of_equal_scores_is_kept():
    run = trained(0, seed=5)
    assert run.sampler.host_rng.random() == random.Random(2 * 5 + 1).random()
    run.rng.seed(6)
    assert run.sampler.host_rng.random() == random.Random(2 * 6 + 1).random()
    run.checkpoint = Mock()
    for score in (0.5, 0.5, 0.6):
        run.keep_if_best("best.pt", score)
    assert run.checkpoint.call_count == 2


OPTIMIZERS = [{}, {"optimizer": "momentum"}, {"sam_rho": 0.7, "sam_adaptive": True}, {"sam_rho": 0.2}]


@pytest.mark.parametrize("options", OPTIMIZERS, ids=str)
def test_the_optimizer_of_a_run_written_out(options):
    run, seen = trained(0, mode="baseline_train", lr=0.05, weight_decay=0.01, **({"optimizer": "sgd"} | options)), []
    cfg, model, original = run.cfg, copy.deepcopy(run.model), run.draw_step_batch
    run.draw_step_batch = lambda steps: seen.append(original(steps)) or seen[-1]
    parameters = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    velocity = {name: torch.zeros_like(p) for name, p in parameters.items()}

    def gradient(at):
        """By name, with the weights ``at``."""
        loss = F.cross_entropy(torch.func.functional_call(model, at, seen[-1][0].x), seen[-1][0].y)
        return dict(zip(at, torch.autograd.grad(loss, at.values()), strict=True))

    for run.step in (1, 2, 3):
        run.training_step()
        g = gradient(parameters)
        if rho := cfg.sam_rho:
            scale = {name: p.abs() if cfg.sam_adaptive else 1 for name, p in parameters.items()}
            norm = torch.cat([(scale[name] * d).flatten() for name, d in g.items()]).norm()
            g = gradient({name: p + rho * scale[name] ** 2 * g[name] / norm for name, p in parameters.items()})
        norm = torch.stack([d.norm() for d in g.values()]).norm()
        assert run.meter.read()["gradient_norm"] == pytest.approx(norm.item(), rel=1e-3)
        with torch.no_grad():
            for name, p in parameters.items():
                d = g[name] + 0.01 * p
                v = velocity[name].mul_(0.9).add_(d)
                p -= 0.05 * run.step / 5 * (v if cfg.optimizer == "momentum" else d + 0.9 * v)
        for ours, expected in zip(run.model.parameters(), parameters.values(), strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-3, atol=2e-6)


def test_without_a_compiler_chains_are_those_of_an_ordinary_run(monkeypatch):
    """Not the form for the compiler, which takes longer and needs more memory when it runs by itself."""
    monkeypatch.setattr(torch, "compile", broken_compiler)
    monkeypatch.setattr(torch.func, "grad", None)
    with pytest.warns(RuntimeWarning, match="torch.compile does not work here"):
        chain = sgld.SGLD(lambda x: -x.square().flatten(1).sum(1), compile=True)
        found = chain(torch.ones(2, 1, 4, 4), 2, 0.25, 0.0, torch.Generator())
    torch.testing.assert_close(found.x, torch.full((2, 1, 4, 4), 0.25))


def test_a_plain_classifier_has_no_penalty_on_log_densities():
    run = trained(0, mode="baseline_train", energy_l2=0.3, mean_energy_l2=0.5, quality_every=1)
    parts = run.loss_and_gradient(run.draw_step_batch(0)[0])
    assert parts["loss/total"] == parts["loss/classification"]


def test_a_compiler_that_fails_in_the_backward_pass_is_noticed_before_the_run(monkeypatch):
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise RuntimeError("no backward compiler")

    monkeypatch.setattr(torch, "compile", lambda f, **_: lambda *args: Broken.apply(f(*args)))
    run = trained(0, mode="baseline_train", compile="on")
    assert progress.compiled(run.forward, run.sampler) == "network"
    with pytest.warns(RuntimeWarning, match="torch.compile does not work here"):
        run.warm_up()
    assert progress.compiled(run.forward, run.sampler) == "nothing"
    run.step = 1
    run.training_step()
    assert run.meter.sums["loss/total"] == trained(mode="baseline_train").meter.sums["loss/total"]


def test_gradients_are_added_up_in_the_same_order_in_all_steps(tmp_path):
    """So the first step after a resume has the rounding of a later one. The trial before it leaves no trace."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        run, orders = trained(0, norm="batch"), []

        def noted(_, bucket):
            orders.append([*map(id, bucket.parameters())])
            future = torch.futures.Future()
            future.set_result(bucket.buffer())
            return future

        run.joint_forward.register_comm_hook(None, noted)
        before = copy.deepcopy(run.state_dict())
        run.warm_up()
        torch.testing.assert_close(run.state_dict(), before, rtol=0, atol=0)
        for run.step in (1, 2):
            run.training_step()
    finally:
        torch.distributed.destroy_process_group()
    assert len(orders) == 3 and orders[0] != orders[1] == orders[2]


@pytest.mark.parametrize("n", [1200, None])
def test_an_epoch_sees_each_image_once_in_a_new_order(n, monkeypatch):
    digits, seen = data.load("digits"), []
    numbered = torch.arange(len(digits.train)).remainder(256).to(torch.uint8)[:, None, None, None].expand(-1, 1, 8, 8)
    images = replace(digits, train=Split(numbered, digits.train.labels)[:n])
    run = trained(0, images, mode="baseline_train", batch_size=200, buffer_size=200)
    monkeypatch.setattr(data, "augment", lambda x, *_: (seen.append(x[:, 0, 0, 0].tolist()), data.to_float(x))[1])
    assert run.steps_per_epoch == len(images.train) // 200 == 6
    orders = []
    for run.step in range(1, 13):
        run.training_step()
        orders.append(run.batches.order)
    for epoch in (0, 1):
        order = orders[6 * epoch]
        assert sorted(order.tolist()) == list(range(len(images.train)))
        assert sum(seen[6 * epoch : 6 * epoch + 6], []) == order[:1200].remainder(256).tolist()
    assert not torch.equal(orders[0], orders[6])


def test_average_of_the_weights():
    """Decay min(ema, (1 + step) / (10 + step)), so that the untrained start is soon forgotten."""
    run = trained(0, ema=0.4)
    for run.step in range(1, 12):
        before, decay = run.ema.class_output.weight.clone(), min(0.4, (1 + run.step) / (10 + run.step))
        run.training_step()
        expected = decay * before + (1 - decay) * run.model.class_output.weight
        torch.testing.assert_close(run.ema.class_output.weight, expected.detach())


@pytest.mark.parametrize(
    "steps, peak, warmup, total, rates",
    [
        ([1, 5, 10, 55, 100], 0.1, 10, 100, [0.01, 0.05, 0.1, (0.1 + 1e-6) / 2, 1e-6]),
        ([1], 0.1, 0, 1, [1e-6]),
        ([3], 0.1, 10, 3, [0.03]),
        ([50], 1e-7, 10, 100, [1e-7]),  # below the cosine's end: constant
    ],
)
def test_cosine_learning_rate(steps, peak, warmup, total, rates):
    cfg = Config(lr=peak, warmup_steps=warmup)
    assert [optim.learning_rate(cfg, step, 10, total) for step in steps] == pytest.approx(rates)


class Waits(TorchDispatchMode):
    """Refuses what would make the host wait for a GPU: sizes or numbers that depend on values, copies to the host."""

    NEVER = ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "_unique2", "unique_dim", "equal")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_") else []
        by_mask = any(index is not None and index.dtype == torch.bool for index in indices)
        to_host = name in ("_to_copy", "to") and (kwargs or {}).get("device") is not None
        if name in self.NEVER or by_mask or to_host:
            raise AssertionError(f"{name} waits for the device")
        return function(*args, **(kwargs or {}))


def test_waiting_is_noticed():
    x = torch.ones(3)
    for wait in (lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: x.to("cpu", copy=True)):
        with pytest.raises(AssertionError, match="waits for the device"), Waits():
            wait(x)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mode": "baseline_train"},
        {"norm": "batch", "start": "class_gaussian", "sgld_grad_clamp": 1.0, "sgld_clamp": True, "sgld_std": 0.0}
        | {"optimizer": "sgd", "sam_rho": 2.0, "sam_adaptive": True, "p_x_batch_size": 12, "p_x_no_augment": True},
        {"class_cond": True, "p_x_y_weight": 0.5, "ema": 0.9, "reinit_freq": 0.5, "start": "gaussian"},
        {"norm": "batch", "norm_statistics": "running", "outlier_weight": 1.0, "start": "gaussian:0.5,smooth:0.5"}
        | {"outlier_images": "smooth:0.25,shapes:0.25,patches:0.25,mixed:0.25"},
    ],
    ids=["jem", "baseline", "sada-jem", "class_cond", "outliers"],
)
def test_no_step_waits_for_the_device(options):
    run = trained(0, **options)
    with Waits():
        for run.step in (1, 2):
            run.training_step()


def test_numbers_of_the_log_are_means_over_processes(monkeypatch):
    monkeypatch.setattr(distributed, "all_reduce_mean", lambda x: x + 1)
    (meter := Meter()).add({"loss": torch.tensor(2.0)})
    assert meter.read() == {"loss": 3.0}


def test_a_large_network_on_a_cpu_is_said_to_be_slow(capsys):
    run, ran = trained(0), {"processes": 1, "precision": "float32", "compiled": "nothing"}
    for n, times in ((5_000_000, 0), (10_000_000, 1)):
        run.model.register_parameter("large", torch.nn.Parameter(torch.empty(n)))
        progress.announce(run, "runs", ran, ran)
        assert capsys.readouterr().out.count("can take minutes on a CPU; README.md names runs for CPUs") == times
