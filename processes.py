"""Several processes of one run, a device each, as torchrun starts them: which one this is, and what all agree on.

PyTorch's own process group carries everything: NCCL between GPUs, gloo between CPUs and for what lies on the host.
Where there is one process, nothing is sent and every function gives back what it was given.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Generator, Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from utils import UserError, copy_tree

T, Item, Value = TypeVar("T"), TypeVar("Item"), TypeVar("Value")


class Place(NamedTuple):
    """Which of ``size`` processes this is; rank 0 writes what the run leaves behind."""

    rank: int = 0
    size: int = 1

    def slice_of(self, n: int) -> slice:
        """Where the process's part of n things lies, which divide evenly."""
        part = n // self.size
        return slice(self.rank * part, (self.rank + 1) * part)


store: dist.Store | None = None  # torchrun's, which outlives a process


def launched() -> bool:
    """Whether torchrun, or something like it, started this process as one of several."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1


def restarted() -> bool:
    """Whether torchrun started the program again after a process of it had failed (``--max_restarts``)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def local_rank() -> int:
    """Which process of this machine this is."""
    return int(os.environ.get("LOCAL_RANK", 0)) if launched() else 0


def connect() -> None:
    """Join the other processes that torchrun started, if it did.

    torchrun keeps one store for all its attempts, where processes that start again would find the addresses of those
    that are gone: each attempt has a part of the store to itself. How often as many have joined tells attempts apart
    that differ in nothing else, as when a machine leaves and comes back.
    """
    global store
    if launched() and not dist.is_initialized():
        shared, rank, size = next(dist.rendezvous("env://"))
        attempt = f"{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)} of {size}"
        turn = (shared.add(attempt, 1) - 1) // size
        store = dist.PrefixStore(f"{attempt}, {turn}", shared)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)


def disconnect() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def place() -> Place:
    return Place(dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else Place()


def first_to_say(message: str) -> bool:
    """Whether no other process has come with this message before, so that a terminal shows it once."""
    if store is None:
        return True
    try:
        return store.add(f"said/{message}", 1) == 1
    except RuntimeError:  # the store has gone with torchrun
        return True


@contextmanager
def only_first_prints() -> Iterator[None]:
    """Inside, what all processes but the first print, warnings and progress bars too, goes nowhere."""
    if place().rank == 0:
        yield
    else:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            yield


def lost_connection(error: Exception) -> bool:
    """Whether an exception of torch means that another process has gone."""
    return dist.is_initialized() and (isinstance(error, dist.DistError) or "gloo" in str(error).lower())


# ---------------------------------------------------------------------------------------------- agreement


def mean(x: Tensor) -> Tensor:
    """The mean of x over all processes, on the device, and differentiable: see ``MeanOverProcesses``."""
    return MeanOverProcesses.apply(x) if dist.is_initialized() else x


class MeanOverProcesses(torch.autograd.Function):
    """The mean of a tensor over all processes. Its gradient is that of the sum of all processes' losses."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total / dist.get_world_size()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return MeanOverProcesses.forward(ctx, gradient)


def averaging_gradients(module: nn.Module, device: torch.device) -> nn.Module:
    """The module, with gradients that are means over all processes after ``backward``: DistributedDataParallel's."""
    if not dist.is_initialized():
        return module
    return DistributedDataParallel(module, [device] if device.type == "cuda" else None)


def total(x: Tensor) -> Tensor:
    """The sum of x over all processes, on the device."""
    if dist.is_initialized():
        x = x.clone()
        dist.all_reduce(x)
    return x


def largest(*numbers: int) -> tuple[int, ...]:
    """The largest of each number in any process. Waits for the other hosts, not for a device."""
    if not dist.is_initialized():
        return numbers
    everyone = torch.tensor(numbers)
    dist.all_reduce(everyone, dist.ReduceOp.MAX)
    return tuple(everyone.tolist())


def from_first(make: Callable[[], T]) -> T:
    """What ``make`` returns in the process of rank 0, in all of them, and so with a UserError that it raises."""
    if not dist.is_initialized():
        return make()
    result: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            result[0] = make()
        except UserError as error:
            result[1] = str(error)
    dist.broadcast_object_list(result, src=0, device=torch.device("cpu"))
    if result[1] is not None:
        raise UserError(result[1])
    return result[0]


def gather(value: Value) -> list[Value]:
    """The values of all processes, by rank, in rank 0; elsewhere an empty list. Tensors must be on the CPU."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, values, dst=0)
    return values or []


def divided(
    items: Sequence[Item],
    work: Callable[[Item], T],
    device: torch.device | str,
    rng: Generator | None = None,
    title: str | None = None,
) -> list[T]:
    """What ``work`` returns for each of the items, such as batches, done by all processes together; all have all of it.

    The results are those of one process: what ``work`` draws from ``rng``, which is seeded for each item, depends on
    that item alone.

    Args:
        device: where the tensors are that ``work`` returns, alone or in tuples.
        title: what stands at a progress bar, if there is to be one.

    Raises:
        What ``work`` raises in this process. Where it fails in another one, a UserError if it was one, or else a
        RuntimeError.
    """
    seeds = [] if rng is None else torch.randint(2**31, (len(items) + 1,), generator=rng, device=rng.device).tolist()
    own = range(len(items))[place().rank :: place().size]
    done, failure = [], None
    try:
        for i in tqdm(own, desc=title, unit="batch", leave=False, disable=title is None):
            if rng is not None:
                rng.manual_seed(seeds[i])
            done.append(work(items[i]))
    except Exception as error:
        failure = error  # after the others have heard of it, who wait
    if rng is not None:
        rng.manual_seed(seeds[-1])
    if not dist.is_initialized():
        if failure:
            raise failure
        return done
    everyone: list[Any] = [None] * place().size
    heard = failure and (isinstance(failure, UserError), str(failure) or type(failure).__name__)
    dist.all_gather_object(everyone, (copy_tree(done, torch.device("cpu")), heard))
    if failure:
        raise failure
    for _, heard in everyone:
        if heard:
            raise (UserError if heard[0] else RuntimeError)(heard[1])
    return [copy_tree(everyone[i % len(everyone)][0][i // len(everyone)], device) for i in range(len(items))]


def one_after_another(load: Callable[[], T]) -> T:
    """What ``load`` returns, first in one process of each machine: it may download what the others then find."""
    if not dist.is_initialized():
        return load()
    if local_rank() == 0:
        loaded = load()
    wait_for_all()
    if local_rank() != 0:
        loaded = load()
    return loaded


def wait_for_all() -> None:
    largest(0)
