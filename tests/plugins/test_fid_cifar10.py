"""The known answer of FID: CIFAR-10's training images against its test images.

    JEMKIT_CIFAR10=data python -m pytest -m slow tests/plugins/test_fid_cifar10.py

It takes hours the first time, and needs the extra `fid`.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from jemkit import Context
from jemkit.attacks.base import Threat
from jemkit.errors import ConfigError, DataError
from jemkit.runtime.rng import generator
from jemkit_plugins.datasets import CIFAR10
from jemkit_plugins.generation import fid, statistics
from jemkit_plugins.generation.features import Features, inception, inception_file

CPU = torch.device("cpu")
PUBLISHED = 3.15
"""3.1508 and 3.1517 in two published measurements."""


def split_of(split: str, data: CIFAR10, features: Features) -> statistics.Statistics:
    """The statistics of a split, computed once for each weights file and kept beside the images;
    an interrupted computation continues."""
    folder = data.dir / "fid"
    path = folder / f"cifar10-{split}-{features.card['sha256'][:16]}.safetensors"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        ctx = Context(generator(CPU, 0), Threat("Linf", 0.0), batch_size=100, work=folder / split)
        result = statistics.measured(data.load(split), features, ctx, {"split": split})
        statistics.write(path, result)
    return statistics.read(path)


@pytest.fixture
def all_threads() -> Iterator[None]:
    """Other tests have one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.timeout(6 * 3600)
@pytest.mark.usefixtures("all_threads")
def test_fid_of_training_against_test_images_is_the_published_one() -> None:
    folder = os.environ.get("JEMKIT_CIFAR10")
    if folder is None:
        pytest.skip("JEMKIT_CIFAR10 does not name a folder with CIFAR-10")
    try:
        features = inception(inception_file(None), CPU)
    except (ConfigError, DataError) as error:
        pytest.skip(str(error))
    data = CIFAR10(dir=Path(folder))
    train, test = (split_of(split, data, features) for split in ("train", "test"))
    assert (train.moments.n, test.moments.n) == (50_000, 10_000)
    assert fid.frechet(train.moments, test.moments) == pytest.approx(PUBLISHED, abs=0.01)
