"""Several processes of one run, a device each: start by torchrun, exchange, shared work. A single one sends nothing."""

import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Generator, Tensor
from tqdm import tqdm

from utils import UserError, tree_to

TIMEOUT = timedelta(hours=2)  # with other processes, of which one may have to decode a large folder of images
EQUAL_RUNS = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")  # how many mpirun or srun says it started
T = TypeVar("T")
is_distributed = dist.is_initialized  # whether there are other processes to agree with
store: dist.Store | None = None  # the part of torchrun's that these processes have to themselves


class World(NamedTuple):
    """Which of ``size`` processes this is; rank 0 writes what the run leaves behind."""

    rank: int = 0
    size: int = 1


def current_world() -> World:
    return World(dist.get_rank(), dist.get_world_size()) if is_distributed() else World()


def connect() -> None:
    """Join the other processes that torchrun started, if it did. Raises UserError if something else started several."""
    global store
    if is_distributed():
        return
    if "RANK" not in os.environ:
        task = "SLURM_PROCID" in os.environ and os.environ.get("ENVIRONMENT") != "BATCH"  # of a job script: one process
        counts = (*EQUAL_RUNS, "SLURM_NTASKS") if task else EQUAL_RUNS
        n = int(next((os.environ[name] for name in counts if os.environ.get(name)), 1))
        if n > 1:
            advice = f"start one run of {n} processes with torchrun --nproc_per_node={n}, or one with srun --ntasks=1"
            raise UserError(f"this is one of {n} equal runs that srun (SLURM) or mpirun started: {advice}")
    elif os.environ.get("WORLD_SIZE", "1") != "1":
        try:
            int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
            whole, rank, size = next(dist.rendezvous("env://"))
        except (KeyError, ValueError) as error:
            raise UserError(f"start several processes with torchrun, which sets what is wrong here: {error}") from None
        store = unused_part(whole, rank, size)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)


def unused_part(whole: dist.Store, rank: int, size: int) -> dist.Store:
    """A part of torchrun's store without addresses of processes that are gone.

    Its count of restarts differs between machines. So each process leaves a ticket, and rank 0 answers the newest one
    of each rank until the process that left it confirms.
    """
    ticket = uuid.uuid4().hex
    if rank > 0:
        whole.set(f"ticket/{rank}", ticket)
        name = whole.get(f"answer/{ticket}").decode()  # waits for it
        whole.set(f"confirmed/{name}/{rank}", "")
        return dist.PrefixStore(name, whole)
    for other in range(1, size):
        while not whole.check([f"confirmed/{ticket}/{other}"]):
            whole.set(f"answer/{whole.get(f'ticket/{other}').decode()}", ticket)
            time.sleep(0.05)
    return dist.PrefixStore(ticket, whole)


def first_to_say(message: str) -> bool:
    """Whether no other process has come with this message before, so that a terminal shows it once."""
    with suppress(RuntimeError):  # the store has gone with torchrun
        return store is None or store.add(f"said/{message}", 1) == 1
    return True


@contextmanager
def only_rank0_prints() -> Iterator[None]:
    """Inside, what all processes but the first print, warnings and progress bars too, goes nowhere."""
    if current_world().rank == 0:
        yield
    else:
        with open(os.devnull, "w", errors="ignore") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            yield


def lost_connection(error: Exception) -> bool:
    """Whether processes cannot go on together, most often because one has gone."""
    return isinstance(error, dist.DistError) or (is_distributed() and "gloo" in str(error).lower())


class AllReduceSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return AllReduceSum.forward(ctx, gradient)


def all_reduce_sum(x: Tensor) -> Tensor:
    """The sum of x over all processes, on the device. Its gradient is that of the sum of all processes' losses."""
    return AllReduceSum.apply(x) if is_distributed() else x


def all_reduce_mean(x: Tensor) -> Tensor:
    """The mean of x over all processes, on the device, and differentiable."""
    return all_reduce_sum(x) / current_world().size


def all_reduce_max(*numbers: int) -> tuple[int, ...]:
    """The largest of each number in any process. Waits for the other hosts, not for a device."""
    largest = torch.tensor(numbers)
    if is_distributed():
        dist.all_reduce(largest, dist.ReduceOp.MAX)
    return tuple(largest.tolist())


def all_gather_object(value: T) -> list[T]:
    """The values of all processes, by rank, whose tensors must be on the CPU."""
    everyone = [value] * current_world().size
    if is_distributed():
        dist.all_gather_object(everyone, value)
    return everyone


def raise_on_all_ranks(call: Callable[[], T]) -> T:
    """What ``call`` returns. Its error is one in all processes, in the others one of the kinds that ``main`` knows."""
    try:
        result = call()
    except Exception as error:
        if not hasattr(error, "is_shared"):  # the others wait to hear of it
            error.is_shared = True
            kind = next((k for k in (UserError, MemoryError) if isinstance(error, k)), RuntimeError)
            all_gather_object(kind(str(error) or type(error).__name__))
        raise
    for failure in filter(None, all_gather_object(None)):
        failure.is_shared = True
        raise failure
    return result


def broadcast_from_rank0(make: Callable[[], T]) -> T:
    """Call ``make`` in rank 0 and return its result in every process. An error is raised in every process."""
    result = [raise_on_all_ranks(make if current_world().rank == 0 else lambda: None)]
    if is_distributed():
        dist.broadcast_object_list(result, src=0, device=torch.device("cpu"))
    return result[0]


def rank0_first(load: Callable[[], T]) -> T:
    """What ``load`` returns: called first in rank 0, then in one process of each machine, then in the others.

    The first may download, or write into a cache, what the others then find. An error in one is an error in all.
    """
    turn = 0 if current_world().rank == 0 else 1 if os.environ["LOCAL_RANK"] == "0" else 2
    return [raise_on_all_ranks(load if now == turn else lambda: None) for now in range(3)][turn]


def sharded_map(
    items: Sequence, work: Callable[[Any], T], device: torch.device | str, rng: Generator | None = None, title: str = ""
) -> list[T]:
    """What ``work`` returns for each of the items, such as batches, done by all processes together; all have all of it.

    ``rng`` gets a seed for each item and one for afterwards: what ``work`` draws does not depend on who does it.
    ``device``: where the tensors are that it returns, alone or in tuples. Errors: see ``raise_on_all_ranks``.
    """
    rank, size = current_world()
    rng = rng or Generator()
    seeds = torch.randint(2**31, (len(items) + 1,), generator=rng, device=rng.device).tolist()

    def do(i: int) -> T:
        rng.manual_seed(seeds[i])
        return work(items[i])

    bar = {"desc": title} if title else {"disable": True}  # disable=False would overrule TQDM_DISABLE
    numbers = tqdm(range(rank, len(items), size), unit="batch", leave=False, **bar)
    own = raise_on_all_ranks(lambda: [do(i) for i in numbers])
    rng.manual_seed(seeds[-1])
    if size == 1:
        return own
    parts = [tree_to(part, device) for part in all_gather_object(tree_to(own, torch.device("cpu")))]
    return [parts[i % size][i // size] for i in range(len(items))]
