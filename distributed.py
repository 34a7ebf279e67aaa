"""Several processes of one run, a device each, as torchrun starts them: which one this is, and what all agree on.

PyTorch's own process group carries everything: NCCL between GPUs, gloo between CPUs and for what lies on the host.
Where there is one process, nothing is sent and every function gives back what it was given.
"""

import math
import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Generator, Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from utils import UserError, tree_to

TIMEOUT = timedelta(hours=2)  # with other processes, of which one may have to decode a large folder of images

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


shared: dist.Store | None = None  # torchrun's, which outlives processes
store: dist.Store | None = None  # the part of it that these processes have to themselves
attempts = 1  # how often torchrun has started the program, this time included


def launched() -> bool:
    """Whether torchrun, or something like it, started this process as one of several.

    Raises UserError if it did not say all that it should.
    """
    if "RANK" not in os.environ or os.environ.get("WORLD_SIZE", "1") == "1":
        return False
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR"):
        value = os.environ.get(name)
        if value is None:
            raise UserError(f"RANK is set as for one of several processes, but {name} is not: start them with torchrun")
        if name != "MASTER_ADDR" and not value.isdecimal():
            raise UserError(f"the environment variable {name} is {value!r}, no number: start processes with torchrun")
    return True


def connect() -> None:
    """Join the other processes that torchrun started, if it did."""
    global shared, store, attempts
    if launched() and not dist.is_initialized():
        shared, rank, size = next(dist.rendezvous("env://"))
        name, attempts = agree_on_attempt(rank, size)
        store = dist.PrefixStore(name, shared)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    elif "TORCHELASTIC_RUN_ID" in os.environ and shared is None:  # one process, which torchrun may start again
        attempts = 1 + int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
        with suppress(RuntimeError):  # torchrun has gone and left its variables
            shared = next(dist.rendezvous("env://", timeout=timedelta(seconds=30)))[0]


def agree_on_attempt(rank: int, size: int) -> tuple[str, int]:
    """A name for this attempt, and the number of attempts so far.

    torchrun keeps one store for all attempts, so it may hold addresses of processes that are gone. Rank 0 chooses a new
    name and sends it to each process until that process confirms it. Questions of processes that are gone stay without
    an answer.
    """
    if rank:
        asked = shared.add(f"question/{rank}", 1)
        name, count = shared.get(f"name/{rank}/{asked}").decode().split()
        shared.set(f"answer/{rank}/{name}", "")
        return name, int(count)
    name, count = uuid.uuid4().hex, shared.add("attempts", 1)
    for other in range(1, size):
        while not shared.check([f"answer/{other}/{name}"]):
            shared.set(f"name/{other}/{shared.add(f'question/{other}', 0)}", f"{name} {count}")
            time.sleep(0.05)
    return name, count


def restarted() -> bool:
    """Whether torchrun started the program again after a process of it had gone (``--max_restarts``)."""
    return attempts > 1


def remember(name: str, value: str) -> None:
    """Keep something for the time after a restart."""
    if shared is not None:
        shared.set(f"kept/{name}", value)


def remembered(name: str) -> str | None:
    """What an earlier attempt has kept, if it has."""
    key = f"kept/{name}"
    return shared.get(key).decode() if shared is not None and shared.check([key]) else None


def disconnect() -> None:
    """Leave the process group. All processes must call this: after an error in only one of them it would wait."""
    if dist.is_initialized():
        dist.destroy_process_group()


def is_distributed() -> bool:
    """Whether there are other processes to agree with."""
    return dist.is_initialized()


def current_world() -> World:
    return World(dist.get_rank(), dist.get_world_size()) if is_distributed() else World()


def first_to_say(message: str) -> bool:
    """Whether no other process has come with this message before, so that a terminal shows it once."""
    if store is None:
        return True
    try:
        return store.add(f"said/{message}", 1) == 1
    except RuntimeError:  # the store has gone with torchrun
        return True


@contextmanager
def only_rank0_prints() -> Iterator[None]:
    """Inside, what all processes but the first print, warnings and progress bars too, goes nowhere."""
    if current_world().rank == 0:
        yield
    else:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            yield


def lost_connection(error: Exception) -> bool:
    """Whether processes cannot go on together, most often because one has gone."""
    return is_distributed() and (isinstance(error, dist.DistError | OutOfStep) or "gloo" in str(error).lower())


# ---------------------------------------------------------------------------------------------- agreement


def all_reduce_mean(x: Tensor) -> Tensor:
    """The mean of x over all processes, on the device, and differentiable: see ``AllReduceMean``."""
    return AllReduceMean.apply(x) if is_distributed() else x


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
    everyone = torch.tensor(numbers)
    dist.all_reduce(everyone, dist.ReduceOp.MAX)
    return tuple(everyone.tolist())


class OutOfStep(RuntimeError):
    """Processes do not do the same any more."""


def all_gather_object(what: str, value: T) -> list[T]:
    """The values of all processes, by rank, in each of them. ``value`` holds tensors of the CPU alone.

    Raises OutOfStep if the others are about to exchange something else than ``what``.
    """
    if not is_distributed():
        return [value]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (what, value))
    names = {name for name, _ in everyone}
    if len(names) > 1:
        raise OutOfStep(f"processes do different things, one {' and another '.join(sorted(names))}")
    return [value for _, value in everyone]


def raise_on_all_ranks(what: str, call: Callable[[], T] | None) -> T | None:
    """What ``call`` returns, or None without one; an error of one process is an error of all.

    Raises what ``call`` raises. In the others it is a UserError if it was one, or else a RuntimeError.
    """
    result, failure = None, None
    try:
        result = call() if call else None
    except Exception as error:
        failure = error  # raised below: first tell the other processes, which are waiting
    heard = failure and (isinstance(failure, UserError), str(failure) or type(failure).__name__)
    messages = all_gather_object(what, heard)
    if failure:
        raise failure
    for message in filter(None, messages):
        raise (UserError if message[0] else RuntimeError)(message[1])
    return result


def broadcast_from_rank0(make: Callable[[], T]) -> T:
    """Call ``make`` in rank 0 and return its result in every process. An error is raised in every process."""
    if not is_distributed():
        return make()
    result = [raise_on_all_ranks("waits for the first", make if dist.get_rank() == 0 else None)]
    dist.broadcast_object_list(result, src=0, device=torch.device("cpu"))
    return result[0]


def gather(value: T) -> list[T]:
    """The values of all processes, by rank, in rank 0; elsewhere an empty list. Tensors must be on the CPU."""
    if not is_distributed():
        return [value]
    values = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, values, dst=0)
    return values or []


def rank0_first(load: Callable[[], T]) -> T:
    """What ``load`` returns in each process: first in rank 0, then in one process of each machine, then in the others.

    The first may download, or write into a cache, what the others then find. An error in one is an error in all.
    """
    if not is_distributed():
        return load()
    turn = 0 if dist.get_rank() == 0 else 1 if os.environ["LOCAL_RANK"] == "0" else 2
    results = [raise_on_all_ranks("loads", load if turn == now else None) for now in range(3)]
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

    The results are those of one process: what ``work`` draws from ``rng``, which is seeded for each item, depends on
    that item alone.

    Args:
        device: where the tensors are that ``work`` returns, alone or in tuples.
        title: what stands at a progress bar, if there is to be one.

    Raises:
        What ``work`` raises; see ``raise_on_all_ranks``.
    """
    seeds = [] if rng is None else torch.randint(2**31, (len(items) + 1,), generator=rng, device=rng.device).tolist()
    own = range(len(items))[current_world().rank :: current_world().size]
    done: list[T] = []

    def do_own() -> None:
        for i in tqdm(own, desc=title, unit="batch", leave=False, disable=title is None):
            if rng is not None:
                rng.manual_seed(seeds[i])
            done.append(work(items[i]))

    what = f"does {len(items)} of {title or work.__qualname__}"
    raise_on_all_ranks(what, do_own)
    if rng is not None:
        rng.manual_seed(seeds[-1])
    if not is_distributed():
        return done
    everyone = all_gather_object(what, tree_to(done, torch.device("cpu")))
    return [tree_to(everyone[i % len(everyone)][i // len(everyone)], device) for i in range(len(items))]


def barrier() -> None:
    all_reduce_max(0)


# ---------------------------------------------------------------------------------------------- a run's state


def gather_state(state: dict[str, Any]) -> dict[str, Any]:
    """In rank 0, its state with what the others have of their own: ``processes``, by rank, and the whole replay buffer.

    Image i of the process of rank r is image i * size + r of the whole, which keeps classes together as one process has
    them. Elsewhere the state as it is.
    """
    parts = gather({name: state[name] for name in (*PER_PROCESS, "buffer") if name in state})
    buffers = [part.pop("buffer") for part in parts if "buffer" in part]
    if buffers:
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
