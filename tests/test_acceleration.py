"""What can be seen of CUDA graphs without a GPU, and the memory of a CPU."""

import gc
import re
import subprocess
import sys
import weakref
from functools import partial
from pathlib import Path

import pytest
import torch
from small_runs import broken_compiler
from torch.utils._pytree import tree_flatten

import acceleration
import data
from acceleration import CompiledOrEager, CUDAGraphBackward, compiles
from config import Config
from trainer import Trainer
from utils import tree_to


class Graph:
    """In place of a CUDAGraphStep: it writes into the same tensors each time, with the remedies of its capture."""

    def __init__(self, run, function, *example):
        for _ in range(3):
            function(*example)
        self.function, self.run, self.remedies = function, run, dict(run.recovery.remedies)
        self.outputs = tree_to(function(*example))

    def __call__(self, *inputs):
        before = dict(self.run.recovery.remedies)
        self.run.recovery.remedies.update(self.remedies)
        results, gradients = self.function(*inputs)
        self.run.recovery.remedies.update(before)
        for name, value in results.items():
            self.outputs[0][name].copy_(value)
        for static, gradient in zip(self.outputs[1], gradients, strict=True):
            static.copy_(gradient)
        self.run.model.zero_grad()
        return self.outputs


@pytest.mark.parametrize(
    "options, n_graphs",
    [
        ({"norm": "batch", "sam_rho": 2.0, "p_x_batch_size": 12, "dropout_rate": 0.2, "max_steps": 20}, 2),
        ({"sam_rho": 0.5, "dropout_rate": 0.2}, 2),
        ({"mode": "baseline_train", "norm": "batch"}, 1),
        ({"adversarial_eps": 0.5, "adversarial_steps": 2, "norm": "batch", "dropout_rate": 0.2}, 1),
    ],
)
def test_captured_gradients_train_as_the_loss_does(options, n_graphs, monkeypatch):
    """Warm-up leaves no trace, each pass of SAM has a graph of its own, and a remedy has new ones."""
    base = {"dataset": "digits", "depth": 10, "width": 1, "batch_size": 16, "sgld_step": 2, "buffer_size": 100}
    base |= {"max_steps": 20, "warmup_steps": 5}

    def trained(captured):
        run = Trainer(Config(**base | options), data.load("digits"), torch.device("cpu"))
        monkeypatch.setattr(acceleration, "CUDAGraphStep", partial(Graph, run))
        if captured:
            run.cuda_graphs = CUDAGraphBackward(run.model)
        for run.step in (1, 2, 3):
            run.training_step()
        assert not captured or len(run.cuda_graphs.graphs) == n_graphs
        state = tree_to(run.state_dict())
        state["recovery"]["remedies"]["energy_l2"] = 0.5
        run.load_state_dict(state)
        for run.step in (4, 5):
            run.training_step()
        return tree_flatten(run.state_dict())[0]

    for one, other in zip(trained(True), trained(False), strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_a_trainer_is_freed_when_nobody_has_it():
    gc.collect()
    gc.disable()
    try:
        cfg = Config(dataset="digits", depth=10, width=1, batch_size=16, buffer_size=100, max_steps=5, warmup_steps=1)
        run = Trainer(cfg, data.load("digits"), torch.device("cpu"))
        parts = [weakref.ref(part) for part in (run.model, run.sampler_model, run.sampler.engine)]
        del run
        assert [part() for part in parts] == [None, None, None]
    finally:
        gc.enable()


def test_what_cannot_be_compiled_runs_as_it_is(monkeypatch):
    monkeypatch.setattr(torch, "compile", broken_compiler)
    plus_one, integer = CompiledOrEager(lambda x: x + 1), CompiledOrEager(int)
    with pytest.warns(RuntimeWarning, match="torch.compile does not work here .OSError."):
        assert plus_one(1) == 2 and not plus_one.works
    with pytest.raises(ValueError, match="invalid literal"):
        integer("one")
    assert integer.works


def test_what_is_compiled():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert compiles("on", cpu, 1) and compiles("auto", gpu, 20_000)
    assert not (compiles("off", gpu, 10**6) or compiles("auto", cpu, 10**6) or compiles("auto", gpu, 19_999))


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="a kernel without large pages")
def test_buffers_on_a_cpu_get_large_pages():
    code = "import torch, utils; utils.set_speed_options(torch.device('cpu')); print(open('/proc/self/smaps').read())"
    maps = subprocess.check_output([sys.executable, "-c", code], cwd=Path(__file__).parent.parent, text=True)
    sizes = re.findall(r"^Size: +(\d+) kB\n(?:(?!Size|VmFlags).*\n)*VmFlags:.* hg\b", maps, re.MULTILINE)
    assert max(map(int, sizes)) > 2_000_000
