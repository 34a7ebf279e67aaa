"""Run a command line of main.py on a GPU that is none, to find what otherwise only a GPU shows.

    python benchmarks/simulated_gpu.py --dataset digits --depth 10 --width 1 --batch_size 20 --max_steps 20

Its tensors are in the host's memory, but say that they are on a device ``simulated``. An operation on one of them and
on one of the host's is an error, as on a GPU. In the end the script lists the lines of the program that waited for the
device or copied to or from it, and how often; those of training steps, which should not wait, come first. Numbers are
those of a CPU in float32, bit for bit; nothing is compiled, and there are no CUDA graphs.
"""

import functools
import sys
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = {str(path) for pattern in ("*.py", "[a-z]*/*.py") for path in ROOT.glob(pattern)} - {__file__}
NAME = "simulated"
TAKES_BOTH = {f"aten::{name}" for name in ("_to_copy", "copy_", "index", "index_put", "index_put_", "_index_put_impl_")}
WAITS = {f"aten::{name}" for name in ("_local_scalar_dense", "nonzero", "bincount", "equal", "_unique2")}


class SimulatedTensor(Tensor):
    """A tensor of the simulated device; ``host`` is the one on the CPU that holds its values."""

    @staticmethod
    def __new__(cls, host: Tensor) -> "SimulatedTensor":
        about = {"strides": host.stride(), "storage_offset": host.storage_offset(), "dtype": host.dtype}
        made = Tensor._make_wrapper_subclass(cls, host.shape, **about, device=torch.device(NAME, 0))
        made.host = host
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return simulation.run(function, args, kwargs or {})

    def __deepcopy__(self, memo: dict) -> "SimulatedTensor":
        if id(self) not in memo:
            memo[id(self)] = copied = SimulatedTensor(self.host.detach().clone())
            if isinstance(self, nn.Parameter):
                memo[id(self)] = nn.Parameter(copied, self.requires_grad)
        return memo[id(self)]

    def tolist(self) -> list:
        return self.cpu().tolist()

    def __format__(self, how: str) -> str:
        return format(self.cpu(), how)

    def __getitem__(self, key: Any) -> Tensor:
        return super().__getitem__(torch.tensor(key) if isinstance(key, list) else key)

    def __setitem__(self, key: Any, value: Any) -> None:
        super().__setitem__(torch.tensor(key) if isinstance(key, list) else key, value)


class SimulatedGenerator(torch.Generator):
    """A generator of the CPU that says that it is on ``device``."""

    def __new__(cls, device: torch.device | str = "cpu") -> "SimulatedGenerator":
        made = super().__new__(cls)
        made.place = torch.device(device)
        return made

    @property
    def device(self) -> torch.device:
        return self.place


class Simulation(TorchDispatchMode):
    """Inside, all operations are checked and done on the CPU.

    in_steps, elsewhere: the lines that waited for the device or copied, and how often, in training steps and not.
    """

    def __init__(self):
        super().__init__()
        self.in_steps: Counter[str] = Counter()
        self.elsewhere: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return self.run(function, args, kwargs or {})

    def run(self, function: Any, args: tuple, kwargs: dict) -> Any:
        name, given = function._schema.name, [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        own = [t for t in given if isinstance(t, SimulatedTensor)]
        mixed = own and any(t.ndim for t in given if not isinstance(t, SimulatedTensor))
        if mixed and name not in TAKES_BOTH:
            raise RuntimeError(f"{name} of tensors on {NAME} and on the CPU, {place()[0]}")
        device = kwargs.get("device")
        on_device = bool(own) if device is None else torch.device(device).type == NAME
        if name == "aten::copy_":
            on_device = isinstance(args[0], SimulatedTensor)
        generator = kwargs.get("generator")
        if isinstance(generator, SimulatedGenerator) and (generator.device.type == NAME) != on_device:
            raise RuntimeError(f"{name} with a generator on {generator.device}, {place()[0]}")
        moved = name == "aten::_to_copy" and on_device != bool(own)
        if moved or mixed or (own and name in WAITS):
            line, in_step = place()
            (self.in_steps if in_step else self.elsewhere)[f"{line} {name.removeprefix('aten::')}"] += 1
        if device is not None:
            kwargs = kwargs | {"device": torch.device("cpu")}
        if name == "aten::_pin_memory":
            return args[0]
        result = function(*to_host(args), **to_host(kwargs))
        if moved and own and result is own[0].host:
            return result.clone()
        before = {id(t.host): t for t in own}  # of functions that change a tensor and return it
        wrap = SimulatedTensor if on_device else lambda t: t
        return tree_map_only(Tensor, lambda t: before[id(t)] if id(t) in before else wrap(t), result)


def to_host(tree: Any) -> Any:
    return tree_map_only(SimulatedTensor, lambda t: t.host, tree)


def place() -> tuple[str, bool]:
    """The line of the program that this is done for, and whether it is part of a training step."""
    frames = [frame for frame in traceback.extract_stack() if frame.filename in PROGRAM]
    line = f"{Path(frames[-1].filename).relative_to(ROOT)}:{frames[-1].lineno}" if frames else "?"
    return line, any(frame.name == "training_step" for frame in frames)


simulation = Simulation()


@functools.cache  # once in a process
def set_up() -> None:
    """Give PyTorch the device, and the program no other."""
    sys.path.insert(0, str(ROOT))
    torch.Generator = SimulatedGenerator
    import utils

    module = type("Module", (backend_registration._DummyBackendModule,), {"get_amp_supported_dtype": lambda self: []})
    backend_registration._setup_privateuseone_for_python_backend(NAME, module())
    utils.pick_device = lambda gpu: torch.device(NAME, 0)
    utils.pick_dtype = lambda precision, device: torch.float32
    utils.set_speed_options = lambda device: None
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=...) makes it on the CPU and moves it


def run(arguments: list[str]) -> int:
    """The exit status of ``main.main``."""
    set_up()
    import main

    with simulation, torch.autograd.set_multithreading_enabled(False):  # a step's stack is that of its backward pass
        return main.main(arguments)


if __name__ == "__main__":
    status = run(sys.argv[1:])
    for title, found in (("in training steps", simulation.in_steps), ("elsewhere", simulation.elsewhere)):
        print(f"waited or copied {title}:", *(f"{n:6} {line}" for line, n in found.most_common()), sep="\n")
    sys.exit(status)
