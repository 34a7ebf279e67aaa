"""The state of a run as nested dicts: its size, and what each of several processes has of its own."""

from typing import Any

import torch
from torch import Tensor

import processes
from processes import Place

OWN = ("rng", "sampler", "meter")  # of a process's state: what is not the same in all of them, besides the buffer


def roomiest(device: torch.device, state: dict[str, Any]) -> torch.device:
    """Where states to go back to are kept: on the device if four of them would fit beside what is there."""
    if device.type != "cuda":
        return device
    free, _ = torch.cuda.mem_get_info(device)
    return device if free > 4 * size_of(state) else torch.device("cpu")


def size_of(tree: Any) -> int:
    """Bytes of all tensors in nested dicts, lists and tuples."""
    match tree:
        case Tensor():
            return tree.nbytes
        case dict():
            return sum(map(size_of, tree.values()))
        case list() | tuple():
            return sum(map(size_of, tree))
    return 0


# ---------------------------------------------------------------------------------------------- several processes


def joined(state: dict[str, Any]) -> dict[str, Any]:
    """In rank 0, its state with what the others have of their own: ``processes``, by rank, and the whole replay buffer.

    Image i of the process of rank r is image i * size + r of the whole, which keeps classes together as one process has
    them. Elsewhere the state as it is.
    """
    parts = processes.gather({name: state[name] for name in (*OWN, "buffer") if name in state})
    buffers = [part.pop("buffer") for part in parts if "buffer" in part]
    if buffers:
        whole = {name: torch.stack([buffer[name] for buffer in buffers], 1).flatten(0, 1) for name in buffers[0]}
        state = state | {"buffer": whole}
    return state | {"processes": parts}


def own_state(state: dict[str, Any], place: Place) -> dict[str, Any]:
    """The part of a ``joined`` state, or of a state that one process saved, for this process.

    If the number of processes has changed, each gets what rank 0 had of its own (``OWN``).
    """
    everyone = state.get("processes", [{}])
    state = state | everyone[place.rank if len(everyone) == place.size else 0]
    return state | {"buffer": own_part(state["buffer"], place)} if "buffer" in state else state


def own_part(buffer: dict[str, Tensor], place: Place) -> dict[str, Tensor]:
    """A process's part of the state of a whole replay buffer."""
    return {name: whole[place.rank :: place.size] for name, whole in buffer.items()}
