"""Compiled gradients: the gradient of a chain's energy as one graph, without the noise."""

import time
import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from jemkit.models.energy import EnergyFn
from jemkit.runtime.microbatch import cuts
from jemkit.runtime.run_dir import RunFolder
from jemkit.sampling.kernels import eager_gradient, slope_at

Backend = Literal["inductor", "aot_eager", "eager"]
CUDA_MODE = "reduce-overhead"  # torch.compile's mode on CUDA: kernels are recorded as CUDA graphs
GRAPHS = 64  # limit on compiled graphs; torch's own limit counts all runs of a process together


class CompiledGradient:
    """The gradient of any energy as one graph without graph breaks; a break is an error.

    The network's weights are inputs of the graph, so an update causes no recompilation; another
    shape, mode or form of the energy does. On CUDA it runs as a CUDA graph. Without a compiler one
    warning is given, and gradients are computed eagerly from then on.
    """

    def __init__(self, backend: Backend = "inductor") -> None:
        self.backend = backend
        self.compilations: list[float] = []  # the seconds of each
        self.given_up = False
        self._graphs = self._reported = 0
        self._unit: Callable[[EnergyFn, Tensor], Tensor] = torch.compile(
            slope_at, fullgraph=True, dynamic=False, backend=self._counted
        )

    def __call__(self, energy: EnergyFn, x: Tensor) -> Tensor:
        if self.given_up or cuts(len(x)):  # a graph is specialised to its batch
            return eager_gradient(energy, x)
        began, before = time.perf_counter(), self._graphs
        try:
            with torch._dynamo.config.patch(trace_autograd_ops=True, recompile_limit=GRAPHS):
                if x.is_cuda:  # the output of a CUDA graph is overwritten by its next replay
                    torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
                # the leaf is made out here: not every torch traces requires_grad_() in a graph
                gradient = self._unit(energy, x.detach().requires_grad_())
                gradient = gradient.clone() if x.is_cuda else gradient
        except Exception as error:
            lacking = lacks_compiler(error)
            if lacking is None:
                raise
            self.given_up = True
            warnings.warn(f"chains run without --compile: {lacking}", stacklevel=2)
            return eager_gradient(energy, x)
        if self._graphs > before:
            self.compilations.append(time.perf_counter() - began)
        return gradient

    @property
    def warm_up(self) -> float:
        """Seconds that compiling took so far."""
        return sum(self.compilations)

    def report(self, folder: RunFolder, watch: Callable[[str, dict[str, Any]], None]) -> None:
        """Compilations since the last call: number of graphs in total, and their seconds."""
        if len(self.compilations) > self._reported:
            self._reported = len(self.compilations)
            what = {"graphs": self._reported, "seconds": round(self.warm_up, 1)}
            folder.event("compiled", **what)
            watch("compiled", what)

    def _counted(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        self._graphs += 1
        if self.backend == "inductor" and any(t.is_cuda for t in inputs):
            return as_cuda_graph(graph, inputs)
        return torch._dynamo.lookup_backend(self.backend)(graph, inputs)


def as_cuda_graph(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
    """Inductor's kernels in `CUDA_MODE`, as a backend of torch.compile."""
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(graph, inputs, config_patches=list_mode_options(CUDA_MODE))


MISSING = {"InvalidCxxCompiler", "TritonMissing", "CppCompileError", "CalledProcessError"}
"""Errors of a machine without a C++ compiler, or on a GPU without Triton or a C compiler."""

NO_C_COMPILER = "Failed to find C compiler"  # Triton's RuntimeError


def lacks_compiler(error: BaseException) -> str | None:
    """What the machine lacks, as a line; None if the energy is at fault."""
    cause: BaseException | None = error
    while cause is not None:
        if type(cause).__name__ in MISSING or NO_C_COMPILER in str(cause):
            return " ".join(str(cause).split()) or type(cause).__name__
        cause = getattr(cause, "inner_exception", None) or cause.__cause__ or cause.__context__
    return None
