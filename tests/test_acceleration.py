"""What can be seen of CUDA graphs without a GPU."""

import pytest
import torch

import acceleration
import data
from acceleration import CapturedGradient, compiles
from config import Config
from models.normalisation import batch_norms, frozen_statistics, keeps_statistics
from trainer import Trainer


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


@pytest.mark.parametrize(
    "options",
    [
        {"norm": "batch", "sam_rho": 2.0, "p_x_batch_size": 12, "dropout_rate": 0.2},
        {"sam_rho": 0.5, "dropout_rate": 0.2},
        {"mode": "baseline_train", "norm": "batch"},
    ],
    ids=["batch norm and SAM", "SAM", "baseline"],
)
def test_captured_gradients_train_as_the_loss_does(options, digits, monkeypatch):
    """Warm-up leaves no trace, and each pass has a graph of its own where they differ."""
    base = {"dataset": "digits", "depth": 10, "width": 1, "batch_size": 16, "sgld_step": 2, "buffer_size": 100}

    def trained(captured):
        run = Trainer(Config(**base | {"max_steps": 20, "warmup_steps": 5} | options), digits, torch.device("cpu"))
        modules = batch_norms(run.model)

        def graph(function, *example):
            """In place of a CapturedStep: the function itself, the model in the state in which it was captured."""
            for _ in range(3):
                function(*example)
            tracked = [module.track_running_stats for module in modules]

            def replay(*inputs):
                before = [module.track_running_stats for module in modules]
                set_tracking(tracked)
                outputs = function(*inputs)
                set_tracking(before)
                return outputs

            return replay

        def set_tracking(flags):
            for module, flag in zip(modules, flags, strict=True):
                module.track_running_stats = flag

        monkeypatch.setattr(acceleration, "CapturedStep", graph)
        if captured:
            run.gradient = CapturedGradient(run.backward, run.model, run.variant)
        for run.step in (1, 2, 3):
            run.training_step()
        return run

    plain, captured = trained(False), trained(True)
    expected, found = (torch.utils._pytree.tree_flatten(run.state_dict())[0] for run in (plain, captured))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
    assert len(captured.gradient.graphs) == (2 if "norm" in options and "sam_rho" in options else 1)


def test_frozen_statistics_nest():
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(3))
    with frozen_statistics(model):
        with frozen_statistics(model):
            pass
        assert not keeps_statistics(model)
    assert keeps_statistics(model)


@pytest.mark.parametrize(
    "choice, device, steps, expected",
    [
        ("on", "cpu", 1, True),
        ("off", "cuda", 10**6, False),
        ("auto", "cpu", 10**6, False),
        ("auto", "cuda", 4999, False),
        ("auto", "cuda", 5000, True),
    ],
)
def test_what_is_compiled(choice, device, steps, expected):
    assert compiles(choice, torch.device(device), steps) == expected
