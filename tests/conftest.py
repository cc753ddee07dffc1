"""How the tests run: one thread, bounded examples, a cache of their own."""

import gc
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "here", deadline=None, max_examples=15, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("ci", settings.get_profile("here"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "here")
torch.set_num_threads(1)

# Else both processes, and each that a test starts, compile all files anew.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


@pytest.fixture(scope="session", autouse=True)
def own_cache() -> Iterator[None]:
    """No test reads or writes the user's cache."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("JEMKIT_CACHE", folder)
        yield


@pytest.fixture(scope="session", autouse=True)
def own_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test leaves the link runs/latest to its run in the folder where the tests are started."""
    link, own = Path("runs/latest").absolute(), tmp_path_factory.getbasetemp().resolve()
    yield
    assert not link.resolve().is_relative_to(own), f"a test wrote {link}, to {link.resolve()}"


@pytest.fixture(autouse=True)
def own_log() -> Iterator[None]:
    """No handler that a test, or a fixture of a whole module, adds to the log reaches another."""
    log = logging.getLogger("jemkit")
    log.handlers.clear()
    yield
    log.handlers.clear()


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


FIRST = (
    "plugins/test_indicators", "runtime/test_fsdp_runs", "training/test_distributed_run",
    "attacks/test_autoattack", "config/test_probing", "faults/test_hostile_runs",
    "laws/test_placement", "runtime/test_divergence_monitor", "laws/test_conformance",
    "runtime/test_out_of_memory", "training/test_mixing", "runtime/test_fsdp", "laws/test_counts",
    "laws/test_matrix", "cli/test_study", "config/test_unused", "evaluation/test_report_browser",
    "evaluation/test_distributed_evaluate", "faults/test_kills", "faults/test_disk_full",
)  # fmt: skip
"""The files that take longest: they begin first, so that both processes of `make test` end
together."""


def pytest_configure(config: pytest.Config) -> None:
    config.option.loadscopereorder = False  # else pytest-xdist begins with the most tests


def pytest_collection_finish() -> None:
    """A collection, as after each OOM, need not search what was imported."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    tests = Path(__file__).parent
    ranks = {tests / f"{name}.py": rank for rank, name in enumerate(FIRST)}
    items.sort(key=lambda item: ranks.get(item.path, len(FIRST)))
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(skip)
