"""Where batch norm ties a batch together, activations are recomputed and nothing else changes."""

import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import every_rank
from strategies import seeds, uniform
from torch import Tensor, nn
from toys import UPDATERS, backbone_of, gen, objective_of, toy_recipe, toy_registry, updater_of

from jemkit import Guard, Trainer, train_step
from jemkit.errors import MisfitError, OutOfMemory
from jemkit.models.networks import WRN
from jemkit.models.norms import Norm
from jemkit.runtime import distributed
from jemkit.runtime.microbatch import MicroBatch, recomputes
from jemkit.runtime.modes import SameModes, frozen, frozen_batch_stats
from jemkit.runtime.pytree import same
from jemkit.runtime.run_dir import RunFolder
from jemkit.testing import toy_batch, toy_model, toy_task

TASK = toy_task()
BATCH = toy_batch(TASK, 6, positives=4)
norms = st.sampled_from(["batch", "instance", "group", "none"])


def wide(norm: Norm = "batch", seed: int = 0) -> Any:
    return toy_model(TASK, WRN(depth=10, width=1, norm=norm), seed=seed).train()


def updated(objective: str, updater: str, *, recompute: bool) -> dict[str, Tensor]:
    """A model's state after two steps."""
    backbone = backbone_of("sadajem", network=WRN(depth=10, width=1))
    moved, rng = updater_of(updater, backbone.model), gen(1)
    with MicroBatch(recompute=recompute).active():
        for _ in range(2):
            train_step(backbone, objective_of(objective), moved, BATCH, rng, Guard())
    return backbone.model.state_dict()


@pytest.mark.parametrize("updater", UPDATERS)
@pytest.mark.parametrize("objective", ["ce", "ebjdat"])
def test_steps_are_the_same_bit_for_bit_statistics_among_them(objective: str, updater: str) -> None:
    assert same(*(updated(objective, updater, recompute=recompute) for recompute in (False, True)))


@settings(max_examples=10, deadline=None)
@given(seeds, norms)
def test_gradients_are_the_same_bit_for_bit_however_often_they_are_computed(
    seed: int, norm: Norm
) -> None:
    x, results = uniform(seed, 5, *TASK.shape), []
    for recompute in (False, True):
        model = wide(norm, seed)
        with MicroBatch(recompute=recompute).active():
            total = model(x).energy.square().mean()
        leaves = list(model.parameters())
        slopes = [
            torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True)
            for _ in range(2)
        ]
        results.append([*slopes, list(model.buffers())])
    assert same(*results)


def slopes_by_a_thread(
    norm: Norm, x: Tensor, *, size: int = 0, recompute: bool = True
) -> list[Any]:
    """As on a GPU, where the way back runs in a thread of torch's own."""
    model = wide(norm)
    with MicroBatch(size, recompute=recompute).active(), ThreadPoolExecutor(1) as thread:
        total = model(x).energy.square().mean()
        thread.submit(total.backward).result()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("size", [0, 2])
@pytest.mark.parametrize("norm", ["batch", "instance", "none"])
def test_the_backward_pass_may_run_in_a_thread_of_its_own(norm: Norm, size: int) -> None:
    results = [
        slopes_by_a_thread(norm, BATCH.x, size=size, recompute=recompute)
        for recompute in (False, True)
    ]
    assert same(*results)


def alive(*, recompute: bool) -> int:
    """How many inputs of a block's convolutions a loss's graph keeps."""
    model, references = wide(), []

    def remember(_: nn.Module, given: tuple[Tensor]) -> None:
        references.append(weakref.ref(given[0]))

    for name, module in model.named_modules():
        if name.endswith(("conv1", "conv2")):
            module.register_forward_pre_hook(remember)
    with MicroBatch(recompute=recompute).active():
        total = model(BATCH.x).energy.mean()
    assert len(references) == 6
    count = sum(one() is not None for one in references)
    total.backward()
    return count


def test_no_activation_is_saved_where_memory_is_short() -> None:
    assert alive(recompute=False) == 6
    assert alive(recompute=True) == 0


def test_a_convolution_is_not_repeated() -> None:
    model, passes = wide(), [0]

    def count(*_: Any) -> None:
        passes[0] += 1

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)
    with MicroBatch(recompute=True).active():
        total = model(BATCH.x).energy.mean()
    before = passes[0]
    total.backward()
    assert passes[0] == before


def test_the_second_pass_of_modes_taken_up_again_teaches_nothing() -> None:
    norm = nn.BatchNorm2d(2)
    again = SameModes(norm)
    x = uniform(0, 4, 2, 3, 3)
    first = norm(x)
    learnt = {name: t.clone() for name, t in norm.named_buffers()}
    norm.eval()
    for _ in range(2):
        with again:
            assert torch.equal(norm(x), first)
    assert same(dict(norm.named_buffers()), learnt)
    assert not norm.training
    with frozen_batch_stats(norm):
        quiet = SameModes(norm)
    with quiet:
        assert not norm.track_running_stats


class Hungry(nn.Module):
    """Has no room for its activations, nor, unless `enough`, for half of them."""

    recomputes = True

    def __init__(self, *, enough: bool) -> None:
        super().__init__()
        self.norm, self.enough = nn.BatchNorm2d(1), enough

    def forward(self, x: Tensor) -> Tensor:
        if not (recomputes() and self.enough):
            raise MemoryError("no room")
        return self.norm(x)  # type: ignore[no-any-return]


def test_on_oom_activations_are_recomputed_before_anything_else() -> None:
    network, x, micro, changes = Hungry(enough=True), torch.ones(8, 1, 2, 2), MicroBatch(), []
    features = micro.retry_on_oom(
        lambda: micro.microbatched(network, x, network),
        on_change=lambda **what: changes.append(what),
    )
    assert features.shape == x.shape
    assert (micro.size, micro.recompute) == (0, True)
    assert changes == [{"was": 8, "images": 8, "recompute": True, "reason": "no room"}]
    with frozen(network):  # a chain's pass, in which no weight asks for a gradient
        other = MicroBatch()
        with pytest.raises(OutOfMemory, match="cannot be split"):
            other.retry_on_oom(lambda: other.microbatched(network, x, network))
        assert not other.recompute


def test_memory_for_which_that_is_not_enough_ends_it() -> None:
    network, x, micro = Hungry(enough=False), torch.ones(8, 1, 2, 2), MicroBatch()
    with pytest.raises(OutOfMemory, match="cannot be split"):
        micro.retry_on_oom(lambda: micro.microbatched(network, x, network))
    assert (micro.size, micro.recompute) == (4, True)


class Busy(Hungry):
    """Has no room once, as while another program has it."""

    def __init__(self) -> None:
        super().__init__(enough=True)
        self.tried = 0

    def forward(self, x: Tensor) -> Tensor:
        self.tried += 1
        if self.tried == 1:
            raise MemoryError("no room")
        return self.norm(x)  # type: ignore[no-any-return]


def test_a_pass_that_was_not_too_large_yet_is_halved_before_it_is_given_up() -> None:
    """A GPU then has it wait in the host's memory."""
    network, x, micro = Busy(), torch.ones(8, 1, 2, 2), MicroBatch(16)
    with frozen(network):
        micro.retry_on_oom(lambda: micro.microbatched(network, x, network))
    assert (micro.size, micro.recompute) == (4, False)


def test_a_pass_that_keeps_nothing_is_halved_at_once() -> None:
    network, x, micro = Busy().eval(), torch.ones(8, 1, 2, 2), MicroBatch()
    with torch.no_grad():
        micro.retry_on_oom(lambda: micro.microbatched(network, x, network))
    assert (micro.size, micro.recompute) == (4, False)


def test_a_single_image_has_its_activations_recomputed() -> None:
    network, x, micro = Hungry(enough=True), torch.ones(1, 1, 2, 2), MicroBatch()
    micro.retry_on_oom(lambda: micro.microbatched(network, x, network))
    assert (micro.size, micro.recompute) == (0, True)
    with pytest.raises(OutOfMemory, match="and smaller passes would not help"):
        MicroBatch().retry_on_oom(lambda: network(x))


def test_where_a_step_cannot_be_retried_the_error_says_what_helps() -> None:
    network, x, done = Hungry(enough=True), torch.ones(8, 1, 2, 2), []

    def work(micro: MicroBatch) -> Tensor:
        done.append(1)
        return micro.microbatched(network, x, network)

    for recompute, message in (
        (False, r"--set run\.recompute=true"),
        (True, r"run\.micro_batch=4"),
    ):
        micro = MicroBatch(recompute=recompute)
        network.enough = not recompute
        with pytest.raises(OutOfMemory, match=message):
            micro.retry_on_oom(partial(work, micro), moved=lambda: len(done))


def trainer(path: Path, *overrides: str) -> Trainer:
    resolved = toy_recipe(toy_registry(), "sadajem", "ebjdat", "plain", *overrides)
    return Trainer(resolved, RunFolder.create(path))


def test_a_run_keeps_what_it_learnt_and_a_recipe_can_ask_for_it(tmp_path: Path) -> None:
    wide = ("backbone.network.use=wrn", "backbone.network.depth=10", "backbone.network.width=1")
    first, second = (trainer(tmp_path / name, *wide) for name in "ab")
    first.parts.micro.recompute = True
    assert not second.parts.micro.recompute
    second.parts.load_state_dict(first.parts.state_dict())
    assert second.parts.micro.recompute
    assert trainer(tmp_path / "c", *wide, "run.recompute=true").parts.micro.recompute


def test_a_network_that_cannot_is_refused_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(MisfitError, match=r"run\.recompute: this network"):
        trainer(tmp_path / "a", "run.recompute=true")


def in_processes() -> bool:
    """Whether a step by statistics of all processes is the same with activation checkpointing."""
    states = []
    for recompute in (False, True):
        network = WRN(depth=10, width=1, norm="sync")
        backbone = backbone_of("sadajem", network=network)
        moved = updater_of("sam", backbone.model)
        with MicroBatch(recompute=recompute).active():
            train_step(backbone, objective_of("ebjdat"), moved, BATCH, gen(1), Guard())
        states.append(backbone.model.state_dict())
    return same(*states)


def by_threads_of_processes() -> bool:
    x = uniform(distributed.shard().rank, 4, *TASK.shape)
    with distributed.together():
        return same(
            *(slopes_by_a_thread("sync", x, recompute=recompute) for recompute in (False, True))
        )


@pytest.mark.parametrize("work", [in_processes, by_threads_of_processes])
def test_norms_over_processes_recompute_theirs_too(work: Callable[[], bool]) -> None:
    assert every_rank(work) == [True, True]
