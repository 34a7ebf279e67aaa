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


class CUDAGraphStep:
    """A function of tensors (and None) as a CUDA graph, which starts all its operations on the GPU at once.

    Without a graph the CPU starts each operation; with a small network the GPU waits for it.
    """

    def __init__(self, function: Callable, *example: Tensor | None):
        self.inputs = [t if t is None else t.clone() for t in example]
        stream = torch.cuda.Stream()  # capture wants its warm-up on another stream
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                function(*self.inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.outputs = function(*self.inputs)

    def __call__(self, *inputs: Tensor | None) -> Any:
        for static, new in zip(self.inputs, inputs, strict=True):
            if static is not None:
                static.copy_(new)
        self.graph.replay()
        return self.outputs


class CUDAGraphBackward:
    """CUDA graphs of a function of a named tuple that leaves gradients in a model's parameters.

    There is one graph for each pair of ``variant`` and shapes of the inputs, and with the same pair the function must
    run the same operations. Its results come as detached copies. Capturing leaves the model's buffers and the random
    generators as they were.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.graphs: dict[tuple, CUDAGraphStep] = {}

    def __call__(
        self, function: Callable[..., dict[str, Tensor]], inputs: tuple[Tensor | None, ...], variant: Any
    ) -> dict[str, Tensor]:
        key = (variant, *(tensor if tensor is None else tensor.shape for tensor in inputs))
        if key not in self.graphs:
            self.graphs[key] = self.capture(function, inputs)
        results, gradients = self.graphs[key](*inputs)
        for parameter, gradient in zip(self.model.parameters(), gradients, strict=True):
            parameter.grad = gradient  # each graph has its own
        return {name: value.clone() for name, value in results.items()}

    def capture(self, function: Callable[..., dict[str, Tensor]], inputs: tuple[Tensor | None, ...]) -> CUDAGraphStep:
        def with_gradients(*tensors):
            results = {name: value.detach() for name, value in function(type(inputs)(*tensors)).items()}
            return results, [parameter.grad for parameter in self.model.parameters()]

        buffers = list(self.model.buffers())
        before = [buffer.clone() for buffer in buffers]
        device = next(self.model.parameters()).device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            graph = CUDAGraphStep(with_gradients, *inputs)
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)
        return graph


class CompiledOrEager:
    """torch.compile of a function; without a working compiler, one warning and ``fallback``, or the function itself."""

    def __init__(self, function: Callable, fallback: Callable | None = None):
        self.fallback = fallback or function
        self.compiled = torch.compile(function, dynamic=False)
        self.proven = False

    @property
    def works(self) -> bool:
        """Whether calls run compiled."""
        return self.compiled is not self.fallback

    def give_up(self) -> None:
        """From now on the fallback runs."""
        self.compiled = self.fallback

    def __call__(self, *args):
        if self.proven:
            return self.compiled(*args)
        return self.prove(lambda call: call(*args))

    def prove(self, trial: Callable[[Callable], Any]) -> Any:
        """Call ``trial`` with this object; if that fails, use the fallback from now on and call ``trial`` again."""
        self.proven = True
        try:
            return trial(self)
        except Exception as error:  # the compiler's exceptions share no public base class
            self.give_up()
            result = trial(self)  # an error of the function itself comes out here
            warnings.warn(
                f"torch.compile does not work here ({type(error).__name__}); running without it",
                RuntimeWarning,
                stacklevel=2,
            )
            return result
