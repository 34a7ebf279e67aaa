"""Start and end of the processes that torchrun starts: how they find each other, restarts, one message for all."""

import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from datetime import timedelta

import torch
import torch.distributed as dist

from distributed import current_world, is_distributed
from utils import UserError

TIMEOUT = timedelta(hours=2)  # with other processes, of which one may have to decode a large folder of images
NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")  # what torchrun tells a process

torchrun_store: dist.Store | None = None  # lives as long as torchrun: longer than processes that it starts again
store: dist.Store | None = None  # the part of it that these processes have to themselves


def launched() -> bool:
    """Whether torchrun started this process as one of several. Raises UserError if something else did."""
    if "RANK" not in os.environ:
        n = started_together()
        if n > 1:
            raise UserError(
                f"this is one of {n} equal runs that srun (SLURM) or mpirun started: start one run of {n} processes "
                f"with torchrun --nproc_per_node={n}, or of a single process with srun --ntasks=1"
            )
        return False
    if os.environ.get("WORLD_SIZE", "1") == "1":
        return False
    for name in (*NUMBERS, "MASTER_ADDR"):
        value = os.environ.get(name, "")
        if not value or (name in NUMBERS and not value.isdecimal()):
            raise UserError(f"the environment variable {name} is {value!r}: start several processes with torchrun")
    return True


def started_together() -> int:
    """How many processes mpirun or srun says it started, this one among them."""
    counts = ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"]
    if "SLURM_PROCID" in os.environ and os.environ.get("ENVIRONMENT") != "BATCH":  # a batch script is one process
        counts.append("SLURM_NTASKS")
    given = [os.environ[name] for name in counts if os.environ.get(name, "").isdecimal()]
    return int(given[0]) if given else 1


def connect() -> None:
    """Join the other processes that torchrun started, if it did."""
    global torchrun_store, store
    if dist.is_initialized():
        return
    if launched():
        torchrun_store, rank, size = next(dist.rendezvous("env://"))
        store = unused_part(torchrun_store, rank, size)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    elif "TORCHELASTIC_RUN_ID" in os.environ and torchrun_store is None:  # one process, which it may start again
        with suppress(RuntimeError):  # torchrun has gone and left its variables
            torchrun_store = next(dist.rendezvous("env://", timeout=timedelta(seconds=30)))[0]


def unused_part(whole: dist.Store, rank: int, size: int) -> dist.Store:
    """A part of torchrun's store without addresses of processes that are gone.

    Which attempt this is, torchrun does not say: its count of restarts differs between machines. So each process leaves
    a ticket, and rank 0 answers the newest ticket of each rank until the process that left it confirms.
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


def remember(name: str, value: str) -> None:
    """Keep something for the time after a restart by torchrun (``--max_restarts``)."""
    if torchrun_store is not None:
        torchrun_store.set(f"kept/{name}", value)


def remembered(name: str) -> str | None:
    """What processes that torchrun started before these have kept, if there were any."""
    key = f"kept/{name}"
    return torchrun_store.get(key).decode() if torchrun_store is not None and torchrun_store.check([key]) else None


def disconnect() -> None:
    """Leave the process group. All processes must call this: after an error in only one of them it would wait."""
    if dist.is_initialized():
        dist.destroy_process_group()


def first_to_say(message: str) -> bool:
    """Whether no other process has come with this message before, so that a terminal shows it once."""
    try:
        return store is None or store.add(f"said/{message}", 1) == 1
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
    return is_distributed() and (isinstance(error, dist.DistError) or "gloo" in str(error).lower())
