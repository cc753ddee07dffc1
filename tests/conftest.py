"""How the tests run: one thread, bounded examples, a cache of their own."""

import logging
import os
import tempfile
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "here", deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("ci", settings.get_profile("here"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "here")
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def own_cache() -> Iterator[None]:
    """No test reads or writes the user's cache."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("JEMKIT_CACHE", folder)
        yield


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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(skip)
