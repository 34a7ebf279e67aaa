"""Functions of tensors made fast: compiled, and replayed as CUDA graphs. They compute what they computed before."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def compiles(choice: str, device: torch.device, steps: int) -> bool:
    """Whether to compile what ``steps`` training steps compute: "on", "off", or "auto", where it saves time.

    Compiling takes one or two minutes, and saves a tenth of a long run's time on a GPU.
    """
    return choice == "on" or (choice == "auto" and device.type == "cuda" and steps >= 5000)


class CapturedStep:
    """A function of tensors (and None) as a CUDA graph: no launch gaps, however small the network."""

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


class CapturedGradient:
    """A function of a named tuple that leaves a model's gradients in its parameters, as CUDA graphs.

    There is a graph for each ``variant()``: for the same one and the same shapes the function must do the same. Its
    results come as detached copies. Capturing leaves the model's buffers and the random generators as they were.
    """

    def __init__(self, function: Callable[..., dict[str, Tensor]], model: nn.Module, variant: Callable[[], Any]):
        self.function, self.model, self.variant = function, model, variant
        self.graphs: dict[Any, CapturedStep] = {}

    def __call__(self, inputs: tuple[Tensor | None, ...]) -> dict[str, Tensor]:
        variant = self.variant()
        if variant not in self.graphs:
            self.graphs[variant] = self.capture(inputs)
        results, gradients = self.graphs[variant](*inputs)
        for parameter, gradient in zip(self.model.parameters(), gradients, strict=True):
            parameter.grad = gradient  # each graph has its own
        return {name: value.clone() for name, value in results.items()}

    def capture(self, inputs: tuple[Tensor | None, ...]) -> CapturedStep:
        def with_gradients(*tensors):
            results = {name: value.detach() for name, value in self.function(type(inputs)(*tensors)).items()}
            return results, [parameter.grad for parameter in self.model.parameters()]

        buffers = list(self.model.buffers())
        before = [buffer.clone() for buffer in buffers]
        device = next(self.model.parameters()).device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            graph = CapturedStep(with_gradients, *inputs)
        for buffer, value in zip(buffers, before, strict=True):
            buffer.copy_(value)
        return graph


class CompiledOrEager:
    """torch.compile of a function; without a working compiler, one warning and the function itself."""

    def __init__(self, function: Callable):
        self.function = function
        self.compiled = torch.compile(function, dynamic=False)
        self.proven = False

    @property
    def works(self) -> bool:
        """Whether calls run compiled."""
        return self.compiled is not self.function

    def give_up(self) -> None:
        """From now on the function itself runs."""
        self.compiled = self.function

    def __call__(self, *args):
        if self.proven:
            return self.compiled(*args)
        return self.prove(lambda call: call(*args))

    def prove(self, trial: Callable[[Callable], Any]) -> Any:
        """Run ``trial`` on the compiled function, a call and whatever else must work, and on the function if not."""
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
