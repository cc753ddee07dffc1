"""What the laws range over: seeds, small tensors, labels."""

import math

import torch
from hypothesis import strategies as st
from torch import Tensor

seeds = st.integers(0, 2**31 - 1)
batch_sizes = st.integers(1, 7)
class_counts = st.sampled_from([3, 10, 100])
image_sizes = st.sampled_from([2, 3, 5, 8])
weights = st.floats(0.01, 4.0)
radii_px = st.just(0.0) | st.floats(1, 64)  # between 0 and 1 they are refused as fractions


def normal(
    seed: int, *shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32
) -> Tensor:
    """A tensor that depends on its seed alone."""
    rng = torch.Generator().manual_seed(seed)
    return scale * torch.randn(shape, generator=rng, dtype=dtype)


def uniform(seed: int, *shape: int, low: float = -1.0, high: float = 1.0) -> Tensor:
    rng = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand(shape, generator=rng)


def labels(seed: int, n: int, n_classes: int) -> Tensor:
    return torch.randint(n_classes, (n,), generator=torch.Generator().manual_seed(seed))


def tensors(*shape: int, scale: float = 1.0) -> st.SearchStrategy[Tensor]:
    """Normal tensors of one shape."""
    return seeds.map(lambda seed: normal(seed, *shape, scale=scale))


@st.composite
def logits(draw: st.DrawFn, low: float = 0.1, high: float = 30.0) -> Tensor:
    """Logits [B, K] of sizes between flat and very sure."""
    n, k, seed = draw(batch_sizes), draw(class_counts), draw(seeds)
    scale = math.exp(draw(st.floats(math.log(low), math.log(high))))
    return normal(seed, n, k, scale=scale)


@st.composite
def image_batches(draw: st.DrawFn, low: float = -1.0, high: float = 1.0) -> Tensor:
    """Images [B, C, S, S] in a range."""
    n, size, seed = draw(batch_sizes), draw(image_sizes), draw(seeds)
    return uniform(seed, n, draw(st.sampled_from([1, 3])), size, size, low=low, high=high)
