"""Compiled gradients: the same numbers in one graph, compiled once, eager where they cannot be."""

import warnings
from subprocess import CalledProcessError
from typing import Any

import pytest
import torch
from torch import Tensor
from toys import backbone_of, gen, objective_of, updater_of

from jemkit import SGLD, Guard, ModelEnergy, run, train_step
from jemkit.models.distances import L2, LogitDistance
from jemkit.models.networks import WRN, SmallCNN
from jemkit.runtime.modes import eval_mode, frozen, sampling_mode
from jemkit.sampling.compile import (
    CUDA_MODE,
    CompiledGradient,
    as_cuda_graph,
    lacks_compiler,
)
from jemkit.sampling.kernels import eager_gradient, gradient, gradients_by, slope_at
from jemkit.testing import toy_batch, toy_model, toy_task
from jemkit.training.objective_contexts import compiled_chains

TASK = toy_task()
BATCH = toy_batch(TASK)


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("mode", "network"),
    [
        ("batch_stats", SmallCNN(channels=2, norm="batch")),
        ("running_stats", SmallCNN(channels=2, norm="batch")),
        ("released", SmallCNN(channels=2, norm="batch")),
        ("batch_stats", WRN(depth=10, width=1)),
    ],
)
def test_a_compiled_gradient_is_the_eager_one(mode: Any, network: Any) -> None:
    model = toy_model(TASK, network)
    unit = CompiledGradient("aot_eager")
    for y in (None, BATCH.y):
        with sampling_mode(model, mode):
            energy = ModelEnergy(model, y)
            torch.testing.assert_close(unit(energy, BATCH.x), eager_gradient(energy, BATCH.x))
    assert len(unit.compilations) == 2


def test_a_chain_compiles_once_however_long_and_however_the_weights_move() -> None:
    model = toy_model(TASK)
    with gradients_by(unit := CompiledGradient("eager")):
        for _ in range(3):
            with sampling_mode(model, "batch_stats"):
                run(SGLD(), ModelEnergy(model), BATCH.x, gen(), 4)
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(0.01)
    assert len(unit.compilations) == 1


@pytest.mark.parametrize(
    ("backbone", "options"),
    [
        ("jem", {}), ("jempp", {"inner": "ce"}), ("mebm", {"distance": LogitDistance()}),
        ("sadajem", {"distance": L2()}),
    ],
)  # fmt: skip
def test_steps_after_the_first_compile_nothing(backbone: str, options: dict[str, Any]) -> None:
    built = backbone_of(backbone)
    unit = CompiledGradient("eager")
    objective = compiled_chains(objective_of("ebjdat", **options), unit)
    updater = updater_of("sam", built.model)
    counts = []
    for _ in range(3):
        train_step(built, objective, updater, BATCH, gen(), Guard())
        counts.append(len(unit.compilations))
    assert counts[0] == counts[2] > 0
    assert unit.warm_up > 0


def test_a_step_with_compiled_chains_ends_where_an_eager_one_does() -> None:
    ends = []
    for compiled in (False, True):
        built = backbone_of("sadajem")
        objective: Any = objective_of("ebjdat")
        if compiled:
            objective = compiled_chains(objective, CompiledGradient("eager"))
        train_step(built, objective, updater_of("plain", built.model), BATCH, gen(), Guard())
        ends.append([p.detach().clone() for p in built.model.parameters()])
    for ours, theirs in zip(*ends, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_outside_the_block_gradients_are_eager() -> None:
    model = toy_model(TASK).eval()
    with gradients_by(unit := CompiledGradient("eager")):
        pass
    gradient(ModelEnergy(model), BATCH.x)
    assert not unit.compilations


def test_a_break_in_the_graph_is_an_error() -> None:
    model = toy_model(TASK)

    def energy(x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        return model(x).energy

    with eval_mode(model), frozen(model), pytest.raises(torch._dynamo.exc.Unsupported):
        CompiledGradient("eager")(energy, BATCH.x)


def test_without_a_compiler_one_warning_is_given_and_chains_go_on() -> None:
    from torch._inductor.exc import InvalidCxxCompiler

    class Bare(CompiledGradient):
        def _counted(self, graph: Any, inputs: Any) -> Any:
            raise InvalidCxxCompiler

    model = toy_model(TASK).eval()
    unit, energy = Bare(), ModelEnergy(model)
    with pytest.warns(UserWarning, match="chains run without --compile: .*ompiler") as warned:
        first = unit(energy, BATCH.x)
    assert len(warned) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = unit(energy, BATCH.x)
    assert torch.equal(first, second)
    assert torch.equal(first, eager_gradient(energy, BATCH.x))


def test_what_cuda_compiles_by_is_torchs_own_mode_with_graphs() -> None:
    """On a CPU, where there are no CUDA graphs, it computes the same."""
    assert torch._inductor.list_mode_options(CUDA_MODE)["triton.cudagraphs"] is True
    unit = torch.compile(slope_at, fullgraph=True, dynamic=False, backend=as_cuda_graph)
    model = toy_model(TASK)
    with sampling_mode(model, "batch_stats"), torch._dynamo.config.patch(trace_autograd_ops=True):
        energy = ModelEnergy(model)
        result = unit(energy, BATCH.x.detach().requires_grad_())
        torch.testing.assert_close(result, eager_gradient(energy, BATCH.x), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Failed to find C compiler. Please specify via CC environment variable"),
        CalledProcessError(1, ["gcc", "-shared", "launcher.c"]),
    ],
    ids=["none", "without headers"],
)
def test_a_gpu_machine_without_a_c_compiler_is_no_fault_of_the_energy(
    error: Exception,
) -> None:
    wrapped = RuntimeError("backend failed")
    wrapped.__cause__ = error
    assert lacks_compiler(wrapped)
    assert lacks_compiler(RuntimeError("a fault of the energy")) is None
