"""Functions of tensors made fast: compiled, and replayed as CUDA graphs. They compute what they computed before."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


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

    def __call__(self, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        for static, new in zip(self.inputs, inputs, strict=True):
            if static is not None:
                static.copy_(new)
        self.graph.replay()
        return self.outputs


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
