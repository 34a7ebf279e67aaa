"""What only a GPU can show: captured chains, no waiting, memory; skipped where there is none."""

import os
import signal
from types import SimpleNamespace

import pytest
import torch
from small_runs import reference_chain
from torch.utils._pytree import tree_flatten

import data
import main
import trainer
import utils
from acceleration import CompiledOrEager
from benchmarks.throughput import synthetic
from checkpoints.files import load_checkpoint
from config import Config
from logger.progress import compiled
from models import build_model, copy_weights, frozen_sampler_model
from sgld import SGLD, uniform_images

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SHAPE = (3, 16, 16)
SMALL = "--dataset digits --gpu 0 --depth 10 --width 1 --batch_size 20 --buffer_size 100 --sgld_step 3".split()
SMALL += "--warmup_steps 2 --compile off --no_log".split()


def generator(seed=0):
    return torch.Generator("cuda").manual_seed(seed)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return frozen_sampler_model(build_model((3, 32, 32), 4, 10, 1).cuda(), torch.float32)


@pytest.fixture(scope="module")
def digits():
    return data.load("digits", device="cuda")


def trained(images, captures=True, **changes):
    """A trainer after two steps: everything is captured; or the loss is neither captured nor compiled."""
    base = {"dataset": "digits", "depth": 10, "width": 1, "batch_size": 16, "sgld_step": 2, "buffer_size": 100}
    base |= {"max_steps": 50, "warmup_steps": 5, "compile": "off"} | changes | ({} if captures else {"compile": "off"})
    run = trainer.Trainer(Config(**base), images, torch.device("cuda", 0))
    if not captures:
        run.cuda_graphs = None
    for run.step in (1, 2):
        run.training_step()
    ran = compiled(run.forward, run.sampler)  # no test of what is compiled passes with what is not
    assert ran == ("network and chains" if base["compile"] == "on" else "nothing")
    return run


@pytest.mark.parametrize("labels", [None, [0, 1, 2, 3]], ids=["log p(x)", "log p(x, y)"])
@pytest.mark.parametrize("options", [{}, {"grad_clamp": 0.01, "clamp": True}, {"compile": True}], ids=str)
def test_captured_chain_equals_the_reference(labels, options, model):
    y = None if labels is None else torch.tensor(labels, device="cuda")
    x = uniform_images(4, SHAPE, generator())
    clamps = {name: value for name, value in options.items() if name != "compile"}
    slow = reference_chain(model.log_density, x, 10, 1.0, 0.01, generator(1), y, **clamps)
    engine = SGLD(model.log_density, **options)
    for _ in range(2):  # captured, and replayed
        fast = engine(x, 10, 1.0, 0.01, generator(1), y)
        torch.testing.assert_close(fast.x, slow.x, rtol=0, atol=1e-4)
        torch.testing.assert_close(fast.grad, slow.grad, rtol=1e-2, atol=1e-5)
    assert isinstance(engine.step, CompiledOrEager) == ("compile" in options) and getattr(engine.step, "works", True)


def test_a_captured_chain_follows_the_weights(model):
    x, engine = uniform_images(4, SHAPE, generator()), SGLD(model.log_density)
    before = engine(x, 3, 1.0, 0.0, generator()).x
    torch.manual_seed(1)
    copy_weights(build_model((3, 32, 32), 4, 10, 1).cuda(), model)
    after = engine(x, 3, 1.0, 0.0, generator()).x
    expected = reference_chain(model.log_density, x, 3, 1.0, 0.0, generator()).x
    torch.testing.assert_close(after, expected, rtol=0, atol=1e-4)
    assert (after - before).abs().max() > 1e-3


def test_two_shapes_have_a_graph_each(model):
    engine = SGLD(model.log_density)
    for n in (4, 7, 4):
        x = uniform_images(n, SHAPE, generator(n))
        expected = reference_chain(model.log_density, x, 3, 1.0, 0.0, generator()).x
        torch.testing.assert_close(engine(x, 3, 1.0, 0.0, generator()).x, expected, rtol=0, atol=1e-4)
    assert len(engine.graphs) == 2


def test_memory_stays_flat_over_gifs(digits):
    run, used = trained(digits), []
    run.logger = SimpleNamespace(save_gif=lambda *_: None)
    for _ in range(4):
        run.dump_gif()
        torch.cuda.synchronize()
        used.append(torch.cuda.memory_allocated())
    assert used[1] == used[2] == used[3]


SADA_JEM = {"norm": "batch", "start": "class_gaussian", "sgld_grad_clamp": 1.0, "sgld_clamp": True, "sgld_std": 0.0}
SADA_JEM |= {"optimizer": "sgd", "sam_rho": 2.0, "sam_adaptive": True, "p_x_batch_size": 12, "p_x_no_augment": True}
KINDS = {"jem": {}, "sada-jem": SADA_JEM, "class_cond": {"class_cond": True, "p_x_y_weight": 0.5, "ema": 0.9}}
KINDS["dat"] = {"norm": "batch", "adversarial_eps": 0.5, "generative": "logistic", "sgld_normalize": True}
KINDS["sam"] = {"separate_energy": True, "sam_rho": 0.5}
KINDS["compiled"] = SADA_JEM | {"compile": "on"}
KINDS["running"] = {"norm": "batch", "norm_statistics": "running"}
KINDS["frozen"] = {"norm": "batch", "norm_statistics": "frozen", "load_ckpt": ".", "outlier_weight": 1.0}
KINDS["frozen"] |= {"outlier_batch_size": 8, "outlier_images": "smooth:0.5,mixed:0.5", "grad_clip": 5.0}
KINDS["baseline"] = {"mode": "baseline_train", "norm": "batch", "optimizer": "sgd"}
every_kind = pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)


@every_kind
def test_captured_gradients_are_those_of_the_loss(options, digits, monkeypatch):
    utils.set_speed_options(torch.device("cuda", 0))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    one, other = (trained(digits, **options, precision="fp32", captures=captures) for captures in (True, False))
    other.load_state_dict(one.state_dict())
    assert one.cuda_graphs.graphs and other.cuda_graphs is None
    for run in (one, other):
        run.step = 3
        run.training_step()
    found, expected = (dict(run.model.named_parameters()) for run in (one, other))
    whole = torch.nn.utils.get_total_norm([p.grad for p in expected.values()])
    for name, p in expected.items():
        # Of a bias before batch normalisation the gradient is 0, but for rounding.
        assert (found[name].grad - p.grad).norm() <= 1e-3 * p.grad.norm() + 1e-5 * whole, name
    for (name, value), other_value in zip(one.model.named_buffers(), other.model.buffers(), strict=True):
        torch.testing.assert_close(value, other_value, rtol=1e-3, atol=1e-5, msg=name)


@every_kind
def test_no_step_waits_for_the_device(options):
    run = trained(synthetic(500, (3, 32, 32), torch.device("cuda")), **options)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for run.step in (3, 4):
            run.training_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_training_goes_back_to_a_state_that_is_kept_on_the_host(digits):
    run = trained(digits)
    run.recovery.keep(utils.tree_to(run.state_dict(), torch.device("cpu")))
    kept, recorded = run.recovery.latest, []
    run.logger = SimpleNamespace(log_recovery=lambda *line: recorded.append(line), checkpoint=lambda *_: None)
    run.step = 3
    run.training_step()
    run.recover()
    assert run.step == 2 and recorded[0][:2] == (3, 2)
    found = run.state_dict()
    for part in ("model", "buffer"):
        assert all(torch.equal(found[part][name].cpu(), kept[part][name]) for name in kept[part])
    run.step = 3
    assert run.training_step().isfinite().all()


@pytest.mark.parametrize("more", ["", "--recipe sada-jem --p_x_batch_size 20 --dropout_rate 0.1"])
def test_stopped_and_resumed_is_the_same_run(more, tmp_path, monkeypatch):
    options = [*SMALL, *more.split(), "--max_steps", "40"]
    assert main.main([*options, "--logdir", str(tmp_path / "whole")]) == 0
    original = trainer.Trainer.training_step

    def stopping(self):
        if self.step == 17:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "training_step", stopping)
        assert main.main([*options, "--logdir", str(tmp_path / "stopped")]) == 143
    (run,), (whole,) = (tmp_path / "stopped").iterdir(), (tmp_path / "whole").iterdir()
    assert main.main(["--resume", str(run)]) == 0
    one, two = (load_checkpoint(path / "ckpt" / "last.pt")["state"] for path in (run, whole))
    one, two = tree_flatten(one)[0], tree_flatten(two)[0]
    assert all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("compile", ["off", "on"])
def test_a_process_group_of_one_changes_nothing(compile, digits, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    options = {"norm": "batch", "sam_rho": 2.0, "start": "class_gaussian", "compile": compile, "ema": 0.9}
    options |= {"precision": "fp32", "optimizer": "sgd", "lr": 0.1}  # Adam makes much of rounding errors
    expected = trained(digits, captures=False, **options).model.state_dict()
    alone = {"rank": 0, "world_size": 1, "init_method": f"file://{tmp_path}/store"}
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl", **alone)
    try:
        found = trained(digits, **options).model.state_dict()
    finally:
        torch.distributed.destroy_process_group()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_batches_from_the_host_are_those_on_the_device(digits):
    def batches(split):
        return data.Batches(split, 200, True, 0.1, torch.Generator("cuda").manual_seed(1))

    host = data.Split(digits.train.images.cpu(), digits.train.labels.cpu())
    here, there = batches(host.to(torch.device("cuda"))), batches(host)
    for _ in range(20):  # three passes
        for one, other in zip(here.next(), there.next(), strict=True):
            assert other.is_cuda and torch.equal(one, other)
