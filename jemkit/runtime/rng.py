"""Separate random generators, seeded by a seed and words that name their purpose."""

import hashlib

import torch
from torch import Generator


def generator(device: torch.device, *words: object) -> Generator:
    """A generator that no other words give; torch's CPU generator uses 32 bits of a seed."""
    digest = hashlib.sha256(" ".join(map(str, words)).encode()).digest()
    return Generator(device).manual_seed(int.from_bytes(digest[:4], "big"))
