"""Short runs on the digits that tests stop, break and compare, and a chain as the papers have it."""

import os
import signal
from contextlib import contextmanager
from unittest.mock import Mock

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import data
import main
import trainer
from checkpoints.files import load_checkpoint
from config import Config
from logger import run_logger
from logger.metrics_log import read_log
from sgld import Chain, normal_like

DIGITS = "--dataset digits --gpu cpu --depth 10 --width 1 --precision fp32 --warmup_steps 2 --sgld_step 2".split()
TINY = "--batch_size 100 --p_x_batch_size 20 --buffer_size 200 --n_valid 100 --dropout_rate 0.1 --ema 0.9 --lr 1e-3 "
TINY = [*DIGITS, *(TINY + "--sample_every 5 --gif_every 1000 --max_steps 34").split()]  # 13 steps an epoch
HARSH = "--lr 0.1 --optimizer sgd --sgld_step 1 --ema 0 --dropout_rate 0".split()  # under which training diverges


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def trained(n_steps=1, images=None, **changes):
    """A trainer after its first steps."""
    options = {"dataset": "digits", "depth": 10, "width": 1, "batch_size": 16, "sgld_step": 3, "buffer_size": 64}
    options |= {"max_steps": 50, "warmup_steps": 5, "lr": 1e-3, "precision": "fp32", "gpu": "cpu"}
    run = trainer.Trainer(Config(**(options | changes)), images or data.load("digits"), torch.device("cpu"))
    for run.step in range(1, n_steps + 1):
        run.training_step()
    return run


def start(logdir, *options, given=TINY):
    """A new run; returns the exit status and the run directory."""
    before = set(logdir.glob("*"))
    status = main.main([*given, "--logdir", str(logdir), *options])
    (run,) = set(logdir.glob("*")) - before
    return status, run


def new_run(given, logdir, *options, status=0):
    """The run directory alone."""
    found, run = start(logdir, *options, given=given)
    assert found == status
    return run


def refused(output, *arguments):
    """The one line on stderr of a command that ends with status 2; ``output`` is capsys or capfd."""
    output.readouterr()
    assert main.main([*map(str, arguments)]) == 2
    err = output.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1
    return err


def state(run, name="last.pt"):
    return load_checkpoint(run / "ckpt" / name)["state"]


def metrics(run):
    """The lines of the log without the speed, which is no two times the same."""
    return [{k: v for k, v in x.items() if not k.startswith("speed/")} for x in read_log(run / "metrics.jsonl")]


def broken_compiler(function, **_):
    """In the place of torch.compile: the first call fails."""
    return Mock(side_effect=OSError("no compiler"))


def equal(one, two):
    match one:
        case torch.Tensor():
            return torch.equal(one, two)
        case dict():
            return one.keys() == two.keys() and all(equal(one[k], two[k]) for k in one)
        case list() | tuple():
            return len(one) == len(two) and all(map(equal, one, two))
    return one == two


def assert_same_run(one, two):
    assert equal(state(one), state(two))
    assert equal(state(one, "best.pt"), state(two, "best.pt"))
    assert metrics(one) == metrics(two)
    for part in ("samples", "sgld"):
        ours, theirs = ({p.name: p.read_bytes() for p in run.glob(f"{part}/*")} for run in (one, two))
        assert ours == theirs
    assert scalars(one) == scalars(two)


def scalars(run):
    """(tag, step) -> value of TensorBoard's scalars; a step that came twice would be there twice."""
    board = EventAccumulator(str(run), size_guidance={"scalars": 0})
    board.Reload()
    tags = [tag for tag in board.Tags()["scalars"] if not tag.startswith("speed/")]
    return {tag: [(e.step, e.value) for e in board.Scalars(tag)] for tag in tags}


@contextmanager
def short_epochs():
    """Inside, each of the 13 steps long epochs ends with an evaluation and a checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "MIN_EPOCH", 1)
        patch.setattr(run_logger, "plot_curves", lambda run: None)  # two pictures at each evaluation
        yield


def at_step(monkeypatch, step, action):
    """Call ``action(trainer)`` once, after the update of ``step``."""
    original, done = trainer.Trainer.training_step, []

    def patched(self):
        samples = original(self)
        if self.step == step and not done:
            done.append(True)
            action(self)
        return samples

    monkeypatch.setattr(trainer.Trainer, "training_step", patched)
    return done


def signal_at_step(monkeypatch, step, number=signal.SIGTERM):
    return at_step(monkeypatch, step, lambda _: os.kill(os.getpid(), number))


def reference_chain(
    log_density, x, steps, step_size, noise_std, generator, y=None, grad_clamp=None, clamp=False, normalize=False
):
    """SGLD (JEM, equation 3), step by step, with the random numbers that ``SGLD`` draws from the same generator."""
    grad = torch.zeros_like(x)
    for _ in range(steps):
        x = x.detach().requires_grad_()
        density = log_density(x) if y is None else log_density(x, y)
        (grad,) = torch.autograd.grad(density.sum(), x)
        limited = grad / (grad.square().sum((1, 2, 3), keepdim=True).sqrt() + 1e-12) if normalize else grad
        if grad_clamp is not None:
            limited = limited.clamp(-grad_clamp, grad_clamp)
        x = x.detach() + step_size * limited + noise_std * normal_like(x, generator)
        if clamp:
            x = x.clamp(-1, 1)
    return Chain(x.detach(), grad)
