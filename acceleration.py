"""Functions of tensors made fast: compiled, and replayed as CUDA graphs. They compute what they computed before."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def compiles(choice: str, device: torch.device, steps: int) -> bool:
    """Whether to compile what ``steps`` training steps compute: "on", "off", or "auto", in long runs on a GPU.

    Compiling takes one or two minutes; chains are then a seventh to a fifth faster (docs/speed.md).
    """
    return choice == "on" or (choice == "auto" and device.type == "cuda" and steps >= 20_000)


class CompiledOrEager:
    """torch.compile of a function; once that has failed (``works`` is False), the function itself."""

    def __init__(self, function: Callable):
        self.function, self.compiled, self.works = function, torch.compile(function, dynamic=False), True

    def __call__(self, *args: Any) -> Any:
        if self.works:
            try:
                return self.compiled(*args)
            except Exception as error:  # the compiler's exceptions share no public base class
                result = self.function(*args)  # an error of the function itself comes out here
                self.give_up(type(error).__name__)
                return result
        return self.function(*args)

    def give_up(self, reason: str) -> None:
        """From now on calls run the function itself."""
        self.works = False
        warnings.warn(f"torch.compile does not work here ({reason}); running without it", RuntimeWarning, stacklevel=2)


class CUDAGraphStep:
    """A function of tensors (and None) as a CUDA graph: the GPU need not wait for the CPU to start each operation."""

    def __init__(self, function: Callable, *example: Tensor | None):
        self.inputs = [t if t is None else t.clone() for t in example]
        device = next(t.device for t in example if t is not None)  # not always the current one
        stream = torch.cuda.Stream(device)  # capture wants its warm-up on another stream
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(3):
                function(*self.inputs)
        torch.cuda.current_stream(device).wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, stream=stream):
            self.outputs = function(*self.inputs)

    def __call__(self, *inputs: Tensor | None) -> Any:
        for static, new in zip(self.inputs, inputs, strict=True):
            if static is not None:
                static.copy_(new)
        self.graph.replay()
        return self.outputs


class CUDAGraphBackward:
    """CUDA graphs of ``backward(batch, update_statistics)``, which leaves gradients in a model's parameters.

    ``batch`` is a named tuple of tensors, whose shapes never change, and None. Each ``update_statistics`` has a graph.
    Results are detached copies. Capturing changes no buffers or random generators. Python numbers are recorded, too.
    """

    def __init__(self, model: nn.Module):
        self.model, self.graphs = model, {}

    def __call__(self, backward: Callable, batch: tuple, update_statistics: bool = True) -> dict[str, Tensor]:
        if update_statistics not in self.graphs:
            self.graphs[update_statistics] = self.capture(backward, batch, update_statistics)
        results, gradients = self.graphs[update_statistics](*batch)
        for parameter, gradient in zip(self.model.parameters(), gradients, strict=True):
            parameter.grad = gradient  # each graph has its own
        return {name: value.clone() for name, value in results.items()}

    def capture(self, backward: Callable, batch: tuple, update_statistics: bool) -> CUDAGraphStep:
        def with_gradients(*tensors: Tensor | None) -> tuple[dict[str, Tensor], list[Tensor]]:
            results = backward(type(batch)(*tensors), update_statistics)
            detached = {name: value.detach() for name, value in results.items()}
            return detached, [parameter.grad for parameter in self.model.parameters()]

        before = [buffer.clone() for buffer in self.model.buffers()]
        device = next(self.model.parameters()).device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            graph = CUDAGraphStep(with_gradients, *batch)
        for buffer, value in zip(self.model.buffers(), before, strict=True):
            buffer.copy_(value)
        return graph
