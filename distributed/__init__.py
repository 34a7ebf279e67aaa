"""Several processes of one run, a device each: rank, exchange, sharding of work and of a run's state.

PyTorch's process group carries everything (see launch.py): NCCL between GPUs, gloo for what lies on the host. Where
there is one process, nothing is sent and every function gives back what it was given.
"""

import math
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Generator, Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from utils import UserError, tree_to

PER_PROCESS = ("rng", "sampler", "meter")  # parts of a run's state that differ between processes, besides the buffer

T, Item = TypeVar("T"), TypeVar("Item")


class World(NamedTuple):
    """Which of ``size`` processes this is; rank 0 writes what the run leaves behind."""

    rank: int = 0
    size: int = 1

    def slice_of(self, n: int) -> slice:
        """Where the process's part of n things lies, which divide evenly."""
        part = n // self.size
        return slice(self.rank * part, (self.rank + 1) * part)


def is_distributed() -> bool:
    """Whether there are other processes to agree with."""
    return dist.is_initialized()


def current_world() -> World:
    return World(dist.get_rank(), dist.get_world_size()) if is_distributed() else World()


class AllReduceMean(torch.autograd.Function):
    """The mean of a tensor over all processes. Its gradient is that of the sum of all processes' losses."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total / dist.get_world_size()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return AllReduceMean.forward(ctx, gradient)


def all_reduce_mean(x: Tensor) -> Tensor:
    """The mean of x over all processes, on the device, and differentiable."""
    return AllReduceMean.apply(x) if is_distributed() else x


def averaging_gradients(module: nn.Module, device: torch.device) -> nn.Module:
    """The module, with gradients that are means over all processes after ``backward``: DistributedDataParallel's."""
    if not is_distributed():
        return module
    return DistributedDataParallel(module, [device] if device.type == "cuda" else None)


def all_reduce_sum(x: Tensor) -> Tensor:
    """The sum of x over all processes, on the device."""
    if is_distributed():
        x = x.clone()
        dist.all_reduce(x)
    return x


def all_reduce_max(*numbers: int) -> tuple[int, ...]:
    """The largest of each number in any process. Waits for the other hosts, not for a device."""
    if not is_distributed():
        return numbers
    largest = torch.tensor(numbers)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return tuple(largest.tolist())


def barrier() -> None:
    all_reduce_max(0)


def all_gather_object(what: str, value: T) -> list[T]:
    """The values of all processes, by rank, in each of them. ``value`` holds tensors of the CPU alone.

    Raises DistError if the others are about to exchange something else than ``what``.
    """
    if not is_distributed():
        return [value]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (what, value))
    names = sorted({name for name, _ in everyone})
    if len(names) > 1:
        raise dist.DistError(f"processes do different things, one {' and another '.join(names)}")
    return [value for _, value in everyone]


def raise_on_all_ranks(what: str, call: Callable[[], T]) -> T:
    """What ``call`` returns; an error of one process is an error of all.

    Raises what ``call`` raises. In the other processes it is a UserError if it was one, or else a RuntimeError.
    """
    try:
        result = call()
    except Exception as error:
        kind = UserError if isinstance(error, UserError) else RuntimeError
        told = kind(str(error) or type(error).__name__)
        all_gather_object(what, told)  # the other processes wait to hear of it
        raise
    for failure in all_gather_object(what, None):
        if failure is not None:
            raise failure
    return result


def broadcast_from_rank0(make: Callable[[], T]) -> T:
    """Call ``make`` in rank 0 and return its result in every process. An error is raised in every process."""
    if not is_distributed():
        return make()
    result = [raise_on_all_ranks("waits for the first", make if dist.get_rank() == 0 else lambda: None)]
    dist.broadcast_object_list(result, src=0, device=torch.device("cpu"))
    return result[0]


def rank0_first(load: Callable[[], T]) -> T:
    """What ``load`` returns in each process: first in rank 0, then in one process of each machine, then in the others.

    The first may download, or write into a cache, what the others then find. An error in one is an error in all.
    """
    if not is_distributed():
        return load()
    first_of_machine = os.environ["LOCAL_RANK"] == "0"
    turn = 0 if dist.get_rank() == 0 else (1 if first_of_machine else 2)
    results = [raise_on_all_ranks("loads", load if now == turn else lambda: None) for now in range(3)]
    return results[turn]


def shard_size(n: int) -> int:
    """How many of n items one process does at most in ``sharded_map``."""
    return math.ceil(n / current_world().size)


def sharded_map(
    items: Sequence[Item],
    work: Callable[[Item], T],
    device: torch.device | str,
    rng: Generator | None = None,
    title: str | None = None,
) -> list[T]:
    """What ``work`` returns for each of the items, such as batches, done by all processes together; all have all of it.

    Item i is done in the process of rank i modulo their number. ``rng``, from which ``work`` may draw, gets a seed for
    each item and one for afterwards: no number depends on who does what. ``device`` is where the tensors are that
    ``work`` returns, alone or in tuples; ``title`` stands at a progress bar. For errors see ``raise_on_all_ranks``.
    """
    rank, size = current_world()
    seeds = [] if rng is None else torch.randint(2**31, (len(items) + 1,), generator=rng, device=rng.device).tolist()

    def do_own() -> list[T]:
        own = []
        for i in tqdm(range(rank, len(items), size), desc=title, unit="batch", leave=False, disable=title is None):
            if rng is not None:
                rng.manual_seed(seeds[i])
            own.append(work(items[i]))
        return own

    what = f"does {len(items)} of {title or work.__qualname__}"
    own = raise_on_all_ranks(what, do_own)
    if rng is not None:
        rng.manual_seed(seeds[-1])
    if size == 1:
        return own
    results: list[Any] = [None] * len(items)
    for other, part in enumerate(all_gather_object(what, tree_to(own, torch.device("cpu")))):
        results[other::size] = tree_to(part, device)
    return results


def gather_state(state: dict[str, Any]) -> dict[str, Any]:
    """In rank 0, its state with what the others have of their own: ``processes``, by rank, and the whole replay buffer.

    Image i of the process of rank r is image i * size + r of the whole, which keeps classes together. Elsewhere the
    state as it is.
    """
    own = {name: state[name] for name in (*PER_PROCESS, "buffer") if name in state}
    rank, size = current_world()
    parts = [None] * size if rank == 0 else None
    dist.gather_object(own, parts, dst=0)
    if parts is None:
        return state
    if "buffer" in state:
        buffers = [part.pop("buffer") for part in parts]
        whole = {name: torch.stack([buffer[name] for buffer in buffers], 1).flatten(0, 1) for name in buffers[0]}
        state = state | {"buffer": whole}
    return state | {"processes": parts}


def shard_state(state: dict[str, Any], world: World) -> dict[str, Any]:
    """The part of a ``gather_state`` state, or of a state that one process saved, for this process.

    If the number of processes has changed, each gets what rank 0 had of its own (``PER_PROCESS``).
    """
    everyone = state.get("processes", [{}])
    state = state | everyone[world.rank if len(everyone) == world.size else 0]
    return state | {"buffer": shard_buffer(state["buffer"], world)} if "buffer" in state else state


def shard_buffer(buffer: dict[str, Tensor], world: World) -> dict[str, Tensor]:
    """A process's part of the state of a whole replay buffer."""
    return {name: whole[world.rank :: world.size] for name, whole in buffer.items()}
