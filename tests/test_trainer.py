"""The training step against a loop as one writes it down from the paper."""

import copy
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from reference import reference_chain
from torch.utils._python_dispatch import TorchDispatchMode

import data
import optim
import sgld
import trainer
from acceleration import CompiledOrEager
from chain_init import uniform_init
from config import Config
from data import Split
from distributed import World
from logger import progress
from models import build_model, copy_weights
from models.wide_resnet import NORMS
from sgld import ReplayBuffer, Sampler


def config(**changes):
    options = {"dataset": "digits", "depth": 10, "width": 1, "batch_size": 16, "sgld_step": 3, "buffer_size": 64}
    options |= {"max_steps": 50, "warmup_steps": 5, "lr": 1e-3, "precision": "fp32", "gpu": "cpu"}
    return Config(**(options | changes))


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def test_synchronised_batch_norm_in_one_process_leaves_the_fast_path_on(digits):
    cfg = config(norm="batch", sync_batch_norm=True, compile="on")
    alone = trainer.Trainer(cfg, digits, torch.device("cpu"))
    several = trainer.Trainer(cfg, digits, torch.device("cpu"), World(0, 2))
    assert isinstance(alone.forward, CompiledOrEager) and not isinstance(several.forward, CompiledOrEager)
    assert alone.gif_engine.capture and not several.gif_engine.capture


def plain_losses(cfg, images, steps):
    """Losses of a plain loop: the model itself sampled with autograd.grad, a forward pass for each term of the loss."""
    torch.manual_seed(cfg.seed)
    data_rng, sgld_rng = torch.Generator().manual_seed(2 * cfg.seed), torch.Generator().manual_seed(2 * cfg.seed + 1)
    model = build_model(1, 10, cfg.depth, cfg.width, norm=cfg.norm)
    optimizer = torch.optim.Adam(model.parameters(), lr=cfg.lr)
    start = partial(uniform_init, images.shape)
    buffer = ReplayBuffer(cfg.buffer_size, 10, start, sgld_rng)
    sampler = Sampler(None, buffer, start, cfg.reinit_freq, cfg.sgld_lr, cfg.sgld_std, sgld_rng)
    per_epoch, losses = len(images.train) // cfg.batch_size, []
    for step in range(1, steps + 1):
        if (step - 1) % per_epoch == 0:
            order = torch.randperm(len(images.train), generator=data_rng)
        batch = images.train[order[(step - 1) % per_epoch * cfg.batch_size :][: cfg.batch_size]]
        x = data.augment(batch.images, images.flip, cfg.sigma, data_rng)
        start, places, _ = sampler.draw(cfg.batch_size, class_cond=False)
        samples = reference_chain(model.log_density, start, cfg.sgld_step, cfg.sgld_lr, cfg.sgld_std, sgld_rng).x
        buffer.store(places, samples)
        loss = (
            F.cross_entropy(model(x), batch.labels) + model(samples).logsumexp(1).mean() - model(x).logsumexp(1).mean()
        )
        cosine = 1e-6 + (cfg.lr - 1e-6) * (1 + math.cos(math.pi * (step - 5) / 45)) / 2
        optimizer.param_groups[0]["lr"] = cfg.lr * step / 5 if step <= 5 else cosine
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def trained_losses(cfg, images, steps):
    run, losses = trainer.Trainer(cfg, images, torch.device("cpu")), []
    for run.step in range(1, steps + 1):
        run.training_step()
        losses.append(run.meter.sums["loss/total"].item())
        run.meter.reset()
    return losses


def test_fifty_losses_equal_those_of_a_plain_loop(digits):
    cfg = config()
    ours, plain = trained_losses(cfg, digits, 50), plain_losses(cfg, digits, 50)
    assert ours[:10] == pytest.approx(plain[:10], abs=1e-5)
    assert ours == pytest.approx(plain, abs=2e-3)  # rounding grows along the chains


def test_bf16_losses_stay_near_fp32_ones(digits):
    exact, half = (trained_losses(config(precision=p), digits, 20) for p in ("fp32", "bf16"))
    assert half == pytest.approx(exact, abs=0.1)
    assert half != exact


def test_batch_norm_keeps_real_and_sampled_statistics_apart(digits, monkeypatch):
    """Two forward passes with batch normalisation, one without."""
    for norm, sizes in (("batch", [16, 16]), ("group", [32])):
        run, seen = trainer.Trainer(config(norm=norm), digits, torch.device("cpu")), []
        run.joint_forward.logits = lambda x, run=run, seen=seen: (seen.append(len(x)), run.model.logits(x))[1]
        run.step = 1
        run.training_step()
        assert seen == sizes


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    "options",
    [*({"norm": norm} for norm in NORMS), {"norm": "batch", "backbone": "robust"}, {"separate_energy": True}]
    + [{"norm": "batch", "norm_statistics": statistics, "load_ckpt": "."} for statistics in ("running", "frozen")],
    ids=lambda options: " ".join(map(str, options.values())),
)
def test_sampler_and_loss_see_one_energy(options, precision, digits):
    """Of the same images, the network that chains climb and the one that the loss scores say the same log p(x)."""
    images = digits
    if "backbone" in options:  # it takes colours
        images = replace(digits, train=Split(digits.train.images.expand(-1, 3, -1, -1), digits.train.labels))
    run = trainer.Trainer(config(**options, precision=precision), images, torch.device("cpu"))
    for run.step in range(1, 4):  # the running statistics are no longer those of the start
        samples = run.training_step()
    copy_weights(run.model, run.sampler_model)
    with torch.no_grad():
        climbed = run.sampler_model.log_density(samples)
    scored = run.backward(trainer.StepBatch(samples, torch.zeros(16, dtype=torch.int64), None, samples, None))
    tolerance = 1e-5 if precision == "fp32" else 0.01
    for name in ("log_density/real", "log_density/sampled"):
        assert scored[name].item() == pytest.approx(climbed.mean().item(), abs=tolerance)


@pytest.mark.parametrize("statistics", ["batch", "running"])
def test_running_statistics_are_those_of_real_images(statistics, digits):
    """The first step's: a tenth of the batch's, as if no samples had been there."""
    run = trainer.Trainer(config(norm="batch", norm_statistics=statistics), digits, torch.device("cpu"))
    alone = trainer.Trainer(config(norm="batch", mode="baseline_train"), digits, torch.device("cpu"))
    for trained in (run, alone):
        trained.step = 1
        trained.training_step()
    assert torch.equal(run.model.f.bn1.running_mean, alone.model.f.bn1.running_mean)
    assert torch.equal(run.model.f.layer2[0].bn2.running_var, alone.model.f.layer2[0].bn2.running_var)
    assert run.model.f.bn1.num_batches_tracked == 1


def test_averaged_weights_get_statistics_of_their_own(digits):
    run = trainer.Trainer(config(norm="batch", ema=0.9, dropout_rate=0.1), digits, torch.device("cpu"))
    for run.step in range(1, 6):
        run.training_step()
    seen, before = {}, torch.get_rng_state()
    first = run.ema.f.layer1[0]
    optim.recalibrate_batch_norm(run.ema, digits.train.images[:300])
    first.bn1.register_forward_hook(lambda module, inputs, _: seen.update(x=inputs[0]))
    run.ema(data.to_float(digits.train.images[:300]))
    torch.testing.assert_close(first.bn1.running_mean, seen["x"].mean((0, 2, 3)))
    torch.testing.assert_close(first.bn1.running_var, seen["x"].var((0, 2, 3)))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("options", [{}, {"sam_rho": 0.7, "sam_adaptive": True}, {"sam_rho": 0.2}], ids=str)
def test_the_optimizer_of_a_run_written_out(options, digits):
    """Nesterov's momentum of 0.9, weight decay, and SAM's second pass on the same images."""
    cfg = config(mode="baseline_train", optimizer="sgd", lr=0.05, weight_decay=0.01, **options)
    run, seen = trainer.Trainer(cfg, digits, torch.device("cpu")), []
    model, original = copy.deepcopy(run.model), run.next_inputs
    run.next_inputs = lambda steps: seen.append(original(steps)) or seen[-1]
    parameters = list(model.parameters())
    velocity = [torch.zeros_like(p) for p in parameters]

    def gradient(inputs, _):
        return torch.autograd.grad(F.cross_entropy(model(inputs.x), inputs.y), parameters)

    for run.step in (1, 2, 3):
        run.training_step()
        g = gradient(*seen[-1])
        if rho := cfg.sam_rho:
            scaled = [p.abs() * d if cfg.sam_adaptive else d for p, d in zip(parameters, g, strict=True)]
            norm = torch.cat([s.flatten() for s in scaled]).norm()
            move = [
                rho * (p.abs() * s if cfg.sam_adaptive else s) / norm for p, s in zip(parameters, scaled, strict=True)
            ]
            before = [p.detach().clone() for p in parameters]
            with torch.no_grad():
                for p, e in zip(parameters, move, strict=True):
                    p += e
            g = gradient(*seen[-1])
            with torch.no_grad():
                for p, b in zip(parameters, before, strict=True):
                    p.copy_(b)
        with torch.no_grad():
            for p, d, v in zip(parameters, g, velocity, strict=True):
                d = d + 0.01 * p
                v.mul_(0.9).add_(d)
                p -= 0.05 * run.step / 5 * (d + 0.9 * v)
        for ours, expected in zip(run.model.parameters(), parameters, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-3, atol=2e-6)


def test_running_statistics_weigh_each_image_alike(digits, monkeypatch):
    """In batches of at most 500 images, the last one of 501 is not half of the mean."""
    run, means = trainer.Trainer(config(norm="batch", ema=0.9), digits, torch.device("cpu")), []
    for size in (500, 501):
        monkeypatch.setattr(optim, "images_per_batch", lambda *_, size=size: size)
        optim.recalibrate_batch_norm(run.ema, digits.train.images[:501])
        means.append(run.ema.f.layer1[0].bn1.running_mean.clone())
    torch.testing.assert_close(*means, rtol=0, atol=1e-3)
    assert means[0].abs().max() > 0.1


def test_without_a_compiler_chains_are_those_of_an_ordinary_run(monkeypatch):
    """Not the form for the compiler, which takes longer and needs more memory when it runs by itself."""

    def broken(function, **_):
        def call(*args):
            raise RuntimeError("no compiler")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setattr(torch.func, "grad", None)
    with pytest.warns(RuntimeWarning, match="torch.compile does not work here"):
        chain = sgld.SGLD(lambda x: -x.square().flatten(1).sum(1), compile=True)
        found = chain(torch.ones(2, 1, 4, 4), 2, 0.25, 0.0, torch.Generator())
    torch.testing.assert_close(found.x, torch.full((2, 1, 4, 4), 0.25))


def test_a_plain_classifier_has_no_penalty_on_log_densities(digits):
    penalties = {"energy_l2": 0.3, "mean_energy_l2": 0.5}
    run = trainer.Trainer(config(mode="baseline_train", **penalties), digits, torch.device("cpu"))
    parts = run.backward(run.next_inputs(0)[0])
    assert parts["loss/total"] == parts["loss/classification"]


def test_a_compiler_that_fails_in_the_backward_pass_is_noticed_before_the_run(digits, monkeypatch):
    """The run goes on without it and says so; the trial leaves no trace."""

    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise RuntimeError("no backward compiler")

    monkeypatch.setattr(torch, "compile", lambda f, **_: lambda *args: Broken.apply(f(*args)))
    run = trainer.Trainer(config(mode="baseline_train", compile="on"), digits, torch.device("cpu"))
    assert progress.compiled(run.forward, run.sampler) == "network"
    with pytest.warns(RuntimeWarning, match="torch.compile does not work here"):
        run.warm_up()
    assert progress.compiled(run.forward, run.sampler) == "nothing"
    eager = trainer.Trainer(config(mode="baseline_train"), digits, torch.device("cpu"))
    for trained in (run, eager):
        trained.step = 1
        trained.training_step()
    assert run.meter.sums["loss/total"] == eager.meter.sums["loss/total"]


def test_gradients_are_added_up_in_the_same_order_in_all_steps(digits, tmp_path):
    """So the first step after a resume has the rounding of a later one. The trial before it leaves no trace."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        run = trainer.Trainer(config(norm="batch"), digits, torch.device("cpu"))
        orders, names = [], {id(p): name for name, p in run.model.named_parameters()}

        def noted(_, bucket):
            orders.append([names[id(p)] for p in bucket.parameters()])
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


def test_an_epoch_sees_each_image_once_in_a_new_order(digits, monkeypatch):
    cfg = config(mode="baseline_train", batch_size=200, buffer_size=200)
    numbered = torch.arange(len(digits.train)).remainder(256).to(torch.uint8)[:, None, None, None].expand(-1, 1, 8, 8)
    images = replace(digits, train=Split(numbered, digits.train.labels))
    run, seen = trainer.Trainer(cfg, images, torch.device("cpu")), []
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


def test_average_of_the_weights(digits):
    """Decay min(ema, (1 + step) / (10 + step)), so that the untrained start is soon forgotten."""
    run = trainer.Trainer(config(ema=0.5), digits, torch.device("cpu"))
    run.model.class_output.bias.data.fill_(0)
    run.ema.class_output.bias.fill_(0)
    expected = 0.0
    for run.step in range(1, 21):
        run.model.class_output.bias.data.fill_(run.step)
        optim.update_ema(run.ema, run.model, 0.5, run.step)
        decay = min(0.5, (1 + run.step) / (10 + run.step))
        expected = decay * expected + (1 - decay) * run.step
        assert run.ema.class_output.bias.tolist() == pytest.approx([expected] * 10)


def test_learning_rate():
    peak = 0.1
    assert [optim.cosine_learning_rate(s, peak, 10, [100]) for s in (1, 5, 10)] == pytest.approx([0.01, 0.05, 0.1])
    assert optim.cosine_learning_rate(55, peak, 10, [100]) == pytest.approx((peak + 1e-6) / 2)
    assert optim.cosine_learning_rate(100, peak, 10, [100]) == pytest.approx(1e-6)
    assert optim.cosine_learning_rate(1, peak, 0, [1]) == pytest.approx(1e-6)
    assert optim.cosine_learning_rate(3, peak, 10, [3]) == pytest.approx(0.03)
    assert optim.cosine_learning_rate(50, 1e-7, 10, [100]) == pytest.approx(1e-7)  # below the cosine's end: constant


def test_a_longer_run_gets_another_cycle():
    """The first one's rates stay; a short warm-up and another cosine follow."""
    ends, peak = [100, 140], 0.1
    assert [optim.cosine_learning_rate(s, peak, 10, ends) for s in range(1, 101)] == [
        optim.cosine_learning_rate(s, peak, 10, [100]) for s in range(1, 101)
    ]
    assert [optim.cosine_learning_rate(s, peak, 10, ends) for s in (101, 104)] == pytest.approx([peak / 4, peak])
    assert optim.cosine_learning_rate(122, peak, 10, ends) == pytest.approx((peak + 1e-6) / 2)
    assert optim.cosine_learning_rate(140, peak, 10, ends) == pytest.approx(1e-6)


class Waits(TorchDispatchMode):
    """Refuses what would make the host wait for a GPU: sizes or numbers that depend on values, copies to the host."""

    NEVER = ("_local_scalar_dense", "nonzero", "masked_select", "bincount", "_unique2", "unique_dim", "equal")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
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
def test_no_step_waits_for_the_device(options, digits):
    """Between two lines of the log nothing turns a tensor into a number."""
    run = trainer.Trainer(config(**options), digits, torch.device("cpu"))
    for run.step in (1, 2):
        with Waits():
            run.training_step()
